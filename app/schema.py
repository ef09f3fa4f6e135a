"""The schema's revision: what this release needs, what a database has, and how to get there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from app import local, model, roles, spaces
from app.database import Database, connect, translated
from app.embedding import Embedder
from app.errors import SchemaTooOld, SetupError, Unsafe
from app.model import Model
from app.replica import Standing
from app.settings import Settings
from app.statements import Statement
from app.tables import Kind

VERSION_TABLE = "pgrecall_revision"
"""Alembic's table, under a name that leaves a team's own Alembic in the same database alone."""

REQUIRED = "0008"
"""The oldest revision this release works on. Revisions are numbered, so newer ones compare as greater."""

_INI = Path(__file__).resolve().parent.parent / "alembic.ini"

REVISION = Statement("schema revision", "select version_num from pgrecall_revision", {})
"""Which revision the database is at."""

PREFLIGHT = Statement(
    "isolation preflight",
    """
with guarded as (
    select c.oid, c.relowner, c.relrowsecurity from pg_class c
     where c.oid in (to_regclass('sources'), to_regclass('documents'), to_regclass('embedding_cache'),
                    to_regclass('embedding_claims'),
                    to_regclass('document_terms'), to_regclass('term_statistics'), to_regclass('collection_statistics'))
)
select (select count(*) from guarded) as tables, current_user as login,
       exists (select from guarded g, pg_roles w
                where w.rolname = %(worker)s and pg_has_role(current_user, w.oid, 'usage')
                  and not (select rolsuper from pg_roles where rolname = current_user)) as inherits,
       coalesce((select pg_has_role(current_user, oid, 'member') from pg_roles where rolname = %(app)s), false) as member,
       (select rolsuper or rolbypassrls from pg_roles where rolname = %(app)s) as bypasses,
       (select bool_or(pg_has_role(r.oid, g.relowner, 'usage')) from guarded g, pg_roles r where r.rolname = %(app)s) as owns,
       (select bool_and(relrowsecurity) from guarded) as secured,
       (select count(distinct p.polrelid) from pg_policy p join guarded g on g.oid = p.polrelid
          join pg_roles r on r.oid = any (p.polroles) where r.rolname = %(app)s) as policies,
       (select quote_ident(n.nspname) from pg_extension e join pg_namespace n on n.oid = e.extnamespace, pg_roles r
         where e.extname = 'vector' and r.rolname = %(app)s and not has_schema_privilege(r.oid, n.oid, 'usage')) as hidden
""",
    {"app": roles.APP, "worker": roles.WORKER},
)
"""Whether the role that every transaction drops to is confined to one tenant and finds pgvector. Reads catalogues only."""

GUARDED = 7
"""Tables the preflight looks at."""


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
    """Settings that name a database: the configured one as it is, else the embedded one, running and migrated."""
    if settings.database_url:
        yield settings
        return
    database = local.start(settings)
    try:
        ready = msgspec.structs.replace(settings, database_url=database.service_url, migration_url=database.owner_url)
        if not is_current(ready):
            migrate(ready)
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
    with migration_url(settings) as url, connect(url) as connection:
        begun = connection.execute("select to_regclass('pgrecall_revision') is not null").fetchone()
        row = connection.execute("select version_num from pgrecall_revision").fetchone() if begun and begun[0] else None
    found: str | None = row[0] if row else None
    known = [
        Step(script.revision, (script.doc or "").strip())
        for script in ScriptDirectory.from_config(config(settings)).walk_revisions()
    ]
    return Pending(found, [step for step in reversed(known) if found is None or step.revision > found])


def is_current(settings: Settings) -> bool:
    """Whether the database is at the newest revision this release knows."""
    return pending(settings).revision == head(settings)


def head(settings: Settings) -> str:
    """The newest revision this release knows."""
    return ScriptDirectory.from_config(config(settings)).get_current_head() or ""


def config(settings: Settings) -> Config:
    """Alembic's configuration, with the settings of this process handed to migrations/env.py."""
    made = Config(_INI)
    made.attributes["settings"] = settings
    return made


def migrate(settings: Settings, revision: str = "head") -> None:
    """Bring the database to `revision`. Raises SetupError in the database's own words where it refuses."""
    try:
        with translated():
            command.upgrade(config(settings), revision)
    except CommandError as error:
        raise SetupError(
            f"migration failed: {error}. A newer release has migrated this database, or another program"
        ) from error
    except psycopg.Error as error:
        hint = f". {error.diag.message_hint}" if error.diag.message_hint else ""
        raise SetupError(f"migration failed: {error.diag.message_primary or error}{hint}") from error


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


async def preflight(database: Database, *, replica: bool = False) -> None:
    """Raise Unsafe, naming the statement that mends it, where the service could reach another tenant's rows.

    Raises SchemaTooOld where there are no tables yet, SetupError where the service may not use pgvector.
    """
    (row,) = await database.fetch_public(PREFLIGHT, as_login=True, replica=replica)
    if row["tables"] < GUARDED:
        raise SchemaTooOld(f"the database lacks tables, this release needs revision {REQUIRED}: run `pgrecall migrate`")
    if not row["member"]:
        raise Unsafe(
            f"the login {row['login']} may not become {roles.APP}: run "
            f"`pgrecall roles --apply --login {row['login']} --url …` with an administrator's URL, or serve as another login"
        )
    if row["inherits"]:
        raise Unsafe(
            f"the login {row['login']} has the rights of {roles.WORKER} without asking for them: run "
            f"`pgrecall roles --apply --login {row['login']} --url …` with an administrator's URL"
        )
    if row["bypasses"]:
        raise Unsafe(f"{roles.APP} bypasses row-level security: ALTER ROLE {roles.APP} NOSUPERUSER NOBYPASSRLS")
    if row["owns"]:
        raise Unsafe(f"{roles.APP} has the rights of the tables' owner: REVOKE that role FROM {roles.APP}")
    if not row["secured"] or row["policies"] < GUARDED:
        raise Unsafe(
            "row-level security is off on a table that holds tenants' rows, or a policy is missing: "
            "ALTER TABLE … ENABLE ROW LEVEL SECURITY, and restore the policies of migrations/versions"
        )
    if row["hidden"]:
        raise SetupError(
            f"{roles.APP} may not use the schema {row['hidden']}, where pgvector is: "
            f"GRANT USAGE ON SCHEMA {row['hidden']} TO {', '.join(roles.ROLES)}"
        )


async def check(database: Database, embedder: Embedder) -> Readiness:
    """What the database has, if the service can work on it.

    Raises SetupError (SchemaTooOld, ModelMismatch, Unsafe) or DatabaseUnavailable.
    """

    async def look(*, replica: bool) -> tuple[str, Model]:
        await preflight(database, replica=replica)
        found = await revision(database, replica=replica)
        models = await model.every(database, replica=replica)
        model.check(models, embedder)
        if not replica:
            spaces.learn(database, models)
        return found, model.active(models).model

    found, recorded = await look(replica=False)
    standing = None if database.replica is None else await database.replica.examine(lambda: look(replica=True))
    return Readiness(found, recorded, standing)
