"""Extensions in a schema of their own, off the search path, as managed platforms have them."""

import io
import secrets

import numpy as np
import psycopg
import pytest
from alembic import command
from msgspec.structs import replace
from psycopg import sql

from app import documents, questions, roles, schema, search, spaces, tables
from app.__main__ import main
from app.database import Database
from app.drafts import Draft
from app.embedding import open_embedder
from app.errors import SetupError
from app.local import OWNER
from app.statements import Statement
from app.upsert import put
from tests.conftest import DIMENSIONS, settings_for, statements
from tests.database.test_models import Steps

COUNT = 260
SCHEMA = "The Extensions"


@pytest.fixture
def elsewhere(cluster, template, contrib):
    """A database whose owner may use the extensions' schema, and pass that on; its name."""
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(sql.SQL("create database {} owner {}").format(*map(sql.Identifier, (name, OWNER))))
        with psycopg.connect(cluster.url(name), autocommit=True) as inside:
            inside.execute(f'create schema "{SCHEMA}"')
            inside.execute(f'create extension vector schema "{SCHEMA}"')
            if contrib:
                inside.execute(f'create extension btree_gin schema "{SCHEMA}"')
            inside.execute(f'grant usage on schema "{SCHEMA}" to {OWNER} with grant option')
        yield name
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def settings(cluster, elsewhere, openai):
    return settings_for(
        cluster.service(elsewhere), openai.url, migration_url=cluster.url(elsewhere, OWNER), exact_rows=100
    )


@pytest.mark.parametrize("dimensions", [DIMENSIONS, 3_072])
async def test_put_search_delete_and_the_cache_work_and_nothing_stays_on_the_session(settings, openai, dimensions):
    settings = replace(settings, embedding_dimensions=dimensions, pool_size=1)
    schema.migrate(settings)
    command.check(schema.config(settings))
    database, embedder = Database(settings, settings.database_url), open_embedder(settings)
    try:
        assert (await schema.check(database, embedder)).revision == schema.head()
        vectors = np.random.default_rng(1).standard_normal((COUNT, dimensions)).astype(np.float32)
        drafts = [Draft(f"d{n:03}", f"text {n}", embedding=vector) for n, vector in enumerate(vectors)]
        await put(database, embedder, settings, "acme", drafts)
        walked = await search.search(database, settings, "acme", vectors[7], top_k=1)
        assert (walked.hits[0].id, walked.scan) == ("d007", search.Scan("index", kind=tables.default_kind(dimensions)))
        with psycopg.connect(settings.migration_url, autocommit=True) as owner:
            text = "[" + ",".join(map(str, vectors[7])) + "]"
            asked = "select id, scan from search_documents('acme', %s, 1)"
            assert owner.execute(asked, (text,)).fetchall() == [("d007", "exact")]
            # Told that it is large, the tenant has its index walked, which names types and operators of that schema.
            owner.execute("insert into collection_statistics (tenant_id, chunks, length) values ('acme', 99999, 99999)")
            assert owner.execute(asked, (text,)).fetchall() == [("d007", "index")]
            fused = owner.execute("select scan from hybrid_search('acme', 'text', %s, 1)", (text,)).fetchall()
            assert fused in ([("index",)], [("completed",)])
        await put(database, embedder, settings, "umbra", [Draft("a", "Otters eat fish.")])
        await put(database, embedder, settings, "umbra", [Draft("b", "Otters eat fish.")])
        assert [call.body["input"] for call in openai.calls] == [["Otters eat fish."]]
        question = await questions.vector(embedder, "Otters eat fish.")
        measured = await search.search(database, settings, "umbra", question)
        assert ([hit.id for hit in measured.hits], measured.scan) == (["a", "b"], search.Scan("exact"))
        await documents.remove(database, "umbra", "a")
        assert [hit.id for hit in (await search.search(database, settings, "umbra", question)).hits] == ["b"]
        path = Statement("search path", "select current_setting('search_path') as path", {})
        assert (await database.fetch("umbra", [path]))[0][0]["path"] == f'"$user", public, "{SCHEMA}"'
        async with database._primary.lend() as lent:
            assert (await (await lent.driver.execute("show search_path")).fetchone()) == ('"$user", public',)
    finally:
        await database.close()
        await embedder.aclose()


def test_the_sql_for_a_dba_finds_pgvector_by_itself(settings, contrib):
    config = schema.config(settings)
    config.output_buffer = printed = io.StringIO()
    command.upgrade(config, "head", sql=True)
    with psycopg.connect(settings.migration_url, autocommit=True) as owner:
        for statement in statements(printed.getvalue(), contrib):
            owner.execute(statement.encode())
    command.check(schema.config(settings))


def test_the_command_line_works(settings, monkeypatch, tmp_path, capsys):
    for name, value in {
        "DATABASE_URL": settings.database_url,
        "PGRECALL_MIGRATION_URL": settings.migration_url,
        "OPENAI_BASE_URL": settings.openai_base_url,
        "PGRECALL_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "otters.txt").write_text("Otters eat fish.")
    judged = tmp_path / "judged.jsonl"
    judged.write_text('{"query": "Otters eat fish.", "expected_doc_ids": ["otters.txt"], "tenant_id": "acme"}\n')
    for arguments in (
        ["migrate"],
        ["ingest", str(tmp_path / "otters.txt"), "--tenant", "acme"],
        ["search", "fish", "--tenant", "acme", "--json"],
        ["evaluate", str(judged), "--fail-under", "recall@10=1"],
        ["status"],
    ):
        assert main(arguments) == 0, capsys.readouterr()


async def test_without_the_right_to_use_the_schema_the_message_says_what_to_grant(cluster, elsewhere, settings):
    with psycopg.connect(cluster.url(elsewhere), autocommit=True) as admin:
        admin.execute(f'revoke grant option for usage on schema "{SCHEMA}" from {OWNER}')
        with pytest.raises(SetupError, match=f'{SCHEMA}, which pgrecall_app may not use.*GRANT USAGE ON SCHEMA "'):
            schema.migrate(settings)
        admin.execute(f'grant usage on schema "{SCHEMA}" to {", ".join(roles.ROLES)}')
        schema.migrate(settings)
        admin.execute(f'revoke usage on schema "{SCHEMA}" from pgrecall_app')
    database = Database(settings, settings.database_url)
    with pytest.raises(SetupError, match=f'may not use the schema "{SCHEMA}".*GRANT USAGE ON SCHEMA "'):
        await schema.preflight(database)
    await database.close()


async def test_the_model_changes_to_another_length(settings, openai):
    schema.migrate(settings)
    database, embedder = Database(settings, settings.database_url), open_embedder(settings)
    steps = Steps(settings.migration_url, database, settings, embedder, openai.url)
    try:
        await steps.put(Draft("a", "Otters eat fish."))
        await steps.prepare()
        await schema.preflight(database)
        await steps.put(Draft("b", "Herons eat frogs."))
        await steps.switch()
        await schema.preflight(database)
        assert (await steps.find("who eats fish"))[1][0].id == "a"
        await steps.rollback()
        await steps.switch()
        await steps.finish()
        await schema.preflight(database)
        assert (await steps.find("who eats frogs"))[1][0].id == "b"
        assert command.check(schema.config(settings)) is None
    finally:
        await spaces.close(database)
        await database.close()
        await embedder.aclose()
