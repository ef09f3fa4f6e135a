"""Migrations: with SQL for a DBA, two at once, without rights, and against the models."""

import io
import secrets
import subprocess
import sys
import threading

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from msgspec.structs import replace
from psycopg import sql
from sqlalchemy import Column, Text

from app import local, schema, tables
from app.errors import SetupError
from tests.conftest import NEEDS_CONTRIB, PATIENCE, cloned, passwords, settings_for, statements
from tests.migration.catalogue import ALEMBICS, snapshot


@pytest.fixture
def empty(cluster):
    """A database with roles and extensions and nothing else; its name."""
    name = f"test_{secrets.token_hex(6)}"
    local.bootstrap(cluster.admin, name)
    passwords(cluster)
    yield name
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def settings(cluster, empty):
    return settings_for(None, "http://127.0.0.1:9/v1", migration_url=cluster.url(empty, local.OWNER))


def test_vectors_stay_in_the_row(cluster, template):
    with cloned(cluster, template) as name, psycopg.connect(cluster.url(name)) as admin:
        column = "select attstorage from pg_attribute where attrelid = 'documents'::regclass and attname = 'embedding'"
        assert admin.execute(column).fetchone() == ("m",)


def test_there_is_one_head_and_it_is_at_least_what_the_release_needs(settings):
    (head,) = ScriptDirectory.from_config(schema.config(settings)).get_heads()
    assert head >= schema.REQUIRED


def test_downgrade_to_base_leaves_nothing_and_may_be_run_again(settings):
    config = schema.config(settings)
    for _ in range(2):
        command.upgrade(config, "head")
        command.upgrade(config, "head")
        command.downgrade(config, "base")
        command.downgrade(config, "base")
        left = snapshot(settings.migration_url)
        assert [fact for facts in left.values() for fact in facts if ALEMBICS not in fact] == []


def test_rows_survive_what_the_next_migration_does(settings):
    config = schema.config(settings)
    command.upgrade(config, "0001")
    with psycopg.connect(settings.migration_url, autocommit=True) as owner:
        owner.execute("insert into sources (tenant_id, id, content) values ('t', 'a', 'text')")
        command.upgrade(config, "head")
        assert owner.execute("select content from sources").fetchone() == ("text",)


def test_words_of_stored_chunks_are_filled_in_without_rewriting_them_and_again_after_a_stop(settings):
    config = schema.config(settings)
    command.upgrade(config, "0001")
    with psycopg.connect(settings.migration_url, autocommit=True) as owner:
        owner.execute(
            "insert into sources (tenant_id, id, content) select 't' || n % 3, 'd' || n, '' from generate_series(1, 90) n"
        )
        owner.execute(
            "insert into documents (tenant_id, id, chunk_key, content, embedding) "
            "select tenant_id, id, 'k', 'vacuum ' || id, array_fill(1, array[64])::vector from sources"
        )
        heap = "select pg_relation_filenode('documents')"
        before = owner.execute(heap).fetchone()
        command.upgrade(config, "head")
        assert owner.execute(heap).fetchone() == before
        # As if it had been stopped while it filled: what is there stays, the rest is filled in.
        owner.execute("delete from document_terms where tenant_id = 't1'")
        owner.execute("truncate term_statistics, collection_statistics")
        owner.execute("select recount_statistics(t) from unnest(array['t0', 't1', 't2']) t")
        owner.execute("update pgrecall_revision set version_num = '0001'")
        command.upgrade(config, "head")
        assert owner.execute("select count(*) from document_terms").fetchone() == (90,)
        counted = "select tenant_id, sum(chunks) from term_statistics where term = 'vacuum' group by 1 order by 1"
        assert owner.execute(counted).fetchall() == [("t0", 30), ("t1", 30), ("t2", 30)]


def test_the_language_is_that_of_the_setting_and_one_that_does_not_exist_is_refused(settings):
    with pytest.raises(SetupError, match='text search configuration "klingon" does not exist'):
        schema.migrate(replace(settings, text_language="klingon"))
    schema.migrate(replace(settings, text_language="german"))
    with psycopg.connect(settings.migration_url) as owner:
        assert owner.execute("select chunk_terms('die Bücher')::text").fetchone() == ("'buch':2",)


@pytest.mark.parametrize("dimensions", [2_000, 2_001, 4_000])
def test_check_is_clean_after_upgrade(settings, dimensions):
    config = schema.config(replace(settings, embedding_dimensions=dimensions))
    command.upgrade(config, "head")
    assert command.check(config) is None  # raises otherwise


def test_the_index_is_half_precision_above_2000_dimensions(settings):
    config = schema.config(replace(settings, embedding_dimensions=3_072))
    command.upgrade(config, "head")
    assert command.check(config) is None
    with psycopg.connect(settings.migration_url) as owner:
        (definition,) = owner.execute(
            "select indexdef from pg_indexes where indexname = 'documents_embedding_half_00_idx'"
        ).fetchone()
    assert "halfvec(3072)) halfvec_cosine_ops" in definition


@pytest.mark.parametrize("change", ["column", "index", "comment", "type"])
def test_check_is_clean_and_dirty_when_a_model_changes(cluster, database_name, monkeypatch, change):
    url = cluster.url(database_name, local.OWNER)
    config = schema.config(settings_for(None, "http://127.0.0.1:9/v1", migration_url=url))
    assert command.check(config) is None
    real = tables.metadata_for

    def changed(dimensions, kind):
        metadata = real(dimensions + 1 if change == "type" else dimensions, kind)
        table = metadata.tables["documents"]
        if change == "column":
            table.append_column(Column("novel", Text))
        elif change == "index":
            table.indexes.discard(next(i for i in table.indexes if i.name == tables.embedding_indexes("full")[3]))
        elif change == "comment":
            table.c.content.comment = "another"
        return metadata

    monkeypatch.setattr(tables, "metadata_for", changed)
    with pytest.raises(CommandError, match="New upgrade operations detected"):
        command.check(config)


def test_offline_sql_makes_the_same_schema_and_says_what_it_waits_for(settings, contrib):
    config = schema.config(settings)
    printed = io.StringIO()
    config.output_buffer = printed
    command.upgrade(config, "head", sql=True)
    text = printed.getvalue()
    assert "set lock_timeout" in text
    assert "%%" not in text
    with psycopg.connect(settings.migration_url, autocommit=True) as owner:
        for statement in statements(text, contrib):
            owner.execute(statement.encode())
    offline = snapshot(settings.migration_url)
    online_config = schema.config(settings)
    command.check(online_config)
    command.downgrade(online_config, "base")
    command.upgrade(online_config, "head")
    assert snapshot(settings.migration_url) == offline
    command.downgrade(config, "head:base", sql=True)
    assert "drop table documents" in printed.getvalue()
    assert "%%" not in printed.getvalue()


def test_two_migrators_at_once_one_works_the_other_finds_nothing_to_do(cluster, settings, root):
    environment = {
        "PGRECALL_MIGRATION_URL": settings.migration_url,
        "OPENAI_API_KEY": "x",
        "PGRECALL_EMBEDDING_DIMENSIONS": "64",
        "PATH": "/usr/bin:/bin",
    }
    several = [
        subprocess.Popen(
            [sys.executable, "-m", "alembic", "upgrade", "head"],
            cwd=root,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in several]
    assert [process.returncode for process in several] == [0, 0], errors
    with psycopg.connect(settings.migration_url) as owner:
        assert owner.execute("select version_num from pgrecall_revision").fetchone() == (schema.head(),)


def test_a_migrator_waits_for_the_other_without_blocking_in_the_server(settings):
    with psycopg.connect(settings.migration_url, autocommit=True) as other:
        other.execute("select pg_advisory_lock(%s)", (0x7067726563616C6C,))
        waiting = threading.Thread(target=schema.migrate, args=(settings,))
        waiting.start()
        waiting.join(0.8)
        assert waiting.is_alive()
        assert other.execute(
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        ).fetchone() == (0,)
        assert other.execute("select to_regclass('documents')").fetchone() == (None,)
        other.execute("select pg_advisory_unlock_all()")
        waiting.join(PATIENCE)
        assert other.execute("select to_regclass('documents') is not null").fetchone() == (True,)


def test_a_lock_that_is_not_to_be_had_stops_the_migration_and_changes_nothing(settings):
    command.upgrade(schema.config(settings), "head")
    command.downgrade(schema.config(settings), "0001")  # above are concurrent operations, which wait
    before = snapshot(settings.migration_url)
    with psycopg.connect(settings.migration_url) as other:
        other.execute("lock table documents in access share mode")
        with pytest.raises(Exception, match="lock timeout"):
            command.downgrade(schema.config(settings), "base")
    assert snapshot(settings.migration_url) == before


def test_without_the_extension_and_the_right_to_create_it_the_error_says_what_to_ask(settings, cluster, empty):
    with psycopg.connect(cluster.url(empty), autocommit=True) as admin:
        admin.execute("drop extension vector")
    with pytest.raises(SetupError, match=r"extension vector, which this login may not create.*CREATE EXTENSION vector"):
        schema.migrate(settings)


def test_without_contrib_two_indexes_are_left_out_and_check_is_clean(settings, cluster, empty, contrib, caplog):
    command.upgrade(schema.config(settings), "head")
    assert ("does not have the extension btree_gin" in caplog.text) is not contrib
    with psycopg.connect(cluster.url(empty), autocommit=True) as admin:
        admin.execute("drop extension if exists btree_gin cascade")
        needed = admin.execute(
            "select indexname from pg_indexes where indexname ~ '_(metadata|labels)_idx$' or indexname = 'documents_terms_idx'"
        ).fetchall()
        assert needed == []
    assert command.check(schema.config(settings)) is None


def test_where_contrib_may_not_be_created_the_error_says_what_to_ask(settings, cluster, empty, contrib):
    if not contrib:
        pytest.skip(NEEDS_CONTRIB)
    with psycopg.connect(cluster.url(empty), autocommit=True) as admin:
        admin.execute(sql.SQL("alter database {} owner to current_user").format(sql.Identifier(empty)))
        admin.execute(sql.SQL("grant create on schema public to {}").format(sql.Identifier(local.OWNER)))
    with pytest.raises(SetupError, match=r"extension btree_gin, which this login may not create.*CREATE EXTENSION"):
        schema.migrate(settings)


def test_a_database_whose_locale_spoils_text_search_is_warned_of(settings, cluster, empty, caplog):
    command.upgrade(schema.config(settings), "head")
    name = sql.Identifier(empty)
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        (ctype,) = admin.execute("select datctype from pg_database where datname = %s", (empty,)).fetchone()
        assert ("takes typographic quotes for letters" in caplog.text) is (ctype in {"C", "POSIX"})
        admin.execute(sql.SQL("drop database {} with (force)").format(name))
        admin.execute(
            sql.SQL("create database {} owner {} template template0 encoding 'UTF8' lc_ctype 'C'").format(
                name, sql.Identifier(local.OWNER)
            )
        )
    with psycopg.connect(cluster.url(empty), autocommit=True) as admin:
        admin.execute("create extension vector")
    command.upgrade(schema.config(settings), "head")
    assert "takes typographic quotes for letters" in caplog.text


def test_a_login_that_is_no_superuser_migrates_where_the_extension_is(settings, cluster):
    with psycopg.connect(settings.migration_url) as owner:
        assert owner.execute("select rolsuper from pg_roles where rolname = current_user").fetchone() == (False,)
    schema.migrate(settings)


def test_everything_public_has_a_comment(cluster, template):
    uncommented = """
    select 'relation ' || c.relname from pg_class c
     where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'i') and obj_description(c.oid, 'pg_class') is null
       and c.relname <> 'pgrecall_revision' and c.relname not like '%\\_pkey' and c.relname not like 'alembic%'
       and not exists (select from pg_constraint k where k.conindid = c.oid)
    union all
    select 'column ' || c.relname || '.' || a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid
     where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v') and a.attnum > 0 and not a.attisdropped
       and c.relname <> 'pgrecall_revision' and col_description(c.oid, a.attnum) is null
    union all
    select 'function ' || p.proname from pg_proc p
     where p.pronamespace = 'public'::regnamespace and obj_description(p.oid, 'pg_proc') is null
       and not exists (select from pg_depend d where d.objid = p.oid and d.deptype = 'e')
    """
    with cloned(cluster, template) as name, psycopg.connect(cluster.url(name), autocommit=True) as admin:
        assert admin.execute(uncommented).fetchall() == []
