"""An embedding server that answers at a fixed rate and uses no CPU for it: `python -m bench.distant RATE LATENCY DIMENSIONS`.

It speaks OpenAI's protocol. Requests share the rate, as those to one graphics card do, and each is answered at the earliest
after the latency. Vectors are random and prepared, the same text gets the same one.
"""

import base64
import contextlib
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import numpy as np

VECTORS = 4_096


class Server(ThreadingHTTPServer):
    """`rate`: texts a second in all; `latency`: seconds a request takes at least."""

    daemon_threads = True

    def __init__(self, rate: float, latency: float, dimensions: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rate, self.latency = rate, latency
        drawn = np.random.default_rng(3).standard_normal((VECTORS, dimensions)).astype(np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        self.vectors = [base64.b64encode(vector.tobytes()).decode() for vector in drawn]
        self._lock = threading.Lock()
        self._busy_until = 0.0

    def work(self, texts: int) -> None:
        """Until so many texts are done, behind those that came before."""
        now = time.monotonic()
        with self._lock:
            self._busy_until = max(self._busy_until, now) + texts / self.rate
            until = max(self._busy_until, now + self.latency)
        time.sleep(until - now)


class Handler(BaseHTTPRequestHandler):
    """`POST /v1/embeddings`."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Answer with a vector for each text."""
        asked: dict[str, Any] = msgspec.json.decode(self.rfile.read(int(self.headers["Content-Length"])))
        texts: list[str] = asked["input"]
        self.server.work(len(texts))
        data = [
            {
                "object": "embedding",
                "index": n,
                "embedding": self.server.vectors[zlib.crc32(text.encode()) % VECTORS],
            }
            for n, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        body = msgspec.json.encode({"object": "list", "model": asked["model"], "data": data, "usage": usage})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def served(rate: float, latency: float, dimensions: int) -> Iterator[str]:
    """The base URL of such a server, in a process of its own."""
    arguments = [str(each) for each in (rate, latency, dimensions)]
    with subprocess.Popen([sys.executable, "-m", __name__, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or not (url := process.stdout.readline().strip()):
                raise SystemExit("the embedding server did not start")
            yield url
        finally:
            process.terminate()


if __name__ == "__main__":
    server = Server(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    server.serve_forever()
