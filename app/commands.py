"""What each command of `pgrecall` does. `arguments` reads the command line; everything here gets it typed."""

import asyncio
import contextlib
import ipaddress
import json
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import psycopg
from psycopg.rows import dict_row

from app import (
    chat,
    embedding,
    filters,
    indexes,
    keys,
    local,
    model,
    questions,
    rag,
    rerank,
    roles,
    schema,
    search,
    settings,
    spaces,
    tenants,
    terminal,
)
from app.conditions import Conditions
from app.database import Database, across, connect
from app.embedding import Embedder
from app.errors import BadInput, DatabaseUnavailable, SetupError, WrongSetting
from app.model import Model
from app.search import Found
from app.settings import Settings

STATUS = """
select tenant_id, documents, chunks, pending, failed, ready_last_minute, ready_last_hour, updated_at,
       extract(epoch from now() - oldest_pending_at)::float8 as oldest_pending_seconds
  from ingest_status order by tenant_id
"""
"""How much each tenant has. Read as pgrecall_worker, which alone sees every tenant's sources."""


@asynccontextmanager
async def opened(config: Settings) -> AsyncIterator[tuple[Database, Embedder]]:
    """The database, checked, and the embedder."""
    embedder = embedding.open_embedder(config)
    database = Database(config, config.database_url or "")
    try:
        await schema.check(database, embedder)
        yield database, await spaces.current(database, config, embedder)
    finally:
        await spaces.close(database)
        await database.close()
        await embedder.aclose()


def serve(arguments: Namespace, config: Settings) -> int:
    """Serve the API until interrupted."""
    from app import server  # noqa: PLC0415 - takes 0.4 s with Litestar and uvicorn, which no other command needs

    if arguments.insecure and config.auth == "auto":
        config = msgspec.structs.replace(config, auth="insecure")
    with schema.provided(config) as ready:
        open_mode = _is_open(ready)
        _check_host(arguments.host, ready, open_mode=open_mode is True)
        os.environ[settings.variable("auth")] = ready.auth
        # Workers are processes of their own and read their settings from the environment.
        os.environ["DATABASE_URL"] = ready.database_url or ""
        works = config.with_worker or config.database_url is None
        works = works if arguments.with_worker is None else arguments.with_worker
        os.environ[settings.variable("with_worker")] = str(works).lower()

        def started(address: str) -> None:
            terminal.say(f"serving on {address}, API docs on {address}/docs (Ctrl-C stops)")
            if open_mode:
                terminal.say("open mode: no keys are asked for, every caller may name every tenant (docs/keys.md)")

        return server.serve(
            "app.asgi:create_app",
            host=arguments.host,
            port=arguments.port,
            workers=arguments.workers,
            settings=ready,
            on_started=started,
        )


def _check_host(host: str, config: Settings, *, open_mode: bool) -> None:
    """Raise WrongSetting for an address others can reach while nobody is asked for a key, unless that is what is wanted."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if open_mode and not loopback and config.auth != "insecure":
        raise WrongSetting(
            f"--host: {host} can be reached by others and the database has no keys; make one (`pgrecall tenant create T`, then "
            "`pgrecall key create --tenant T --scope read --scope write`), or listen on 127.0.0.1, ::1 or localhost, or "
            "add --insecure behind something that checks who is asking"
        )


def _is_open(config: Settings) -> bool | None:
    """Whether the server will ask for no keys; None where the database cannot say so now, which it will before it serves."""
    if config.auth == "keys":
        return False
    try:
        with connect(config.database_url or "") as connection, connection.transaction():
            connection.execute("select set_config('role', %s, true)", (roles.APP,))
            row = connection.execute(keys.IN_USE.sql.encode()).fetchone()
            return row is not None and not row[0]
    except (DatabaseUnavailable, psycopg.Error):
        return None


def migrate(arguments: Namespace, config: Settings) -> int:
    """Bring the database to the newest revision, or with --check say what that would take."""
    if arguments.check:
        return _pending(arguments, config)
    before = schema.is_current(config)
    schema.migrate(config)
    report = {"revision": schema.head(), "migrated": not before}
    if arguments.json:
        terminal.json(report)
    else:
        terminal.say(f"the database is at revision {report['revision']}" + (", nothing to do" if before else ""))
    return 0


PENDING = 3
"""Exit status of `migrate --check` where migrations are pending."""


def _pending(arguments: Namespace, config: Settings) -> int:
    found = schema.pending(config)
    if arguments.json:
        terminal.json({"revision": found.revision, "head": schema.head(), "pending": found.steps})
    elif found.steps:
        terminal.say(
            f"the database is {f'at revision {found.revision}' if found.revision else 'without a schema'}; pending:"
        )
        for step in found.steps:
            terminal.out.print(f"{step.revision}  {step.summary}", markup=False, soft_wrap=True)
    else:
        terminal.say(f"the database is at revision {found.revision}, nothing is pending")
    return PENDING if found.steps else 0


def apply_roles(arguments: Namespace, config: Settings) -> int:
    """Print or apply the statements that make the roles."""
    login = arguments.login
    if login is None and config.database_url:
        login = psycopg.conninfo.conninfo_to_dict(config.database_url).get("user")
    statements = roles.statements(str(login) if login else None)
    if not arguments.apply:
        for statement in statements:
            terminal.out.print(statement + ";", markup=False, soft_wrap=True)
        return 0
    url = arguments.url or config.migration_url or config.database_url
    if url is None:
        raise SetupError("the embedded database makes its roles itself; for another one set DATABASE_URL or give --url")
    with connect(url) as connection:
        for statement in statements:
            try:
                connection.execute(statement.encode())
            except psycopg.errors.InsufficientPrivilege:
                raise SetupError(
                    "this login may not create or grant these roles: run `pgrecall roles` and hand what it prints to an administrator, "
                    "or give an administrator's URL with --url"
                ) from None
    terminal.say(f"{', '.join(roles.ROLES)} are there" + (f"; {login} may become the first two" if login else ""))
    return 0


def find(arguments: Namespace, config: Settings) -> int:
    """Search and print the hits."""
    with schema.provided(config) as ready:
        found = asyncio.run(_find(arguments, ready))
    if arguments.json:
        terminal.json({"results": found.hits, "count": len(found.hits), "scan": found.scan})
    else:
        terminal.hits(f"hits for {arguments.query!r} ({found.scan.strategy} scan): {len(found.hits)}", found.hits)
    return 0


async def _find(arguments: Namespace, config: Settings) -> Found:
    async with opened(config) as (database, embedder):
        return await asked(database, embedder, config, arguments)


async def asked(database: Database, embedder: Embedder, config: Settings, arguments: Namespace) -> Found:
    """The hits for the question and filters of a command line."""
    tenants.check(arguments.tenant, "--tenant")
    conditions = Conditions(
        doc_types=tuple(arguments.doc_type) if arguments.doc_type else None,
        metadata=filters.parse(json_object(arguments.metadata, "--metadata"), "--metadata"),
    )
    mode: search.Mode = arguments.mode
    async with rerank.opened(config) as reranker:

        async def searched(embedder: Embedder) -> Found:
            vector = None
            if mode != "text" or arguments.threshold is not None:
                vector = await questions.vector(embedder, arguments.query)
            return await search.search(
                database,
                config,
                arguments.tenant,
                vector,
                top_k=arguments.top_k,
                question=arguments.query,
                threshold=arguments.threshold,
                conditions=conditions,
                options=search.Options(mode=mode),
                stage=rerank.Stage(rerank.required(reranker), arguments.query) if arguments.rerank else None,
                space=Model(embedder.model, embedder.dimensions),
            )

        return await spaces.following(database, config, embedder, searched)


def ask(arguments: Namespace, config: Settings) -> int:
    """Answer a question from the documents, with citations."""
    with schema.provided(config) as ready:
        answer = asyncio.run(_ask(arguments, ready))
    if arguments.json:
        terminal.json(answer)
    else:
        show_answer(arguments.query, answer)
    return 0


async def _ask(arguments: Namespace, config: Settings) -> Any:
    chat_model = chat.open_chat(config)
    try:
        async with opened(config) as (database, embedder):
            found = await asked(database, embedder, config, arguments)
            return await rag.answer(chat_model, embedder, arguments.query, found.hits, settings=config)
    finally:
        if chat_model is not None:
            await chat_model.aclose()


def show_answer(question: str, answer: Any) -> None:
    """The answer and the sources it cites."""
    terminal.out.print()
    terminal.out.print(terminal.visible(question), markup=False, style="bold")
    terminal.out.print(terminal.visible(answer.answer), markup=False)
    terminal.table(
        f"sources ({answer.model} answered; cited are {', '.join(map(str, answer.cited)) or 'none'})",
        [("source", "right"), ("score", "right"), ("document", "left"), ("snippet", "left")],
        [(s.source, f"{s.rank_score:.3f}", s.id, terminal.snippet(s.content)) for s in answer.sources],
    )


def index(arguments: Namespace, config: Settings) -> int:
    """Show the kinds of vector index, or change to another one."""
    with schema.provided(config) as ready, schema.migration_url(ready) as url:
        kept = indexes.listed(url) if arguments.kind is None else _changed(arguments, url)
    if arguments.json:
        terminal.json({"indexes": kept})
        return 0
    terminal.table(
        "vector indexes (one for each bucket of tenants)",
        [
            ("kind", "left"),
            ("state", "left"),
            ("oversampling", "right"),
            ("valid", "right"),
            ("MB", "right"),
            ("scans", "right"),
        ],
        [
            (
                each.kind,
                each.state,
                f"{each.oversampling:g}",
                f"{each.valid}/{each.indexes}",
                f"{each.bytes / 1e6:,.1f}",
                f"{each.scans:,}",
            )
            for each in kept
        ],
    )
    return 0


def _changed(arguments: Namespace, url: str) -> list[indexes.Kept]:
    with terminal.progress("%") as progress:
        task = progress.add_task("starting", total=100)
        return indexes.change(
            url,
            arguments.kind,
            oversampling=arguments.oversampling,
            keep=arguments.keep,
            told=lambda what, share: progress.update(task, description=what, completed=100 * share),
        )


def show_settings(arguments: Namespace, config: Settings) -> int:
    """Every setting with its value and where that comes from."""
    rows = [
        {
            "name": settings.variable(field.name),
            "value": settings.masked(field.name, getattr(config, field.name)),
            "source": settings.source(field.name),
            "allowed": settings.allowed(field.type).removeprefix("allowed: "),
        }
        for field in msgspec.structs.fields(Settings)
    ]
    if arguments.json:
        terminal.json(rows)
    else:
        terminal.table(
            "settings (docs/settings.md says what each is for)",
            [("name", "left"), ("value", "left"), ("source", "left"), ("allowed", "left")],
            [["" if cell is None else cell for cell in row.values()] for row in rows],
        )
    return 0


def status(arguments: Namespace, config: Settings) -> int:
    """What the database holds: revision, model, and documents per tenant."""
    with schema.provided(config) as ready:
        report = asyncio.run(_status(ready))
        if config.database_url is None:
            with contextlib.closing(local.start(config)) as database:
                report["psql"] = f"psql '{database.analyst_url}'"
    if arguments.json:
        terminal.json(report)
        return 0
    terminal.table(
        f"revision {report['revision']}, {report['embedding_model']} with {report['embedding_dimensions']} dimensions",
        [
            ("tenant", "left"),
            *(
                (name, "right")
                for name in ("documents", "chunks", "pending", "oldest", "failed", "last minute", "hour")
            ),
        ],
        [
            (
                *(t[name] for name in ("tenant_id", "documents", "chunks", "pending")),
                "" if t["oldest_pending_seconds"] is None else f"{t['oldest_pending_seconds']:,.0f} s",
                *(t[name] for name in ("failed", "ready_last_minute", "ready_last_hour")),
            )
            for t in report["tenants"]
        ],
    )
    if any(t["failed"] for t in report["tenants"]):
        terminal.say("`pgrecall queue --state failed` says why; `pgrecall retry` tries them again")
    if "psql" in report:
        terminal.say(f"for SQL, while a server or another command keeps the database up: {report['psql']}")
    return 0


async def _status(config: Settings) -> dict[str, Any]:
    database = Database(config, config.database_url or "")
    try:
        revision = await schema.revision(database)
        recorded = await model.recorded(database)
    finally:
        await database.close()
    return {
        "revision": revision,
        "embedding_model": recorded.name,
        "embedding_dimensions": recorded.dimensions,
        "tenants": stored(config),
    }


def stored(config: Settings) -> list[dict[str, Any]]:
    """How much each tenant has: the rows of STATUS."""
    with across(config.database_url or "") as connection:
        return connection.cursor(row_factory=dict_row).execute(STATUS).fetchall()


def json_object(text: str | None, option: str) -> dict[str, Any]:
    """The value of an option that is a JSON object. Raises BadInput naming the option."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadInput(option, f'{text[:80]!r} is not a JSON object; allowed: such as {{"lang": "en"}}')
    return value
