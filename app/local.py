"""The embedded database, set up as production would be: an owner that migrates, a login for the service, one for analysts."""

from dataclasses import dataclass

import psycopg
from psycopg import sql

from app import embedded, roles
from app.errors import SetupError
from app.keeper import Keeper
from app.settings import Settings

DATABASE = "pgrecall"
OWNER = "pgrecall_owner"
SERVICE = "pgrecall_service"
ANALYST = "analyst"
_BOOTSTRAP_LOCK = 0x70677265


@dataclass(frozen=True)
class Local:
    """A handle on the running embedded server; the server stops when the last handle of any process is closed."""

    server: embedded.Server
    keeper: Keeper

    @property
    def service_url(self) -> str:
        """For the service: DATABASE_URL."""
        return self.server.url(SERVICE, DATABASE)

    @property
    def owner_url(self) -> str:
        """For migrations."""
        return self.server.url(OWNER, DATABASE)

    @property
    def admin_url(self) -> str:
        """As the superuser: for making logins."""
        return self.server.url(database=DATABASE)

    @property
    def analyst_url(self) -> str:
        """For psql and notebooks: every tenant, read-only."""
        return self.server.url(ANALYST, DATABASE)

    def close(self) -> None:
        """Give the handle back."""
        self.keeper.stop()
        self.server.close()


def start(settings: Settings) -> Local:
    """Start, or join, the server in PGRECALL_DATA_DIR and make its roles, logins and database if they are missing.

    Should it die, it is started again for as long as this handle is open.
    """
    server = embedded.start(settings.data_path)
    try:
        bootstrap(server.url(), DATABASE)
    except psycopg.Error as error:
        server.close()
        raise SetupError(f"the embedded database in {settings.data_path} cannot be set up: {error}") from error
    return Local(server, Keeper(server))


def bootstrap(admin_url: str, database: str) -> None:
    """As a superuser: the roles, an owner, a service login, an analyst login and an empty database with pgvector."""
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute("select pg_advisory_lock(%s)", (_BOOTSTRAP_LOCK,))  # until this session ends
        if connection.execute("select from pg_database where datname = %s", (database,)).fetchone() is not None:
            return
        for login, rights in ((OWNER, "createdb"), (SERVICE, "noinherit"), (ANALYST, "")):
            if connection.execute("select from pg_roles where rolname = %s", (login,)).fetchone() is None:
                connection.execute(sql.SQL("create role {} login " + rights).format(sql.Identifier(login)))
        for statement in roles.statements(SERVICE):
            connection.execute(statement.encode())
        connection.execute(sql.SQL("grant pgrecall_analyst to {}").format(sql.Identifier(ANALYST)))
        connection.execute(sql.SQL("alter role {} set statement_timeout = '60s'").format(sql.Identifier(ANALYST)))
        # Without it an index scan that the policy filters comes back short.
        connection.execute(
            sql.SQL("alter role {} set hnsw.iterative_scan = 'strict_order'").format(sql.Identifier(ANALYST))
        )
        # Under another name until it is whole: a bootstrap that was killed is begun again.
        unfinished = f"{database}_unfinished"
        connection.execute(sql.SQL("drop database if exists {}").format(sql.Identifier(unfinished)))
        connection.execute(
            sql.SQL("create database {} owner {}").format(sql.Identifier(unfinished), sql.Identifier(OWNER))
        )
        with psycopg.connect(admin_url, dbname=unfinished, autocommit=True) as inside:
            inside.execute("create extension vector")
        connection.execute(
            sql.SQL("alter database {} rename to {}").format(sql.Identifier(unfinished), sql.Identifier(database))
        )


ADMIT_ANALYST = "insert into analyst_tenants (analyst, tenant_id) values (%s, '*') on conflict do nothing"
"""The embedded database is one person's: its analyst reads every tenant."""
