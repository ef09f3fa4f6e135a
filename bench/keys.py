"""What a key costs a search: the same searches over HTTP without keys, with one, and with one whose requests are limited.

    python -m bench.keys [--rows 50000] [--data-dir .bench] [--rounds 20] [--clients 4]

Two databases with the same rows, one without keys and one with two; a server of one process on each, asked in turns, a
turn of half a second.
"""

import json
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import psycopg

from app import keys, registry
from app.registry import Asked
from bench import data, postgres, served
from bench.data import Narrowing
from bench.load import Load, request
from bench.served import Serving
from bench.timing import Sample

SECONDS = 0.5
TENANT = "hundredth"
LIMIT = 1_000_000
"""Requests a minute: a share is more than a turn needs, and the turns need several in all."""


def filled(server: postgres.embedded.Server, rows: int, name: str) -> tuple[str, str]:
    """A database with the rows; the URLs of the service and of the owner."""
    corpus = data.corpus(rows, layout="mixed", dimensions=postgres.LOCAL_DIMENSIONS, seed=postgres.SEED)
    settings = postgres.empty(server, name)
    postgres.fill(settings.migration_url or "", corpus, name)
    return settings.database_url or "", settings.migration_url or ""


def key(owner_url: str, limit: int | None) -> str:
    """A key of the tenant that may read."""
    minted = keys.mint()
    with psycopg.connect(owner_url, autocommit=True) as owner:
        registry.run_as_owner(owner, registry.put_tenant(TENANT))
        asked = Asked(scopes=["read"], tenant_id=TENANT, requests_per_minute=limit)
        registry.run_as_owner(owner, registry.create_key(asked, minted))
    return minted.token


def http(load: Load, serving: Serving, requests: list[bytes], clients: int) -> Sample:
    before = serving.cpu()
    sample = load.turn(serving.address, requests, clients, SECONDS).sample
    return sample._replace(server=serving.cpu() - before)


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--data-dir", type=Path, default=Path(".bench"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    with postgres.started(options.data_dir) as server, ExitStack() as opened:
        corpus = data.corpus(options.rows, layout="mixed", dimensions=postgres.LOCAL_DIMENSIONS, seed=postgres.SEED)
        bodies = [postgres.body(TENANT, Narrowing(), embedding=vector.tolist()) for vector in corpus.queries[:16]]
        bare_url, _ = filled(server, options.rows, "keys_none")
        keyed_url, owner_url = filled(server, options.rows, "keys_some")
        tokens = {"no keys": None, "a key": key(owner_url, None), "a key with a limit": key(owner_url, LIMIT)}
        servings = {url: opened.enter_context(served.pgrecall(url, 1)) for url in (bare_url, keyed_url)}
        load = opened.enter_context(Load())
        turns: dict[str, Callable[[], Sample]] = {}
        for name, token in tokens.items():
            serving = servings[keyed_url if token else bare_url]
            requests = [request(f"{serving.address}/search", body) for body in bodies]
            if token:
                named = f"\r\nAuthorization: Bearer {token}\r\nContent-Type".encode()
                requests = [each.replace(b"\r\nContent-Type", named, 1) for each in requests]
            for _ in range(8):
                load.turn(serving.address, requests, options.clients, 0)
            turns[name] = partial(http, load, serving, requests, options.clients)
        samples: dict[str, list[Sample]] = {name: [] for name in turns}
        for number in range(options.rounds):
            names = list(turns)
            for name in names[number % 3 :] + names[: number % 3]:
                samples[name].append(turns[name]())
        for name, found in samples.items():
            rate = [len(each.latencies) / each.elapsed for each in found]
            cpu = [1e6 * (each.server or 0) / len(each.latencies) for each in found]
            base = [len(each.latencies) / each.elapsed for each in samples["no keys"]]
            of_none = median(ours / theirs for ours, theirs in zip(rate, base, strict=True))
            middle = median(sorted(latency for each in found for latency in each.latencies))
            print(
                json.dumps(
                    {
                        "variant": name,
                        "requests_per_second": round(median(rate)),
                        "of_no_keys": round(of_none, 3),
                        "median_ms": round(1e3 * middle, 3),
                        "server_cpu_us": round(median(cpu)),
                    }
                )
            )


if __name__ == "__main__":
    main()
