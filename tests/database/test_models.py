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


def snapshot_of(url):
    """The schema, vectors' lengths left out, with comments and owners of what stays."""
    found = snapshot(url)
    with psycopg.connect(url) as connection:
        found["comments"] = connection.execute(
            "select c.relname, d.objsubid, d.description from pg_description d join pg_class c on c.oid = d.objoid "
            "where c.relnamespace = 'public'::regnamespace and d.classoid = 'pg_class'::regclass order by 1, 2"
        ).fetchall()
        found["storage"] = connection.execute(
            "select attname, attstorage, attnotnull from pg_attribute where attrelid = 'documents'::regclass and attnum > 0"
        ).fetchall()
        found["valid"] = connection.execute("select conname from pg_constraint where not convalidated").fetchall()
    return {name: [str(each).replace(f"({LENGTH})", f"({DIMENSIONS})") for each in rows] for name, rows in found.items()}
