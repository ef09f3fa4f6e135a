"""What getting documents in costs: rows beside a raw COPY, texts beside the embedder alone, again, over HTTP.

    python -m bench.ingest [rows] [embedder] [elsewhere] [again] [stream] [deferred] [--data-dir .bench] [--rounds 3]

Each round of each variant fills an empty database of its own, variants one after the other in another order every round.
Beside seconds stands the CPU of the server's processes and of this one: on a busy machine trust that, and ratios.
"""

import asyncio
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pgvector.psycopg
import psycopg
from psycopg import sql

from app import chunking, deferral, embedded, files, loading, local, terminal
from app.database import Database
from app.drafts import Draft
from app.embedding import Embedder, LocalEmbedder, open_embedder
from app.files import Reading, Step
from app.loading import Counts
from app.settings import Settings
from bench import data, distant, postgres, timing
from bench.data import Corpus

TICK = os.sysconf("SC_CLK_TCK")
TEMPLATE = "ingest_template"
TENANT = data.EVERYTHING


class Took(NamedTuple):
    """Seconds that passed, and of CPU in the server and here."""

    wall: float
    server: float
    client: float


def cpu(postmaster: int) -> float:
    """Seconds of CPU that a server's processes have used, those that have ended included."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rsplit(") ", 1)[1].split()
            if int(entry.name) == postmaster:
                total += sum(map(int, fields[11:15]))
            elif int(fields[1]) == postmaster:
                total += int(fields[11]) + int(fields[12])
    return total / TICK


class Bench:
    """A server and a template to clone empty databases from."""

    def __init__(self, server: embedded.Server, data_dir: Path) -> None:
        self.server = server
        self.folder = data_dir
        self.postmaster = int((data_dir / "pg" / "postgres" / "postmaster.pid").read_text().split("\n")[0])
        self.settings = postgres.empty(server, TEMPLATE)

    @contextlib.contextmanager
    def database(self) -> Iterator[Settings]:
        """Settings of an empty database."""
        name = "ingest_round"
        drop = sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
        with psycopg.connect(self.server.url(), autocommit=True) as admin:
            admin.execute(drop)
            admin.execute(
                sql.SQL("create database {} template {} owner {}").format(
                    *map(sql.Identifier, (name, TEMPLATE, local.OWNER))
                )
            )
            admin.execute("checkpoint")
            yield msgspec.structs.replace(
                self.settings,
                database_url=self.server.url(local.SERVICE, name),
                migration_url=self.server.url(local.OWNER, name),
                statement_timeout=600.0,
            )
            admin.execute(drop)

    @contextlib.contextmanager
    def measured(self, taken: list[Took]) -> Iterator[None]:
        """Add what the block takes."""
        wall, server, client = time.perf_counter(), cpu(self.postmaster), time.process_time()
        yield
        taken.append(Took(time.perf_counter() - wall, cpu(self.postmaster) - server, time.process_time() - client))


def rounds(variants: dict[str, Callable[[list[Took]], None]], count: int, title: str) -> dict[str, list[Took]]:
    """What each variant took in each round; every round begins with another one."""
    taken: dict[str, list[Took]] = {name: [] for name in variants}
    names = list(variants)
    with terminal.progress("runs") as bar:
        task = bar.add_task(title, total=count * len(names))
        for number in range(count):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                bar.update(task, description=f"{title}: {name}")
                variants[name](taken[name])
                bar.advance(task)
    return taken


def summary(taken: dict[str, list[Took]], unit: int, base: str) -> list[dict[str, Any]]:
    """A row for each variant: per unit ms, and the ratios of its rounds to `base` in the same round."""
    rows = []
    for name, each in taken.items():
        ratios = {
            kind: [measure(b) / measure(t) for t, b in zip(each, taken[base], strict=True)]
            for kind, measure in (("wall", lambda t: t.wall), ("cpu", lambda t: t.server + t.client))
        }
        rows.append(
            {
                "variant": name,
                "base": base,
                "rounds": len(each),
                "wall_ms": 1e3 * statistics.median(t.wall for t in each) / unit,
                "server_cpu_ms": 1e3 * statistics.median(t.server for t in each) / unit,
                "client_cpu_ms": 1e3 * statistics.median(t.client for t in each) / unit,
                "speed_wall": [round(ratio, 3) for ratio in sorted(ratios["wall"])],
                "speed_cpu": [round(ratio, 3) for ratio in sorted(ratios["cpu"])],
            }
        )
    return rows


def rows(bench: Bench, count: int, repeats: int) -> list[dict[str, Any]]:
    """Documents with vectors of their own: raw COPY into the same indexed tables, and ours."""
    corpus = data.corpus(count, layout="single", dimensions=384, seed=5)
    listed = list(corpus.rows())
    jsonl = bench.folder / f"rows_{count}.jsonl"
    with jsonl.open("wb") as out:
        for row, vector in zip(listed, corpus.vectors, strict=True):
            out.write(
                msgspec.json.encode(
                    {
                        "id": row.id,
                        "content": row.content,
                        "doc_type": row.doc_type,
                        "metadata": row.metadata,
                        "created_at": row.created_at,
                        "embedding": [round(float(x), 6) for x in vector],
                    }
                )
                + b"\n"
            )
    drafts = [
        Step(Draft(row.id, row.content, None, row.doc_type, row.metadata, row.created_at, vector), len(row.content))
        for row, vector in zip(listed, corpus.vectors, strict=True)
    ]

    def copied(taken: list[Took], *, everything: bool) -> None:
        with bench.database() as settings, psycopg.connect(settings.migration_url or "", autocommit=True) as owner:
            pgvector.psycopg.register_vector(owner)
            if not everything:
                copy_sources(owner, corpus)
            with bench.measured(taken):
                if everything:
                    copy_sources(owner, corpus)
                copy_documents(owner, corpus)
                if everything:
                    learn(owner, corpus)

    def ours(taken: list[Took], *, file: bool, lanes: int) -> None:
        with bench.database() as settings:
            chosen = msgspec.structs.replace(settings, pool_size=lanes)
            steps = files.drafts([jsonl], Reading()) if file else drafts
            with bench.measured(taken):
                counts = asyncio.run(loaded(chosen, steps))
            if counts.created != count or counts.skipped:
                raise SystemExit(f"{counts} of {count}")

    variants: dict[str, Callable[[list[Took]], None]] = {
        "COPY into documents": lambda taken: copied(taken, everything=False),
        "COPY into sources and documents, learn_terms": lambda taken: copied(taken, everything=True),
        "pgrecall, one connection": lambda taken: ours(taken, file=False, lanes=1),
        "pgrecall": lambda taken: ours(taken, file=False, lanes=10),
        "pgrecall, from JSONL": lambda taken: ours(taken, file=True, lanes=10),
    }
    return summary(rounds(variants, repeats, f"{count:,} rows"), count, "COPY into documents")


def copy_sources(owner: psycopg.Connection[Any], corpus: Corpus) -> None:
    """As the tables' owner, whom no policy holds."""
    with owner.cursor().copy(
        "copy sources (tenant_id, id, content, content_sha256, doc_type, metadata, created_at, chunk_keys, "
        "start_offsets, state, chunker, embedding_origin, embedding_model) from stdin (format binary)"
    ) as copy:
        copy.set_types(
            ["text", "text", "text", "bytea", "text", "jsonb", "timestamptz", "text[]", "int4[]", *["text"] * 4]
        )
        for row in corpus.rows():
            digest = sha256(row.content.encode()).digest()
            labels = (row.doc_type, postgres.Jsonb(row.metadata), row.created_at)
            place = ([chunking.key(row.content)], [0], "ready", "whole", "caller", "none")
            copy.write_row((row.tenant, row.id, row.content, digest, *labels, *place))


def copy_documents(owner: psycopg.Connection[Any], corpus: Corpus) -> None:
    """Texts and vectors, with every index there is."""
    with owner.cursor().copy(
        "copy documents (tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding) "
        "from stdin (format binary)"
    ) as copy:
        copy.set_types(["text", "text", "text", "text", "jsonb", "timestamptz", "text", "vector"])
        for row, vector in zip(corpus.rows(), corpus.vectors, strict=True):
            labels = (row.doc_type, postgres.Jsonb(row.metadata), row.created_at)
            copy.write_row((row.tenant, row.id, chunking.key(row.content), *labels, row.content, vector))


def learn(owner: psycopg.Connection[Any], corpus: Corpus) -> None:
    """Words and statistics, a thousand chunks at a time."""
    listed = [(row.id, chunking.key(row.content)) for row in corpus.rows()]
    for start in range(0, len(listed), 1_000):
        ids, keys = zip(*listed[start : start + 1_000], strict=True)
        owner.execute("select learn_terms(%s, %s, %s)", (TENANT, list(ids), list(keys)))


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Database]:
    """A database, closed at the end."""
    database = Database(settings, settings.database_url or "")
    try:
        yield database
    finally:
        await database.close()


MODEL: list[LocalEmbedder] = []


def model() -> LocalEmbedder:
    """The local model, loaded once."""
    if not MODEL:
        MODEL.append(LocalEmbedder())
    return MODEL[0]


async def loaded(settings: Settings, steps: Any) -> Counts:
    """What is stored of these, embedded by the local model."""
    return await loaded_by(model(), settings, steps)


async def loaded_by(embedder: Embedder, settings: Settings, steps: Any) -> Counts:
    """What is stored of these."""
    counts = Counts()
    async with opened(settings) as database:
        await loading.load(database, embedder, settings, TENANT, steps, counts=counts, told=print)
    return counts


def texts(count: int) -> list[Draft]:
    """Documents of real prose, no two chunks alike."""
    return [Draft(f"d{n}", " ".join(data.content(n * 7 + part) for part in range(5)) + f" {n}") for n in range(count)]


def cut(settings: Settings, using: Embedder, documents: list[Draft]) -> list[str]:
    """The chunks of these documents."""
    most = min(settings.chunk_max_tokens, using.max_tokens)
    limits = {"max_tokens": most, "overlap_tokens": settings.chunk_overlap_tokens}
    return [
        chunk.content for draft in documents for chunk in chunking.chunk(draft.content, using.count_tokens, **limits)
    ]


def embedder(bench: Bench, count: int, repeats: int) -> list[dict[str, Any]]:
    """Texts that are embedded here: the model alone on the same chunks, and the whole of ingest."""
    documents = texts(count)
    chunks = cut(bench.settings, model(), documents)

    def alone(taken: list[Took]) -> None:
        async def embed() -> None:
            await model().embed(chunks, "document")

        with bench.measured(taken):
            asyncio.run(embed())

    def whole(taken: list[Took]) -> None:
        steps = [Step(draft, len(draft.content)) for draft in documents]
        with bench.database() as settings:
            with bench.measured(taken):
                counts = asyncio.run(loaded(settings, steps))
            if counts.embedded != len(chunks):
                raise SystemExit(f"{counts} of {len(chunks)} chunks")

    with bench.database() as fresh:  # what the first statements of a process cost is no part of a long load
        asyncio.run(loaded(fresh, [Step(draft, 1) for draft in documents[:10]]))
    variants = {"embedder alone": alone, "ingest": whole}
    made = summary(rounds(variants, repeats, f"{len(chunks):,} chunks"), len(chunks), "embedder alone")
    return [row | {"chunks": len(chunks)} for row in made]


RATES = (100, 300)
"""Texts a second of an embedding server elsewhere."""
LATENCY = 0.08
"""Seconds in which it answers at the earliest."""


def elsewhere(bench: Bench, count: int, repeats: int) -> list[dict[str, Any]]:
    """Texts that a server elsewhere embeds: its client alone on the same chunks, and the whole of ingest."""
    documents = texts(count)
    rows = []
    for rate in RATES:
        with distant.served(rate, LATENCY, bench.settings.embedding_dimensions or 384) as url:
            there = {"embedder": "openai", "openai_base_url": url, "openai_api_key": "none", "embedding_model": "none"}
            base = msgspec.structs.replace(bench.settings, **there, embedding_dimensions=384)
            chunks = cut(base, open_embedder(base), documents)

            def alone(taken: list[Took], base: Settings = base, chunks: list[str] = chunks) -> None:
                async def embed() -> None:
                    client = open_embedder(base)
                    with bench.measured(taken):
                        await client.embed(chunks, "document")
                    await client.aclose()

                asyncio.run(embed())

            def whole(taken: list[Took], there: dict[str, str] = there, chunks: list[str] = chunks) -> None:
                async def load(chosen: Settings) -> Counts:
                    client = open_embedder(chosen)
                    with bench.measured(taken):
                        counts = await loaded_by(
                            client, chosen, [Step(draft, len(draft.content)) for draft in documents]
                        )
                    await client.aclose()
                    return counts

                with bench.database() as settings:
                    chosen = msgspec.structs.replace(settings, **there, embedding_dimensions=384)
                    with psycopg.connect(settings.migration_url or "", autocommit=True) as owner:
                        owner.execute("update embedding_models set name = 'none'")
                    counts = asyncio.run(load(chosen))
                if counts.embedded != len(chunks):
                    raise SystemExit(f"{counts} of {len(chunks)} chunks")

            whole([])  # what the first statements of a process cost is no part of a long load
            base_name = f"client alone, {rate} texts a second"
            variants = {base_name: alone, f"ingest, {rate} texts a second": whole}
            rows += summary(rounds(variants, repeats, f"{len(chunks):,} chunks"), len(chunks), base_name)
    return [row | {"chunks": len(chunks)} for row in rows]


def again(bench: Bench, count: int, repeats: int) -> list[dict[str, Any]]:
    """Documents that are stored already, from files that did not change."""
    corpus = data.corpus(count, layout="single", dimensions=384, seed=5)
    jsonl = bench.folder / f"again_{count}.jsonl"
    with jsonl.open("wb") as out:
        for row in corpus.rows():
            out.write(msgspec.json.encode({"id": row.id, "content": row.content, "doc_type": row.doc_type}) + b"\n")
    taken: dict[str, list[Took]] = {"again": []}
    with bench.database() as settings:
        chunker = f"{chunking.VERSION}/{settings.chunk_max_tokens}/{settings.chunk_overlap_tokens}"
        with psycopg.connect(settings.migration_url or "", autocommit=True) as owner:
            copy_sources(owner, corpus)
            owner.execute(
                "update sources set metadata = '{}', chunker = %s, embedding_origin = 'pgrecall', embedding_model = %s",
                (chunker, model().model),
            )
            owner.execute("vacuum analyze sources")
        for _ in range(repeats):
            with bench.measured(taken["again"]):
                counts = asyncio.run(loaded(settings, files.drafts([jsonl], Reading())))
            if counts.unchanged != count:
                raise SystemExit(f"{counts} of {count}")
    return summary(taken, count, "again")


def stream(bench: Bench, count: int, repeats: int) -> list[dict[str, Any]]:  # noqa: ARG001  once: it is about memory
    """Documents with vectors over HTTP, and the server's memory meanwhile; without the vector index, to be done sooner."""
    generator = np.random.default_rng(9)
    results = []
    with bench.database() as settings, deferral.deferred(settings.migration_url or "", "t", None):
        environment = os.environ | {"DATABASE_URL": settings.database_url or "", "PGRECALL_EMBEDDER": "local"}
        environment.pop("PGRECALL_DATA_DIR", None)
        with subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0"], env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            for line in process.stderr or ():
                if found := re.search(r"serving on http://([\d.]+):(\d+)", line):
                    break
            else:
                raise SystemExit("the server ended before it served")
            try:
                memory = [resident(process.pid)]
                taken: list[Took] = []
                with bench.measured(taken):
                    answered = streamed(
                        (found[1], int(found[2])), count, generator, lambda: memory.append(resident(process.pid))
                    )
                results.append(
                    {
                        "items": count,
                        "answered": answered,
                        "seconds": taken[0].wall,
                        "server_cpu_s": taken[0].server,
                        "rss_before_mb": memory[0],
                        "rss_at_each_tenth_mb": memory[1:],
                        "rss_after_mb": resident(process.pid),
                    }
                )
            finally:
                process.send_signal(signal.SIGINT)
                process.wait()
    return results


def resident(pid: int) -> float:
    """MB of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def streamed(address: tuple[str, int], count: int, generator: np.random.Generator, tenth: Callable[[], None]) -> int:
    """Send so many documents in one request, reading the answers meanwhile; how many were created."""
    import socket  # noqa: PLC0415
    import threading  # noqa: PLC0415

    with socket.create_connection(address) as connection:
        connection.sendall(
            b"POST /documents/stream?tenant_id=t HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        created = 0

        def read() -> None:
            nonlocal created
            held = b""
            while b'"done":' not in held:
                part = connection.recv(1 << 18)
                if not part:
                    break
                created += (held[-20:] + part).count(b'"status":"created"')
                held = held[-200:] + part
                if held.count(b'"status":"created"') and len(held) > 400:
                    held = held[-200:]

        reader = threading.Thread(target=read)
        reader.start()
        for start in range(0, count, 100):
            vectors = generator.standard_normal((min(100, count - start), 384)).round(4)
            lines = b"".join(
                msgspec.json.encode({"id": f"d{start + n}", "content": f"Item {start + n}.", "embedding": v.tolist()})
                + b"\n"
                for n, v in enumerate(vectors)
            )
            connection.sendall(b"%x\r\n" % len(lines) + lines + b"\r\n")
            if start % (count // 10) == 0:
                tenth()
        connection.sendall(b"0\r\n\r\n")
        reader.join()
    return created


def deferred(bench: Bench, count: int, repeats: int) -> list[dict[str, Any]]:
    """Rows with vectors into an empty database: with the vector index in place, and built afterwards."""
    corpus = data.corpus(count, layout="single", dimensions=384, seed=5)
    steps = [
        Step(Draft(row.id, row.content, None, row.doc_type, row.metadata, row.created_at, vector), len(row.content))
        for row, vector in zip(corpus.rows(), corpus.vectors, strict=True)
    ]

    def run(taken: list[Took], *, defer: bool) -> None:
        with bench.database() as settings, bench.measured(taken):
            if not defer:
                asyncio.run(loaded(settings, steps))
                return
            with deferral.deferred(settings.migration_url or "", TENANT, None) as index:
                asyncio.run(loaded(settings, steps))
                index.build(lambda *_: None)

    variants: dict[str, Callable[[list[Took]], None]] = {
        "index in place": lambda taken: run(taken, defer=False),
        "--defer-index": lambda taken: run(taken, defer=True),
    }
    return summary(rounds(variants, repeats, f"{count:,} rows"), count, "index in place")


COMMANDS: dict[str, tuple[Callable[[Bench, int, int], list[dict[str, Any]]], int]] = {
    "rows": (rows, 3_000),
    "embedder": (embedder, 150),
    "elsewhere": (elsewhere, 600),
    "again": (again, 100_000),
    "stream": (stream, 100_000),
    "deferred": (deferred, 50_000),
}


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", choices=[*COMMANDS, []], default=list(COMMANDS))
    parser.add_argument("--rounds", type=int, default=3)
    options = timing.arguments(parser, rows=0)
    results: dict[str, Any] = {}
    path = options.out / "ingest.json"
    if path.exists():
        results = msgspec.json.decode(path.read_bytes())["results"]
    options.data_dir.mkdir(parents=True, exist_ok=True)
    with postgres.started(options.data_dir) as server:
        bench = Bench(server, options.data_dir)
        where = timing.surroundings(bench.settings.database_url or "")
        for name in options.what:
            command, count = COMMANDS[name]
            before = timing.surroundings(bench.settings.database_url or "")
            found = command(bench, options.rows or count, options.rounds)
            size = {"size": f"{options.rows or count:,} documents"}
            results[name] = {"surroundings": before | size, "rows": found}
            terminal.json(found)
            options.out.mkdir(parents=True, exist_ok=True)
            record = {"surroundings": where, "results": results}
            path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


if __name__ == "__main__":
    main()
