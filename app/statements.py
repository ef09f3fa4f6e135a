"""Statements apart from being run: built by SQLAlchemy, rendered once, completed with values."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import ClauseElement
from sqlalchemy.dialects import postgresql

_dialect = postgresql.psycopg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy does not type its dialects


class Statement(NamedTuple):
    """SQL text with its values, apart from being run."""

    name: str
    sql: str
    values: Mapping[str, Any]


class Rendered(NamedTuple):
    """SQL text as psycopg takes it, `%(name)s` for every value, and the values that were fixed when it was built."""

    sql: str
    constants: Mapping[str, Any]

    def with_values(self, name: str, values: Mapping[str, Any]) -> Statement:
        """Ready to be run."""
        return Statement(name, self.sql, {**self.constants, **values})


def rendered(statement: ClauseElement) -> Rendered:
    """The text of a SQLAlchemy statement; worth keeping, because making it takes longer than most searches."""
    compiled = statement.compile(dialect=_dialect)
    return Rendered(str(compiled), {name: value for name, value in compiled.params.items() if value is not None})
