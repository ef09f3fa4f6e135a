"""The least a server of this kind can do: one Litestar handler that runs a recorded search on a bare driver connection.

`GET /bare/NAME/N` runs search N of the set NAME from the file in BENCH_SEARCHES: one psycopg pipeline for each of its
transactions, on a connection of a plain list, and answers with the rows. No body is read, nothing is checked, no pool.
"""

import os
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pgvector.psycopg
import psycopg
from litestar import Litestar, get
from litestar.datastructures import State
from psycopg.rows import dict_row

CONNECTIONS = 8


@asynccontextmanager
async def _opened(app: Litestar) -> AsyncIterator[None]:
    url = os.environ["DATABASE_URL"]
    app.state.free = []
    for _ in range(CONNECTIONS):
        connection = await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=3)
        await pgvector.psycopg.register_vector_async(connection)
        app.state.free.append(connection)
    yield
    for connection in app.state.free:
        await connection.close()


@get("/bare/{name:str}/{number:int}")
async def bare(state: State, name: str, number: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of the search's last transaction."""
    rows: list[dict[str, Any]] = []
    connection = state.free.pop()
    for config, statements in state.searches[name][number]:
        async with connection.pipeline():
            await connection.execute(
                "select " + ", ".join("set_config(%s, %s, true)" for _ in config),
                [part for pair in config.items() for part in pair],
            )
            for text, values in statements:
                cursor = connection.cursor(row_factory=dict_row, binary=True)
                await cursor.execute(text, values)
        rows = await cursor.fetchall()
    state.free.append(connection)
    return {"results": rows}


def create_app() -> Litestar:
    """The application."""
    searches = pickle.loads(Path(os.environ["BENCH_SEARCHES"]).read_bytes())
    state = State({"searches": searches})
    return Litestar([bare], lifespan=[_opened], state=state, openapi_config=None, logging_config=None)
