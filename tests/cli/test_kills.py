"""Server and database killed at random moments of mixed writes: what was acknowledged is there, and whole."""

import contextlib
import os
import random
import signal
import threading
import time

import httpx
import psycopg
import pytest

from tests.cli.test_commands import postmaster, serving

WORDS = ("heron", "otter", "badger", "mill", "ford", "weir", "moon", "tide", "root", "star")


def text(generator):
    sentences = (f"The {generator.choice(WORDS)} met the {generator.choice(WORDS)} {n} times." for n in range(40))
    return " ".join(sentences)


def storm(address, acknowledged, in_doubt, seed, over):
    """Write and delete until the server is gone. The outcome of the last request of each document is not known."""
    generator = random.Random(seed)
    with httpx.Client(base_url=address, timeout=20) as client:
        while not over.is_set():
            document = f"{seed}/{generator.randrange(4)}"
            content = text(generator) if generator.random() < 0.8 else None
            in_doubt[document] = content
            try:
                if content is None:
                    answer = client.delete(f"/documents/{document}", params={"tenant_id": "t"})
                    done = answer.status_code in (204, 404)
                else:
                    body = {"tenant_id": "t", "content": content, "embedding": None, "metadata": {"seed": seed}}
                    done = client.put(f"/documents/{document}", json=body).status_code in (200, 201)
            except httpx.HTTPError:
                return
            if done:
                acknowledged[document] = in_doubt.pop(document)


def check(data_dir, acknowledged, in_doubt):
    with psycopg.connect(f"host={data_dir / 'postgres'} user=pgrecall_owner dbname=pgrecall") as owner:
        sources = dict(owner.execute("select id, content from sources").fetchall())
        places = owner.execute("select id, unnest(chunk_keys) from sources").fetchall()
        chunks = owner.execute("select id, chunk_key from documents").fetchall()
        whole = owner.execute(
            "select bool_and(substring(s.content from c.start_offset + 1 for length(c.content)) = c.content) "
            "from document_chunks c join sources s using (tenant_id, id)"
        ).fetchone()
    for document, content in acknowledged.items():
        assert sources.get(document) in {content, in_doubt.get(document, content)}, document
    assert sources.keys() <= acknowledged.keys() | in_doubt.keys()
    assert sorted(places) == sorted(chunks)
    assert whole in ((True,), (None,))


@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_kills_at_random_moments_lose_nothing_acknowledged_and_leave_nothing_half(tmp_path, rounds):
    generator = random.Random(20261123)
    acknowledged: dict[str, str | None] = {}
    in_doubt: dict[str, str | None] = {}
    for number in range(rounds):
        with serving(tmp_path / "pg") as (process, address):
            check(tmp_path / "pg", acknowledged, in_doubt)
            with psycopg.connect(f"host={tmp_path / 'pg/postgres'} user=pgrecall_owner dbname=pgrecall") as owner:
                stored = dict(owner.execute("select id, content from sources").fetchall())
            # From here on, what is stored is what was acknowledged.
            acknowledged, in_doubt = stored | {d: None for d in acknowledged if d not in stored}, {}
            over = threading.Event()
            writers = [
                threading.Thread(target=storm, args=(address, acknowledged, in_doubt, seed, over)) for seed in range(3)
            ]
            for writer in writers:
                writer.start()
            time.sleep(0.5 + generator.random() * 1.5)
            database = postmaster(tmp_path / "pg")
            victim = number % 3
            if victim in (0, 2):
                os.kill(database, signal.SIGKILL)
            if victim in (1, 2):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.3)
            over.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for writer in writers:
                writer.join()
    with serving(tmp_path / "pg") as (process, address):
        check(tmp_path / "pg", acknowledged, in_doubt)
        assert any(acknowledged.values())
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=20)
