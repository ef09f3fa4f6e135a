"""The embedding model changes while searches and writes run: nobody is refused, no answer is of the wrong space."""

import asyncio
import itertools

import numpy as np
import psycopg
import pytest
from alembic import command
from msgspec.structs import replace

from app import backfill, change, commands, documents, erasure, indexes, schema, search, spaces, swap
from app.database import Database
from app.drafts import Draft
from app.errors import BadInput, ModelMismatch, SetupError
from app.meter import Meter
from app.model import Model
from app.questions import vector as question_vector
from app.upsert import put
from tests.conftest import DIMENSIONS
from tests.migration.test_migrations import snapshot
from tests.openai_server import embedding

NEW = "text-embedding-3-large"
LENGTH = 48
CATS = "Cats sleep for most of the day and hunt at dusk."
OTTERS = "Otters eat fish in the river and float on their backs."
HERONS = "Herons stand still in shallow water."


def quiet(*_):
    pass


@pytest.fixture
def steps(owner_url, database, settings, embedder, openai):
    """The steps of a change to NEW."""
    return Steps(owner_url, database, settings, embedder, openai.url)


def abandon(connection):
    return change.abandon(connection, quiet)


class Steps:
    def __init__(self, url, database, settings, embedder, base_url):
        self.url, self.database, self.settings, self.embedder = url, database, settings, embedder
        self.new = change.model_of(NEW, LENGTH, "openai", base_url)

    def start(self, new=None):
        with change.operating(self.url) as connection:
            change.start(connection, new or self.new, "openai", self.settings.openai_base_url)

    async def fill(self, budget=None, **options):
        with change.operating(self.url) as connection:
            await spaces.refresh(self.database)
            to = change.other(connection)
            other = await spaces.of(self.database, self.settings, self.embedder, to.model)
            filled = await backfill.fill(
                connection, self.database, other, self.settings, Meter(budget), told=quiet, **options
            )
            await asyncio.to_thread(change.build, connection, self.url, to, quiet)
            return filled

    def run(self, step):
        with change.operating(self.url) as connection:
            return step(connection)

    async def prepare(self):
        self.start()
        await self.fill()

    async def switch(self):
        return await asyncio.to_thread(self.run, change.switch)

    async def rollback(self):
        return await asyncio.to_thread(self.run, change.rollback)

    async def finish(self):
        return await asyncio.to_thread(self.run, lambda connection: change.finish(connection, quiet))

    async def put(self, *drafts):
        return await put(self.database, self.embedder, self.settings, "acme", list(drafts))

    async def find(self, text, **options):
        async def searched(embedder):
            space = Model(embedder.model, embedder.dimensions)
            vector = await question_vector(embedder, text)
            found = await search.search(self.database, self.settings, "acme", vector, space=space, **options)
            return embedder.model, found.hits

        return await spaces.following(self.database, self.settings, self.embedder, searched)


def vectors(owner, table="documents"):
    """Text and length of the vector of each chunk, and whether it is what its model gives that text."""
    rows = owner.execute(f"select content, embedding::text from {table} order by content").fetchall()
    found = [(content, np.array(text.strip("[]").split(","), np.float32)) for content, text in rows]
    return [
        (content, len(each), np.allclose(each, embedding(content, len(each)), atol=1e-5)) for content, each in found
    ]


async def test_a_change_to_another_length_from_start_to_finish(steps, owner, owner_url, settings):
    await steps.put(Draft("cats", CATS, doc_type="faq"), Draft("otters", OTTERS))
    before = snapshot_of(owner_url)
    steps.start()
    await steps.put(Draft("herons", HERONS))
    filled = await steps.fill()
    assert (filled.chunks, filled.refused) == (2, [])
    model, hits = await steps.find("what do otters eat")
    assert (model, hits[0].id) == ("text-embedding-3-small", "otters")
    assert vectors(owner, "pgrecall_run_documents") == [(text, LENGTH, True) for text in (CATS, HERONS, OTTERS)]
    await steps.switch()
    assert vectors(owner) == [(text, LENGTH, True) for text in (CATS, HERONS, OTTERS)]
    assert vectors(owner, "pgrecall_run_documents") == [(text, DIMENSIONS, True) for text in (CATS, HERONS, OTTERS)]
    model, hits = await steps.find("what do otters eat")
    assert (model, hits[0].id) == (NEW, "otters")
    await steps.rollback()
    assert (await steps.find("what do otters eat"))[0] == "text-embedding-3-small"
    await steps.switch()
    await steps.finish()
    assert (await steps.find("when do cats hunt"))[1][0].id == "cats"
    assert owner.execute("select to_regclass('pgrecall_run_documents')").fetchone() == (None,)
    assert owner.execute("select distinct embedding_model from sources").fetchall() == [(NEW,)]
    assert snapshot_of(owner_url) == before
    assert command.check(schema.config(replace(settings, migration_url=owner_url))) is None


class Traffic:
    """Searches and writes of two processes, as it were, each with connections of its own, until `done`."""

    def __init__(self, settings, embedder, texts):
        self.settings, self.embedder, self.texts = settings, embedder, texts
        self.done = asyncio.Event()
        self.answered, self.written, self.models = 0, {}, set()
        self.databases = [Database(settings, settings.database_url) for _ in range(2)]
        self.tasks = [asyncio.create_task(self.search(database, n)) for n, database in enumerate(self.databases)]
        self.tasks += [asyncio.create_task(self.write(database, n)) for n, database in enumerate(self.databases)]

    async def search(self, database, number):
        rng = np.random.default_rng(number)
        while not self.done.is_set():
            name = list(self.texts)[rng.integers(len(self.texts))]
            mode = ("vector", "hybrid")[rng.integers(2)]

            async def searched(using, name=name, mode=mode):
                question = self.texts[name]
                space, given = Model(using.model, using.dimensions), await question_vector(using, question)
                options = search.Options(mode=mode)
                found = await search.search(
                    database, self.settings, "acme", given, question=question, space=space, options=options, top_k=3
                )
                return space, given, found.hits

            space, given, hits = await spaces.following(database, self.settings, self.embedder, searched)
            assert hits[0].id == name
            for hit in hits:  # against a vector of the other space it would be another number
                expected = float(given @ embedding(hit.content, space.dimensions))
                assert hit.similarity == pytest.approx(expected, abs=1e-4)
            self.models.add(space.name)
            self.answered += 1

    async def write(self, database, number):
        rng = np.random.default_rng(100 + number)
        for turn in itertools.count():
            if self.done.is_set():
                return
            name = f"w{number}-{rng.integers(15)}"
            if rng.integers(4) == 0 and name in self.written:
                await documents.remove(database, "acme", name)
                del self.written[name]
            else:
                text = f"Version {turn} of {name}, written by number{number}."
                draft = Draft(name, text, doc_type=f"type{turn % 3}")
                await put(database, self.embedder, self.settings, "acme", [draft])
                self.written[name] = text

    async def passes(self):
        """Until some more has been answered and written. Raises what a search or write has raised."""
        before = self.answered
        for _ in range(600):
            await asyncio.sleep(0.1)
            if self.answered > before + 5 or any(task.done() for task in self.tasks):
                break
        for task in self.tasks:
            if task.done():
                task.result()

    async def end(self):
        self.done.set()
        results = await asyncio.gather(*self.tasks, return_exceptions=True)
        for database in self.databases:
            await spaces.close(database)
            await database.close()
        return results


async def test_searches_and_writes_run_through_a_whole_change(steps, owner, owner_url, settings, embedder):
    texts = {f"animal{n}": f"The animal{n} lives in place{n} and eats food{n}." for n in range(40)}
    await steps.put(*(Draft(name, text) for name, text in texts.items()))
    traffic = Traffic(settings, embedder, texts)
    try:
        await traffic.passes()
        await asyncio.to_thread(steps.start)
        await traffic.passes()
        await steps.fill()
        for step in (steps.switch, steps.rollback, steps.switch, steps.finish):
            await traffic.passes()
            await step()
        await traffic.passes()
    finally:
        results = await traffic.end()
    assert results == [None] * 4
    assert traffic.models == {"text-embedding-3-small", NEW}
    expected = sorted([*texts.values(), *traffic.written.values()])
    assert vectors(owner) == [(text, LENGTH, True) for text in expected]
    assert command.check(schema.config(replace(settings, migration_url=owner_url))) is None
    counted = owner.execute("select sum(chunks)::int from collection_statistics").fetchone()
    assert counted == owner.execute("select count(*) from document_terms").fetchone() == (len(expected),)


def snapshot_of(url):
    """The schema, vectors' lengths left out, with comments and owners of what stays."""
    found = snapshot(url)
    with psycopg.connect(url) as connection:
        found["comments"] = connection.execute(
            "select c.relname, d.objsubid, d.description from pg_description d join pg_class c on c.oid = d.objoid "
            "where c.relnamespace = 'public'::regnamespace and d.classoid = 'pg_class'::regclass "
            "and c.relname !~ '^documents_embedding_' order by 1, 2"
        ).fetchall()
        found["storage"] = connection.execute(
            "select attname, attstorage, attnotnull from pg_attribute where attrelid = 'documents'::regclass and attnum > 0 "
            "and not attisdropped"
        ).fetchall()
        found["valid"] = connection.execute("select conname from pg_constraint where not convalidated").fetchall()
    return {
        name: [str(each).replace(f"({LENGTH})", f"({DIMENSIONS})") for each in rows] for name, rows in found.items()
    }


async def test_a_document_is_whole_in_both_spaces_after_each_write(steps, owner):
    await steps.put(Draft("cats", CATS, doc_type="faq"), Draft("otters", OTTERS))
    await steps.prepare()

    async def same():
        rows = "select tenant_id, id, chunk_key, doc_type, metadata, created_at, content from {} order by 1, 2, 3"
        found = owner.execute(rows.format("documents")).fetchall()
        assert owner.execute(rows.format("pgrecall_run_documents")).fetchall() == found
        return [row[6] for row in found]

    assert await same() == [CATS, OTTERS]
    await steps.put(Draft("cats", CATS, doc_type="guide", metadata={"a": 1}))
    assert await same() == [CATS, OTTERS]
    await steps.put(Draft("cats", HERONS))
    assert await same() == [HERONS, OTTERS]
    await documents.remove(steps.database, "acme", "otters")
    assert await same() == [HERONS]
    await steps.switch()
    await steps.put(Draft("otters", OTTERS), Draft("cats", CATS))
    assert await same() == [CATS, OTTERS]
    assert vectors(owner) == [(text, LENGTH, True) for text in (CATS, OTTERS)]
    await steps.rollback()
    assert vectors(owner) == [(text, DIMENSIONS, True) for text in (CATS, OTTERS)]


async def test_the_same_document_again_writes_nothing_and_embeds_nothing_after_a_switch(steps, owner, openai):
    await steps.put(Draft("cats", CATS))
    await steps.prepare()
    await steps.switch()
    calls = len(openai.embedding_calls)
    (outcome,) = await steps.put(Draft("cats", CATS))
    assert (outcome.status, outcome.version, len(openai.embedding_calls)) == ("unchanged", 1, calls)


async def test_a_write_whose_second_vector_fails_succeeds_and_is_left_to_the_backfill(steps, openai, owner):
    await steps.prepare()
    openai.models = {"text-embedding-3-small"}
    await steps.put(Draft("cats", CATS))
    assert len(openai.embedding_calls) == 2
    await steps.put(Draft("otters", OTTERS))
    assert len(openai.embedding_calls) == 3  # for a while nobody waits for a server that has failed
    with pytest.raises(SetupError, match=r"cannot switch: 2 chunks have no vector of text-embedding-3-large yet"):
        await steps.switch()
    openai.models = None
    assert (await steps.fill()).chunks == 2
    await steps.switch()
    assert vectors(owner) == [(text, LENGTH, True) for text in (CATS, OTTERS)]


async def test_a_text_the_new_model_refuses_is_named_and_keeps_the_switch_from_happening(steps, openai):
    await steps.put(Draft("cats", CATS), Draft("otters", OTTERS))
    steps.start()
    openai.poison = "Otters"
    filled = await steps.fill()
    assert filled.chunks == 1
    assert [(each.tenant_id, each.id) for each in filled.refused] == [("acme", "otters")]
    with pytest.raises(SetupError, match="1 chunks have no vector"):
        await steps.switch()


async def test_vectors_of_callers_without_a_new_one_keep_the_switch_from_happening(steps, openai):
    own = embedding("something", DIMENSIONS)
    await steps.put(Draft("cats", CATS), Draft("own", "A text with a vector of its own.", embedding=own))
    await steps.prepare()
    with pytest.raises(SetupError, match="1 chunks have vectors that their callers brought and none of"):
        await steps.switch()
    await steps.put(Draft("own", "A text with a vector of its own."))
    await steps.switch()


async def test_steps_in_the_wrong_order_are_refused_and_say_what_can_follow(steps):
    for step in (change.switch, change.rollback, abandon):
        with pytest.raises(SetupError, match="no change of the embedding model is under way"):
            steps.run(step)
    with pytest.raises(BadInput, match="is the model already"):
        steps.start(change.model_of("text-embedding-3-small", DIMENSIONS, "openai", None))
    steps.start()
    with pytest.raises(SetupError, match="indexes for text-embedding-3-large are not built"):
        steps.run(change.switch)
    with pytest.raises(SetupError, match="cannot rollback: text-embedding-3-large is being filled"):
        steps.run(change.rollback)
    with pytest.raises(BadInput, match="is under way"):
        steps.start(change.model_of("another", 32, "openai", None))
    await steps.fill()
    await steps.switch()
    with pytest.raises(SetupError, match="cannot abandon: the switch to text-embedding-3-large is done"):
        steps.run(abandon)
    with pytest.raises(SetupError, match="being changed"):
        indexes.change(steps.url, "half", oversampling=None, told=quiet, patience=0)


async def test_an_abandoned_change_leaves_everything_as_it_was(steps, owner_url, owner):
    await steps.put(Draft("cats", CATS))
    before = snapshot_of(owner_url)
    await steps.prepare()
    steps.run(abandon)
    assert snapshot_of(owner_url) == before
    await steps.put(Draft("cats", OTTERS))
    assert vectors(owner) == [(OTTERS, DIMENSIONS, True)]
    await steps.prepare()
    await steps.switch()
    assert vectors(owner) == [(OTTERS, LENGTH, True)]


async def test_what_is_bound_to_the_table_and_cannot_follow_is_named_before_anything_is_done(steps, owner):
    owner.execute("create materialized view nightly as select count(*) from documents")
    owner.execute("create function chunk() returns documents language sql as 'select * from documents limit 1'")
    with pytest.raises(
        SetupError, match=r"function chunk\(\).*is bound to the table documents.*materialized view nightly"
    ):
        steps.start()
    assert owner.execute("select count(*) from embedding_models").fetchone() == (1,)


async def test_a_view_of_the_owners_own_reads_the_active_space_throughout(steps, owner):
    owner.execute("create view lengths as select id, vector_dims(embedding) as length from document_chunks")
    owner.execute("comment on view lengths is 'How long they are.'")
    owner.execute("grant select on lengths to pgrecall_analyst")
    await steps.put(Draft("cats", CATS))
    await steps.prepare()
    for step, length in ((steps.switch, LENGTH), (steps.rollback, DIMENSIONS), (steps.switch, LENGTH)):
        await step()
        assert owner.execute("select * from lengths").fetchall() == [("cats", length)]
    await steps.finish()
    assert owner.execute("select obj_description('lengths'::regclass)").fetchone() == ("How long they are.",)
    assert owner.execute("select has_table_privilege('pgrecall_analyst', 'lengths', 'select')").fetchone() == (True,)


async def test_a_reader_that_holds_its_locks_keeps_the_switch_from_happening_and_is_not_harmed(
    steps, owner, owner_url, monkeypatch
):
    monkeypatch.setattr(swap, "ROUNDS", 1)
    await steps.put(Draft("cats", CATS))
    await steps.prepare()
    with psycopg.connect(owner_url) as reader:
        reader.execute("select count(*) from tenant_documents")
        with pytest.raises(SetupError, match="Nothing is changed"):
            await steps.switch()
        assert reader.execute("select count(*) from documents").fetchone() == (1,)
    assert vectors(owner) == [(CATS, DIMENSIONS, True)]
    await steps.switch()


async def test_a_process_started_with_the_settings_of_either_model_serves_the_active_one(steps, settings, openai):
    await steps.put(Draft("otters", OTTERS))
    old, new = settings, replace(settings, embedding_model=NEW, embedding_dimensions=LENGTH)

    async def started(with_settings):
        async with commands.opened(with_settings) as (database, embedder):
            await put(database, embedder, with_settings, "acme", [Draft("cats", CATS)])
            return embedder.model

    with pytest.raises(ModelMismatch):
        await started(new)
    await steps.prepare()
    assert [await started(each) for each in (old, new)] == ["text-embedding-3-small"] * 2
    await steps.switch()
    assert [await started(each) for each in (old, new)] == [NEW] * 2
    await steps.finish()
    assert [await started(each) for each in (old, new)] == [NEW] * 2
    with pytest.raises(ModelMismatch):
        await started(replace(settings, embedding_model="another"))


async def test_a_change_to_more_dimensions_than_a_full_index_takes_and_back(steps, owner, owner_url, settings, openai):
    await steps.put(Draft("cats", CATS))
    long = change.model_of(NEW, 3_072, "openai", openai.url)
    steps.start(long)
    await steps.fill()
    await steps.switch()
    kinds = "select kind, state from vector_indexes order by 1"
    assert owner.execute(kinds).fetchall() == [("full", "retired"), ("half", "active")]
    await steps.rollback()
    assert owner.execute(kinds).fetchall() == [("full", "active"), ("half", "retired")]
    await steps.switch()
    await steps.finish()
    assert owner.execute(kinds).fetchall() == [("half", "active")]
    assert command.check(schema.config(replace(settings, migration_url=owner_url))) is None
    assert (await steps.find("when do cats hunt"))[1][0].id == "cats"


async def test_a_migration_down_gives_up_a_change_under_way(steps, owner_url, settings, owner):
    await steps.put(Draft("cats", CATS))
    await steps.prepare()
    config = schema.config(replace(settings, migration_url=owner_url))
    command.downgrade(config, "0005")
    assert owner.execute("select to_regclass('pgrecall_run_documents')").fetchone() == (None,)
    command.upgrade(config, "head")
    assert command.check(config) is None
    await steps.prepare()
    await steps.switch()


@pytest.mark.parametrize("switched", [False, True], ids=["while it is filled", "after the switch"])
async def test_an_erasure_takes_the_vectors_of_both_models(steps, owner, settings, switched):
    await steps.put(Draft("a", CATS), Draft("b", OTTERS))
    await steps.prepare()
    if switched:
        await steps.switch()
    assert [text for text, *_ in vectors(owner, "pgrecall_run_documents")] == [CATS, OTTERS]
    one = await erasure.document(steps.database, settings, "acme", "a")
    assert (one.complete, one.removed["documents"], one.removed["pgrecall_run_documents"]) == (True, 1, 1)
    assert owner.execute("select count(*) from embedding_cache").fetchone() == (2,)  # the other document's
    whole = await erasure.tenant(steps.database, settings, "acme")
    assert (whole.complete, whole.removed["documents"], whole.removed["pgrecall_run_documents"]) == (True, 1, 1)
    assert whole.readable["pgrecall_run_documents"] == 0
    for table in ("documents", "pgrecall_run_documents", "document_terms", "embedding_cache", "sources"):
        assert owner.execute(f"select count(*) from {table}").fetchone() == (0,), table
