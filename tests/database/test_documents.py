"""Putting, reading and deleting documents in the real database."""

import asyncio
import dataclasses
from datetime import UTC, datetime

import numpy as np
import pytest
from msgspec.structs import replace

from app import documents, filters
from app.conditions import Conditions
from app.drafts import Draft
from app.errors import BadInput, EmbeddingFailed, NotFound, TooLarge, VersionConflict
from app.meter import Meter
from app.outcomes import Fault
from app.tags import tag
from app.upsert import put, put_each

PROSE = " ".join(
    f"Sentence number {n} tells of the {word} that was seen near the {place}."
    for n, (word, place) in enumerate(
        (w, p)
        for w in ("heron", "otter", "badger", "lynx", "marten", "ermine")
        for p in ("mill", "ford", "weir", "quay", "lock", "ferry")
    )
)


@pytest.fixture
def write(database, embedder, settings):
    async def _write(*drafts, tenant="acme", **options):
        return await put(database, embedder, settings, tenant, drafts, **options)

    return _write


def rows(owner, tenant="acme", document_id="a"):
    return dict(
        owner.execute(
            "select chunk_key, xmin::text from documents where tenant_id = %s and id = %s", (tenant, document_id)
        ).fetchall()
    )


async def test_a_new_document_is_created_and_can_be_read_back_to_the_character(write, database, owner):
    text = "Otters swim.\r\n\r\nThey eat fish — “daily”. 🦦\n" + PROSE
    (outcome,) = await write(Draft("a", text, doc_type="note", metadata={"lang": "en"}, title="Otters"))
    assert outcome.status == "created"
    assert outcome.embedded == len(rows(owner)) > 1
    document = await documents.get(database, "acme", "a")
    assert (document.content, document.doc_type, document.metadata, document.title) == (
        text,
        "note",
        {"lang": "en"},
        "Otters",
    )
    assert document.version == 1
    assert document.state == "ready"
    chunks = owner.execute("select content, start_offset from document_chunks order by chunk_index").fetchall()
    assert all(text[start : start + len(chunk)] == chunk for chunk, start in chunks)
    assert [start for _, start in chunks] == document.start_offsets


async def test_the_same_document_again_writes_nothing_and_asks_the_model_nothing(write, owner, openai):
    draft = Draft("a", PROSE, metadata={"n": 1, "f": 1e22, "g": 1e23, "h": 1e308, "deep": {"x": [1, True, None]}})
    await write(draft)
    before, calls = owner.execute("select xmin::text, updated_at from sources").fetchall(), len(openai.calls)
    (outcome,) = await write(draft)
    assert (outcome.status, outcome.embedded, outcome.removed, outcome.version) == ("unchanged", 0, 0, 1)
    assert owner.execute("select xmin::text, updated_at from sources").fetchall() == before
    assert len(openai.calls) == calls


async def test_changed_text_keeps_the_rows_of_unchanged_chunks(write, owner, openai):
    await write(Draft("a", PROSE))
    before = rows(owner)
    (outcome,) = await write(Draft("a", "A new sentence stands at the very start. " + PROSE))
    after = rows(owner)
    assert outcome.status == "updated"
    assert outcome.reused == len([key for key in before if after.get(key) == before[key]]) >= len(before) - 2
    assert outcome.removed == len(before.keys() - after.keys())
    assert outcome.embedded == len(after.keys() - before.keys()) <= 2
    assert len(openai.embedded) == len(before) + outcome.embedded


async def test_a_sentence_at_the_start_of_200_chunks_rewrites_at_most_two(write, owner):
    text = "\n\n".join(
        " ".join(
            f"Paragraph {p} says in sentence {s} that {w} matter a great deal to everyone." for s, w in enumerate(words)
        )
        for p in range(120)
        for words in [
            ("birds fish trees rocks rivers clouds stars seeds roots winds tides moons" * (1 + p % 2)).split()
        ]
    )
    await write(Draft("a", text))
    before = rows(owner)
    assert len(before) >= 190
    await write(Draft("a", "Something was added. " + text))
    after = rows(owner)
    rewritten = [key for key in after if after[key] != before.get(key)]
    assert len(rewritten) <= 2


async def test_metadata_alone_changed_is_an_update_without_embedding(write, owner, openai):
    await write(Draft("a", PROSE, metadata={"v": 1}))
    asked = len(openai.calls)
    (outcome,) = await write(Draft("a", PROSE, metadata={"v": 2}, doc_type="note"))
    assert (outcome.status, outcome.embedded, outcome.removed) == ("updated", 0, 0)
    assert len(openai.calls) == asked
    assert owner.execute("select distinct metadata ->> 'v', doc_type from documents").fetchall() == [("2", "note")]


@pytest.mark.parametrize(
    ("old", "new"), [({"x": 1}, {"x": True}), ({"x": 1}, {"x": "1"}), ({"x": None}, {}), ({"x": 0}, {"x": False})]
)
async def test_metadata_of_another_type_is_a_change(write, old, new):
    await write(Draft("a", "text", metadata=old))
    assert (await write(Draft("a", "text", metadata=new)))[0].status == "updated"


async def test_one_and_one_point_zero_are_the_same_number(write):
    await write(Draft("a", "text", metadata={"x": 1}))
    assert (await write(Draft("a", "text", metadata={"x": 1.0})))[0].status == "unchanged"


async def test_put_replaces_omitted_fields_become_empty_and_created_at_stays(write, database):
    born = datetime(2020, 2, 29, 12, tzinfo=UTC)
    await write(Draft("a", "text", doc_type="x", metadata={"k": 1}, title="t", created_at=born))
    await write(Draft("a", "other"))
    document = await documents.get(database, "acme", "a")
    assert (document.doc_type, document.metadata, document.title, document.created_at) == (None, {}, None, born)
    assert document.version == 2


async def test_a_moved_date_reaches_the_chunks(write, owner):
    moved = datetime(2021, 1, 1, tzinfo=UTC)
    await write(Draft("a", PROSE))
    await write(Draft("a", PROSE, created_at=moved))
    assert owner.execute("select distinct created_at from documents").fetchall() == [(moved,)]


async def test_the_same_id_in_two_tenants_is_two_documents(write, database):
    await write(Draft("a", "for acme"), tenant="acme")
    await write(Draft("a", "for umbra"), tenant="umbra")
    assert (await documents.get(database, "acme", "a")).content == "for acme"
    await documents.remove(database, "umbra", "a")
    assert (await documents.get(database, "acme", "a")).content == "for acme"
    with pytest.raises(NotFound):
        await documents.get(database, "umbra", "a")


async def test_repeated_text_in_one_document_is_two_rows_embedded_once(write, owner, openai):
    paragraph = " ".join(f"The quick brown fox number {n} jumps over the lazy dog again and again." for n in range(9))
    (outcome,) = await write(Draft("a", f"# One\n\n{paragraph}\n\n# One\n\n{paragraph}"))
    assert outcome.embedded == len(rows(owner))
    assert len(openai.embedded) == len(set(openai.embedded))


class TestOwnVectors:
    """Documents that bring their vector."""

    vector = np.arange(1, 65, dtype=np.float32)

    async def test_are_one_chunk_and_cost_nothing(self, write, owner, openai):
        (outcome,) = await write(Draft("a", PROSE, embedding=self.vector))
        assert (outcome.embedded, openai.calls) == (1, [])
        assert owner.execute("select embedding_origin, embedding_model from sources").fetchone() == (
            "caller",
            "text-embedding-3-small",
        )
        assert owner.execute("select embedding::text from documents").fetchone() == (
            "[" + ",".join(str(n) for n in range(1, 65)) + "]",
        )

    async def test_unchanged_when_the_vector_is_the_same_updated_when_not(self, write, owner):
        await write(Draft("a", "text", embedding=self.vector))
        assert (await write(Draft("a", "text", embedding=list(map(float, self.vector)))))[0].status == "unchanged"
        assert (await write(Draft("a", "text", embedding=self.vector * 2)))[0].status == "updated"
        assert owner.execute("select count(*), min(embedding::text) like '[2,4,%' from documents").fetchone() == (
            1,
            True,
        )

    async def test_keep_their_row_when_metadata_alone_changes(self, write, owner):
        await write(Draft("a", "text", embedding=self.vector))
        (outcome,) = await write(Draft("a", "text", embedding=self.vector, metadata={"v": 2}))
        assert (outcome.status, outcome.embedded, outcome.reused, outcome.removed) == ("updated", 0, 1, 0)
        assert owner.execute("select metadata, embedding::text like '[1,2,3,%' from documents").fetchone() == (
            {"v": 2},
            True,
        )

    async def test_give_way_to_ours_and_back(self, write, owner):
        await write(Draft("a", "text", embedding=self.vector))
        assert (await write(Draft("a", "text")))[0].embedded == 1
        assert owner.execute("select embedding_origin from sources").fetchone() == ("pgrecall",)
        (outcome,) = await write(Draft("a", "text", embedding=self.vector))
        assert (outcome.status, outcome.embedded, outcome.removed) == ("updated", 1, 1)

    @pytest.mark.parametrize(
        ("vector", "fault"),
        [
            ([1.0] * 63, "has 63 dimensions; allowed: 64"),
            ([0.0] * 64, "is zero"),
            ([1.0] * 63 + [float("nan")], "embedding[63]"),
            ([1.0] * 63 + [float("inf")], "embedding[63]"),
            ([1e39] + [1.0] * 63, "embedding[0]"),
        ],
    )
    async def test_are_refused_when_they_cannot_be_searched(self, write, owner, vector, fault):
        with pytest.raises(BadInput, match=fault.replace("[", r"\[").replace("]", r"\]")):
            await write(Draft("a", "text", embedding=vector))
        assert owner.execute("select count(*) from sources").fetchone() == (0,)

    async def test_their_text_has_a_limit_of_its_own(self, write):
        with pytest.raises(TooLarge, match="content: is 32,001 bytes"):
            await write(Draft("a", "x" * 32_001, embedding=self.vector))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": "x" * 513}, "id"),
        ({"id": "é" * 257}, "id"),
        ({"id": "a\0b"}, "id"),
        ({"id": "a\ud800"}, "id"),
        ({"content": ""}, "content"),
        ({"content": " \n\t "}, "content"),
        ({"content": "a\0b"}, "content"),
        ({"content": "a\udfffb"}, "content"),
        ({"content": "x" * 10_000_001}, "content"),
        ({"doc_type": "x" * 129}, "doc_type"),
        ({"doc_type": ""}, "doc_type"),
        ({"title": "\0"}, "title"),
        ({"metadata": {"k": "a\0"}}, "metadata.k"),
        ({"metadata": {"k\0": 1}}, "metadata"),
        ({"metadata": {"k": ["\ud800"]}}, "metadata.k[0]"),
        ({"metadata": {"k": float("nan")}}, "metadata.k"),
        ({"metadata": {"k": "x" * 64_000}}, "metadata"),
        ({"metadata": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {}}}}}}}}}}, "metadata"),
        ({"created_at": datetime(2020, 1, 1)}, "created_at"),  # noqa: DTZ001  the fault under test
    ],
)
async def test_what_is_over_the_limits_is_refused_by_name_and_nothing_is_written(write, owner, change, field):
    good = Draft("good", "good text")
    bad = dataclasses.replace(Draft("bad", "bad text"), **change)
    with pytest.raises(BadInput) as alone:
        await write(bad)
    assert alone.value.field == field
    with pytest.raises(BadInput) as batch:
        await write(good, bad)
    assert batch.value.field == f"documents[1].{field}"
    assert owner.execute("select count(*) from sources").fetchone() == (0,)


async def test_limits_themselves_are_allowed(write, database):
    deepest = {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": 1}}}}}}}}
    await write(Draft("é" * 256, "x", doc_type="t" * 128, metadata=deepest))
    assert (await documents.get(database, "acme", "é" * 256)).metadata == deepest


async def test_an_id_twice_in_a_batch_is_refused(write):
    with pytest.raises(BadInput, match=r"documents\[2\].id: 'a' is also the id of documents\[0\]"):
        await write(Draft("a", "x"), Draft("b", "x"), Draft("a", "y"))


async def test_more_tokens_than_allowed_are_refused_before_any_is_paid(write, openai):
    with pytest.raises(TooLarge, match="allowed in one request: 1,000"):
        await write(Draft("a", PROSE * 20), token_limit=1_000)
    assert openai.calls == []


async def test_a_write_may_name_the_states_it_expects(write, owner):
    (created,) = await write(Draft("a", "one"), expected={None})
    first = {tag(1, created.updated_at)}
    (updated,) = await write(Draft("a", "two"), expected=first)
    assert updated.version == 2
    stored = owner.execute("select updated_at from sources where id = 'a'").fetchone()
    assert stored == (updated.updated_at,)
    for expected in (first, {None}):
        with pytest.raises(VersionConflict, match="version 2 of this document is stored"):
            await write(Draft("a", "three"), expected=expected)
    with pytest.raises(VersionConflict, match="no version"):
        await write(Draft("b", "new"), expected=first)


async def test_a_failing_model_leaves_nothing_and_the_retry_pays_only_for_the_rest(write, owner, openai):
    drafts = [Draft(f"d{n}", f"Text number {n} is about topic {n}.") for n in range(5)]
    openai.poison = "number 3"
    with pytest.raises(EmbeddingFailed):
        await write(*drafts)
    assert owner.execute("select count(*) from sources").fetchone() == (0,)
    openai.poison = None
    outcomes = await write(*drafts)
    assert [o.status for o in outcomes] == ["created"] * 5


async def test_every_refused_text_is_named_and_the_others_are_paid_for_once(write, owner, openai):
    drafts = [Draft(f"d{n}", f"Text number {n} is about topic {n}.") for n in range(12)]
    openai.poison = "number 3"
    drafts[7] = Draft("d7", "A second text, number 3 as well.")
    with pytest.raises(
        EmbeddingFailed, match=r"^documents\[3\].content: .* refuses this text .*; documents\[7\]"
    ) as error:
        await write(*drafts)
    assert error.value.faults.keys() == {3, 7}
    assert owner.execute("select count(*) from sources").fetchone() == (0,)
    openai.poison = None
    openai.calls.clear()
    await write(*drafts)
    assert sorted(openai.embedded) == sorted([drafts[3].content, drafts[7].content])


async def test_documents_are_stored_one_by_one_where_that_is_asked_for(
    database, embedder, settings, owner, openai, write
):
    await write(Draft("kept", "An older text."))
    openai.poison = "poison"
    long = "\n\n".join([PROSE, "This paragraph holds the poison. " * 9, PROSE])
    drafts = [
        Draft("good", PROSE),
        Draft("refused", long),
        Draft("bad", "text", metadata={"a": "\x00"}),
        Draft("good", "again"),
        Draft("kept", "An older text."),
        Draft("own", "Brings its vector.", embedding=[1.0] * 64),
    ]
    meter = Meter()
    outcomes = await put_each(database, embedder, settings, "acme", drafts, meter=meter)
    assert [outcome.id for outcome in outcomes] == [draft.id for draft in drafts]
    good, refused, bad, twice, kept, own = outcomes
    assert [one.status for one in (good, kept, own)] == ["created", "unchanged", "created"]
    assert all(isinstance(one, Fault) and one.lasting for one in (refused, bad, twice))
    assert refused.field == "content"
    assert "refuses this text" in refused.reason
    assert str(bad).startswith("metadata")
    assert str(twice) == "id: 'good' is also the id of documents[0]"
    stored = owner.execute("select id from sources union select id from documents order by 1").fetchall()
    assert stored == [("good",), ("kept",), ("own",)]
    assert meter.texts == len({text for text in openai.embedded if "poison" not in text and text != "An older text."})


async def test_a_server_that_is_away_is_no_documents_fault(database, embedder, settings, owner, openai, write):
    await write(Draft("known", "Paid for before."), tenant="acme")
    owner.execute("delete from sources")
    openai.fail(status=401)
    known, new = await put_each(
        database, embedder, settings, "acme", [Draft("known", "Paid for before."), Draft("new", "Never seen.")]
    )
    assert known.status == "created"
    assert (new.id, new.field, new.lasting) == ("new", "", False)
    assert "OPENAI_API_KEY" in new.reason
    assert owner.execute("select id from sources").fetchall() == [("known",)]


async def test_nothing_is_left_to_store_where_every_document_is_at_fault(database, embedder, settings, owner):
    outcomes = await put_each(database, embedder, settings, "acme", [Draft("", "x"), Draft("a", "")])
    assert [outcome.field for outcome in outcomes] == ["id", "content"]
    with pytest.raises(BadInput, match="0 items"):
        await put_each(database, embedder, settings, "acme", [])


async def test_a_write_that_fails_after_embedding_does_not_pay_again(write, owner, openai):
    owner.execute("alter table documents add constraint staged_fault check (id <> 'b')")
    with pytest.raises(Exception, match="staged_fault"):
        await write(Draft("a", "first text"), Draft("b", "second text"))
    assert owner.execute("select (select count(*) from sources), (select count(*) from documents)").fetchone() == (0, 0)
    owner.execute("alter table documents drop constraint staged_fault")
    asked = len(openai.calls)
    assert [o.embedded for o in await write(Draft("a", "first text"), Draft("b", "second text"))] == [1, 1]
    assert len(openai.calls) == asked


async def test_the_cache_stays_within_its_bound(database, embedder, settings, owner):
    small = replace(settings, cache_rows=3)
    for n in range(10):
        await put(database, embedder, small, "acme", [Draft("a", f"version {n} of the text")])
    assert owner.execute("select count(*) from embedding_cache").fetchone()[0] <= 4


async def test_two_writers_of_one_document_leave_one_version_whole(write, owner, database):
    versions = [PROSE.replace("heron", bird) for bird in ("crane", "stork", "egret", "ibis")]

    async def writer(n):
        for turn in range(4):
            await write(
                Draft("a", versions[(n + turn) % 4], metadata={"v": (n + turn) % 4}), Draft(f"w{n}", f"own {turn}")
            )

    await asyncio.gather(*(writer(n) for n in range(4)))
    content, keys, metadata = owner.execute(
        "select content, chunk_keys, metadata from sources where id = 'a'"
    ).fetchone()
    assert content == versions[metadata["v"]]
    stored = owner.execute("select chunk_key, content, metadata from documents where id = 'a'").fetchall()
    assert {key for key, _, _ in stored} == set(keys)
    assert all(chunk in content and labels == metadata for _, chunk, labels in stored)


async def test_writers_and_deleters_of_one_document_never_leave_half(write, owner, database):
    async def writer(n):
        for turn in range(6):
            await write(Draft("a", PROSE[n * 50 :] + f" {turn}"))

    async def deleter():
        for _ in range(12):
            try:
                await documents.remove(database, "acme", "a")
            except NotFound:
                await asyncio.sleep(0.005)

    await asyncio.gather(writer(0), writer(1), deleter())
    sources = owner.execute("select chunk_keys from sources").fetchall()
    stored = owner.execute("select chunk_key from documents").fetchall()
    assert {k for (k,) in stored} == {k for (keys,) in sources for k in keys}


async def test_pages_follow_the_ids_and_filters_apply(write, database):
    await write(
        *(Draft(f"d{n:02}", f"text {n}", doc_type="odd" if n % 2 else "even", metadata={"n": n}) for n in range(25))
    )
    seen, after = [], None
    while page := await documents.page(database, "acme", Conditions(), limit=10, after=after):
        seen += [d.id for d in page]
        after = page[-1].id
    assert seen == [f"d{n:02}" for n in range(25)]
    odd = Conditions(doc_types=("odd",), metadata=filters.parse({"n": {"$gt": 20}}))
    assert [d.id for d in await documents.page(database, "acme", odd, limit=10)] == ["d21", "d23"]


async def test_delete_by_filter_needs_a_filter_and_takes_only_what_matches(write, database, owner):
    await write(*(Draft(f"d{n}", f"text {n}", metadata={"n": n}) for n in range(6)))
    await write(Draft("d0", "other tenant", metadata={"n": 0}), tenant="umbra")
    with pytest.raises(BadInput, match="a filter is required"):
        await documents.remove_matching(database, "acme", Conditions())
    assert await documents.remove_matching(database, "acme", Conditions(metadata=filters.parse({"n": {"$lt": 4}}))) == 4
    assert owner.execute("select tenant_id, id from documents order by 1, 2").fetchall() == [
        ("acme", "d4"),
        ("acme", "d5"),
        ("umbra", "d0"),
    ]
