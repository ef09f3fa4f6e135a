"""What `pgrecall sql` and `pgrecall analyst` do: the way in for people who write SQL, and who they are there."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from app import commands, embedded, local, questions, roles, schema, spaces, tenants, terminal
from app.database import connect
from app.embedding import Embedder
from app.errors import BadInput, SetupError
from app.settings import Settings

_WELCOME = (
    "functions: search_documents, hybrid_search, similar_documents, recall_check; \\x and \\df+ NAME tell of one\n"
    "views: whole_documents, statistics_by_tenant, index_health, model_progress; tables: documents, sources; \\d+ NAME"
)
"""What a person at the prompt does not find: \\df lists pgvector's functions first, \\dt what an analyst may not read."""


def open_psql(arguments: Namespace, config: Settings) -> int:
    """Open psql as the analyst, or as the owner, or print where it would connect. The exit status is psql's."""
    if arguments.options and not arguments.options[0].startswith("-"):
        raise BadInput("sql", f"{arguments.options[0]!r} is no option; allowed: psql's options after --, like: -- -At")
    if arguments.print_url:
        return _print_url(config, as_owner=arguments.owner)
    with _url(config, as_owner=arguments.owner) as url:
        program = _program()
        if program is None:
            terminal.say("there is no psql on this machine; connect with what you have to:")
            terminal.out.print(url, markup=False, soft_wrap=True)
            return 0
        options = [f"--command={each}" for each in arguments.command or ()]
        options += [f"--file={each}" for each in arguments.file or ()]
        if not options and not arguments.options and sys.stdin is not None and sys.stdin.isatty():
            terminal.say(_WELCOME)
        place, environment = _hidden(url)
        # psql takes Ctrl-C for the statement that is running; this process is to outlive that.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            command = [program, f"--dbname={place}", *options, *arguments.options]
            # What the shell opened is for psql to read, as in `-f <(echo …)`; Python's own files are closed without that.
            return subprocess.run(command, env=environment, check=False, close_fds=False).returncode  # noqa: S603
        finally:
            signal.signal(signal.SIGINT, before)


def _print_url(config: Settings, *, as_owner: bool) -> int:
    with _url(config, as_owner=as_owner) as url:
        terminal.out.print(url, markup=False, soft_wrap=True)
    if config.database_url is None and (as_owner or config.analyst_url is None):
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            terminal.say(
                "nothing keeps the embedded database up: it can be reached there while `pgrecall serve`, or a "
                "`pgrecall sql` without --print-url, runs"
            )
    return 0


@contextmanager
def _url(config: Settings, *, as_owner: bool) -> Iterator[str]:
    """Where to connect. The embedded database, where it is that one, is up for as long as this is open."""
    if config.analyst_url is not None and not as_owner:
        yield config.analyst_url
        return
    with schema.provided(config) as ready:
        if config.database_url is None:
            with contextlib.closing(local.start(config)) as database:
                yield database.owner_url if as_owner else database.analyst_url
            return
        if not as_owner:
            raise SetupError(
                "set PGRECALL_ANALYST_URL to the URL of an analyst's login, which `pgrecall analyst` makes; or give --owner"
            )
        if ready.migration_url is None:
            raise SetupError("--owner: set PGRECALL_MIGRATION_URL to the owner's URL")
        yield ready.migration_url


def _program() -> str | None:
    found = shutil.which("psql")
    if found is None:
        with contextlib.suppress(SetupError):
            found = shutil.which("psql", path=embedded.binaries())
    return found


def _hidden(url: str) -> tuple[str, dict[str, str]]:
    """The URL without its password, which is for the environment: others see a process's arguments."""
    parts = conninfo_to_dict(url)
    password = parts.pop("password", None)
    environment = dict(os.environ)
    return (
        (url, environment)
        if password is None
        else (
            make_conninfo(**{name: str(value) for name, value in parts.items()}),
            environment | {"PGPASSWORD": str(password)},
        )
    )


def admit(arguments: Namespace, config: Settings) -> int:
    """Print or apply the SQL that makes a login an analyst's, with its tenants and limit, or takes that back."""
    if arguments.revoke == bool(arguments.tenant or arguments.all_tenants):
        raise BadInput("--tenant", "allowed: --tenant (several times), or --all-tenants, or --revoke")
    if not 0 < len(arguments.login.encode()) < roles.LONGEST_NAME:
        raise BadInput("login", f"is not allowed; allowed: a name of 1 to {roles.LONGEST_NAME - 1} bytes")
    named = ["*"] if arguments.all_tenants else [tenants.check(each, "--tenant") for each in arguments.tenant or ()]
    statements = (
        roles.dismissal(arguments.login)
        if arguments.revoke
        else roles.admission(arguments.login, named, arguments.statement_timeout)
    )
    if not arguments.apply:
        for statement in statements:
            terminal.out.print(statement + ";", markup=False, soft_wrap=True)
        return 0
    with _administrator(arguments.url, config) as url, connect(url) as connection:
        connection.add_notice_handler(
            lambda notice: terminal.say(f"{(notice.severity or '').lower()}: {notice.message_primary}")
        )
        for statement in statements:
            try:
                connection.execute(statement.encode())
            except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable) as error:
                raise SetupError(
                    f"{error.diag.message_primary}: this takes a login that may create roles and write analyst_tenants of "
                    "this database. Hand what `pgrecall analyst` prints to an administrator, or give one's URL with --url"
                ) from None
    said = (
        "reads nothing any more"
        if arguments.revoke
        else f"reads {'every tenant' if named == ['*'] else ', '.join(named)}"
    )
    terminal.say(f"{arguments.login} {said}")
    if not arguments.revoke:
        terminal.say(
            "where the server asks for passwords, give it one with psql's \\password; then PGRECALL_ANALYST_URL names it for `pgrecall sql`"
        )
    return 0


@contextmanager
def _administrator(url: str | None, config: Settings) -> Iterator[str]:
    if url is not None or config.database_url is not None:
        yield url or config.migration_url or config.database_url or ""
        return
    with schema.provided(config), contextlib.closing(local.start(config)) as database:
        yield database.admin_url


def embed(arguments: Namespace, config: Settings) -> int:
    """Print the vector of a question as PostgreSQL writes it, for search_documents."""
    with schema.provided(config) as ready:
        vector = asyncio.run(_embedded(ready, arguments.query))
    if arguments.json:
        terminal.json(vector)
    else:
        terminal.out.print(f"[{','.join(map(str, vector))}]", markup=False, soft_wrap=True)
    return 0


async def _embedded(config: Settings, question: str) -> list[float]:
    async with commands.opened(config) as (database, embedder):

        async def asked(embedder: Embedder) -> list[float]:
            found: list[float] = (await questions.vector(embedder, question)).tolist()
            return found

        return await spaces.following(database, config, embedder, asked)
