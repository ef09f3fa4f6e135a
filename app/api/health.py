"""Whether the process lives and whether it can serve; neither asks a remote model."""

from typing import Literal

from litestar import get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from msgspec import Struct

from app.api import operations, problems
from app.api.service import Service


class Live(Struct):
    """The process answers."""

    status: Literal["live"] = "live"


class Replica(Struct):
    """The server searches read from.

    `state`: `serving`, or why searches read from the primary: `behind` by more than PGRECALL_REPLICA_LAG, `unreachable`,
    or `unfit` (the log says why). `lag` is how many seconds it is behind at most, null where that is not known.
    """

    state: Literal["serving", "behind", "unreachable", "unfit"]
    lag: float | None


class Ready(Struct):
    """Database, schema and embedding model fit this release and its settings. `replica` is null where there is none."""

    revision: str
    embedding_model: str
    embedding_dimensions: int
    replica: Replica | None = None
    status: Literal["ready"] = "ready"


@get(
    "/health/live",
    operation_id="live",
    summary="Is the process alive?",
    tags=["health"],
    operation_class=operations.Described,
    responses=problems.documented(always=problems.BARE)
    | {200: ResponseSpec(Live, description="Alive", examples=[Example("alive", value=Live())])},
)
async def live() -> Live:
    """200 as long as the process can answer at all."""
    return Live()


@get(
    "/health/ready",
    operation_id="ready",
    summary="Can it serve?",
    tags=["health"],
    operation_class=operations.Described,
    responses=problems.documented(always=problems.ANY)
    | {
        200: ResponseSpec(
            Ready, description="Ready", examples=[Example("ready", value=Ready("0010", "all-MiniLM-L6-v2-int8", 384))]
        )
    },
)
async def ready(service: NamedDependency[Service]) -> Ready:
    """200 when the database is reachable, its schema new enough and its embedding model the configured one; else 503."""
    readiness = await service.check()
    standing = readiness.replica
    return Ready(
        readiness.revision,
        readiness.model.name,
        readiness.model.dimensions,
        None if standing is None else Replica(standing.state, standing.lag),
    )
