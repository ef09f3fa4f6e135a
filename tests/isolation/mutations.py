"""The predicates on the tenant in the statements the application sends, and what takes them out one at a time.

Nothing of the code is changed: the text of a statement is, on its way to the driver. So no predicate can be forgotten.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psycopg
import pytest

from app import roundtrip

PREDICATE = re.compile(
    r"(?<![\w.])(?:[\w\"]+\.)*tenant_id\s*=\s*(?:cast\()?%\((?:\w*tenant\w*)\)s(?:\s+as\s+text\))?(?:::\w+)?(?:\s+collate\s+\"\w+\")?",
    re.IGNORECASE,
)


class Mutant(NamedTuple):
    """A statement's text, and which of its predicates is taken out."""

    text: str
    place: int

    @property
    def mutated(self) -> str:
        found = list(PREDICATE.finditer(self.text))[self.place]
        return f"{self.text[: found.start()]}true{self.text[found.end() :]}"


def of(text: str) -> list[Mutant]:
    """Each predicate of a statement taken out."""
    return [Mutant(text, place) for place, _ in enumerate(PREDICATE.finditer(text))]


@contextlib.contextmanager
def rewritten(rewrite: Callable[[str], str]) -> Iterator[None]:
    """Every statement passes through `rewrite` before it is sent."""
    numbered = roundtrip._numbered
    served, plain = psycopg.AsyncCursor.execute, psycopg.Cursor.execute

    def passed(query):  # type: ignore[no-untyped-def]
        text = query.decode() if isinstance(query, bytes) else query
        return rewrite(text) if isinstance(text, str) else query

    async def executed(self, query, params=None, **options):  # type: ignore[no-untyped-def]
        return await served(self, passed(query), params, **options)

    def executed_plainly(self, query, params=None, **options):  # type: ignore[no-untyped-def]
        return plain(self, passed(query), params, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roundtrip, "_numbered", lambda text: numbered(rewrite(text)))
        patch.setattr(psycopg.AsyncCursor, "execute", executed)
        patch.setattr(psycopg.Cursor, "execute", executed_plainly)
        yield
