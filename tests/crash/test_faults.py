"""What breaks and is not killed: a cut connection, a restart in the middle of a batch, a full disk, an embedder that is gone."""

import asyncio
import contextlib
import os
import random
import secrets
import subprocess
from pathlib import Path

import psycopg
import pytest
from msgspec.structs import replace
from psycopg import sql

from app import embedded, local, schema
from app.database import Database
from app.drafts import Draft
from app.embedding import open_embedder
from app.errors import DatabaseUnavailable, EmbeddingFailed, StorageFull, Unavailable
from app.upsert import put
from tests.conftest import PATIENCE, settings_for
from tests.crash import invariants, prose
from tests.crash.proxy import Proxy

DRIVERS_WORDS = ("psycopg", "sqlalchemy", "errno", "libpq", "could not extend", "terminating", "server closed")


def texts(generator, count, size=8):
    return {
        f"d{n}": "\n".join(
            [*(prose.sentence(generator) for _ in range(size)), f"mark{secrets.token_hex(4)} closes it."]
        )
        for n in range(count)
    }


def drafts(written):
    return [Draft(name, content) for name, content in written.items()]


def stored(owner):
    return dict(owner.execute("select id, content from sources").fetchall())


def check_clear(error, *words):
    assert all(word in str(error) for word in words), error
    assert not any(word in str(error).lower() for word in DRIVERS_WORDS), error


@pytest.fixture
def small(settings):
    return replace(settings, chunk_max_tokens=48, chunk_overlap_tokens=16)


@pytest.mark.parametrize("direction", ["sent", "received"])
async def test_a_connection_cut_anywhere_in_a_batch_leaves_all_or_nothing_and_the_next_try_works(
    small, owner, embedder, direction
):
    generator = random.Random(20261125)
    with Proxy(small.database_url) as proxy:
        database = Database(small, proxy.url)
        before = texts(generator, 5)
        await put(database, embedder, small, "t", drafts(before))
        proxy.cut(direction, None)
        before = texts(generator, 5)
        await put(database, embedder, small, "t", drafts(before))
        whole = proxy.counted[direction]
        failed = 0
        for place in [*sorted(generator.randrange(whole) for _ in range(12)), whole - 1]:
            after = texts(generator, 5)
            proxy.cut(direction, place)
            try:
                await put(database, embedder, small, "t", drafts(after))
                acknowledged = True
            except DatabaseUnavailable as error:
                check_clear(error, "try again")
                acknowledged = False
                failed += 1
            proxy.cut(direction, None)
            found = stored(owner)
            assert found in ([after] if acknowledged else [before, after]), place
            before = found
            assert invariants.faults(owner, small, embedder) == [], place
            again = texts(generator, 5)
            await put(database, embedder, small, "t", drafts(again))
            before = again
        assert failed
        await database.close()


@pytest.fixture
def own_server(tmp_path, openai):
    """An embedded server that a test may stop: settings, a handle, the owner's URL."""
    with contextlib.closing(embedded.start(tmp_path / "own", durable=False)) as server:
        yield server, *prepared(server, openai)


def prepared(server, openai):
    local.bootstrap(server.url(), local.DATABASE)
    owner_url = server.url(local.OWNER, local.DATABASE)
    settings = settings_for(
        server.url(local.SERVICE, local.DATABASE), openai.url, chunk_max_tokens=48, chunk_overlap_tokens=16
    )
    schema.migrate(replace(settings, migration_url=owner_url))
    return settings, owner_url


async def test_a_server_restarted_in_the_middle_of_batches_costs_only_tries(own_server, embedder):
    server, settings, owner_url = own_server
    database = Database(settings, settings.database_url)
    acknowledged: dict[str, list[str]] = {}
    over, refused = False, []

    async def writer(number):
        generator = random.Random(number)
        while not over:
            written = {f"{number}/{name}": content for name, content in texts(generator, 3).items()}
            try:
                await put(database, embedder, settings, "t", drafts(written))
                acknowledged.update({name: [content] for name, content in written.items()})
            except Unavailable as error:
                refused.append(error)
                for name, content in written.items():
                    acknowledged.setdefault(name, []).append(content)
                await asyncio.sleep(0.02)

    writers = [asyncio.create_task(writer(number)) for number in range(3)]
    for mode in ("fast", "immediate", "fast"):
        await asyncio.sleep(1)
        pgdata = server.data_path / "postgres"
        options = (pgdata / "postmaster.opts").read_text()
        assert "unix_socket_directories" in options
        await asyncio.to_thread(embedded._run, server.data_path, pgdata, "pg_ctl", "restart", "-w", "-s", "-m", mode)
        before = dict(acknowledged)
        async with asyncio.timeout(PATIENCE):
            while all(acknowledged[name] == content for name, content in before.items()):  # noqa: ASYNC110  what the writers write
                await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    over = True
    await asyncio.gather(*writers)
    await database.close()
    for error in refused:
        check_clear(error, "try again")
    with psycopg.connect(owner_url, autocommit=True) as owner:
        found = stored(owner)
        assert found.keys() <= acknowledged.keys()
        for name, possible in acknowledged.items():
            assert found.get(name) in possible, name
        assert invariants.faults(owner, settings, embedder) == []


@contextlib.contextmanager
def small_disk(megabytes):
    """A file system of so many MB that PostgreSQL's user may enter."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    folder = Path(f"/tmp/pgrecall-full-{secrets.token_hex(4)}")
    folder.mkdir(mode=0o755)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("this machine lets nobody mount a file system")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()


def fill(folder, *, leaving):
    """A file that leaves so many bytes."""
    free = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - leaving))
    return filler


async def test_a_full_disk_is_named_nothing_is_half_stored_and_freed_space_is_enough(own_server, embedder):
    server, settings, owner_url = own_server
    generator = random.Random(7)
    with small_disk(4) as folder:
        inside = folder / "space"
        inside.mkdir()
        owned_by = (server.data_path / "postgres").stat()
        os.chown(inside, owned_by.st_uid, owned_by.st_gid)
        with psycopg.connect(server.url(database=local.DATABASE), autocommit=True) as admin:
            admin.execute(sql.SQL("create tablespace small location {}").format(sql.Literal(str(inside))))
            for table in ("sources", "documents"):
                admin.execute(sql.SQL("alter table {} set tablespace small").format(sql.Identifier(table)))
            filler = fill(folder, leaving=400_000)
            database = Database(settings, settings.database_url)
            acknowledged = {}
            written: dict[str, str] = {}

            async def put_until_full():
                for batch in range(200):
                    written.clear()
                    written.update({f"{batch}/{name}": text for name, text in texts(generator, 20, 30).items()})
                    await put(database, embedder, settings, "t", drafts(written))
                    acknowledged.update(written)

            with pytest.raises(StorageFull) as full:
                await put_until_full()
            check_clear(full.value, "disk is full", "free space")
            with psycopg.connect(owner_url, autocommit=True) as owner:
                assert stored(owner) == acknowledged
                assert invariants.faults(owner, settings, embedder) == []
                filler.unlink()
                await put(database, embedder, settings, "t", drafts(written))
                assert stored(owner) == acknowledged | written
                assert invariants.faults(owner, settings, embedder) == []
            await database.close()
            for table in ("sources", "documents"):
                admin.execute(sql.SQL("alter table {} set tablespace pg_default").format(sql.Identifier(table)))
            admin.execute("drop tablespace small")


async def test_a_disk_without_room_for_the_log_stops_the_server_and_nothing_acknowledged_is_lost(openai, embedder):
    generator = random.Random(8)
    with small_disk(160) as folder, contextlib.closing(embedded.start(folder / "data", durable=True)) as server:
        settings, owner_url = prepared(server, openai)
        database = Database(settings, settings.database_url)
        acknowledged = {}
        filler = fill(folder, leaving=1_000_000)
        failures = []
        for batch in range(60):
            written = {f"{batch}/{name}": text for name, text in texts(generator, 2).items()}
            try:
                await put(database, embedder, settings, "t", drafts(written))
                acknowledged |= written
                with contextlib.suppress(psycopg.Error), psycopg.connect(server.url(), autocommit=True) as admin:
                    admin.execute("select pg_switch_wal()")  # the next write needs a file of 16 MB
            except Unavailable as error:
                failures.append(error)
                if len(failures) > 2:
                    break
        assert any(isinstance(error, DatabaseUnavailable) for error in failures)
        for error in failures:
            check_clear(error, "try again")
        filler.unlink()
        # As the keeper does: a server that is still dying when asked is not revived yet.
        for left in reversed(range(120)):
            await asyncio.to_thread(server.revive)
            try:
                await put(database, embedder, settings, "t", drafts(written))
                break
            except Unavailable:
                if not left:
                    raise
                await asyncio.sleep(0.5)
        await database.close()
        with psycopg.connect(owner_url, autocommit=True) as owner:
            found = stored(owner)
            assert acknowledged.items() <= found.items()
            assert written.items() <= found.items()
            assert invariants.faults(owner, settings, embedder) == []


async def test_while_the_embedder_is_gone_puts_fail_clearly_and_searches_by_words_go_on(
    small, database, embedder, owner, openai
):
    generator = random.Random(9)
    before = texts(generator, 3)
    await put(database, embedder, small, "t", drafts(before))
    hurried = replace(small, embedding_retries=1)
    openai.fail("cut", times=10_000)
    gone = open_embedder(hurried)
    with pytest.raises(EmbeddingFailed) as failed:
        await put(database, gone, hurried, "t", drafts(texts(generator, 3)))
    check_clear(failed.value)
    assert stored(owner) == before
    openai._faults.clear()
    after = texts(generator, 3)
    await put(database, gone, hurried, "t", drafts(after))
    await gone.aclose()
    assert stored(owner) == after
    assert invariants.faults(owner, small, embedder) == []
