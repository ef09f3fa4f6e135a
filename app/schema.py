"""The schema's revision: what this release needs, what a database has, and how to get there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import psycopg
from sqlalchemy import Connection, text

from app import catalogue, isolation, local, model, spaces
from app.database import Database, connect, translated
from app.embedding import Embedder
from app.errors import SchemaTooOld, SetupError, Unavailable, WrongSetting
from app.model import Model
from app.replica import Standing
from app.settings import Settings
from app.statements import Statement
from app.tables import Kind

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "pgrecall_revision"
"""Alembic's table, under a name that leaves a team's own Alembic in the same database alone."""

REQUIRED = "0010"
"""The oldest revision this release works on. Revisions are numbered, so newer ones compare as greater."""

_ROOT = Path(__file__).resolve().parent.parent

REVISION = Statement("schema revision", "select version_num from pgrecall_revision", {})
"""Which revision the database is at."""


_AS_OWNER = (
    "Migrations are for the owner of the tables, who may create in their schema: PGRECALL_MIGRATION_URL is that login's"
)


class Readiness(NamedTuple):
    """What a database has: its revision and the model whose vectors it holds. `replica`: None without one."""

    revision: str
    model: Model
    replica: Standing | None


@contextmanager
def migration_url(settings: Settings) -> Iterator[str]:
    """Where migrations go: PGRECALL_MIGRATION_URL, else DATABASE_URL, else the embedded database as its owner."""
    if settings.migration_url or settings.database_url:
        yield settings.migration_url or settings.database_url or ""
        return
    database = local.start(settings)
    try:
        yield database.owner_url
    finally:
        database.close()


@contextmanager
def provided(settings: Settings) -> Iterator[Settings]:
    """Settings that name a database: the configured one as it is, else the embedded one, running and migrated.

    Raises WrongSetting where only the owner's URL is set: the embedded database is not the one that is meant.
    """
    if settings.database_url:
        yield settings
        return
    if settings.migration_url:
        raise WrongSetting(
            "DATABASE_URL is not set and PGRECALL_MIGRATION_URL is: set both, DATABASE_URL to the service's login, or neither"
        )
    database = local.start(settings)
    try:
        ready = msgspec.structs.replace(settings, database_url=database.service_url, migration_url=database.owner_url)
        if not is_current(ready):
            migrate(ready, quiet=True)
        with connect(database.owner_url) as connection:
            connection.execute(local.ADMIT_ANALYST, (local.ANALYST,))
        yield ready
    finally:
        database.close()


@dataclass(frozen=True, slots=True)
class Step:
    """A migration that a database has not had: its revision, and the first line of what it says of itself."""

    revision: str
    summary: str


class Pending(NamedTuple):
    """Where a database is (None: nowhere yet) and the migrations between it and the newest of this release, in order."""

    revision: str | None
    steps: list[Step]


def pending(settings: Settings) -> Pending:
    """What `migrate` would do. Reads one row and takes no lock that anyone waits for."""
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - as in `config`

    found = _recorded(settings)
    known = [
        Step(script.revision, (script.doc or "").strip())
        for script in ScriptDirectory.from_config(config(settings)).walk_revisions()
    ]
    return Pending(found, [step for step in reversed(known) if found is None or step.revision > found])


def _recorded(settings: Settings) -> str | None:
    with migration_url(settings) as url, connect(url) as connection:
        begun = connection.execute("select to_regclass('pgrecall_revision') is not null").fetchone()
        try:
            row = (
                connection.execute("select version_num from pgrecall_revision").fetchone()
                if begun and begun[0]
                else None
            )
        except psycopg.errors.InsufficientPrivilege as error:
            raise SetupError(f"{error.diag.message_primary}. {_AS_OWNER}") from error
    found: str | None = row[0] if row else None
    return found


def is_current(settings: Settings) -> bool:
    """Whether the database is at the newest revision this release knows."""
    return _recorded(settings) == head()


def head() -> str:
    """The newest revision this release knows, by the files' names: they are numbered."""
    return max(path.name.partition("_")[0] for path in (_ROOT / "migrations/versions").glob("[0-9]*.py"))


def config(settings: Settings, *, quiet: bool = False) -> "Config":
    """Alembic's configuration, with the settings of this process handed to migrations/env.py. `quiet`: log at debug."""
    from alembic.config import Config  # noqa: PLC0415 - takes 0.4 s, which nobody pays who does not migrate

    made = Config(_ROOT / "alembic.ini")
    made.attributes |= {"settings": settings, "quiet": quiet}
    return made


def migrate(settings: Settings, revision: str = "head", *, quiet: bool = False) -> None:
    """Bring the database to `revision`. Raises SetupError in the database's own words where it refuses."""
    from alembic import command  # noqa: PLC0415 - as in `config`
    from alembic.util import CommandError  # noqa: PLC0415

    try:
        with translated():
            command.upgrade(config(settings, quiet=quiet), revision)
    except CommandError as error:
        raise SetupError(
            f"migration failed: {error}. A newer release has migrated this database, or another program"
        ) from error
    except Unavailable as error:
        if type(error) is not Unavailable:
            raise
        raise SetupError(
            "migration failed: a lock that it needs was not to be had, others hold it (look at pg_stat_activity). Nothing of "
            "this step is changed but what it builds beside others; run it again"
        ) from error
    except psycopg.Error as error:
        denied = isinstance(error, psycopg.errors.InsufficientPrivilege)
        hint = error.diag.message_hint or (_AS_OWNER if denied else None)
        raise SetupError(
            f"migration failed: {error.diag.message_primary or error}" + (f". {hint}" if hint else "")
        ) from error


def recorded_model(connection: Connection) -> Model | None:
    """The model a database was made for, None where it is still empty."""
    if connection.execute(text("select to_regclass('embedding_models')")).scalar() is None:
        return None
    row = connection.execute(text("select name, dimensions from embedding_models where state = 'active'")).first()
    return Model(*row) if row else None


def index_kind(connection: Connection) -> Kind | None:
    """The active kind of vector index, None where the database is older than kinds are."""
    if connection.execute(text("select to_regclass('vector_indexes')")).scalar() is None:
        return None
    kind: Kind | None = connection.execute(text("select kind from vector_indexes where state = 'active'")).scalar()
    return kind


async def revision(database: Database, *, replica: bool = False) -> str:
    """The revision of a database. Raises SchemaTooOld where it is older than this release needs."""
    found = (await database.fetch_public(REVISION, replica=replica))[0]["version_num"]
    if found < REQUIRED:
        raise SchemaTooOld(
            f"the database is at revision {found}, this release needs {REQUIRED}: run `pgrecall migrate`"
        )
    return str(found)


async def preflight(database: Database, *, replica: bool = False) -> str:
    """The revision of a database in which the service reaches one tenant at a time, as the migrations made it.

    Raises Unsafe, naming the statement that mends it, where something differs; SchemaTooOld where the database is older
    than this release needs, SetupError where the service may not use pgvector.
    """
    unlike: list[isolation.Fault] = []
    words = True
    for _ in range(2):  # a migration may have begun or ended in the middle of it: then look again
        try:
            (row,) = await database.fetch_public(
                catalogue.preflight(words=words), as_login=True, replica=replica, config=catalogue.CONFIG
            )
        except Unavailable as error:
            if type(error) is not Unavailable or not words:
                raise
            words = False  # somebody holds a table for themselves
            continue
        if not any(each["name"] == "sources" for each in row["relations"] or ()):
            raise SchemaTooOld(
                f"the database has no tables, this release needs revision {REQUIRED}: run `pgrecall migrate`"
            )
        catalogue.check_roles(row)
        at = await revision(database, replica=replica)
        unlike = isolation.faults(catalogue.read(row, at))
        if not unlike:
            return at
    raise isolation.refusal(unlike)


async def check(database: Database, embedder: Embedder) -> Readiness:
    """What the database has, if the service can work on it.

    Raises SetupError (SchemaTooOld, ModelMismatch, Unsafe) or DatabaseUnavailable.
    """

    async def look(*, replica: bool) -> tuple[str, Model]:
        found = await preflight(database, replica=replica)
        models = await model.every(database, replica=replica)
        model.check(models, embedder)
        if not replica:
            spaces.learn(database, models)
        return found, model.active(models).model

    found, recorded = await look(replica=False)
    standing = None if database.replica is None else await database.replica.examine(lambda: look(replica=True))
    return Readiness(found, recorded, standing)
