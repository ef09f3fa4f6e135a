"""Whether the process lives and whether it can serve; neither asks a remote model."""

from typing import Literal

from litestar import get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from msgspec import Struct

from app.api import problems
from app.api.service import Service


class Live(Struct):
    """The process answers."""

    status: Literal["live"] = "live"


class Ready(Struct):
    """Database, schema and embedding model fit this release and its settings."""

    revision: str
    embedding_model: str
    embedding_dimensions: int
    status: Literal["ready"] = "ready"


@get(
    "/health/live",
    operation_id="live",
    summary="Is the process alive?",
    tags=["health"],
    responses={200: ResponseSpec(Live, description="Alive", examples=[Example("alive", value=Live())])},
)
async def live() -> Live:
    """200 as long as the process can answer at all."""
    return Live()


@get(
    "/health/ready",
    operation_id="ready",
    summary="Can it serve?",
    tags=["health"],
    responses=problems.DOCUMENTED
    | {
        200: ResponseSpec(
            Ready, description="Ready", examples=[Example("ready", value=Ready("0002", "all-MiniLM-L6-v2-int8", 384))]
        )
    },
)
async def ready(service: NamedDependency[Service]) -> Ready:
    """200 when the database is reachable, its schema new enough and its embedding model the configured one; else 503."""
    readiness = await service.check()
    return Ready(readiness.revision, readiness.model.name, readiness.model.dimensions)
