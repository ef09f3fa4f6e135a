"""The preflight finds every way in which a database can differ from what the migrations made, and its mends mend it."""

import asyncio
import io
import re
import time

import psycopg
import pytest
from alembic import command
from psycopg import sql
from psycopg.rows import dict_row

from app import catalogue, isolation, local, schema
from app.database import Database
from app.errors import SchemaTooOld, Unsafe
from app.tables import bearing
from migrations.isolation import made, written
from tests.conftest import PATIENCE, cloned, statements

TAMPERINGS = [
    ("alter policy app_sources on sources using (true)", "app_sources on sources is .*using true with check"),
    (
        "alter policy app_documents on documents with check (true)",
        "app_documents on documents is .*with check true",
    ),
    ("alter policy analyst_documents on documents using (true)", "analyst_documents on documents is .*using true"),
    (
        (
            "alter policy app_embedding_cache on embedding_cache using "
            "(tenant_id = current_setting('pgrecall.tenant_id', true) or tenant_id = 'acme')"
        ),
        "app_embedding_cache on embedding_cache is",
    ),
    ("alter policy backup_sources on sources to pgrecall_backup, pgrecall_analyst", "backup_sources on sources is"),
    (
        "alter policy analyst_term_statistics on term_statistics to public",
        "analyst_term_statistics on term_statistics is",
    ),
    (
        (
            "drop policy app_document_terms on document_terms; create policy app_document_terms on document_terms as restrictive "
            "to pgrecall_app using (tenant_id = current_setting('pgrecall.tenant_id', true))"
        ),
        "app_document_terms on document_terms is",
    ),
    ("drop policy app_sources on sources", "the policy app_sources on sources is missing"),
    ('create policy "Let us in" on documents to public using (true)', "the policy Let us in on documents, .* none of"),
    (
        "create policy more on embedding_claims for delete to pgrecall_app using (true)",
        "the policy more on embedding_claims",
    ),
    (
        "alter table collection_statistics disable row level security",
        "row-level security is off on collection_statistics",
    ),
    ("alter table analyst_tenants disable row level security", "row-level security is off on analyst_tenants"),
    (
        (
            "create or replace view tenant_documents as select tenant_id, id, chunk_key, doc_type, metadata, created_at, content, "
            "embedding from documents"
        ),
        "the view tenant_documents reads: SELECT",
    ),
    (
        "create or replace view tenant_sources as select s.* from sources s where true",
        "the view tenant_sources reads: SELECT",
    ),
    ("alter view document_chunks reset (security_invoker)", "the view document_chunks has the options: none"),
    ("alter view ingest_status set (security_invoker = false)", "the view ingest_status has the options"),
    ("alter view tenant_documents set (security_barrier = true)", "the view tenant_documents has the options"),
    ("drop view ingest_status", "the view ingest_status is missing"),
    ("grant truncate on documents to pgrecall_app", "pgrecall_app has TRUNCATE on documents"),
    ("grant select on sources to public", "public has SELECT on sources"),
    ("grant select on analyst_tenants to pgrecall_app", "pgrecall_app has SELECT on analyst_tenants"),
    ("grant select (content) on sources to pgrecall_worker", "pgrecall_worker has SELECT .*content.* on sources"),
    ("grant update on sources to pgrecall_worker", "pgrecall_worker has UPDATE on sources"),
    (
        "grant insert, update (doc_type) on documents to pgrecall_analyst",
        "pgrecall_analyst has INSERT, UPDATE .doc_type. on",
    ),
    ("revoke select on tenant_documents from pgrecall_app", "pgrecall_app lacks SELECT on tenant_documents"),
    ("revoke select (state) on sources from pgrecall_worker", "pgrecall_worker lacks SELECT .*state.* on sources"),
    (
        "alter function learn_terms(text, text[], text[]) security definer",
        "learn_terms.* runs with the rights of its owner",
    ),
    ("alter procedure fill_terms(integer) security definer", "fill_terms.integer. runs with the rights of its owner"),
    (
        "alter function text_language() set search_path = evil, public",
        "text_language.. runs under search_path=evil, public",
    ),
    ("revoke execute on function chunk_terms(text) from public", "public lacks EXECUTE on chunk_terms.text."),
    (
        "grant execute on function search_statement(text) to pgrecall_app",
        "pgrecall_app has EXECUTE on search_statement",
    ),
    (
        (
            "do $$ begin execute replace(pg_get_functiondef('similar_documents(text, text, integer)'::regprocedure), "
            "'d.tenant_id = $1 and ', ''); end $$"
        ),
        "the function similar_documents.* was replaced",
    ),
    (
        (
            "create or replace function find_key(given_prefix text) returns table (key_hash bytea, tenant_id text, scopes text[], "
            "expires_in double precision, revoked boolean, requests_per_minute bigint, concurrent_streams bigint, "
            "max_rows bigint, tokens_per_day bigint) language sql stable security definer "
            "set search_path = pg_catalog, public, pg_temp as 'select sha256(''x''), ''umbra'', array[''admin''], 9, false, 9, 9, 9, 9'"
        ),
        "the function find_key.text. was replaced",
    ),
    (
        (
            "create or replace function forget_terms(tenant text, ids text[], keys text[] default null) returns bigint "
            "language sql begin atomic select 1::bigint; end"
        ),
        "the function forget_terms.* was replaced",
    ),
    (
        (
            "create or replace function tenant_terms(tenant_id text, terms tsvector) returns tsvector "
            "language sql immutable strict parallel safe cost 1000 as 'select terms'"
        ),
        "the function tenant_terms.* was replaced",
    ),
    (
        (
            "create or replace function chunk_terms(content text) returns tsvector language plpgsql immutable strict "
            "parallel safe as $$ begin return ''; end $$"
        ),
        "the function chunk_terms.text. was replaced",
    ),
    ("drop function similar_documents(text, text, integer)", "the function similar_documents.* is missing"),
    ("alter function search_statement(text) volatile", "search_statement.text. is plpgsql volatile"),
    (
        "alter function chunk_terms(text) called on null input parallel unsafe",
        "chunk_terms.text. is sql immutable",
    ),
]


@pytest.mark.parametrize(("sabotage", "message"), TAMPERINGS, ids=[each[0][:60] for each in TAMPERINGS])
async def test_a_difference_is_found_and_named_and_its_mend_mends_it(database, owner, settings, sabotage, message):
    await schema.preflight(database)
    owner.execute(sabotage)
    with pytest.raises(Unsafe, match=message):
        await schema.preflight(database)
    for _ in range(2):  # a view that was dropped lacks its rights when it is made again
        for fault in isolation.faults(rules(owner)):
            for statement in statements_of(fault.mend, settings):
                owner.execute(statement.encode())
    await schema.preflight(database)


def statements_of(mend, settings):
    """What a mend says to run: itself, or a part of what a migration prints."""
    if not (named := re.fullmatch(r"run the CREATE of (\w+) that `alembic upgrade (\w+:\w+) --sql` prints", mend)):
        return [mend]
    config = schema.config(settings)
    config.output_buffer = io.StringIO()
    command.upgrade(config, named[2], sql=True)
    printed = statements(config.output_buffer.getvalue(), contrib=True)
    return [each for each in printed if re.match(rf"create or replace (function|procedure) {named[1]}\(", each.strip())]


def rules(connection):
    """What the database has, as the preflight sees it."""
    statement = catalogue.preflight()
    row = connection.cursor(row_factory=dict_row).execute(statement.sql.encode(), statement.values).fetchone()
    return catalogue.read(row, connection.execute("select version_num from pgrecall_revision").fetchone()[0])


@pytest.mark.parametrize(
    ("grant", "revoke", "message"),
    [
        ("alter role {app} bypassrls", "alter role {app} nobypassrls", "pgrecall_app.* bypasses row-level security"),
        ("grant {backup} to {app}", "revoke {backup} from {app}", "pgrecall_app.* has the rights of pgrecall_backup"),
        (
            "grant {analyst} to {worker}",
            "revoke {analyst} from {worker}",
            "pgrecall_worker.* has the rights of pgrecall_ana",
        ),
        (
            "grant {owner} to {worker}",
            "revoke {owner} from {worker}",
            "pgrecall_worker.* has the rights of the tables' own",
        ),
        ("alter role {analyst} bypassrls", "alter role {analyst} nobypassrls", "pgrecall_analyst.* bypasses row-level"),
    ],
)
async def test_a_role_that_reaches_further_is_found(
    settings, cluster, monkeypatch, grant, revoke, message, database_name
):
    """Roles are the cluster's: the others' tests must not see it, so it happens to roles of this test's own."""
    suffix = database_name.removeprefix("test")
    named = {each: f"pgrecall_{each}{suffix}" for each in ("app", "worker", "analyst", "backup")}
    names = {f"pgrecall_{each}": name for each, name in named.items()}
    named["owner"] = local.OWNER
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        for name in names.values():
            admin.execute(sql.SQL("create role {} nologin").format(sql.Identifier(name)))
        try:
            admin.execute(grant.format(**named).encode())
            with psycopg.connect(cluster.url(database_name, local.SERVICE), row_factory=dict_row) as login:
                admin.execute(sql.SQL("grant {} to pgrecall_service").format(sql.Identifier(named["app"])))
                statement = catalogue.preflight()
                values = statement.values | {each: named[each] for each in ("app", "worker", "backup")}
                row = login.execute(statement.sql.encode(), values | {"roles": list(names.values())}).fetchone()
            with pytest.raises(Unsafe, match=message):
                catalogue.check_roles(row)
        finally:
            admin.execute(revoke.format(**named).encode())
            for name in names.values():
                admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def test_what_is_expected_is_what_the_migrations_made(cluster, template, settings):
    with cloned(cluster, template) as name:
        rules = made(cluster.url(name), schema.head())
    assert written(rules) == isolation.FILE.read_text(), "run `make isolation` and look at what changed"


def test_every_table_that_holds_tenants_rows_is_kept_under_row_level_security():
    kept = {name for name, relation in isolation.expected().relations.items() if relation.secured}
    assert {table.name for table in bearing()} <= kept


async def test_at_another_revision_only_what_opens_the_service_is_refused(database, owner):
    owner.execute("update pgrecall_revision set version_num = '9999'")
    for harmless in (
        "alter table sources add column novel text",
        (
            "create or replace view tenant_collection_statistics as select tenant_id, chunks, length, 1 as novel "
            "from collection_statistics where tenant_id = current_setting('pgrecall.tenant_id', true)"
        ),
        "drop policy backup_sources on sources",
        "create policy worker_sources_update on sources for update to pgrecall_worker using (true)",
        "grant select on analyst_tenants to pgrecall_worker",
        (
            "create policy app_sources_select on sources for select to pgrecall_app "
            "using (tenant_id = current_setting('pgrecall.tenant_id', true))"
        ),
    ):
        owner.execute(harmless)
        assert await schema.preflight(database) == "9999"
    for harm, mend in (
        (
            "alter policy app_sources on sources using (true)",
            "alter policy app_sources on sources using (tenant_id = current_setting('pgrecall.tenant_id', true))",
        ),
        ("alter table documents disable row level security", "alter table documents enable row level security"),
        ("grant truncate on documents to pgrecall_app", "revoke truncate on documents from pgrecall_app"),
        (
            "alter view document_chunks set (security_invoker = false)",
            "alter view document_chunks set (security_invoker = true)",
        ),
        ("create policy x on sources to pgrecall_app using (true)", "drop policy x on sources"),
        (
            (
                "create or replace view tenant_collection_statistics as select tenant_id, chunks, length, 1 as novel "
                "from collection_statistics where true"
            ),
            (
                "create or replace view tenant_collection_statistics as select tenant_id, chunks, length, 1 as novel "
                "from collection_statistics where tenant_id = current_setting('pgrecall.tenant_id', true)"
            ),
        ),
    ):
        owner.execute(harm)
        with pytest.raises(Unsafe):
            await schema.preflight(database)
        owner.execute(mend)
    await schema.preflight(database)


async def test_while_a_migration_runs_nothing_is_put_into_words_and_no_lock_is_waited_for(
    database, owner, settings, owner_url
):
    with psycopg.connect(owner_url) as migrator:
        migrator.execute("select pg_advisory_lock(%s)", (isolation.MIGRATOR_LOCK,))
        migrator.commit()
        migrator.execute("lock table tenant_sources, tenant_documents, document_chunks in access exclusive mode")
        migrator.execute("alter policy app_sources on sources using (true)")
        await asyncio.wait_for(schema.preflight(database), PATIENCE)
        owner.execute("alter table embedding_cache disable row level security")
        with pytest.raises(Unsafe, match="row-level security is off on embedding_cache"):
            await schema.preflight(database)
        owner.execute("alter table embedding_cache enable row level security")
        migrator.commit()
        # A session that is closed lets go of its locks only when the server has come to notice.
        migrator.execute("select pg_advisory_unlock(%s)", (isolation.MIGRATOR_LOCK,))
        migrator.commit()
    with pytest.raises(Unsafe, match="app_sources on sources is"):
        await schema.preflight(database)


async def test_a_login_that_could_not_migrate_is_not_believed_to(database, owner, cluster, database_name):
    owner.execute("alter policy app_sources on sources using (true)")
    for login in (local.ANALYST, local.SERVICE):
        with psycopg.connect(cluster.url(database_name, login)) as pretender:
            pretender.execute("select pg_advisory_lock(%s)", (isolation.MIGRATOR_LOCK,))
            with pytest.raises(Unsafe, match="app_sources on sources is"):
                await schema.preflight(database)


async def test_a_function_that_is_not_the_owners_is_found(database, owner, cluster, database_name, settings):
    function = "search_statement(text)"
    with psycopg.connect(cluster.url(database_name), autocommit=True) as admin:
        admin.execute(f"alter function {function} owner to {local.ANALYST}")
        with pytest.raises(Unsafe, match=f"search_statement.text. belongs to {local.ANALYST}"):
            await schema.preflight(database)
        for fault in isolation.faults(rules(owner)):
            admin.execute(fault.mend.encode())
    await schema.preflight(database)


async def test_a_table_that_somebody_holds_for_themselves_is_looked_at_without_its_words(database, owner, owner_url):
    with psycopg.connect(owner_url) as other:
        other.execute("lock table embedding_cache in access exclusive mode")
        await schema.preflight(database)
        owner.execute("alter table sources disable row level security")
        with pytest.raises(Unsafe, match="row-level security is off on sources"):
            await schema.preflight(database)


async def test_words_read_while_a_migration_is_committed_are_read_again(database, owner, monkeypatch):
    owner.execute("grant truncate on documents to pgrecall_app")
    real, looks = schema.revision, []

    async def mended(*arguments, **options):
        looks.append(1)
        owner.execute("revoke truncate on documents from pgrecall_app")
        return await real(*arguments, **options)

    monkeypatch.setattr(schema, "revision", mended)
    await schema.preflight(database)
    assert len(looks) == 2


async def test_what_others_do_with_their_own_is_left_alone(database, owner, cluster):
    role = f"bi_{time.monotonic_ns()}"
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(f"create role {role}")
        try:
            owner.execute(f"grant select on documents, document_chunks to {role}")
            owner.execute(f"create policy theirs on documents for select to {role} using (tenant_id = 'acme')")
            owner.execute("create table theirs (tenant_id text, note text)")
            owner.execute("create function theirs() returns integer language sql security definer return 1")
            owner.execute("create function chunk_terms(content integer) returns integer language sql return 1")
            await schema.preflight(database)
        finally:
            owner.execute("drop policy if exists theirs on documents")
            owner.execute(f"revoke all on documents, document_chunks from {role}")
            admin.execute(f"drop role {role}")


async def test_an_empty_database_is_told_what_to_run(settings, cluster, template):
    with cloned(cluster, template) as name, psycopg.connect(cluster.url(name), autocommit=True) as admin:
        admin.execute("drop schema public cascade; create schema public")
        admin.execute("create extension vector")
        url = cluster.url(name, local.SERVICE)
        database = Database(settings, url)
        try:
            with pytest.raises(SchemaTooOld, match="pgrecall migrate"):
                await schema.preflight(database)
        finally:
            await database.close()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            " SELECT documents.tenant_id,\n    documents.id\n   FROM documents\n  WHERE (documents.tenant_id = current_setting('x'::text, true));",
            "SELECT tenant_id, id FROM documents WHERE (tenant_id = current_setting('x'::text, true))",
        ),
        ("SELECT s.id FROM sources s GROUP BY s.id", "SELECT id FROM sources s GROUP BY id"),
        ("SELECT a.id FROM a JOIN b ON (a.id = b.id)", "SELECT a.id FROM a JOIN b ON (a.id = b.id)"),
        ("SELECT a.id FROM a, b WHERE (a.id = b.id)", "SELECT a.id FROM a, b WHERE (a.id = b.id)"),
        (
            "SELECT (embedding OPERATOR(ext.<=>) '[1]'::ext.vector) FROM documents",
            "SELECT (embedding <=> '[1]'::vector) FROM documents",
        ),
    ],
)
def test_the_words_of_every_version_and_place_become_the_same(one, other):
    assert catalogue._unqualified(catalogue._same_words(one, "ext")) == other
