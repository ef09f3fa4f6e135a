"""Erasing a document or a tenant: every row that came of it goes in one transaction, and another looks whether it is gone.

Writers share a lock that the erasure of a tenant has alone (`Database.write`): a put is erased whole, or it comes after
and stays. Statistics of a tenant are deleted, not counted off word by word.
"""

import logging
import time
from collections.abc import Container
from typing import NamedTuple

import psycopg
from psycopg import sql
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Delete,
    LargeBinary,
    Select,
    TableClause,
    Text,
    bindparam,
    delete,
    func,
    select,
    text,
)

from app import documents as stored
from app import holdings, layout, questions
from app.database import Database, connect
from app.errors import SetupError
from app.settings import Settings
from app.tables import bearing, document_terms, documents, embedding_cache, sources

log = logging.getLogger(__name__)

_tenant = bindparam("tenant_id", type_=Text)
_document = bindparam("document_id", type_=Text)

OLDER = text("not age(xmin) between -1000000 and age(cast(:transaction as xid))")
"""Rows that were there before a transaction. Later ones are younger than it, and than the look itself where they came during
it; what vacuum froze long ago may bear any number."""

DOCUMENTS = select(func.count()).select_from(sources).where(sources.c.tenant_id == _tenant)
"""How many documents a tenant has."""

DOCUMENT = DOCUMENTS.where(sources.c.id == _document)
"""Whether there is this document, 0 or 1."""


class Erased(NamedTuple):
    """What an erasure did. `id` None: the whole tenant went.

    `removed`: rows that went, by table. `readable`: rows from before it that a later transaction could still read, by table;
    all 0 where `complete`. `put_since`: documents that came after it, which stay.
    """

    tenant_id: str
    id: str | None
    complete: bool
    removed: dict[str, int]
    readable: dict[str, int]
    put_since: int


class Remains(NamedTuple):
    """Where erased rows still are although nobody can read them, until when, and what ends it."""

    where: str
    until: str
    finish: str


def removal(table: TableClause) -> Delete:
    """All rows of a tenant in one table."""
    statement = delete(table).where(table.c.tenant_id == _tenant)
    if table is document_terms:
        # No index of it leads with the tenant: it is reached through the chunks, which it cannot be without.
        statement = statement.where(
            documents.c.tenant_id == _tenant,
            documents.c.id == document_terms.c.id,
            documents.c.chunk_key == document_terms.c.chunk_key,
        )
    return statement


def left(table: TableClause, *conditions: ColumnElement[bool]) -> Select[int]:
    """How many rows of a tenant, from before the transaction `transaction`, one table still has."""
    return select(func.count()).select_from(table).where(table.c.tenant_id == _tenant, *conditions, OLDER)


async def document(
    database: Database,
    settings: Settings,
    tenant_id: str,
    document_id: str,
    *,
    expected: Container[str | None] | None = None,
) -> Erased:
    """Erase one document. Raises NotFound, or VersionConflict where its tag is not in `expected`."""
    removed = await stored.remove(database, tenant_id, document_id, expected=expected)
    values = {
        "tenant_id": tenant_id,
        "document_id": document_id,
        "transaction": removed.transaction,
        "digests": removed.digests,
    }
    async with database.write(tenant_id, limit=settings.erasure_timeout) as connection:
        looked = [
            (held.table.name, left(held.table, held.table.c.id == _document))
            for held in await holdings.every(connection)
            if held.by_id
        ]
        of_texts = embedding_cache.c.content_sha256 == func.any(bindparam("digests", type_=ARRAY(LargeBinary)))
        looked.append((embedding_cache.name, left(embedding_cache, of_texts)))
        readable = {name: (await connection.execute(statement, values)).scalar_one() for name, statement in looked}
        since = (await connection.execute(DOCUMENT, values)).scalar_one()
    return Erased(
        tenant_id, document_id, not any(readable.values()), removed.rows, readable, since - readable["sources"]
    )


async def tenant(database: Database, settings: Settings, tenant_id: str) -> Erased:
    """Erase all there is of a tenant; a tenant that does not exist has no rows. Raises Unavailable, TimedOut.

    Puts to it wait or are told to come again until it is done; PGRECALL_ERASURE_TIMEOUT is the time each table may take.
    """
    removed = {}
    async with database.write(tenant_id, alone=True, limit=settings.erasure_timeout) as connection:
        values = {"tenant_id": tenant_id, "transaction": (await connection.execute(stored.TRANSACTION)).scalar_one()}
        for held in await holdings.every(connection):
            removed[held.table.name] = (await connection.execute(removal(held.table), values)).rowcount
    questions.forget(tenant_id)
    layout.forget(database)
    async with database.write(tenant_id, limit=settings.erasure_timeout) as connection:
        readable = {
            held.table.name: (await connection.execute(left(held.table), values)).scalar_one()
            for held in await holdings.every(connection)
        }
        since = (await connection.execute(DOCUMENTS, values)).scalar_one()
    return Erased(tenant_id, None, not any(readable.values()), removed, readable, since - readable["sources"])


async def extent(database: Database, tenant_id: str, document_id: str | None) -> int:
    """How many documents an erasure would take."""
    async with database.write(tenant_id) as connection:
        statement = DOCUMENTS if document_id is None else DOCUMENT
        return int(
            (await connection.execute(statement, {"tenant_id": tenant_id, "document_id": document_id})).scalar_one()
        )


def vacuum(url: str) -> float:
    """Take dead rows out of every table that holds tenants' rows, and out of its indexes. Seconds it took.

    `url` is the owner's, not through a pooler of transactions. Raises SetupError where the login may not.
    """
    began = time.monotonic()
    refused: list[str] = []

    def heard(notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            refused.append(notice.message_primary or "")

    with connect(url) as connection:
        connection.add_notice_handler(heard)
        connection.execute("set lock_timeout = 0")
        made = holdings.SYNCHRONOUS
        run = [name for _, name, _ in connection.execute(made.sql.encode(), made.constants).fetchall()]
        for name in [*run, *(each.name for each in bearing())]:
            connection.execute(sql.SQL("vacuum {}").format(sql.Identifier(name)))
    if refused:
        raise SetupError(
            f"{refused[0]}: VACUUM is for the owner of the tables; set PGRECALL_MIGRATION_URL to the owner's URL, or have the "
            f"owner run: VACUUM {', '.join(each.name for each in bearing())}"
        )
    return time.monotonic() - began


def remains(tenant_id: str, document_id: str | None = None, *, registered: bool = True) -> list[Remains]:
    """What no transaction can remove. `registered`: the tenant may still be, as it is not deleted, only erased."""
    names = ", ".join(each.name for each in bearing())
    listed = [
        Remains(
            "dead rows in the files of the tables and in their indexes, the HNSW graphs among them",
            "VACUUM, which autovacuum begins when a fifth of a table has changed; freed bytes are overwritten by later rows",
            f"as the owner: VACUUM {names} (pgrecall erase --vacuum); VACUUM FULL where the bytes must leave the disk",
        ),
        Remains(
            "the write-ahead log and its archive",
            "segments are reused after checkpoints; an archive keeps them as long as it was told to",
            "CHECKPOINT; the archive's retention",
        ),
        Remains(
            "replicas", "they have replayed the erasure", "nothing to do; pg_stat_replication tells how far they are"
        ),
        Remains(
            "base backups, dumps and snapshots of the disk",
            "they expire",
            "delete those that may not be kept; erase again after restoring one that is older",
        ),
        Remains(
            "memory of other pgrecall processes: vectors of questions that the tenant asked",
            f"{questions.KEPT / 60:.0f} minutes after each was asked last",
            "nothing to do, or restart them",
        ),
    ]
    if document_id is None:
        listed.append(
            Remains(
                "analyst_tenants, where the tenant's name may be granted to analysts",
                "the grant is taken back",
                f"as the owner: delete its rows there, WHERE tenant_id = '{tenant_id}'",
            )
        )
    if document_id is None and registered:
        listed.append(
            Remains(
                "tenants and api_keys, where the tenant's name, its limits and its keys may stand",
                "the tenant is deleted; its keys are revoked then, and stay by name",
                f"pgrecall tenant delete {tenant_id}",
            )
        )
    return listed
