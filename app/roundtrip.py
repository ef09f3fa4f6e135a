"""One transaction in one round trip, spoken to libpq directly.

psycopg's own pipeline asks the socket after each statement whether it may write and whether there is something to read,
and makes a cursor for each: a third of the time this process spends on a search (bench/drivers.py). Here all messages
are queued, flushed once and answered once. Values are still dumped and loaded by psycopg's adapters.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import psycopg
from psycopg import abc
from psycopg.abc import PQGen
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGconn, PGresult
from psycopg.waiting import Ready, Wait

from app.statements import Statement

PREPARE_FROM = 3
"""Uses of a statement on a connection from which on it is prepared there."""

MOST_PREPARED = 200
"""Statements prepared on a connection before it is replaced; callers' filters have endless shapes."""

ENCODING = "utf-8"
"""Of connections that are used here, whatever the database's is."""

_PLACEHOLDER = re.compile(r"%(?:\((\w+)\)s|%)")
_FAILED = (ExecStatus.FATAL_ERROR, ExecStatus.PIPELINE_ABORTED)


class _Numbered(NamedTuple):
    text: bytes
    names: tuple[str, ...]


@lru_cache(maxsize=2_000)
def _numbered(sql: str) -> _Numbered:
    """The text with $1, $2 … for %(name)s, as libpq takes it, and the names in that order."""
    names: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        name = found[1]
        return "%" if name is None else f"${names.setdefault(name, len(names) + 1)}"

    return _Numbered(_PLACEHOLDER.sub(number, sql).encode(), tuple(names))


KEPT = "select name from pg_prepared_statements where statement like '%{mark}%'"
"""Under which names a statement with this mark, which is the statement itself, is prepared on the session."""


async def pooled(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether a pooler stands before the server: what a session is told may reach another one later."""
    # A pooler's clients are not given the server's process, but something the pooler knows them by.
    row = await (await connection.execute("select pg_backend_pid()", prepare=False)).fetchone()
    return row is None or row[0] != connection.info.backend_pid


async def follows(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the pooler before the server keeps track of prepared statements, for which it gives them names of its own.

    One that does not would execute what another client has prepared under the same name.
    """
    if not psycopg.capabilities.has_send_close_prepared():
        return False  # without the message, the driver removes them by SQL, in which no pooler translates the name
    pgconn, name = connection.pgconn, f"pgrecall_{secrets.token_hex(8)}"
    pgconn.enter_pipeline_mode()
    pgconn.send_prepare(name.encode(), KEPT.format(mark=name).encode())
    pgconn.send_query_prepared(name.encode(), [])
    pgconn.send_close_prepared(name.encode())
    pgconn.pipeline_sync()
    results = await connection.wait(_answers(pgconn))
    pgconn.exit_pipeline_mode()
    if any(result.status in _FAILED for result in results):
        return False
    names = {results[1].get_value(row, 0) for row in range(results[1].ntuples)}
    return len(names) == 1 and name.encode() not in names


class Prepared:
    """What is prepared on one connection, and how often the rest was used."""

    def __init__(self) -> None:
        self._uses: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self._names: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
        self._made = 0

    @property
    def full(self) -> bool:
        """Whether the server keeps enough prepared statements for this connection."""
        return self._made >= MOST_PREPARED

    def forget(self) -> None:
        """Use none of the prepared statements again."""
        self._uses.clear()
        self._names.clear()

    def queue(self, pgconn: PGconn, text: bytes, types: tuple[int, ...], values: Any, formats: Any) -> bool:
        """Queue a statement with its values; whether it is to be prepared with it, which is one more result."""
        key = (text, types)
        name = self._names.get(key)
        if name is not None:
            pgconn.send_query_prepared(name, values, formats, Format.BINARY)
            return False
        used = self._uses.pop(key, 0) + 1
        if used < PREPARE_FROM:
            if len(self._uses) > MOST_PREPARED:
                self._uses.clear()
            self._uses[key] = used
            pgconn.send_query_params(text, values, types, formats, Format.BINARY)
            return False
        self._made += 1
        name = self._names[key] = b"pgrecall_%d" % self._made
        pgconn.send_prepare(name, text, types)
        pgconn.send_query_prepared(name, values, formats, Format.BINARY)
        return True


async def run(
    connection: psycopg.AsyncConnection[Any],
    prepared: Prepared | None,
    config: Mapping[str, str],
    statements: Sequence[Statement],
) -> list[list[dict[str, Any]]]:
    """The rows of each statement, in one transaction under these settings. `prepared` None: prepare nothing.

    The connection is in autocommit mode: PostgreSQL begins a transaction with the first message of a pipeline and ends
    it at the Sync that closes it. Raises psycopg's errors; the connection can be used again when it has left pipeline
    mode.
    """
    pgconn, transformer = connection.pgconn, Transformer(connection)
    dumped = []
    for statement in statements:
        text, names = _numbered(statement.sql)
        values = transformer.dump_sequence([statement.values[name] for name in names], [PyFormat.AUTO] * len(names))
        dumped.append((text, transformer.types or (), values, transformer.formats))
    rows_at = []
    pgconn.enter_pipeline_mode()
    pgconn.send_query_params(_configure(len(config)), [part.encode() for pair in config.items() for part in pair])
    count = 1
    for text, types, values, formats in dumped:
        if prepared is None:
            pgconn.send_query_params(text, values, types, formats, Format.BINARY)
        elif prepared.queue(pgconn, text, types, values, formats):
            count += 1
        rows_at.append(count)
        count += 1
    pgconn.pipeline_sync()
    results = await connection.wait(_answers(pgconn))
    pgconn.exit_pipeline_mode()
    for result in results:
        if result.status in _FAILED:
            if prepared is not None:
                prepared.forget()
            raise error_from_result(result, encoding=ENCODING)
    return [_rows(transformer, results[index]) for index in rows_at]


@lru_cache
def _configure(settings: int) -> bytes:
    calls = (f"set_config(${2 * index + 1}, ${2 * index + 2}, true)" for index in range(settings))
    return f"select {', '.join(calls)}".encode()


def _answers(pgconn: PGconn) -> PQGen[list[PGresult]]:
    """All results up to the Sync. What the server sends is read while there is still something to be sent."""
    results: list[PGresult] = []
    result: PGresult | None = None
    unsent = pgconn.flush()
    while True:
        ready = yield Wait.RW if unsent else Wait.R
        if ready & Ready.R:
            pgconn.consume_input()
            while not pgconn.is_busy():
                last, result = result, pgconn.get_result()
                if result is None:
                    if last is None:
                        break  # nothing is under way, as after the connection's end
                    continue
                if result.status == ExecStatus.PIPELINE_SYNC:
                    return results
                results.append(result)
        if unsent:
            unsent = pgconn.flush()


def _rows(transformer: abc.Transformer, result: PGresult) -> list[dict[str, Any]]:
    transformer.set_pgresult(result)
    names = [(result.fname(index) or b"").decode() for index in range(result.nfields)]
    make: Callable[[Sequence[Any]], dict[str, Any]] = lambda values: dict(zip(names, values, strict=True))  # noqa: E731
    return transformer.load_rows(0, result.ntuples, make)
