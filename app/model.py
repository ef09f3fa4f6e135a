"""Which embedding models, and so which vector spaces, this database holds. `embedding_models` has a row for each."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sqlalchemy import Text, cast, literal, select

from app.database import Database
from app.embedding import Embedder
from app.errors import ModelMismatch
from app.settings import LOCAL_MODEL
from app.statements import rendered
from app.tables import embedding_models

State = Literal["active", "filling", "retired", "dropped"]
Provider = Literal["local", "openai"]


class Model(NamedTuple):
    """A space: vectors of another model of the same length are still of another space."""

    name: str
    dimensions: int

    @property
    def tag(self) -> str:
        """What SPACE gives for it."""
        return f"{self.dimensions} {self.name}"


class Recorded(NamedTuple):
    """A row of `embedding_models`. `provider` None: the one that is configured."""

    name: str
    dimensions: int
    state: State
    provider: Provider | None
    base_url: str | None

    @property
    def model(self) -> Model:
        """Its space."""
        return Model(self.name, self.dimensions)

    @property
    def where(self) -> "Recorded":
        """Its space and who computes it, whatever its state."""
        return self._replace(state="active")


_columns = [embedding_models.c[name] for name in Recorded._fields]

RECORDED = select(*_columns)
"""Every model this database has, or has had, vectors of."""

KEPT = select(*_columns).where(embedding_models.c.state != "dropped")
"""The model that is searched and, while it is being changed, the other whose vectors are kept in step."""

SPACE = (
    select(cast(embedding_models.c.dimensions, Text).concat(literal(" ")).concat(embedding_models.c.name))
    .where(embedding_models.c.state == "active")
    .scalar_subquery()
)
"""The space that is searched, in the snapshot of the statement it stands in. See `Model.tag`."""

_RECORDED = rendered(RECORDED)
NOW_SEARCHED = rendered(select(SPACE.label("space")))
"""The same by itself."""


def tagged(tag: str) -> Model:
    """The model with this tag."""
    dimensions, _, name = tag.partition(" ")
    return Model(name, int(dimensions))


async def every(database: Database, *, replica: bool = False) -> list[Recorded]:
    """All models that are recorded."""
    rows = await database.fetch_public(_RECORDED.with_values("recorded models", {}), replica=replica)
    return [Recorded(**row) for row in rows]


async def recorded(database: Database, *, replica: bool = False) -> Model:
    """The model this database's vectors are of."""
    return active(await every(database, replica=replica)).model


def active(models: Sequence[Recorded]) -> Recorded:
    """The one that is searched."""
    return next(each for each in models if each.state == "active")


def check(models: Sequence[Recorded], configured: Embedder) -> None:
    """Raise ModelMismatch, saying what to run, unless the database holds, or has held, what is configured."""
    searched = active(models)
    if (configured.model, configured.dimensions) not in {each.model for each in models}:
        use = (
            "PGRECALL_EMBEDDER=local"
            if searched.name == LOCAL_MODEL
            else f"OPENAI_API_KEY or OPENAI_BASE_URL, PGRECALL_EMBEDDING_MODEL={searched.name} and "
            f"PGRECALL_EMBEDDING_DIMENSIONS={searched.dimensions}"
        )
        raise ModelMismatch(
            f"this database holds vectors of {searched.name} with {searched.dimensions} dimensions, but "
            f"{configured.model} with {configured.dimensions} is configured. Either use the model it holds: set {use}. Or "
            "change its model: `pgrecall model plan` with the settings of the model it holds. Or make another database for "
            "the configured one: set DATABASE_URL or PGRECALL_DATA_DIR to it and run "
            "`pgrecall migrate`; a database that is still empty can be made anew with `alembic downgrade base` first"
        )
