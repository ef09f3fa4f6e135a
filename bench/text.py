"""Full-text search: latency and the cost of writing at 200,000 chunks of one tenant, and quality on judged collections.

    python -m bench.text [--admin URL] [--rows 200000] [--folder DIR]     # latency, cost of writing
    python -m bench.text [--admin URL] --judged DIR [DIR ...]             # nDCG@10 of collections in the BEIR layout

The texts are those under --folder (HTML, text, POD, gzipped or not; unpacked documentation packages, for example) in
passages of about 80 words, or without it sentences of Python's own documentation, shuffled. Embeddings are one number:
nothing here looks at them. Times are of `search.search`, one client, statement and round trip.
"""

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import html
import itertools
import re
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from app import chunking, embedded, evaluation, judgements, local, schema, search, tables, terminal, text
from app.database import Database
from app.embedding import LocalEmbedder
from app.search import Options
from app.settings import Settings

TENANT = "acme"
BY_WORDS = Options(mode="text")
TOP_K = 10
SHORT, LONG = 200, 40
"""Questions of each kind."""
BATCHES = (1, 20, 200)
WHOLE = "whole"
"""In place of a budget: one chunk a document."""

_HIDDEN = re.compile(r"<(script|style|nav|head)\b.*?</\1>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(r"</?(p|div|li|tr|td|h\d|pre|dt|dd|table|ul|ol|blockquote|section)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_READ = re.compile(r"\.(html|txt|rst|pod)(\.gz)?$")


def passages(folder: Path, words: int = 80) -> Iterator[str]:
    """Consecutive words of the files below, each passage once."""
    seen = set()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or not _READ.search(path.name):
            continue
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        content = data.decode("utf-8", "replace").replace("\0", "")
        if ".html" in path.name:
            content = html.unescape(_TAG.sub("", _BLOCK.sub("\n", _HIDDEN.sub(" ", content))))
        found = content.split()
        for start in range(0, len(found), words):
            passage = " ".join(found[start : start + words])[:8_000]
            digest = hashlib.md5(passage.encode(), usedforsecurity=False).digest()
            if digest not in seen and start + words // 4 < len(found):
                seen.add(digest)
                yield passage


def shuffled(random: Random) -> Iterator[str]:
    """Sentences of Python's language reference in any order."""
    sentences = re.split(r"(?<=[.:])\s+", "\n".join(topics.values()))
    while True:
        yield " ".join(random.choices(sentences, k=6))


def questions(random: Random, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Short ones of 4 to 8 words, half of them made of common words around a rarer one, and long ones of 70."""

    def window(count: int) -> str:
        while True:
            words = random.choice(texts).replace('"', "").replace(" -", " ").split()
            if len(words) >= count:
                start = random.randrange(len(words) - count + 1)
                return " ".join(words[start : start + count])

    rare = re.findall(r"[a-z]{5,12}", " ".join(random.sample(texts, min(len(texts), 2_000))))
    short = [f"how to set the default value of {random.choice(rare)}" for _ in range(SHORT // 2)]
    short += [window(random.randint(4, 8)) for _ in range(SHORT - len(short))]
    return short, [f"{window(35)} {window(35)}" for _ in range(LONG)]


@contextlib.contextmanager
def opened(admin: str | None) -> Iterator[tuple[Settings, psycopg.Connection[Any]]]:
    """A database of its own: the service's settings and the owner's connection."""
    name = f"pgrecall_bench_{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        if admin is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            admin = stack.enter_context(embedded.start(folder / "pg", durable=True)).url()

        def url(user: str) -> str:
            parts = urlsplit(admin or "")
            return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}", path=f"/{name}"))

        settings = Settings(
            database_url=url(local.SERVICE),
            migration_url=url(local.OWNER),
            openai_api_key="none",
            embedding_model="none",
            embedding_dimensions=1,
            statement_timeout=600,
        )
        local.bootstrap(admin, name)
        try:
            schema.migrate(settings)
            with psycopg.connect(url(local.OWNER), autocommit=True) as owner:
                owner.execute(f"drop index {', '.join(tables.embedding_indexes('full'))}".encode())
                yield settings, owner
        finally:
            with psycopg.connect(admin, autocommit=True) as connection:
                connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def store(owner: psycopg.Connection[Any], tenant: str, documents: dict[str, list[str]]) -> None:
    """Documents as lists of their chunks, without their words."""
    keyed = {id_: list(dict.fromkeys(chunks)) for id_, chunks in documents.items()}
    columns = "copy sources (tenant_id, id, content, chunk_keys, start_offsets, state) from stdin"
    with owner.cursor().copy(columns) as rows:
        for id_, chunks in keyed.items():
            rows.write_row((tenant, id_, "", [chunking.key(c) for c in chunks], [0] * len(chunks), "ready"))
    with owner.cursor().copy("copy documents (tenant_id, id, chunk_key, content, embedding) from stdin") as rows:
        for id_, chunks in keyed.items():
            for chunk in chunks:
                rows.write_row((tenant, id_, chunking.key(chunk), chunk, "[1]"))


async def asked(database: Database, settings: Settings, several: Sequence[str]) -> list[float]:
    """Milliseconds of each question, sorted, at its second time."""
    times = []
    for question in several:
        for _ in range(2):
            begun = time.perf_counter()
            await search.search(database, settings, TENANT, None, question=question, top_k=TOP_K, options=BY_WORDS)
            took = 1e3 * (time.perf_counter() - begun)
        times.append(took)
    return sorted(times)


def written(owner: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    """Milliseconds a chunk, beside the tenant's others: the row itself and what its words cost."""
    shown = []
    rows = owner.execute("select id, chunk_key from documents order by id limit 2000").fetchall()
    for batch in BATCHES:
        spent = {"row": 0.0, "words": 0.0, "off": 0.0}
        several = [rows[start : start + batch] for start in range(0, min(len(rows), 30 * batch), batch)]
        for some in several:
            values = {"tenant_id": TENANT, "ids": [r[0] for r in some], "keys": [r[1] for r in some]}
            fresh = values | {"ids": [f"{secrets.token_hex(4)}-{r[0]}" for r in some]}
            timed(owner, spent, "off", "select forget_terms(%(tenant_id)s, %(ids)s, %(keys)s)", values)
            owner.execute(
                "insert into sources (tenant_id, id, content) select %(tenant_id)s, i, '' from unnest(%(ids)s::text[]) i",
                fresh,
            )
            timed(
                owner,
                spent,
                "row",
                "insert into documents (tenant_id, id, chunk_key, content, embedding) select %(tenant_id)s, k.id, "
                "d.chunk_key, d.content, d.embedding from unnest(%(ids)s::text[], %(old)s::text[], %(keys)s::text[]) "
                "k (id, old, key) join documents d on d.tenant_id = %(tenant_id)s and d.id = k.old and d.chunk_key = k.key",
                fresh | {"old": values["ids"]},
            )
            timed(owner, spent, "words", "select learn_terms(%(tenant_id)s, %(ids)s, %(keys)s)", fresh)
            owner.execute("select learn_terms(%(tenant_id)s, %(ids)s, %(keys)s)", values)
        count = len(several) * batch
        shown.append(
            (
                f"{batch} a statement, ms a chunk",
                f"row {spent['row'] / count:.2f}, words {spent['words'] / count:.2f}, off again {spent['off'] / count:.2f}",
            )
        )
    begun = time.perf_counter()
    owner.execute("select fold_statistics(%s)", (TENANT,))
    return [*shown, ("fold, ms", f"{1e3 * (time.perf_counter() - begun):.0f}")]


def timed(owner: psycopg.Connection[Any], spent: dict[str, float], name: str, query: str, values: Any) -> None:
    begun = time.perf_counter()
    owner.execute(query.encode(), values)
    spent[name] += 1e3 * (time.perf_counter() - begun)


def figures(name: str, times: Sequence[float]) -> tuple[str, str]:
    p95 = times[int(0.95 * len(times))]
    return name, f"p50 {statistics.median(times):.1f}, p95 {p95:.1f}, max {times[-1]:.1f}"


def speed(admin: str | None, rows: int, folder: Path | None) -> list[tuple[str, str]]:
    random = Random(5)
    found = list(passages(folder)) if folder else list(itertools.islice(shuffled(random), rows))
    random.shuffle(found)
    found = found[:rows]
    short, long = questions(random, found)
    with opened(admin) as (settings, owner):
        store(owner, TENANT, {f"d{start}": found[start : start + 4] for start in range(0, len(found), 4)})
        begun = time.perf_counter()
        owner.execute("call fill_terms()")
        filled = time.perf_counter() - begun
        for table in ("documents", "document_terms", "term_statistics", "collection_statistics"):
            owner.execute(f"vacuum analyze {table}".encode())
        sizes = (
            "select count(*), pg_size_pretty(pg_table_size('document_terms')), "
            "pg_size_pretty(pg_relation_size('document_terms_tenant_terms_idx')), "
            "pg_size_pretty(pg_total_relation_size('term_statistics')), round(avg(length)) from document_terms"
        )
        count, table, index, statistics_, length = owner.execute(sizes).fetchone() or ()
        shown = [
            ("chunks", f"{count:,} of {length} words"),
            ("document_terms, its index, statistics", f"{table}, {index}, {statistics_}"),
            ("filled, ms a chunk", f"{1e3 * filled / count:.2f}"),
        ]

        async def latencies() -> None:
            database = Database(settings, settings.database_url or "")
            for name, several in (("4 to 8 words", short), ("70 words", long)):
                shown.append(figures(f"{name}, ms", await asked(database, settings, several)))
            await database.close()

        asyncio.run(latencies())
        return shown + written(owner)


def quality(admin: str | None, folders: Sequence[Path], budgets: Sequence[str]) -> list[tuple[str, str]]:
    """nDCG@10, a document judged by its best chunk: cut to each budget, and with one chunk a document."""
    embedder = LocalEmbedder()
    shown = []
    with opened(admin) as (settings, owner):
        for folder, budget in itertools.product(folders, (*budgets, WHOLE)):
            tenant = f"{folder.name}-{budget.replace('/', '-')}"
            collection = judgements.read(folder, tenant)
            if budget == WHOLE:
                documents = {draft.id: [draft.content] for draft in collection.drafts}
            else:
                limit, overlap = map(int, budget.split("/"))
                documents = {
                    draft.id: [
                        each.content
                        for each in chunking.chunk(
                            draft.content, embedder.count_tokens, max_tokens=limit, overlap_tokens=overlap
                        )
                    ]
                    for draft in collection.drafts
                }
            store(owner, tenant, documents)
            owner.execute("call fill_terms()")

            async def judged(questions: Sequence[judgements.Question], tenant: str = tenant) -> float:
                database = Database(settings, settings.database_url or "")
                gains = []
                for question in questions:
                    asked = text.plain(question.text)
                    hits, *_ = await search.search(
                        database, settings, tenant, None, question=asked, top_k=100, options=BY_WORDS
                    )
                    best = list(dict.fromkeys(hit.id for hit in hits))
                    gains.append(evaluation.ndcg(best, question.grades, 10))
                await database.close()
                return statistics.mean(gains)

            ndcg = asyncio.run(judged(collection.questions))
            chunks = sum(map(len, documents.values()))
            shown.append((f"{folder.name}, {budget}", f"{ndcg:.3f} ({chunks:,} chunks)"))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--admin", help="URL of a superuser on a server that asks local roles for no password")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="of texts to cut into passages")
    parser.add_argument("--judged", type=Path, nargs="+", help="folders of judged collections: nDCG@10 of each instead")
    default = f"{Settings().chunk_max_tokens}/{Settings().chunk_overlap_tokens}"
    parser.add_argument(
        "--budgets", nargs="+", default=[default], metavar="TOKENS/OVERLAP", help=f"of chunks ({default})"
    )
    args = parser.parse_args()
    rows = quality(args.admin, args.judged, args.budgets) if args.judged else speed(args.admin, args.rows, args.folder)
    terminal.table("full-text search", [("", "left"), ("", "right")], rows)


if __name__ == "__main__":
    main()
