"""The embedding model changes while searches and writes run: nobody is refused, no answer is of the wrong space."""

import asyncio

import numpy as np
import psycopg
import pytest
from alembic import command
from msgspec.structs import replace

from app import backfill, change, documents, schema, search, spaces
from app.database import Database
from app.drafts import Draft
from app.embedding import open_embedder
from app.errors import BadInput, ModelMismatch, SetupError, SpaceChanged
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


class Steps:
    def __init__(self, url, database, settings, embedder, base_url):
        self.url, self.database, self.settings, self.embedder = url, database, settings, embedder
        self.new = change.model_of(NEW, LENGTH, "openai", base_url)

    def start(self, new=None):
        with change.operating(self.url) as connection:
            change.start(connection, new or self.new, "openai", self.settings.openai_base_url)

    async def fill(self, **options):
        with change.operating(self.url) as connection:
            await spaces.refresh(self.database)
            to = change.other(connection)
            other = await spaces.of(self.database, self.settings, self.embedder, to.model)
            filled = await backfill.fill(connection, self.database, other, self.settings, told=quiet, **options)
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
    return [(content, len(each), np.allclose(each, embedding(content, len(each)), atol=1e-5)) for content, each in found]


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


async def test_searches_and_writes_run_through_a_whole_change(steps, owner, owner_url, settings, embedder):
    """Two processes, as it were, each with connections of its own; every answer is checked against its space."""
    animals = [f"animal{n}" for n in range(40)]
    texts = {name: f"The {name} lives in place{n} and eats food{n}." for n, name in enumerate(animals)}
    await steps.put(*(Draft(name, text) for name, text in texts.items()))
    done = asyncio.Event()
    answered, written, spaces_seen = 0, {}, set()

    async def keep_searching(database, number):
        nonlocal answered
        rng = np.random.default_rng(number)

        async def searched(using):
            space = Model(using.model, using.dimensions)
            options = search.Options(mode="hybrid") if mode else None
            given = await question_vector(using, texts[name])
            found = await search.search(
                database, settings, "acme", given, question=texts[name], space=space, options=options, top_k=3
            )
            return space, given, found.hits

        while not done.is_set():
            name, mode = animals[rng.integers(len(animals))], rng.integers(2)
            space, given, hits = await spaces.following(database, settings, embedder, searched)
            assert hits[0].id == name
            for hit in hits:  # a similarity to a vector of the other space would be another number
                assert hit.similarity == pytest.approx(float(given @ embedding(hit.content, space.dimensions)), abs=1e-4)
            spaces_seen.add(space.name)
            answered += 1

    async def keep_writing(database, number):
        rng = np.random.default_rng(100 + number)
        turn = 0
        while not done.is_set():
            turn += 1
            name = f"w{number}-{rng.integers(15)}"
            if rng.integers(4) == 0 and name in written:
                await documents.remove(database, "acme", name)
                del written[name]
            else:
                text = f"Version {turn} of {name}, written by number{number}."
                await put(database, embedder, settings, "acme", [Draft(name, text, doc_type=f"type{turn % 3}")])
                written[name] = text

    others = [Database(settings, settings.database_url) for _ in range(2)]
    tasks = [asyncio.create_task(keep_searching(database, n)) for n, database in enumerate(others)]
    tasks += [asyncio.create_task(keep_writing(database, n)) for n, database in enumerate(others)]

    async def meanwhile(seconds=0.7):
        before = answered
        await asyncio.sleep(seconds)
        while answered == before and not any(task.done() for task in tasks):
            await asyncio.sleep(0.05)
        for task in tasks:
            if task.done():
                task.result()

    try:
        await meanwhile()
        await asyncio.to_thread(steps.start)
        await meanwhile()
        await steps.fill()
        await meanwhile()
        for step in (steps.switch, steps.rollback, steps.switch, steps.finish):
            await step()
            await meanwhile()
    finally:
        done.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for database in others:
            await spaces.close(database)
            await database.close()
    assert results == [None] * 4
    assert spaces_seen == {"text-embedding-3-small", NEW}
    expected = sorted([*texts.values(), *written.values()])
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
    return {name: [str(each).replace(f"({LENGTH})", f"({DIMENSIONS})") for each in rows] for name, rows in found.items()}
