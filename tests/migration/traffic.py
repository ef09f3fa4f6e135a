"""A serving process and the requests that are made of it without pause, each remembered with how it ended."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import NamedTuple

import httpx
import psycopg

from tests.conftest import DIMENSIONS, PATIENCE

TENANTS = ("acme", "umbra", "initech", "hooli")
WORDS = [
    "pump",
    "valve",
    "reset",
    "invoice",
    "herons",
    "otters",
    "password",
    "security",
    "index",
    "vacuum",
    "tenant",
    "bridge",
]


class Answer(NamedTuple):
    """How a request ended: when it was made, how long it took, and what was wrong with it."""

    kind: str
    began: float
    took: float
    fault: str | None


@contextlib.contextmanager
def serving(folder, code, url, openai_url):
    """The address of `pgrecall serve` of a checkout, ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PGRECALL_", "OPENAI_", "DATABASE_"))} | {
        "DATABASE_URL": url,
        "OPENAI_API_KEY": "sk-test",
        "OPENAI_BASE_URL": openai_url,
        "PGRECALL_EMBEDDING_MODEL": "text-embedding-3-small",
        "PGRECALL_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
        "PGRECALL_LOG_LEVEL": "warning",
        "PGRECALL_POOL_TIMEOUT": str(PATIENCE),
        "PGRECALL_STATEMENT_TIMEOUT": str(PATIENCE),
        "PYTHONPATH": str(code),
    }
    address = f"http://127.0.0.1:{port}"
    said = folder / "serve.log"
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", str(port)],
            cwd=code,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not _ready(address):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _ready(address):
    try:
        return httpx.get(f"{address}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def seed(owner_url, each=600):
    """Documents of every tenant, put by SQL as the oldest revision has its tables."""
    with psycopg.connect(owner_url) as owner:
        for tenant in TENANTS:
            values = {"tenant": tenant, "rows": each, "dimensions": DIMENSIONS, "words": WORDS}
            owner.execute(
                "insert into sources (tenant_id, id, content, content_sha256, chunk_keys, start_offsets, state, embedding_model)"
                " select %(tenant)s, 'seed/' || n, w, sha256(convert_to(w, 'UTF8')), array['k'], array[0], 'ready',"
                " 'text-embedding-3-small' from (select n, (%(words)s::text[])[1 + n %% 12] || ' of number ' || n as w"
                " from generate_series(1, %(rows)s) n) d",
                values,
            )
            owner.execute(
                "insert into documents (tenant_id, id, chunk_key, content, embedding) select tenant_id, id, 'k', content,"
                " (select array_agg(random() - 0.5) from generate_series(1, %(dimensions)s) where s.id is not null)::vector"
                " from sources s where tenant_id = %(tenant)s",
                values,
            )


class Traffic:
    """Clients that search, put, delete, read, stream and ask whether the server is ready, until told to stop."""

    def __init__(self, address):
        self.answers: list[Answer] = []
        self._client = httpx.Client(base_url=address, timeout=PATIENCE)
        self._stopping = threading.Event()
        self._numbers = itertools.count()
        streams = self._client.post("/documents/stream?tenant_id=acme", content=b"").status_code not in {404, 405}
        kinds = [self._search, self._search, self._put, self._documents, self._ask, self._ready]
        kinds += [self._stream] if streams else []
        self._kinds = len(set(kinds))
        self._threads = [threading.Thread(target=self._repeat, args=(kind,)) for kind in kinds]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        self._client.close()

    def faults(self):
        """What went wrong."""
        return [f"{answer.kind}: {answer.fault}" for answer in self.answers if answer.fault is not None]

    def count(self):
        """How many requests of each kind were answered."""
        return dict(Counter(answer.kind for answer in self.answers))

    def slowest(self, since=0.0, until=float("inf")):
        """Seconds that the slowest request took that was under way between two moments."""
        return max((a.took for a in self.answers if a.began + a.took >= since and a.began <= until), default=0.0)

    def wait(self, seconds, least=3):
        """Let pass these seconds, and until a request of each kind has been answered `least` times meanwhile."""
        began = time.monotonic()
        while time.monotonic() < began + PATIENCE:
            meanwhile = Counter(answer.kind for answer in self.answers if answer.began >= began)
            enough = len(meanwhile) == self._kinds and min(meanwhile.values()) >= least
            if enough and time.monotonic() >= began + seconds:
                return
            time.sleep(0.05)
        raise AssertionError(f"too few answers: {self.count()}")

    def _repeat(self, kind):
        name = kind.__name__.lstrip("_")
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                fault = kind(next(self._numbers))
            except httpx.HTTPError as error:
                fault = repr(error)
            self.answers.append(Answer(name, began, time.monotonic() - began, fault))
            time.sleep(0.02)

    def _search(self, number):
        question = {"tenant_id": TENANTS[number % 4], "query": f"{WORDS[number % 12]} number", "top_k": 5}
        answer = self._client.post("/search", json=question)
        found = answer.json().get("count") if answer.status_code == 200 else None
        return None if found == 5 else f"{answer.status_code} {answer.text}"

    def _put(self, number):
        document = {
            "tenant_id": TENANTS[number % 4],
            "content": f"The {WORDS[number % 12]} was put as number {number}.",
        }
        answer = self._client.put(f"/documents/put/{number % 40}", json=document)
        return None if answer.is_success else f"{answer.status_code} {answer.text}"

    def _documents(self, number):
        tenant = TENANTS[number % 4]
        document = {"tenant_id": tenant, "content": f"Short-lived number {number}."}
        for answer in (
            self._client.put(f"/documents/gone/{number}", json=document),
            self._client.get(f"/documents/gone/{number}", params={"tenant_id": tenant}),
            self._client.delete(f"/documents/gone/{number}", params={"tenant_id": tenant}),
        ):
            if not answer.is_success:
                return f"{answer.request.method} {answer.status_code} {answer.text}"
        return None

    def _ask(self, number):
        asked = {"tenant_id": TENANTS[number % 4], "question": f"Which {WORDS[number % 12]}?", "stream": True}
        answer = self._client.post("/rag", json=asked)
        whole = answer.status_code == 200 and "data: [DONE]" in answer.text and "event: error" not in answer.text
        return None if whole else f"{answer.status_code} {answer.text}"

    def _stream(self, number):
        lines = [json.dumps({"id": f"fed/{number % 10}/{n}", "content": f"Fed {number} {n}."}) for n in range(20)]
        answer = self._client.post(
            "/documents/stream",
            params={"tenant_id": TENANTS[number % 4]},
            content="\n".join(lines).encode(),
            headers={"Content-Type": "application/x-ndjson"},
        )
        stored = [line for line in answer.text.splitlines() if '"status":"created"' in line or '"status":"u' in line]
        return None if answer.status_code == 200 and len(stored) == 20 else f"{answer.status_code} {answer.text}"

    def _ready(self, _number):
        answer = self._client.get("/health/ready")
        return None if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
