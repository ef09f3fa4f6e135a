"""The service as a process of its own, over a socket, on a clone of the database and a model server of its own."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from msgspec.structs import asdict

from app import local
from app.settings import variable
from tests.conftest import PATIENCE, Cluster, cloned, settings_for
from tests.openai_server import OpenAIServer


@dataclass
class Served:
    """`address` is where it listens, `said` the file with its standard error, `owner` the URL of its database's owner."""

    process: subprocess.Popen[bytes]
    address: str
    said: Path
    openai: OpenAIServer
    database: str
    owner: str

    def document(self) -> dict[str, Any]:
        """What it says of itself: the OpenAPI document."""
        return json.loads(httpx.get(f"{self.address}/docs/openapi.json", timeout=PATIENCE).content)

    def until(self, text: str) -> str:
        """What it said once this is in it."""
        began = time.monotonic()
        while text not in (said := self.said.read_text()):
            assert time.monotonic() - began < PATIENCE, said
            time.sleep(0.02)
        return said


@contextmanager
def serving(cluster: Cluster, template: str, folder: Path, files: int = 0, **changes: object) -> Iterator[Served]:
    """Serve until the end of the block; the process must end in order. `files` it may open, `changes` are settings."""
    said = folder / "said"
    with cloned(cluster, template) as name, OpenAIServer() as openai, said.open("wb") as stderr:
        settings = settings_for(
            cluster.url(name, local.SERVICE),
            openai.url,
            **({"chat_model": "gpt-test", "embedding_retries": 0} | changes),
        )
        limit = f"ulimit -n {files};" if files else ""
        environment = {variable(field): str(value) for field, value in asdict(settings).items() if value is not None}
        with subprocess.Popen(
            ["sh", "-c", f'{limit} exec "$0" -m app serve --port 0', sys.executable],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment},
            stderr=stderr,
        ) as process:
            try:
                address, began = None, time.monotonic()
                while address is None:
                    assert process.poll() is None, said.read_text()
                    assert time.monotonic() - began < PATIENCE, said.read_text()
                    time.sleep(0.02)
                    address = re.search(r"serving on (http://127\.0\.0\.1:\d+)", said.read_text())
                yield Served(process, address[1], said, openai, name, cluster.url(name, local.OWNER))
                process.terminate()
                assert process.wait(PATIENCE) == 0, said.read_text()
            finally:
                process.kill()
