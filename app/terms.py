"""Chunks become searchable by their words, and their statistics are kept, in the transaction that writes them.

The statements are calls of functions that revision 0002 makes, so that filling a database and writing to it do the same.
Statistics are rows that writers only add, so that none waits for another; `fold` makes one row of several now and then.
"""

import logging

from sqlalchemy import ARRAY, Text, bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database
from app.errors import PgrecallError

log = logging.getLogger(__name__)

FOLD_AFTER = 256
"""Writes of a tenant after which its statistics are folded: a common word has then as many rows to be added up."""

AT_ONCE = 1_000
"""Chunks that are counted in one statement: more of them would run into PGRECALL_STATEMENT_TIMEOUT on a busy server."""

_tenant = bindparam("tenant_id", type_=Text)
_ids = bindparam("ids", type_=ARRAY(Text))
_keys = bindparam("keys", type_=ARRAY(Text))

LEARN = select(func.learn_terms(_tenant, _ids, _keys))
"""Chunks that have just been added, by document and key. How many rows the tenant's statistics could be folded from."""

FORGET = select(func.forget_terms(_tenant, _ids, _keys))
"""Chunks that are about to be removed, by document and key."""

FORGET_DOCUMENTS = select(func.forget_terms(_tenant, _ids))
"""Documents that are about to be removed."""

FOLD = select(func.fold_statistics(_tenant))
"""One row for each word and one for the tenant."""


async def learn(connection: AsyncConnection, tenant_id: str, chunks: list[tuple[str, str]]) -> int:
    """Count these chunks, (document, chunk_key) each, which have just been added. How many rows could be folded."""
    rows = 0
    for start in range(0, len(chunks), AT_ONCE):
        rows = int((await connection.execute(LEARN, _values(tenant_id, chunks[start : start + AT_ONCE]))).scalar_one())
    return rows


async def forget(connection: AsyncConnection, tenant_id: str, chunks: list[tuple[str, str]]) -> None:
    """Count these chunks off, (document, chunk_key) each, which are about to be removed."""
    await connection.execute(FORGET, _values(tenant_id, chunks))


async def forget_documents(connection: AsyncConnection, tenant_id: str, ids: list[str]) -> None:
    """Count off every chunk of these documents, which are about to be removed."""
    await connection.execute(FORGET_DOCUMENTS, {"tenant_id": tenant_id, "ids": ids})


async def fold(database: Database, tenant_id: str) -> None:
    """Fold a tenant's statistics in a transaction of its own. Searches find the same before and after."""
    try:
        async with database.write(tenant_id) as connection:
            await connection.execute(FOLD, {"tenant_id": tenant_id})
    except PgrecallError as error:
        log.warning("the statistics of tenant %s were not folded, the next writer will try: %s", tenant_id, error)


def _values(tenant_id: str, chunks: list[tuple[str, str]]) -> dict[str, object]:
    ids, keys = zip(*sorted(chunks), strict=True)
    return {"tenant_id": tenant_id, "ids": list(ids), "keys": list(keys)}
