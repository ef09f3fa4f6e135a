"""The kind of vector index changes while searches run: nobody is short, what is interrupted goes on, the old one goes."""

import asyncio

import numpy as np
import psycopg
import pytest
from alembic import command
from msgspec.structs import replace

from app import indexes, layout, schema, search
from app.errors import BadInput, SetupError
from tests.conftest import DIMENSIONS, PATIENCE

COUNT = 700


@pytest.fixture
def rows(owner):
    vectors = np.random.default_rng(3).standard_normal((COUNT, DIMENSIONS)).astype(np.float32)
    owner.execute(
        "insert into sources (tenant_id, id, content, chunk_keys, start_offsets, state) "
        "select 't', 'd' || n, 'x', '{k}', '{0}', 'ready' from generate_series(0, %s) n",
        (COUNT - 1,),
    )
    with owner.cursor().copy("copy documents (tenant_id, id, chunk_key, content, embedding) from stdin") as copy:
        for n, vector in enumerate(vectors):
            copy.write_row(("t", f"d{n}", "k", "x", "[" + ",".join(map(str, vector)) + "]"))
    return vectors


def quiet(_what, _share):
    pass


@pytest.mark.parametrize("kind", ["half", "binary"])
async def test_searches_run_through_a_change_and_use_the_new_index_after_it(
    database, settings, owner_url, rows, monkeypatch, kind
):
    monkeypatch.setattr(layout, "FRESH", 0.2)
    query = rows[5]
    done = asyncio.Event()
    kinds = set()

    async def keep_searching():
        while not done.is_set():
            found = await search.search(database, replace(settings, exact_rows=100), "t", query, top_k=10)
            assert len(found.hits) == 10
            assert found.hits[0].id == "d5"
            kinds.add(found.scan.kind)

    searching = asyncio.create_task(keep_searching())
    try:
        kept = await asyncio.to_thread(indexes.change, owner_url, kind, oversampling=None, told=quiet, patience=1.0)
        async with asyncio.timeout(PATIENCE):
            while kind not in kinds and not searching.done():  # noqa: ASYNC110  what the other task finds
                await asyncio.sleep(0.02)
    finally:
        done.set()
        await searching
    assert kinds == {"full", kind}
    assert [(each.kind, each.state, each.valid) for each in kept] == [(kind, "active", 16)]


def test_what_an_interrupted_change_has_built_stays_and_what_is_invalid_is_made_anew(
    owner, owner_url, cluster, database_name, rows
):
    def interrupt(what, _share):
        if "half_05" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        indexes.change(owner_url, "half", oversampling=None, told=interrupt, patience=0)
    states = {each.kind: (each.state, each.valid) for each in indexes.listed(owner_url)}
    assert states == {"full": ("active", 16), "half": ("building", 5)}
    made = owner.execute("select oid from pg_class where relname = 'documents_embedding_half_00_idx'").fetchone()
    with psycopg.connect(cluster.url(database_name), autocommit=True) as admin:
        admin.execute(
            "update pg_index set indisvalid = false where indexrelid = 'documents_embedding_half_01_idx'::regclass"
        )
    kept = indexes.change(owner_url, "half", oversampling=6, told=quiet, patience=0)
    assert [(each.kind, each.state, each.valid, each.oversampling) for each in kept] == [("half", "active", 16, 6.0)]
    assert (
        owner.execute("select oid from pg_class where relname = 'documents_embedding_half_00_idx'").fetchone() == made
    )


def test_two_changes_at_once_are_refused_and_so_is_what_cannot_be(owner_url):
    with psycopg.connect(owner_url, autocommit=True) as other:
        other.execute("select pg_advisory_lock(%s)", (indexes.OPERATION_LOCK,))
        with pytest.raises(SetupError, match="another"):
            indexes.change(owner_url, "half", oversampling=None, told=quiet, patience=0)
    with pytest.raises(BadInput, match="1 to 100"):
        indexes.change(owner_url, "half", oversampling=0.5, told=quiet, patience=0)


def test_the_schema_check_is_clean_with_another_kind(owner_url, settings, rows):
    indexes.change(owner_url, "binary", oversampling=None, told=quiet, patience=0)
    config = schema.config(replace(settings, migration_url=owner_url))
    assert command.check(config) is None
