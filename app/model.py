"""Which embedding model, and so which vector space, this database holds."""

from typing import NamedTuple

from sqlalchemy import select

from app.database import Database
from app.embedding import Embedder
from app.errors import ModelMismatch
from app.settings import LOCAL_MODEL
from app.statements import rendered
from app.tables import embedding_models

ACTIVE = rendered(
    select(embedding_models.c.name, embedding_models.c.dimensions).where(embedding_models.c.state == "active")
)
"""The model whose vectors are searched."""


class Model(NamedTuple):
    """A space: vectors of another model of the same length are still of another space."""

    name: str
    dimensions: int


async def recorded(database: Database, *, replica: bool = False) -> Model:
    """The model this database's vectors are of."""
    (row,) = await database.fetch_public(ACTIVE.with_values("active model", {}), replica=replica)
    return Model(**row)


def check(recorded_model: Model, configured: Embedder) -> None:
    """Raise ModelMismatch, saying what to run, unless the database holds what is configured."""
    if (configured.model, configured.dimensions) != recorded_model:
        use = (
            "PGRECALL_EMBEDDER=local"
            if recorded_model.name == LOCAL_MODEL
            else f"OPENAI_API_KEY or OPENAI_BASE_URL, PGRECALL_EMBEDDING_MODEL={recorded_model.name} and "
            f"PGRECALL_EMBEDDING_DIMENSIONS={recorded_model.dimensions}"
        )
        raise ModelMismatch(
            f"this database holds vectors of {recorded_model.name} with {recorded_model.dimensions} dimensions, but "
            f"{configured.model} with {configured.dimensions} is configured. Either use the model it holds: set {use}. Or "
            "make another database for the configured one: set DATABASE_URL or PGRECALL_DATA_DIR to it and run "
            "`pgrecall migrate`; a database that is still empty can be made anew with `alembic downgrade base` first"
        )
