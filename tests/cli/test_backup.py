"""docs/backup.md from top to bottom, on two tenants; what comes back is what was there, to the bit."""

import asyncio
import secrets
import shlex

import numpy as np
import psycopg
import pytest
from psycopg import sql

from app import local, schema, search, spaces
from app.database import Database
from app.embedding import open_embedder
from tests.cli.test_docs import Shell, check
from tests.conftest import NEEDS_CONTRIB, cloned, settings_for
from tests.isolation.worlds import fill

TABLES = ("sources", "documents", "document_terms", "term_statistics", "collection_statistics")
OTHERS = ("embedding_cache", "embedding_models", "vector_indexes", "analyst_tenants", "pgrecall_revision")
SPOIL = (
    "delete from sources where tenant_id = 'acme' and id = 'mine'",
    "update sources set content = content || ' spoilt' where tenant_id = 'acme'",
    "insert into sources (tenant_id, id, content) values ('acme', 'since', 'Put after the dump.')",
)


def rows(url: str, table: str, tenant: str = "") -> list[str]:
    """All rows of a table, or a tenant's, as text."""
    which = "" if not tenant else f" where tenant_id = '{tenant}'"
    with psycopg.connect(url, autocommit=True) as owner:
        return [row[0] for row in owner.execute(f"select t::text from {table} t{which} order by 1").fetchall()]


async def found(url: str, openai_url: str, tenant: str) -> list[object]:
    """What searches of a database give; preflight passes before."""
    settings = settings_for(url, openai_url)
    database, embedder = Database(settings, url), open_embedder(settings)
    try:
        await schema.check(database, embedder)
        vector = np.eye(64, dtype=np.float32)[0]
        given = []
        for mode in ("vector", "text", "hybrid"):
            options = search.Options(mode=mode)
            hits = await search.search(
                database, settings, tenant, vector, question="reset password", top_k=100, options=options
            )
            given += hits.hits
        return given
    finally:
        await spaces.close(database)
        await database.close()
        await embedder.aclose()


@pytest.fixture
def places(cluster, contrib, template, openai):
    """A server with pgrecall on it, as the page has it: its databases and logins under names of their own."""
    if not contrib:
        pytest.skip(NEEDS_CONTRIB)
    suffix = secrets.token_hex(4)
    logins = {name: f"{name}_{suffix}" for name in ("nightly", "acme_backup")}
    with cloned(cluster, template) as app, cloned(cluster, template) as elsewhere:
        for tenant in ("acme", "umbra"):
            fill(cluster, app, openai.url, tenant)
        fill(cluster, elsewhere, openai.url, "umbra")
        names = {"app": app, "elsewhere": elsewhere, "restored": f"restored_{suffix}", "again": f"again_{suffix}"}
        users = {"postgres": None, "app_owner": local.OWNER, "app_service": local.SERVICE} | logins
        made = {
            f"postgresql://{user}@db/{name}": shlex.quote(cluster.url(there, login))
            for user, login in users.items()
            for name, there in names.items()
        }
        made |= {"postgresql://postgres@db/postgres": shlex.quote(cluster.admin)}
        made |= {f"DATABASE {name} ": f"DATABASE {names[name]} " for name in ("restored", "again")}
        made |= {f"'{name}'": f"'{login}'" for name, login in logins.items()}
        made |= {f"ROLE {name} ": f"ROLE {login} " for name, login in logins.items()}
        made |= {"OWNER app_owner": f"OWNER {local.OWNER}"}
        try:
            yield names, made
        finally:
            with psycopg.connect(cluster.admin, autocommit=True) as admin:
                for name in ("restored", "again"):
                    admin.execute(
                        sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(names[name]))
                    )
                for login in logins.values():
                    admin.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(login)))


def test_the_page_on_backups_brings_back_what_was_there(root, tmp_path, cluster, openai, places):
    names, replaced = places
    shell = Shell(root, tmp_path)
    shell.places = replaced
    owner = {name: cluster.url(there, local.OWNER) for name, there in names.items()}
    service = {name: cluster.url(there, local.SERVICE) for name, there in names.items()}
    shell.run(
        f"export OPENAI_API_KEY=sk-test OPENAI_BASE_URL={openai.url} PGRECALL_EMBEDDING_MODEL=text-embedding-3-small "
        "PGRECALL_EMBEDDING_DIMENSIONS=64"
    )
    page = (root / "docs/backup.md").read_text()
    before = {(table, tenant): rows(owner["app"], table, tenant) for table in TABLES for tenant in ("acme", "umbra")}
    assert all(before.values())
    whole = {table: rows(owner["app"], table) for table in OTHERS}
    theirs = {table: rows(owner["elsewhere"], table) for table in TABLES}
    hits = {tenant: asyncio.run(found(service["app"], openai.url, tenant)) for tenant in ("acme", "umbra")}
    assert all(hits.values())

    # Up to the last restore; then the tenant's rows are spoilt, and it brings them back.
    head, mark, rest = page.rpartition("To go back to what the dump holds")
    check(shell, head)
    with psycopg.connect(owner["app"], autocommit=True) as connection:
        for statement in SPOIL:
            connection.execute(statement)
    check(shell, mark + rest)

    for name in ("restored", "again", "app"):
        for (table, tenant), expected in before.items():
            assert rows(owner[name], table, tenant) == expected, (name, table, tenant)
        for tenant, expected in hits.items():
            assert asyncio.run(found(service[name], openai.url, tenant)) == expected, (name, tenant)
    for name in ("restored", "again"):
        for table, expected in whole.items():
            assert rows(owner[name], table) == expected, (name, table)
    for table in TABLES:  # beside another tenant, which it did not touch
        assert rows(owner["elsewhere"], table, "acme") == before[table, "acme"], table
        assert rows(owner["elsewhere"], table, "umbra") == theirs[table], table
    assert asyncio.run(found(service["elsewhere"], openai.url, "acme")) == hits["acme"]


def test_the_backup_role_reads_every_row_of_every_table(places, cluster, openai):
    """A table without a policy for it would be dumped empty, and nobody told."""
    names, _ = places
    with psycopg.connect(cluster.url(names["app"]), autocommit=True) as admin:
        tables = admin.execute(
            "select oid::regclass::text from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')"
        ).fetchall()
        assert ("sources",) in tables
        for (table,) in tables:
            everything = admin.execute(f"select count(*) from {table}").fetchone()
            with admin.transaction(force_rollback=True):
                admin.execute("set local role pgrecall_backup")
                assert admin.execute(f"select count(*) from {table}").fetchone() == everything, table
