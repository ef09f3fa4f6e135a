"""What became of each document of a put: stored and how, or the fault it was left out for."""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, NamedTuple

from app.batching import named
from app.drafts import Draft
from app.errors import BadInput, EmbeddingFailed, PgrecallError


class Outcome(NamedTuple):
    """What a put did. `embedded` chunks are new rows, `reused` kept theirs, `removed` are gone.

    `state` pending: the text is stored, and a worker will do the rest.
    """

    id: str
    status: Literal["created", "updated", "unchanged"]
    version: int
    updated_at: datetime
    embedded: int = 0
    reused: int = 0
    removed: int = 0
    state: Literal["ready", "pending"] = "ready"


class Fault(NamedTuple):
    """Why a document was not stored. `field` is the part of it that `reason` is about, empty for none.

    `lasting`: the same document will fail the same way again, as one that is over a limit, or has a text the model
    refuses. Otherwise something came in the way, which `error` says: a server that is away, a budget that is spent.
    """

    id: str
    field: str
    reason: str
    lasting: bool
    error: PgrecallError

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}" if self.field else self.reason


def fault_of(draft: Draft, error: PgrecallError) -> Fault:
    """What `error` says about this document."""
    if isinstance(error, BadInput):
        return Fault(draft.id, error.field, error.fault, lasting=True, error=error)
    lasting = isinstance(error, EmbeddingFailed) and error.index is not None
    return Fault(draft.id, "content" if lasting else "", str(error), lasting=lasting, error=error)


def together(faults: Mapping[int, PgrecallError], count: int) -> PgrecallError:
    """One error for a call of `count` documents that all or none were to be stored by."""
    refused = {
        index: str(fault)
        for index, fault in sorted(faults.items())
        if isinstance(fault, EmbeddingFailed) and fault.index is not None
    }
    if refused:
        return EmbeddingFailed(named(refused, count, "documents[{}].content"), faults=refused)
    return next(iter(faults.values()))
