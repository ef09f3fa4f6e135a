"""Documents and tenants erased: what is gone, what stays, and puts that run at the same time."""

import asyncio
import contextlib

import psycopg
import pytest
from msgspec.structs import replace

from app import cache, documents, erasure, holdings, questions, terms
from app.database import Database
from app.drafts import Draft
from app.errors import BeingErased, NotFound, SetupError, TimedOut, Unavailable, VersionConflict
from app.tables import GRANTS, RUN_PREFIX, bearing
from app.upsert import put
from app.worker import Worker
from tests.conftest import DIMENSIONS, PATIENCE

OTTERS = "Otters eat fish. " + " ".join(f"They were seen at the {n}th mill of the river." for n in range(60))
HERONS = "Herons stand still. " + " ".join(f"The {n}th of them waits at the weir for hours." for n in range(60))


@pytest.fixture
def write(database, embedder, settings):
    async def _write(*drafts, tenant="acme"):
        return await put(database, embedder, settings, tenant, drafts)

    return _write


def held(owner, tenant="acme"):
    """Rows of a tenant by table, as its owner sees them: every table of the database that has a column tenant_id."""
    names = owner.execute(
        "select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant_id' "
        "where c.relkind in ('r', 'p') and c.relnamespace = (select relnamespace from pg_class where oid = 'sources'::regclass)"
    ).fetchall()
    return {
        name: owner.execute(f"select count(*) from {name} where tenant_id = %s", (tenant,)).fetchone()[0]
        for (name,) in names
        if name not in {each.name for each in GRANTS}
    }


def recounted(owner, tenant="acme"):
    """The statistics of a tenant as they add up, and as its words are."""
    kept = owner.execute(
        "select term, sum(chunks) from term_statistics where tenant_id = %s group by term having sum(chunks) <> 0",
        (tenant,),
    ).fetchall()
    counted = owner.execute(
        "select w.lexeme, count(*) from document_terms t cross join unnest(t.terms) w where tenant_id = %s group by 1",
        (tenant,),
    ).fetchall()
    return sorted(kept), sorted(counted)


def test_every_table_with_a_tenant_is_one_that_an_erasure_knows(owner):
    assert set(held(owner)) == {table.name for table in bearing()}


async def test_a_tenant_is_erased_with_everything_and_others_keep_theirs(write, database, settings, owner):
    await write(Draft("a", OTTERS), Draft("b", HERONS))
    await write(Draft("a", OTTERS + " And no more."))
    await write(Draft("a", OTTERS), tenant="other")
    owner.execute(
        "insert into embedding_claims select tenant_id, model, dimensions, input_type, content_sha256, gen_random_uuid(), "
        "now() from embedding_cache"
    )
    before, other = held(owner), held(owner, "other")
    assert all(before.values())
    erased = await erasure.tenant(database, settings, "acme")
    assert erased.removed == before
    assert erased.complete
    assert erased.readable == dict.fromkeys(before, 0)
    assert erased.put_since == 0
    assert not any(held(owner).values())
    assert held(owner, "other") == other
    kept, counted = recounted(owner, "other")
    assert kept == counted
    again = await erasure.tenant(database, settings, "acme")
    assert (again.complete, set(again.removed.values())) == (True, {0})


async def test_a_document_goes_with_what_its_former_versions_left_in_the_cache(write, database, settings, owner):
    await write(Draft("a", OTTERS), Draft("b", HERONS), Draft("twin", HERONS))
    await write(Draft("a", "A short text now."))
    count = "select count(*) from embedding_cache where tenant_id = 'acme'"
    (cached,) = owner.execute(count).fetchone()
    erased = await erasure.document(database, settings, "acme", "a")
    assert erased.complete
    assert erased.removed["sources"] == erased.removed["documents"] == erased.removed["document_terms"] == 1
    assert erased.removed["embedding_cache"] > 1
    chunks = owner.execute("select distinct sha256(convert_to(content, 'UTF8')) from documents").fetchall()
    digests = owner.execute("select content_sha256 from embedding_cache").fetchall()
    assert sorted(digests) == sorted(chunks)
    assert len(digests) == cached - erased.removed["embedding_cache"]
    kept, counted = recounted(owner)
    assert kept == counted
    with pytest.raises(NotFound):
        await erasure.document(database, settings, "acme", "a")


async def test_a_text_that_another_document_has_loses_its_cached_vector_and_nothing_else(
    write, database, settings, owner, embedder
):
    await write(Draft("b", HERONS), Draft("twin", HERONS))
    await erasure.document(database, settings, "acme", "b")
    assert owner.execute("select count(*) from embedding_cache").fetchone() == (0,)
    twin = await documents.get(database, "acme", "twin")
    chunks = owner.execute("select count(*) from documents where id = 'twin'").fetchone()
    assert chunks == (len(twin.start_offsets),)
    (outcome,) = await write(Draft("twin", HERONS))
    assert outcome.status == "unchanged"


async def test_going_back_to_a_former_text_pays_for_nothing(write, openai):
    await write(Draft("a", OTTERS))
    await write(Draft("a", HERONS))
    paid = len(openai.embedded)
    await write(Draft("a", OTTERS))
    assert len(openai.embedded) == paid


async def test_a_deletion_by_filter_empties_the_cache_of_its_texts(write, database, owner):
    await write(Draft("a", OTTERS, doc_type="note"), Draft("b", HERONS))
    assert await documents.remove_matching(database, "acme", documents.Conditions(doc_types=("note",))) == 1
    chunks = owner.execute("select distinct sha256(convert_to(content, 'UTF8')) from documents").fetchall()
    assert sorted(owner.execute("select content_sha256 from embedding_cache").fetchall()) == sorted(chunks)


async def test_a_condition_that_does_not_hold_erases_nothing(write, database, settings, owner):
    await write(Draft("a", OTTERS))
    before = held(owner)
    with pytest.raises(VersionConflict):
        await erasure.document(database, settings, "acme", "a", expected={"7-abc"})
    assert held(owner) == before


async def test_tables_of_a_change_of_model_are_erased_too(write, database, settings, owner):
    await write(Draft("a", OTTERS), Draft("b", HERONS))
    table = f'"{RUN_PREFIX}7 odd"'
    owner.execute(f"create table {table} (tenant_id text, id text, chunk_key text, embedding vector)")
    owner.execute(f"insert into {table} select tenant_id, id, chunk_key, embedding from documents")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="pgrecall_run_7 odd"):
        await erasure.document(database, settings, "acme", "a")
    assert held_of(owner, "a") > 0
    owner.execute(f"grant select, delete on {table} to pgrecall_app")
    (before,) = owner.execute(f"select count(*) from {table} where id = 'a'").fetchone()
    one = await erasure.document(database, settings, "acme", "a")
    assert one.removed[f"{RUN_PREFIX}7 odd"] == before
    whole = await erasure.tenant(database, settings, "acme")
    assert whole.removed[f"{RUN_PREFIX}7 odd"] > 0
    assert owner.execute(f"select count(*) from {table}").fetchone() == (0,)
    assert whole.readable[f"{RUN_PREFIX}7 odd"] == 0


def held_of(owner, document_id):
    return owner.execute("select count(*) from documents where id = %s", (document_id,)).fetchone()[0]


async def test_what_could_still_be_read_is_counted(write, database, settings, owner, monkeypatch):
    await write(Draft("a", OTTERS))

    async def one_less(connection):
        return [each for each in await every(connection) if each.table is not cache.cached]

    every = holdings.every
    turns = iter([one_less, every])

    async def by_turns(connection):
        return await next(turns)(connection)

    monkeypatch.setattr(holdings, "every", by_turns)
    erased = await erasure.tenant(database, settings, "acme")
    assert not erased.complete
    assert erased.readable["embedding_cache"] == held(owner)["embedding_cache"] > 0


async def test_this_process_forgets_what_the_tenant_asked(write, database, settings, embedder):
    for tenant in ("acme", "other"):
        await questions.embed(embedder, tenant, ["what do otters eat?"], ["query"])
    await erasure.tenant(database, settings, "acme")
    (asked,) = await questions.embed(embedder, "acme", ["what do otters eat?"], ["query"])
    (other,) = await questions.embed(embedder, "other", ["what do otters eat?"], ["query"])
    assert (asked.remembered, other.remembered) == (False, True)


async def test_questions_are_forgotten_some_time_after_their_last_use(embedder, monkeypatch):
    await questions.embed(embedder, "acme", ["what do otters eat?"], ["query"])
    monkeypatch.setattr(questions, "KEPT", -1.0)
    (late,) = await questions.embed(embedder, "other", ["and herons?"], ["query"])
    assert not late.remembered
    assert not questions._known[embedder]._kept


async def test_a_put_during_an_erasure_is_told_to_come_again_and_holds_no_connection_for_long(
    write, database, settings, owner, monkeypatch
):
    await write(Draft("a", OTTERS))
    async with database.write("acme", alone=True):
        with pytest.raises(BeingErased, match="is being erased") as refused:
            await write(Draft("c", HERONS))
        assert refused.value.retry_after == 5
        (outcome,) = await write(Draft("c", HERONS), tenant="other")
        assert outcome.status == "created"
    (outcome,) = await write(Draft("c", HERONS))
    assert outcome.status == "created"


async def test_an_erasure_waits_for_a_put_under_way_and_takes_it_along(write, database, settings, owner):
    await write(Draft("a", OTTERS))
    async with database.write("acme") as connection:
        await connection.exec_driver_sql(
            "insert into sources (tenant_id, id, content) values ('acme', 'late', 'written by hand')"
        )
        erasing = asyncio.create_task(erasure.tenant(database, settings, "acme"))
        waiting = (
            "select from pg_locks where locktype = 'advisory' and not granted "
            "and database = (select oid from pg_database where datname = current_database())"
        )
        async with asyncio.timeout(PATIENCE):
            while owner.execute(waiting).fetchone() is None:  # noqa: ASYNC110  a session of the server
                await asyncio.sleep(0.02)
        assert not erasing.done()
    erased = await erasing
    assert erased.removed["sources"] == 2
    assert not any(held(owner).values())


async def test_writers_that_do_not_end_are_named(database, settings, monkeypatch):
    monkeypatch.setattr("app.database.WRITERS_END", 0.2)
    async with database.write("acme"):
        with pytest.raises(Unavailable, match="did not end within"):
            await erasure.tenant(database, settings, "acme")


async def test_what_is_put_while_it_is_erased_is_whole_or_not_there(write, database, settings, owner):
    """Writers and erasures of one tenant at once: an acknowledged put that began after the last erasure stays."""
    over = False
    acknowledged: dict[str, tuple[float, str]] = {}
    clock = asyncio.get_running_loop().time

    async def writer(number):
        count = 0
        while not over:
            count += 1
            text = f"{OTTERS} Written {count} times by {number}."
            began = clock()
            with contextlib.suppress(Unavailable):
                await write(Draft(f"{number}", text), Draft(f"{number}/{count % 3}", HERONS + text))
                acknowledged[f"{number}"] = (began, text)

    writers = [asyncio.create_task(writer(number)) for number in range(2)]
    last = 0.0
    for _ in range(6):
        await asyncio.sleep(0.15)
        erased = await erasure.tenant(database, settings, "acme")
        last = clock()
        assert erased.complete
    async with asyncio.timeout(PATIENCE):
        while not any(began > last for began, _ in acknowledged.values()):  # noqa: ASYNC110  what the writers write
            await asyncio.sleep(0.02)
    over = True
    await asyncio.gather(*writers)
    await terms.fold(database, "acme")
    stored = dict(owner.execute("select id, content from sources where tenant_id = 'acme'").fetchall())
    for document_id, (began, text) in acknowledged.items():
        assert stored.get(document_id) == text or began < last
    places = owner.execute("select id, unnest(chunk_keys) from sources").fetchall()
    assert sorted(places) == sorted(owner.execute("select id, chunk_key from documents").fetchall())
    assert sorted(places) == sorted(owner.execute("select id, chunk_key from document_terms").fetchall())
    kept, counted = recounted(owner)
    assert kept == counted
    assert counted


async def test_a_short_statement_timeout_does_not_make_it_impossible(database, settings, owner):
    owner.execute(
        "insert into sources (tenant_id, id, doc_type, content, chunk_keys, start_offsets, state) "
        "select 'large', 'd' || n, 'note', 'otters eat fish ' || n, array['k'], array[0], 'ready' from generate_series(1, 3000) n"
    )
    vector = "[" + ",".join(["0.125"] * DIMENSIONS) + "]"
    owner.execute(
        "insert into documents (tenant_id, id, chunk_key, content, embedding) "
        "select tenant_id, id, 'k', content, %s from sources where tenant_id = 'large'",
        (vector,),
    )
    owner.execute(
        "select learn_terms('large', array_agg(id), array_agg(chunk_key)) from documents where tenant_id = 'large'"
    )
    hurried = Database(replace(settings, statement_timeout=0.005), settings.database_url)
    with pytest.raises(TimedOut):
        await documents.remove_matching(hurried, "large", documents.Conditions(doc_types=("note",)))
    erased = await erasure.tenant(hurried, settings, "large")
    await hurried.close()
    assert erased.complete
    assert erased.removed["documents"] == 3_000
    assert not any(held(owner, "large").values())


def test_vacuum_takes_dead_rows_out_and_refuses_a_login_that_may_not(owner, owner_url, settings):
    owner.execute(
        "insert into sources (tenant_id, id, content) select 'v', 'd' || n, 'x' from generate_series(1, 500) n"
    )
    owner.execute("delete from sources where tenant_id = 'v'")
    assert erasure.vacuum(owner_url) > 0
    with pytest.raises(SetupError, match="VACUUM is for the owner"):
        erasure.vacuum(settings.database_url)


async def test_writers_that_leave_the_same_texts_in_another_order_do_not_wait_in_a_circle(write, database, settings):
    async def replaced(*names):
        for turn in range(8):
            texts = (OTTERS, HERONS) if turn % 2 else (HERONS, OTTERS)
            await write(*(Draft(name, text) for name, text in zip(names, texts, strict=True)))

    await asyncio.gather(replaced("a", "b"), replaced("d", "c"), replaced("f", "e"))
    for name in ("a", "d", "e"):
        assert (await erasure.document(database, settings, "acme", name)).complete


async def test_a_worker_goes_on_for_other_tenants_while_one_is_erased(write, database, embedder, settings, owner):
    for tenant in ("acme", "other"):
        owner.execute("insert into sources (tenant_id, id, content) values (%s, 'a', 'Otters eat fish.')", (tenant,))
    working = Worker(database, embedder, settings)
    async with database.write("acme", alone=True):
        task = asyncio.create_task(working.run())
        async with asyncio.timeout(PATIENCE):
            while owner.execute("select count(*) from sources where state = 'ready'").fetchone() != (1,):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert working._pause == 0
    assert owner.execute("select tenant_id from sources where state = 'ready'").fetchall() == [("other",)]
    async with asyncio.timeout(PATIENCE):
        while owner.execute("select count(*) from sources where state = 'ready'").fetchone() != (2,):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
