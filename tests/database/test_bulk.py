"""Rows that go in together are the rows that go in one by one."""

import asyncio
import struct
from datetime import UTC, datetime

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from app import bulk, packing, upsert
from app.database import Database
from app.drafts import Draft
from app.embedding import open_embedder
from tests.conftest import DIMENSIONS, THOROUGH

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(str.strip)
SENTENCES = st.lists(st.sampled_from(["The otter eats.", "Herons wait.", "Die Eule ruft."]), min_size=1, max_size=40)
METADATA = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXTS,
    max_size=3,
)
DRAFTS = st.builds(
    Draft,
    id=st.sampled_from(["a", "b/1", "ü", "d", "e", "f"]),
    content=TEXTS | SENTENCES.map(" ".join),
    title=st.none() | TEXTS,
    doc_type=st.none() | TEXTS,
    metadata=METADATA,
    created_at=st.none() | st.integers(-(2**31), 2**33).map(lambda s: datetime.fromtimestamp(s, UTC)),
    embedding=st.none() | st.integers(1, 3).map(lambda n: [float(n), *[0.5] * (DIMENSIONS - 1)]),
)
BATCHES = st.lists(st.lists(DRAFTS, min_size=1, max_size=6, unique_by=lambda draft: draft.id), min_size=1, max_size=4)


async def put(settings, tenant, batches, worthwhile):
    """The outcomes of batches, put one after the other, where so many rows are worth a statement."""
    before, bulk.WORTHWHILE = bulk.WORTHWHILE, worthwhile
    database, embedder = Database(settings, settings.database_url), open_embedder(settings)
    try:
        outcomes = [await upsert.put(database, embedder, settings, tenant, batch) for batch in batches]
        return [outcome._replace(updated_at=None) for each in outcomes for outcome in each]
    finally:
        bulk.WORTHWHILE = before
        await database.close()
        await embedder.aclose()


def rows(owner, tenant):
    """What is stored, without the moments that the clock decided."""
    moment = "case when created_at < '2020-01-01' or created_at > '2100-01-01' then created_at end"
    statements = [
        f"select id, to_jsonb(s)::jsonb - array['tenant_id', 'created_at', 'updated_at', 'ready_at'], ready_at is null, {moment} from sources s",
        f"select id, to_jsonb(d)::jsonb - array['tenant_id', 'created_at'], {moment} from documents d",
        "select id, chunk_key, terms::text, length from document_terms",
        "select term, sum(chunks) from term_statistics",
    ]
    grouped = ["", "", "", " group by term having sum(chunks) <> 0"]
    return [
        sorted(owner.execute(f"{statement} where tenant_id = %s{group}", (tenant,)).fetchall(), key=repr)
        for statement, group in zip(statements, grouped, strict=True)
    ]


def test_any_sequence_of_batches_leaves_the_same_rows_either_way(settings, owner):
    number = 0

    @hypothesis.settings(max_examples=12 * THOROUGH, deadline=None)
    @hypothesis.given(BATCHES)
    def check(batches):
        nonlocal number
        number += 1
        several = asyncio.run(put(settings, f"several-{number}", batches, 1))
        single = asyncio.run(put(settings, f"single-{number}", batches, 10**9))
        assert several == single
        assert rows(owner, f"several-{number}") == rows(owner, f"single-{number}")

    check()


async def test_more_rows_than_fit_a_statement_and_ids_that_are_taken(database, embedder, settings, owner, monkeypatch):
    monkeypatch.setattr(bulk, "AT_ONCE", 7)
    vector = [1.0, *[0.0] * (DIMENSIONS - 1)]
    drafts = [Draft(f"d{n}", f"Text {n}.", embedding=vector) for n in range(20)]
    await upsert.put(database, embedder, settings, "t", drafts[5:8])
    outcomes = await upsert.put_each(database, embedder, settings, "t", drafts)
    assert [outcome.status for outcome in outcomes] == ["created"] * 5 + ["unchanged"] * 3 + ["created"] * 12
    assert owner.execute(
        "select count(*) from documents where embedding::real[] = %s::real[]", (vector,)
    ).fetchone() == (20,)


async def test_rows_of_another_tenant_are_refused(database, owner):
    """The statement is the service's own; row-level security holds all the same."""
    row = {
        "tenant_id": "theirs",
        "id": "x",
        "chunk_key": "k",
        "doc_type": None,
        "metadata": {},
        "created_at": datetime.now(UTC),
        "content": "text",
        "embedding": np.ones(DIMENSIONS, np.float32),
    }
    with pytest.raises(Exception, match="row-level security"):
        async with database.write("mine") as connection:
            await bulk.add_chunks(connection, "theirs", [row])
    assert owner.execute("select count(*) from documents").fetchone() == (0,)


def test_nothing_packed_is_an_empty_array():
    assert packing.texts([]) == struct.pack(">iiI", 0, 0, packing.TEXT) == packing.texts(iter(()))
    assert packing.vectors([], 99) == struct.pack(">iiI", 0, 0, 99)
