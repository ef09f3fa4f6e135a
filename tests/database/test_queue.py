"""Documents stored first and embedded later: puts that do not wait, SQL, workers, failures."""

import asyncio
import contextlib

import psycopg
import pytest
from msgspec.structs import replace

from app import documents, local, pending, questions, roles, search
from app.database import Database
from app.drafts import Draft
from app.embedding import open_embedder
from app.errors import VersionConflict
from app.tags import tag
from app.upsert import put
from app.worker import Worker, patient
from tests.conftest import PATIENCE
from tests.database.test_documents import PROSE, rows


@pytest.fixture
def settings(settings):
    return replace(settings, worker_poll=0.2, worker_lease=600.0, embedding_retries=0)


@pytest.fixture
def write(database, embedder, settings):
    async def _write(*drafts, tenant="acme", later=True, **options):
        return await put(database, embedder, settings, tenant, drafts, later=later, **options)

    return _write


@pytest.fixture
def drain(database, embedder, settings):
    """Work until nothing is due; what the worker counted."""

    async def _drain(**changes):
        options = {name: changes.pop(name) for name in ("only",) if name in changes}
        worker = Worker(database, embedder, replace(settings, **changes), once=True, **options)
        await worker.run()
        return worker.counts

    return _drain


@contextlib.asynccontextmanager
async def working(settings, embedder=None, **options):
    """A worker at work beside the test, on connections of its own."""
    database = Database(patient(settings), settings.database_url)
    opened = embedder or open_embedder(settings)
    task = asyncio.create_task(Worker(database, opened, settings, **options).run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await database.close()
        if embedder is None:
            await opened.aclose()


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  what is waited for happens in the database
            await asyncio.sleep(0.02)


def states(owner, tenant="acme"):
    return dict(owner.execute("select id, state from sources where tenant_id = %s", (tenant,)).fetchall())


def one(owner, columns, document_id="a"):
    return owner.execute(f"select {columns} from sources where id = %s", (document_id,)).fetchone()


async def found(database, settings, embedder, question, mode="vector"):
    vector = await questions.vector(embedder, question)
    options = search.Options(mode=mode)
    return (await search.search(database, settings, "acme", vector, top_k=10, question=question, options=options)).hits


async def test_a_put_that_does_not_wait_stores_the_text_and_embeds_nothing(write, openai, owner, database):
    (outcome,) = await write(Draft("a", PROSE, title="T", doc_type="note", metadata={"k": 1}))
    assert (outcome.status, outcome.state, outcome.version) == ("created", "pending", 1)
    assert openai.embedding_calls == []
    assert one(owner, "content, state, content_sha256, chunk_keys, ready_at") == (PROSE, "pending", None, [], None)
    document = await documents.get(database, "acme", "a")
    assert (document.state, document.title, document.metadata) == ("pending", "T", {"k": 1})


async def test_the_worker_makes_it_ready_under_the_version_and_moment_of_the_put(write, drain, owner, database):
    (outcome,) = await write(Draft("a", PROSE, doc_type="note"))
    counts = await drain()
    assert (counts.ready, counts.parked, counts.deferred) == (1, 0, 0)
    document = await documents.get(database, "acme", "a")
    assert (document.state, document.version, document.updated_at) == ("ready", outcome.version, outcome.updated_at)
    assert len(rows(owner)) == len(document.start_offsets) > 1
    assert one(owner, "claimed_by, not_before, attempts, error, ready_at is null") == (None, None, 0, None, False)
    (again,) = await write(Draft("a", PROSE, doc_type="note"))
    assert (again.status, again.state, again.version) == ("unchanged", "ready", 1)


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
async def test_the_old_version_stays_searchable_until_the_new_one_is_ready(
    write, drain, database, settings, embedder, mode
):
    await write(Draft("a", "Otters sleep in rafts.", title="Old"), later=False)
    await write(Draft("a", "Badgers dig setts.", title="New", doc_type="note"))
    (hit,) = await found(database, settings, embedder, "otters", mode)
    assert (hit.content, hit.doc_type, hit.start_offset) == ("Otters sleep in rafts.", None, 0)
    await drain()
    hits = await found(database, settings, embedder, "badgers", mode)
    assert [(hit.content, hit.doc_type) for hit in hits] == [("Badgers dig setts.", "note")]


async def test_chunks_whose_text_stayed_keep_rows_and_vectors(write, drain, owner, openai):
    await write(Draft("a", PROSE), later=False)
    before, paid = rows(owner), len(openai.embedded)
    await write(Draft("a", PROSE + "\n\nA wholly new ending.", doc_type=None))
    assert rows(owner) == before
    await drain()
    after = rows(owner)
    kept = before.keys() & after.keys()
    assert len(kept) >= len(before) - 2
    assert all(before[key] == after[key] for key in kept)
    assert len(openai.embedded) - paid == len(after) - len(kept)


async def test_a_put_that_waits_overtakes_a_pending_one_and_keeps_its_chunks_too(write, drain, owner, openai):
    await write(Draft("a", PROSE), later=False)
    before, paid = rows(owner), len(openai.embedded)
    await write(Draft("a", "something else"))
    (outcome,) = await write(Draft("a", PROSE), later=False)
    assert (outcome.status, outcome.version, outcome.embedded, outcome.removed) == ("updated", 3, 0, 0)
    assert rows(owner) == before
    assert len(openai.embedded) == paid
    assert (await drain()).ready == 0


async def test_a_document_that_brought_its_vector_is_embedded_when_it_is_replaced_without_one(write, drain, owner):
    await write(Draft("a", "Otters swim.", embedding=[1.0] + [0.0] * 63), later=False)
    await write(Draft("a", "Otters swim."))
    assert one(owner, "state, embedding_origin") == ("pending", "caller")
    await drain()
    assert one(owner, "state, embedding_origin") == ("ready", "pgrecall")
    ((vector,),) = owner.execute("select embedding::text from documents").fetchall()
    assert vector.count("0,0,0,0,0") == 0


async def test_one_that_brings_its_vector_is_ready_at_once_though_it_does_not_wait(write, owner):
    brought, pending_one = await write(Draft("a", "x", embedding=[1.0] + [0.0] * 63), Draft("b", "y"))
    assert (brought.state, pending_one.state) == ("ready", "pending")
    assert states(owner) == {"a": "ready", "b": "pending"}


async def test_preconditions_hold_for_puts_that_do_not_wait(write, owner):
    (first,) = await write(Draft("a", "one"), expected={None})
    with pytest.raises(VersionConflict):
        await write(Draft("a", "two"), expected={None})
    (second,) = await write(Draft("a", "two"), expected={tag(first.version, first.updated_at)})
    assert second.version == 2
    with pytest.raises(VersionConflict):
        await write(Draft("a", "three"), expected={tag(first.version, first.updated_at)})
    assert one(owner, "content") == ("two",)


@pytest.mark.parametrize("change", ["replace", "delete", "sql", "wait"])
async def test_what_changes_while_the_worker_embeds_is_not_overwritten(
    write, owner, openai, settings, embedder, database, change
):
    changed = False
    openai.holds = lambda call: "the first text" in call.body["input"] and not changed
    await write(Draft("a", "the first text"))
    async with working(settings):
        await until(lambda: openai.embedded)
        match change:
            case "replace":
                await write(Draft("a", "the second text"))
            case "wait":
                await write(Draft("a", "the second text"), later=False)
            case "delete":
                await documents.remove(database, "acme", "a")
            case "sql":
                owner.execute("update sources set content = 'the second text', state = 'pending'")
        changed = True
        await until(lambda: set(states(owner).values()) <= {"ready"})
    texts = {text for (text,) in owner.execute("select content from documents").fetchall()}
    assert texts == (set() if change == "delete" else {"the second text"})
    assert owner.execute("select count(*) from document_terms").fetchone() == (len(texts),)


async def test_rows_inserted_by_sql_are_embedded_by_the_owner_or_as_the_service(drain, owner, settings):
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'a', 'Otters swim.')")
    with psycopg.connect(settings.database_url) as service:
        service.execute("select set_config('role', %s, true)", (roles.APP,))
        service.execute("select set_config('pgrecall.tenant_id', 'acme', true)")
        service.execute(
            "insert into sources (tenant_id, id, content, title, doc_type, metadata, created_at) "
            "values ('acme', 'b', %s, 'T', 'note', '{\"k\": 1}', '2024-01-01')",
            (PROSE,),
        )
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            service.execute("insert into sources (tenant_id, id, content) values ('umbra', 'b', 'x')")
    owner.execute("insert into sources (tenant_id, id, content) values ('umbra', 'a', 'Badgers dig.')")
    assert (await drain()).ready == 2
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'b', %s)", (PROSE,))
    assert (await drain()).ready == 1
    assert states(owner) == {"a": "ready", "b": "ready"}
    assert owner.execute("select count(*) from document_chunks where id = 'b'").fetchone()[0] > 1


async def test_a_text_changed_by_sql_is_embedded_and_counts_as_a_new_version(write, drain, owner, database):
    await write(Draft("a", "Otters swim."), later=False)
    before = await documents.get(database, "acme", "a")
    owner.execute("update sources set content = 'Badgers dig.', state = 'pending' where id = 'a'")
    await drain()
    after = await documents.get(database, "acme", "a")
    assert (after.state, after.version) == ("ready", before.version + 1)
    assert after.updated_at > before.updated_at
    assert owner.execute("select content from documents").fetchall() == [("Badgers dig.",)]


async def test_what_sql_lets_pass_and_the_limits_do_not_is_given_up_with_the_reason(drain, owner, openai):
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'blank', E' \\n')")
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'long', repeat('word ', 2000001))")
    owner.execute(
        "insert into sources (tenant_id, id, content, metadata) "
        "values ('acme', 'wide', 'text', jsonb_build_object('k', repeat('x', 64001)))"
    )
    owner.execute(
        "insert into sources (tenant_id, id, content, metadata) "
        "select 'acme', 'deep', 'text', (repeat('{\"a\":', 3000) || '1' || repeat('}', 3000))::jsonb"
    )
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'good', 'Otters swim.')")
    with pytest.raises(psycopg.errors.CheckViolation):
        owner.execute("insert into sources (tenant_id, id, content, created_at) values ('acme', 'x', 'x', 'infinity')")
    counts = await drain(worker_attempts=1)
    assert (counts.ready, counts.parked) == (1, 4)
    faults = dict(owner.execute("select id, error from sources where state = 'failed'").fetchall())
    assert faults["blank"].startswith("content: is empty or white space only")
    assert faults["long"].startswith("content: is 10,000,005 bytes")
    assert faults["wide"].startswith("metadata")
    assert "deep" in faults
    assert openai.embedded == ["Otters swim."]


async def test_a_refused_text_is_given_up_alone_and_tried_again_on_demand(write, drain, owner, openai, database):
    openai.poison = "poison"
    await write(*(Draft(f"d{n}", "poison" if n == 3 else f"text {n}") for n in range(8)))
    counts = await drain()
    assert (counts.ready, counts.parked) == (7, 1)
    state, attempts, error = one(owner, "state, attempts, error", "d3")
    assert (state, attempts) == ("failed", 1)
    assert "refuses this text" in error
    assert [d.id for d in await documents.page(database, "acme", search.Conditions(), limit=9, state="failed")] == [
        "d3"
    ]
    assert (await drain()).ready == 0
    openai.poison = None
    assert await pending.retry(database, "acme", ["d3", "d4", "none"]) == 1
    assert await pending.retry(database, "acme") == 0
    assert (await drain()).ready == 1
    assert set(states(owner).values()) == {"ready"}


async def test_a_document_that_fails_while_others_work_is_given_up_after_the_attempts(write, drain, owner, openai):
    await write(Draft("a", "some text"))
    for attempt in (1, 2):
        openai.fail("truncated")
        counts = await drain(worker_attempts=2)
        state, attempts, error, later = one(owner, "state, attempts, error, not_before > now()")
        assert attempts == attempt
        assert error
        assert (state, later) == (("pending", True) if attempt == 1 else ("failed", None))
        owner.execute("update sources set not_before = null")
    assert counts.parked == 1


async def test_when_the_server_is_away_nothing_counts_and_work_goes_on_when_it_is_back(
    write, drain, owner, openai, settings
):
    await write(*(Draft(f"d{n}", f"text {n}") for n in range(5)))
    openai.fail(status=503, times=1000)
    counts = await drain()
    assert (counts.ready, counts.parked, counts.deferred) == (0, 0, 5)
    assert owner.execute("select distinct state, attempts, claimed_by from sources").fetchall() == [
        ("pending", 0, None)
    ]
    async with working(settings):
        await until(lambda: len(openai.embedding_calls) >= 6)
        openai._faults.clear()
        await until(lambda: set(states(owner).values()) == {"ready"})
    assert owner.execute("select sum(attempts) from sources").fetchone() == (0,)


async def test_a_misconfigured_model_does_not_give_documents_up(write, drain, owner, openai):
    await write(*(Draft(f"d{n}", f"text {n}") for n in range(3)))
    openai.models = {"another"}
    counts = await drain()
    assert (counts.parked, counts.deferred) == (0, 3)
    assert set(states(owner).values()) == {"pending"}


async def test_several_workers_never_embed_a_text_twice(write, owner, openai, settings):
    for batch in range(4):
        await write(*(Draft(f"d{batch}/{n}", f"text {batch} of {n}") for n in range(50)))
    openai.delay = 0.02
    async with working(settings), working(settings), working(settings):
        await until(lambda: set(states(owner).values()) == {"ready"})
    assert len(openai.embedded) == len(set(openai.embedded)) == 200
    assert owner.execute("select count(*) from documents").fetchone() == (200,)


async def test_a_small_tenant_does_not_wait_for_a_big_one(write, owner, settings, openai):
    for batch in range(4):
        await write(*(Draft(f"d{batch}/{n}", f"text {batch} of {n}") for n in range(250)), tenant="big")
    await write(*(Draft(f"s{n}", f"small text {n}") for n in range(10)), tenant="small")
    async with working(replace(settings, worker_concurrency=1)):
        await until(lambda: set(states(owner, "small").values()) == {"ready"})
    order = openai.embedded
    last = max(place for place, text in enumerate(order) if text.startswith("small"))
    assert last < 200


async def test_big_documents_do_not_hold_up_small_ones(write, owner, settings, openai):
    for n in range(3):
        await write(Draft(f"big{n}", "\n\n".join(f"{PROSE} {n} {k}" for k in range(60))))
    await write(*(Draft(f"s{n}", f"small text {n}") for n in range(20)))
    over = False
    openai.holds = lambda call: not over and not any("small" in text for text in call.body["input"])
    async with working(settings):
        await until(lambda: all(s == "ready" for d, s in states(owner).items() if d.startswith("s")))
        assert "pending" in states(owner).values()
        over = True
        await until(lambda: set(states(owner).values()) == {"ready"})


async def test_a_worker_that_ends_gives_back_what_it_holds_at_once(write, owner, openai, settings):
    await write(Draft("a", "text"))
    openai.delay = 2 * PATIENCE
    async with working(replace(settings, worker_lease=3600)):
        await until(lambda: openai.embedded)
        assert one(owner, "claimed_by is not null, not_before > now() + interval '50 minutes'") == (True, True)
    assert one(owner, "state, claimed_by, not_before, attempts") == ("pending", None, None, 0)


async def test_what_a_killed_worker_held_is_suspect_and_given_up_when_that_repeats(write, drain, owner, openai):
    await write(*(Draft(f"d{n}", f"text {n}") for n in range(4)))
    owner.execute("update sources set claimed_by = 'gone', not_before = now() - interval '1 s'")
    owner.execute("update sources set attempts = 4 where id = 'd2'")
    counts = await drain(worker_attempts=5)
    assert (counts.ready, counts.parked) == (3, 1)
    assert len(openai.embedding_calls) == 3
    assert "a worker ended" in one(owner, "error", "d2")[0]


async def test_claims_last_as_long_as_the_work(write, owner, openai, settings):
    await write(Draft("a", "text"))
    over = False
    openai.holds = lambda _: not over
    async with working(replace(settings, worker_lease=9.0)):
        await until(lambda: openai.embedded)
        first = one(owner, "claimed_by, not_before")
        await until(lambda: one(owner, "not_before")[0] > first[1])
        assert one(owner, "claimed_by, not_before < now() + interval '9 s'") == (first[0], True)
        over = True
        await until(lambda: states(owner) == {"a": "ready"})
    assert openai.embedded == ["text"]


async def test_a_put_wakes_a_worker_that_would_look_much_later(write, owner, settings, cluster, database_name):
    listening = "select count(*) from pg_stat_activity where datname = %s and query like 'listen%%' and state = 'idle'"
    direct = cluster.url(database_name, local.SERVICE) if cluster.pooler else None
    async with working(replace(settings, worker_poll=3600, listen_url=direct)) as task:
        with psycopg.connect(cluster.admin, autocommit=True) as admin:
            await until(lambda: admin.execute(listening, (database_name,)).fetchone() == (1,))
        await asyncio.sleep(1)
        for n in range(3):
            await write(Draft(f"d{n}", f"text {n}"))
        await until(lambda: set(states(owner).values()) == {"ready"})
        assert not task.done()


async def test_the_role_that_looks_across_tenants_sees_no_texts_and_changes_nothing(write, settings):
    await write(Draft("a", "text"))
    with psycopg.connect(settings.database_url, autocommit=True) as service:
        service.execute(f"set role {roles.WORKER}")
        assert service.execute("select tenant_id, id, state from sources").fetchall() == [("acme", "a", "pending")]
        for statement in ("select content from sources", "update sources set error = null", "select * from documents"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                service.execute(statement)


async def test_status_counts_what_waits_and_what_became_ready(write, drain, owner, database, openai):
    openai.poison = "poison"
    await write(Draft("a", "x"), Draft("b", "poison"))
    await drain()
    await write(Draft("c", "y"))
    owner.execute("update sources set updated_at = now() - interval '90 s' where id = 'c'")
    owner.execute("update sources set ready_at = now() - interval '2 minutes' where id = 'a'")
    await write(Draft("d", "z"), later=False)
    found = await pending.status(database, "acme")
    assert (found.documents, found.chunks, found.pending, found.failed) == (4, 2, 1, 1)
    assert (found.ready_last_minute, found.ready_last_hour) == (1, 2)
    assert found.oldest_pending_at == owner.execute("select updated_at from sources where id = 'c'").fetchone()[0]
    assert await pending.status(database, "nobody") == pending.Status()
