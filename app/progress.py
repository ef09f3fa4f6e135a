"""What a migration logs: a record for each step it has made, and one for what stopped it."""

import logging
import re
import time
from collections import Counter
from typing import Any

import psycopg
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError

log = logging.getLogger(__name__)

_COMMENTS = re.compile(r"\s*(?:--[^\n]*\n\s*)*")
_SESSION = frozenset({"set", "select", "show", "begin", "commit"})
"""Statements that change nothing of the schema."""
_OF_TWO_WORDS = re.compile(
    r"(create|alter|drop)(?: or replace)?(?: unique)? (\w+(?: concurrently)?)|\w+", re.IGNORECASE
)


def kind(statement: str) -> str | None:
    """What a statement does, such as `create table` or `comment`; None where it changes nothing of the schema."""
    found = _OF_TWO_WORDS.match(statement, _COMMENTS.match(statement).end())  # type: ignore[union-attr]  # matches nothing, too
    if found is None:
        return None
    name = (f"{found[1]} {found[2]}" if found[1] else found[0]).lower()
    return None if name in _SESSION else name


class Steps:
    """Counts the statements of one connection and says at each step what was done and how long it took."""

    def __init__(self, connection: Connection, revision: str | None, *, quiet: bool) -> None:
        """`revision`: where the database is. `quiet`: log the steps at debug, for a database that is made by the way."""
        self._reached = revision or "base"
        self._level = logging.DEBUG if quiet else logging.INFO
        self._began = time.monotonic()
        self._kinds: Counter[str] = Counter()
        event.listen(connection, "before_cursor_execute", self._count)

    def _count(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if (found := kind(statement)) is not None:
            self._kinds[found] += 1

    def _took(self) -> dict[str, Any]:
        took = {"seconds": round(time.monotonic() - self._began, 3), "statements": dict(sorted(self._kinds.items()))}
        self._began = time.monotonic()
        self._kinds.clear()
        return took

    def applied(self, *, step: Any, **_: Any) -> None:
        """Alembic's on_version_apply: `step` is done, and committed next."""
        down = step.down_revision_ids[0] if step.down_revision_ids else "base"
        start, self._reached = self._reached, step.up_revision_id if step.is_upgrade else down
        facts = {"revision": self._reached, "from": start, "direction": "upgrade" if step.is_upgrade else "downgrade"}
        log.log(self._level, "migrated", extra={"facts": facts | self._took()})

    def stopped(self, error: Exception) -> None:
        """`error` ended the step after the revision that is logged."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        said = cause.diag.message_primary if isinstance(cause, psycopg.Error) else None
        state = {"sqlstate": cause.sqlstate} if isinstance(cause, psycopg.Error) and cause.sqlstate else {}
        facts = {"revision": self._reached} | self._took() | {"error": said or type(error).__name__} | state
        log.error("migration stopped", extra={"facts": facts})
