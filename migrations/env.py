"""How Alembic reaches the database: with the settings of `pgrecall`, bounded waits and one migrator at a time."""

import os
import sys
import time

from alembic import context
from alembic.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from app import database, isolation, pool, progress, schema, settings, tables, telemetry

LOCK_TIMEOUT = "4s"  # a migration that cannot have its lock gives up rather than queue live traffic behind it
STATEMENT_TIMEOUT = "60s"  # concurrent index builds set their own
WAIT_FOR_MIGRATOR = 900  # seconds
PREPARE = (
    f"set lock_timeout = '{LOCK_TIMEOUT}'",
    f"set statement_timeout = '{STATEMENT_TIMEOUT}'",
    f"select set_config('search_path', search_path, false) from ({pool.PGVECTOR}) as pgvector where search_path <> '' limit 1",
)
"""What every migration's session begins with; the last finds pgvector where it is in a schema of its own."""

ANNOUNCE = f"""do $$ begin
    if not pg_try_advisory_lock({isolation.MIGRATOR_LOCK}) then
        raise exception 'another migration is running: look at pg_locks and pg_stat_activity, then run this again';
    end if;
end $$"""
"""Says to services and other migrators that a migration runs."""

RELEASE = f"select pg_advisory_unlock({isolation.MIGRATOR_LOCK})"
"""A session that ends lets go of it by itself, but only a moment later: the next step may come sooner."""


def _configure(options: settings.Settings, connection: Connection | None, steps: progress.Steps | None = None) -> None:
    model, dimensions, kind = options.model, options.dimensions, None
    if connection is not None:
        recorded = schema.recorded_model(connection)
        kind = schema.index_kind(connection)
        model, dimensions = (recorded.name, recorded.dimensions) if recorded else (model, dimensions)
        connection.commit()
    context.configure(
        connection=connection,
        dialect_name=None if connection else "postgresql",
        target_metadata=tables.metadata_for(dimensions, kind),
        compare_type=True,
        compare_server_default=False,
        include_object=_ours,
        transaction_per_migration=True,
        version_table=schema.VERSION_TABLE,
        literal_binds=connection is None,
        embedding_model=model,
        index_kind=kind,
        embedding_dimensions=dimensions,
        text_language=options.text_language,
        on_version_apply=steps.applied if steps else None,
    )


CONTRIB_INDEXES = frozenset({"documents_labels_idx"})
"""Left out on a server without btree_gin."""


# The database may hold a team's own tables, and its own Alembic with a table of that name.
def _ours(thing: object, name: str | None, kind: str, reflected: bool, compared: object) -> bool:  # noqa: ARG001  Alembic's signature
    if kind == "table" and reflected and compared is None:
        return False
    if kind == "index" and name in CONTRIB_INDEXES and not reflected and compared is None:
        connection = context.get_bind()
        return connection.execute(text("select from pg_extension where extname = 'btree_gin'")).first() is not None
    if kind == "index" and reflected and (name or "").startswith("documents_embedding_") and compared is None:
        active = context.get_context().opts["index_kind"]
        return active is not None and name in tables.embedding_indexes(
            active
        )  # others are being built or were retired by `pgrecall index`
    # What operations build at run time carries this prefix and is recorded by them, not by migrations.
    return not (reflected and (name or "").startswith("pgrecall_run_"))


def offline(options: settings.Settings) -> None:
    """Print the SQL for a DBA to review."""
    _configure(options, None)
    with context.begin_transaction():
        for statement in (ANNOUNCE, *PREPARE):
            context.execute(statement)
        context.run_migrations()
        context.execute(RELEASE)


def online(connection: Connection, options: settings.Settings) -> None:
    """Migrate, unless another migrator is at work: then wait for it and find nothing left to do."""
    _wait_for_turn(connection)
    known = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE}).get_current_revision()
    steps = progress.Steps(connection, known, quiet=bool(context.config.attributes.get("quiet")))
    connection.commit()
    try:
        for statement in PREPARE:
            connection.execute(text(statement))
        connection.commit()
        _configure(options, connection, steps)
        with context.begin_transaction():
            context.run_migrations()
    except CommandError:  # before any step: `check` finds some pending, or a revision is not known
        raise
    except Exception as error:
        # Alembic, leaving a block of concurrent work, stumbles over a connection that is gone: what it was before counts.
        first = error.__context__ if isinstance(error, PendingRollbackError) else None
        steps.stopped(first if isinstance(first, DBAPIError) else error)
        if isinstance(first, DBAPIError):
            raise first from None
        raise
    finally:
        if not connection.invalidated:
            connection.rollback()
            connection.execute(text("select pg_advisory_unlock(:key)"), {"key": isolation.MIGRATOR_LOCK})
            connection.commit()


def _wait_for_turn(connection: Connection) -> None:
    # A blocking pg_advisory_lock would deadlock with the other migrator's CREATE INDEX CONCURRENTLY.
    deadline = time.monotonic() + WAIT_FOR_MIGRATOR
    while not connection.execute(text("select pg_try_advisory_lock(:key)"), {"key": isolation.MIGRATOR_LOCK}).scalar():
        connection.commit()
        if time.monotonic() > deadline:
            raise SystemExit(f"another migration has been running for {WAIT_FOR_MIGRATOR} s; look at pg_stat_activity")
        time.sleep(0.25)
    connection.commit()


def run() -> None:
    """Entry point: Alembic executes this file."""
    options = context.config.attributes.get("settings")
    if options is None:  # Alembic's own command line
        options = settings.read()
        telemetry.set_up(options)
    if context.is_offline_mode():
        try:
            offline(options)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed once more at the end
            raise SystemExit(1) from None  # a pager was left before the end
        return
    with schema.migration_url(options) as url, database.sync_engine(url).connect() as connection:
        online(connection, options)


run()
