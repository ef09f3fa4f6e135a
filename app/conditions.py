"""What a chunk must satisfy to be searched, listed or removed: the tenant's predicate and the filters beside it (pure)."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, ColumnElement, DateTime, Table, Text, bindparam, func

from app import filters
from app.filters import Filter
from app.tables import tenant_document_terms, tenant_documents, tenant_sources


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a chunk must satisfy besides belonging to the tenant. None: no such condition; `doc_types` () : nothing fits."""

    doc_types: tuple[str, ...] | None = None
    metadata: Filter | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    @property
    def shape(self) -> Hashable:
        """Equal for conditions whose clauses are the same SQL; values are not part of it."""
        return (
            self.doc_types is not None,
            self.created_after is not None,
            self.created_before is not None,
            None if self.metadata is None else filters.shape(self.metadata),
        )


def where(conditions: Conditions, table: Any = tenant_documents) -> list[ColumnElement[bool]]:
    """The tenant's predicate and the conditions, with every value a named parameter."""
    clauses: list[ColumnElement[bool]] = [table.c.tenant_id == bindparam("tenant_id", type_=Text)]
    if conditions.doc_types is not None:
        clauses.append(table.c.doc_type == func.any(bindparam("doc_types", type_=ARRAY(Text))))
    if conditions.created_after is not None:
        clauses.append(table.c.created_at >= bindparam("created_after", type_=DateTime(timezone=True)))
    if conditions.created_before is not None:
        clauses.append(table.c.created_at < bindparam("created_before", type_=DateTime(timezone=True)))
    if conditions.metadata is not None:
        clauses.append(filters.clause(conditions.metadata, table.c.metadata))
    return clauses


def where_values(tenant_id: str, conditions: Conditions) -> dict[str, Any]:
    """The values of `where`."""
    given = {
        "doc_types": None if conditions.doc_types is None else list(conditions.doc_types),
        "created_after": conditions.created_after,
        "created_before": conditions.created_before,
    }
    values = {"tenant_id": tenant_id} | {name: value for name, value in given.items() if value is not None}
    return values | (filters.values(conditions.metadata) if conditions.metadata is not None else {})


class Relations(NamedTuple):
    """What a search reads, and how its conditions are written.

    The service reads the tenant views. The functions for analysts (`app/analysts.py`) read the tables, whose row-level
    security decides what they see. Under a policy PostgreSQL does not ask an index about words: there `chunk_passes` says of
    a row of `terms` whether its chunk satisfies the conditions.
    """

    documents: Table
    sources: Table
    terms: Table
    question: str  # the function that knows a question's words
    where: Callable[[Conditions], list[ColumnElement[bool]]]
    chunk_passes: Callable[[Conditions], list[ColumnElement[bool]]] | None = None

    @property
    def word_index(self) -> bool:
        """Whether words are found by their index."""
        return self.chunk_passes is None


VIEWS = Relations(tenant_documents, tenant_sources, tenant_document_terms, "text_question", where)
"""What the service reads."""
