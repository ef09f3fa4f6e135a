"""The functions for analysts: the searches of the API as SQL, rendered from the same builder.

`search_chunks` in analysts.sql does in the database what `search` does in Python: it chooses the scan by how many rows
pass, walks the index and completes what comes back short. The statements it runs are those of `scans` and `fusion` over
the tables rather than the tenant views, so that row-level security decides what an analyst sees. `search_statement` has
them as text in which braces stand for what only a call knows: the kind of index that is active, the length of the
vectors, the conditions.

A migration holds what `statements` gave when it was written. Where it comes to give something else, a test demands a new
revision, whose SQL `python -m app.analysts` prints (docs/decisions.md says why).
"""

import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Integer, Select, Text, bindparam, exists, func, literal_column, select
from sqlalchemy.sql import ClauseElement

from app import drafts, fusion, layout, scans, tenants, text
from app.conditions import Conditions, Relations, where
from app.filters import Filter
from app.fusion import Mixed
from app.scans import Wanted
from app.settings import Settings
from app.statements import rendered
from app.tables import BUCKETS, document_terms, documents, sources

PARAMETERS = (
    "tenant_id",
    "embedding",
    "top_k",
    "bound",
    "candidates",
    "threshold",
    "doc_types",
    "created_after",
    "created_before",
    "question",
    "text_k",
    "vector_weight",
    "text_weight",
    "leg_k",
)
"""The values of every statement, in the order in which `search_chunks` hands them over: $1, $2, …"""

MOST = 1_000
"""The most rows a search in SQL gives. The API's most, `search.MAX_TOP_K`, is for answers over HTTP."""

_LENGTH = 31_999
"""Stands for the length of the vectors while a statement is rendered; pgvector stores at most 16,000 dimensions."""

_SOURCE = Path(__file__).with_name("analysts.sql")


def _spliced(_: Conditions) -> list[ColumnElement[bool]]:
    tenant = documents.c.tenant_id == bindparam("tenant_id", type_=Text)
    return [tenant, literal_column("{conditions}")]


def _placed(_: Conditions) -> list[ColumnElement[bool]]:
    return [literal_column("{passing}")]


TABLES = Relations(documents, sources, document_terms, "text_question_read", _spliced, _placed)
"""What analysts read."""

_ANY = Conditions(metadata=Filter((), {}))


class Fragment(NamedTuple):
    """A statement, or a part of one, with braces for what a call fills in."""

    name: str
    sql: str


def fragments() -> Iterator[Fragment]:
    """All that `search_chunks` puts together."""
    for grouped in (False, True):
        # Of the three kinds of index this is the one whose order no other part of a statement repeats.
        wanted = Wanted(_LENGTH, "binary", thresholded=True, grouped=grouped)
        among = " grouped" if grouped else ""
        yield _fragment(f"few{among}", scans.build("few", Conditions(), wanted, TABLES))
        yield _fragment(f"few metadata{among}", scans.build("few", _ANY, wanted, TABLES))
        for strategy in ("nearest", "exact"):
            yield _fragment(f"{strategy}{among}", scans.build(strategy, _ANY, wanted, TABLES))
            for method in ("relative", "rrf"):
                mixed = Mixed(wanted, strategy, method)
                yield _fragment(f"{method} {strategy}{among}", fusion.build(_ANY, mixed, TABLES))
        words = Mixed(wanted._replace(thresholded=False), None, similarity=False)
        yield _fragment(f"text{among}", fusion.build(_ANY, words, TABLES))
    passing: Select[Any] = select(literal_column("1").label("one")).select_from(documents).where(*_spliced(_ANY))
    counted = passing.limit(bindparam("bound", type_=Integer)).subquery("counted")
    yield _fragment("count", select(func.count()).select_from(counted))
    chunk = documents.c.id == literal_column("document_terms.id", Text)
    chunk &= documents.c.chunk_key == literal_column("document_terms.chunk_key", Text)
    held: Select[Any] = select(literal_column("1")).select_from(documents).where(chunk, *_spliced(_ANY))
    yield _fragment("passing", exists(held))
    yield Fragment("score", str(text.score()))
    for kind in ("full", "half", "binary"):
        yield Fragment(f"order {kind}", _text(scans.by_index(Wanted(_LENGTH, kind), TABLES)))
    moment = datetime(2000, 1, 1, tzinfo=UTC)
    for name, conditions in (
        ("doc_types", Conditions(doc_types=())),
        ("created_after", Conditions(created_after=moment)),
        ("created_before", Conditions(created_before=moment)),
    ):
        yield _fragment(name, where(conditions, documents)[1])


def _fragment(name: str, statement: ClauseElement) -> Fragment:
    sql = _text(statement).replace(str(text.score()), "{score}")
    return Fragment(name, sql.replace(_text(scans.by_index(Wanted(_LENGTH, "binary"), TABLES)), "{order}"))


def _text(statement: ClauseElement) -> str:
    """The statement with its parameters numbered and what is constant in it written out."""
    sql, constants = rendered(statement)

    def written(found: re.Match[str]) -> str:
        name = found[1]
        if name in PARAMETERS:
            return f"${PARAMETERS.index(name) + 1}"
        value = constants[name]
        return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)

    sql = re.sub(r"%\((\w+)\)s", written, sql).replace("%%", "%")
    return sql.replace(str(_LENGTH), "{dimensions}")


def statements() -> list[str]:
    """What makes the functions, in an order in which each finds what it calls. May be run again."""
    cases = "".join(f"\n    when '{name}' then $statement${sql}$statement$" for name, sql in fragments())
    values: dict[str, Any] = {
        "FRAGMENTS": cases,
        "MOST": MOST,
        "EF_SEARCH": Settings().ef_search,
        "MAX_EF_SEARCH": scans.MAX_EF_SEARCH,
        "BUCKETS": BUCKETS,
        "LEG": fusion.LEG,
        "TELLING": scans.TELLING,
        "REPETITIVE": scans.REPETITIVE,
        "VISIT": layout.VISIT,
        "LEAST_ROWS": layout.LEAST,
        "MOST_ROWS": layout.MOST,
        "TENANT": tenants.PATTERN,
        "ID_BYTES": drafts.MAX_ID_BYTES,
        "QUERY_BYTES": drafts.MAX_QUERY_BYTES,
        "SEEN": drafts.SEEN,
        "TYPES": drafts.MAX_DOC_TYPES,
        "EARLIEST": drafts.EARLIEST.isoformat(),
        "LATEST": drafts.LATEST.isoformat(),
        "YEARS": drafts.YEARS,
        "SHORTEST": drafts.SHORTEST,
        "LONGEST": drafts.LONGEST,
    }
    filled = re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), _SOURCE.read_text())
    several = [each.strip() for each in filled.split("\n-- ;;\n")]
    return [each for each in several if each]


if __name__ == "__main__":
    sys.stdout.write("\n-- ;;\n".join(statements()) + "\n")
