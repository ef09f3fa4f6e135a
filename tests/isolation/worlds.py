"""Two worlds that differ in one thing: in one of them another tenant, `umbral`, has documents much like those of `acme`.

Both have their vectors in the same HNSW index, the one that tenants share whose names hash alike.
Whatever `acme` asks for or does must come out alike in both, to the letter, and leave every row of `umbral` as it is.
Then nothing of the other tenant can be read, counted or touched, and "not there" is told as "not yours" is.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx
import psycopg
from psycopg import sql

from app import local, spaces, upsert
from app.asgi import create_app
from app.database import Database
from app.drafts import Draft
from app.embedding import open_embedder
from app.settings import Settings
from tests.conftest import Cluster, cloned, settings_for

MARK = "zqumbra"
"""Stands in everything of the other tenant: texts, titles, types, metadata, errors; and in nothing else."""

LIKE = {
    "shared": "To reset your password, open Settings, choose Security and press Reset.",
    "shared/second": "Invoices are sent by mail on the first of each month.",
}
"""Documents both tenants have under one id, alike but for the mark."""
MOMENT = datetime(2026, 1, 31, 12, tzinfo=UTC)


def drafts(tenant: str, kind: str) -> list[Draft]:
    """The documents of a kind (ready, pending or failed) a tenant has."""
    mark = "" if tenant == "acme" else f" {MARK}"
    own = "mine" if tenant == "acme" else "theirs"
    texts = {**LIKE, own: "A link comes by mail and is valid for one hour."}
    if kind != "ready":
        texts = {f"{kind}/{name}": text for name, text in texts.items()}
    return [
        Draft(
            name,
            f"{text}{mark}",
            title=f"Title of {name}{mark}",
            doc_type=f"faq{mark}",
            metadata={"lang": "en", **({MARK: MARK} if mark else {})},
            created_at=MOMENT,
        )
        for name, text in texts.items()
    ]


async def _fill(settings: Settings, tenant: str) -> None:
    database, embedder = Database(settings, settings.database_url or ""), open_embedder(settings)
    try:
        for kind in ("ready", "pending", "failed"):
            await upsert.put(database, embedder, settings, tenant, drafts(tenant, kind), later=kind != "ready")
    finally:
        await spaces.close(database)
        await database.close()
        await embedder.aclose()


FAILED = """
update sources set state = 'failed', attempts = 5, error = 'refused' || case when tenant_id <> 'acme' then %(mark)s else '' end
 where id like 'failed/%%' and tenant_id = %(tenant)s
"""
CLAIMED = """
insert into embedding_claims (tenant_id, model, dimensions, input_type, content_sha256, holder, expires_at)
select tenant_id, model, dimensions, input_type, content_sha256, gen_random_uuid(), now() + interval '1 hour'
  from embedding_cache where tenant_id = %(tenant)s limit 1
"""


def fill(cluster: Cluster, name: str, openai: str, tenant: str) -> None:
    """A tenant with documents that are ready, pending and given up, cached vectors and a claim."""
    asyncio.run(_fill(settings_for(cluster.url(name, local.SERVICE), openai), tenant))
    with psycopg.connect(cluster.url(name, local.OWNER), autocommit=True) as owner:
        values = {"tenant": tenant, "mark": f" {MARK}"}
        owner.execute(FAILED, values)
        owner.execute(CLAIMED, values)


@dataclass(frozen=True)
class World:
    """A database. `shared`: whether umbral is in it."""

    cluster: Cluster
    name: str
    openai: str
    shared: bool

    @property
    def owner(self) -> str:
        return self.cluster.url(self.name, local.OWNER)

    def settings(self, **changes: object) -> Settings:
        return settings_for(self.cluster.service(self.name), self.openai, **({"chat_model": None} | changes))

    def foreign(self) -> dict[str, list[str]]:
        """Every row of umbral, in every table that has tenants."""
        with psycopg.connect(self.owner, autocommit=True) as owner:
            return {
                table: [
                    row[0]
                    for row in owner.execute(
                        sql.SQL("select t::text from {} t where tenant_id = 'umbral' order by 1").format(
                            sql.Identifier(table)
                        )
                    )
                ]
                for (table,) in owner.execute(BEARING).fetchall()
            }


BEARING = """
select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'tenant_id' and not attisdropped
 where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') order by 1
"""
"""The tables with tenants' rows, by the catalogue."""


@contextlib.contextmanager
def pair(cluster: Cluster, templates: tuple[str, str], openai: str) -> Iterator[tuple[World, World]]:
    """A clone of each: the world that umbral shares, and the one where there is no umbral."""
    with cloned(cluster, templates[0]) as both, cloned(cluster, templates[1]) as alone:
        yield World(cluster, both, openai, True), World(cluster, alone, openai, False)


class Asked(NamedTuple):
    """A request."""

    method: str
    url: str
    body: Any = None
    headers: Mapping[str, str] = {}
    content: bytes | None = None


class Told(NamedTuple):
    """What a caller can see of an answer, but for what differs from one request to the next."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: str


VOLATILE = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+(?:Z|\+00:00)?"  # when something was stored, or logged
    r'|(?<="\d-)[0-9a-f]{10,}'  # the same in an entity tag
    r'|"milliseconds":\{[^}]*\}|"(?:\w*seconds|p50|p95|pages_hit|pages_read|\w*_ms)":[\d.]+'
    r"|(?<=worker )\S+/\d+/[0-9a-f]+|\d:\d\d:\d\d|[\d.]+ ?m?s\b"
)
"""How long something took, when it was, and how many pages of 8 kB it met in memory."""
PER_REQUEST = frozenset({"x-request-id", "date", "server-timing"})


def told(answer: httpx.Response) -> Told:
    headers = sorted((name, value) for name, value in answer.headers.items() if name not in PER_REQUEST)
    body = answer.text.replace(answer.headers.get("x-request-id", "\0"), "ID")
    if "content-length" in answer.headers:
        headers = [each for each in headers if each[0] != "content-length"]
    headers = [(name, VOLATILE.sub("*", value)) for name, value in headers]
    return Told(answer.status_code, tuple(headers), VOLATILE.sub("*", body))


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The application on a world. To be opened and closed in one task."""
    app = create_app(settings)
    async with app.lifespan():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            yield client


async def ask(client: httpx.AsyncClient, requests: Sequence[Asked]) -> list[Told]:
    """The answers, in order."""
    return [
        told(
            await client.request(
                each.method,
                each.url,
                headers=dict(each.headers),
                **({"content": each.content} if each.content is not None else {"json": each.body} if each.body else {}),
            )
        )
        for each in requests
    ]


def difference(there: object, elsewhere: object) -> str:
    """Where two answers begin to differ; empty where they do not."""
    one, other = repr(there), repr(elsewhere)
    if one == other:
        return ""
    place = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    return f"…{one[max(0, place - 80) : place + 80]}… but …{other[max(0, place - 80) : place + 80]}…"


def marked(answers: Sequence[object]) -> list[str]:
    """Answers in which the mark of the other tenant stands."""
    return [each for each in (json.dumps(answer, default=str) for answer in answers) if MARK in each.lower()]
