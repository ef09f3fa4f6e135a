"""Tenants and keys over HTTP, for keys with the scope admin; not served without one, also in open mode.

An admin key of no tenant administers all of them and reads no text of any. One of a tenant sees that tenant and its keys, and
makes and revokes keys of it.
"""

import asyncio
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body, PathParameter
from msgspec import UNSET, Meta, Struct, UnsetType

from app import erasure, keys, registry, tenants
from app.api import guard, operations, problems
from app.api.erasure import Erasure, TenantPath, example, told
from app.api.fields import SOME, TenantId
from app.api.parameters import MAX_PAGE, After, Limit
from app.api.service import Service
from app.drafts import check_range, check_text
from app.errors import NotRegistered
from app.registry import Asked

MAX_PREFIX_BYTES = 100
MAX_AFTER_BYTES = 512
NO_STORE = {"Cache-Control": "no-store"}

MaxRows = Annotated[
    int | UnsetType | None,
    Meta(
        description="Chunks it may have, pending documents counted as one; null takes the limit away.",
        extra_json_schema={"extra": {"minimum": 0, "maximum": registry.MAX_LIMIT}},
    ),
]
TokensPerDay = Annotated[
    int | UnsetType | None,
    Meta(
        description="Tokens its keys may have embedded and answered with in a day, by UTC; null takes the limit away.",
        extra_json_schema={"extra": {"minimum": 0, "maximum": registry.MAX_LIMIT}},
    ),
]


class PutTenant(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A tenant to register, or limits of one that is. Limits that are left out stay as they are."""

    tenant_id: TenantId = msgspec.field(default_factory=tenants.LeftOut)
    max_rows: MaxRows = UNSET
    tokens_per_day: TokensPerDay = UNSET


class TenantShown(Struct, kw_only=True):
    """A tenant, its limits (null: none) and what counts towards them.

    `created_at` null: in use, not registered. `tokens_today` are counted while there is a limit of them.
    """

    tenant_id: str
    created_at: datetime | None
    max_rows: int | None
    tokens_per_day: int | None
    tokens_today: int
    chunks: int
    keys: Annotated[int, Meta(description="Keys that are valid now.")]


class TenantPage(Struct):
    """Tenants this key may see, by name. `next` is the `after` of the next page, null on the last."""

    tenants: list[TenantShown]
    next: str | None


class Deletion(Struct):
    """A tenant's end: keys revoked, and the erasure of all it had."""

    revoked: int
    erasure: Erasure


class CreateKey(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A key to make."""

    scopes: Annotated[
        list[Literal["read", "write", "admin"]],
        Meta(
            description="What it may do: one or more, none twice; read and write are a tenant's.",
            extra_json_schema={"extra": {"minItems": 1, "uniqueItems": True}},
        ),
    ]
    tenant_id: Annotated[
        str | None,
        Meta(
            description="The only tenant it acts for, which has to be registered. Without one its scope is admin.",
            extra_json_schema={"extra": {"pattern": tenants.PATTERN}},
        ),
    ] = None
    name: Annotated[
        str | None,
        Meta(description=f"What it is for, 1 to {registry.MAX_NAME_BYTES} bytes in UTF-8.", extra_json_schema=SOME),
    ] = None
    expires_at: Annotated[
        datetime | None, Meta(description="With time zone, within the next hundred years; null for never.")
    ] = None
    requests_per_minute: Annotated[
        int | None,
        Meta(
            description="In each minute of the clock; null for any number.",
            extra_json_schema={"extra": {"minimum": 1, "maximum": registry.MAX_LIMIT}},
        ),
    ] = None
    concurrent_streams: Annotated[
        int | None,
        Meta(
            description="Streams under way at once (/documents/stream, and /rag with `stream`); null for any number.",
            extra_json_schema={"extra": {"minimum": 0, "maximum": registry.MAX_LIMIT}},
        ),
    ] = None


class KeyShown(Struct, kw_only=True):
    """A key without what is secret of it. Null stands for never, no limit, every tenant.

    `prefix` names it. `last_used_at` is known to about a minute.
    """

    prefix: str
    name: str | None
    scopes: list[str]
    tenant_id: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    requests_per_minute: int | None
    concurrent_streams: int | None


class NewKey(KeyShown, kw_only=True):
    """A key that was made, with the key itself, which is not stored."""

    key: str


class KeyPage(Struct):
    """Keys this one may see, by prefix. `next` is the `after` of the next page, null on the last."""

    keys: list[KeyShown]
    next: str | None


_MOMENT = datetime.fromisoformat("2026-01-31T12:00:00+00:00")
_TENANT = TenantShown(
    tenant_id="acme",
    created_at=_MOMENT,
    max_rows=1_000_000,
    tokens_per_day=None,
    tokens_today=0,
    chunks=5_400,
    keys=2,
)
_SHOWN: dict[str, Any] = {
    "prefix": "3fh2k9qa",
    "name": "the website",
    "scopes": ["read"],
    "tenant_id": "acme",
    "created_at": _MOMENT,
    "expires_at": None,
    "revoked_at": None,
    "last_used_at": None,
    "requests_per_minute": 600,
    "concurrent_streams": None,
}
_NEW = NewKey(**_SHOWN, key="pgr_3fh2k9qa_…")
_ASKED = CreateKey(scopes=["read"], tenant_id="acme", name="the website", requests_per_minute=600)


@post(
    "/admin/tenants",
    operation_id="put_tenant",
    **guard.needs("admin", keyed=True),
    summary="Register a tenant, or set its limits",
    tags=["admin"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented(*problems.BODY)
    | {
        200: ResponseSpec(TenantShown, description="It was registered", examples=[Example("a tenant", value=_TENANT)]),
        201: ResponseSpec(TenantShown, description="Registered", examples=[Example("a tenant", value=_TENANT)]),
    },
)
async def put_tenant(
    request: Request[Any, Any, Any],
    service: NamedDependency[Service],
    data: Annotated[
        PutTenant, Body(examples=[Example("a limit", value=PutTenant(tenant_id="acme", max_rows=1_000_000))])
    ],
) -> Response[TenantShown]:
    """Keys are made for registered tenants only. What is stored for a tenant before it is registered stays."""
    by = guard.caller_of(request)
    statement = registry.put_tenant(data.tenant_id, data.max_rows, data.tokens_per_day, by)
    created = (await registry.run(service.database, statement))[0]["created"]
    (row,) = await registry.run(service.database, registry.list_tenants(by, data.tenant_id))
    return Response(TenantShown(**row), status_code=201 if created else 200)


@get(
    "/admin/tenants",
    operation_id="list_tenants",
    **guard.needs("admin", keyed=True),
    summary="List tenants",
    tags=["admin"],
    operation_class=operations.Described,
    responses=problems.documented()
    | {
        200: ResponseSpec(
            TenantPage, description="A page", examples=[Example("the last page", value=TenantPage([_TENANT], None))]
        )
    },
)
async def list_tenants(
    request: Request[Any, Any, Any], service: NamedDependency[Service], limit: Limit = 100, after: After = None
) -> TenantPage:
    """Those that are registered, and those that have chunks without being registered."""
    _check_page(limit, after)
    rows = await registry.run(service.database, registry.page_of_tenants(guard.caller_of(request), limit + 1, after))
    page = [TenantShown(**row) for row in rows[:limit]]
    return TenantPage(page, page[-1].tenant_id if len(rows) > limit else None)


def _check_page(limit: int, after: str | None) -> None:
    check_range("limit", limit, 1, MAX_PAGE)
    if after is not None:
        check_text("after", after, 0, MAX_AFTER_BYTES)


@delete(
    "/admin/tenants/{tenant_id:str}",
    operation_id="delete_tenant",
    **guard.needs("admin", keyed=True),
    summary="Delete a tenant",
    tags=["admin"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented(HTTPStatus.NOT_FOUND)
    | {
        200: ResponseSpec(
            Deletion, description="Deleted", examples=[Example("deleted", value=Deletion(2, example(None)))]
        )
    },
)
async def delete_tenant(
    request: Request[Any, Any, Any], service: NamedDependency[Service], tenant_id: TenantPath
) -> Deletion:
    """Its keys are revoked; once no server takes them any more, all it has is erased. Cannot be undone."""
    by = guard.caller_of(request)
    statement = registry.delete_tenant(tenants.check(tenant_id), by)
    known = await registry.run(service.database, registry.list_tenants(by, tenant_id))
    revoked = (await registry.run(service.database, statement))[0]["revoked"]
    if revoked:
        await asyncio.sleep(service.settings.key_cache)
    erased = await erasure.tenant(service.database, service.settings, tenant_id)
    # Documents that wait to be embedded are no chunks yet: a tenant of nothing else is known by what was erased.
    if not known and not revoked and not any(erased.removed.values()):
        raise NotRegistered(f"there is no tenant {tenant_id!r}")
    return Deletion(revoked, told(erased, registered=False))


@post(
    "/admin/keys",
    operation_id="create_key",
    **guard.needs("admin", keyed=True),
    summary="Make a key",
    tags=["admin"],
    status_code=201,
    operation_class=operations.Described,
    responses=problems.documented(*problems.BODY, HTTPStatus.NOT_FOUND)
    | {201: ResponseSpec(NewKey, description="Made", examples=[Example("a key", value=_NEW)])},
)
async def create_key(
    request: Request[Any, Any, Any],
    service: NamedDependency[Service],
    data: Annotated[CreateKey, Body(examples=[Example("a key to read", value=_ASKED)])],
) -> Response[NewKey]:
    """The answer is the only place where it stands. An admin key of a tenant makes keys with no more rights than its own."""
    minted = keys.mint()
    statement = registry.create_key(Asked(**msgspec.structs.asdict(data)), minted, guard.caller_of(request))
    (row,) = await registry.run(service.database, statement)
    return Response(NewKey(**row, key=minted.token), headers=NO_STORE)


@get(
    "/admin/keys",
    operation_id="list_keys",
    **guard.needs("admin", keyed=True),
    summary="List keys",
    tags=["admin"],
    operation_class=operations.Described,
    responses=problems.documented()
    | {
        200: ResponseSpec(
            KeyPage,
            description="A page",
            examples=[Example("the last page", value=KeyPage([KeyShown(**_SHOWN)], None))],
        )
    },
)
async def list_keys(
    request: Request[Any, Any, Any], service: NamedDependency[Service], limit: Limit = 100, after: After = None
) -> KeyPage:
    """With their last use, to about a minute; revoked and expired ones, too."""
    _check_page(limit, after)
    rows = await registry.run(service.database, registry.page_of_keys(guard.caller_of(request), limit + 1, after))
    page = [KeyShown(**row) for row in rows[:limit]]
    return KeyPage(page, page[-1].prefix if len(rows) > limit else None)


@delete(
    "/admin/keys/{prefix:str}",
    operation_id="revoke_key",
    **guard.needs("admin", keyed=True),
    summary="Revoke a key",
    tags=["admin"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented(HTTPStatus.NOT_FOUND)
    | {200: ResponseSpec(KeyShown, description="Revoked", examples=[Example("revoked", value=KeyShown(**_SHOWN))])},
)
async def revoke_key(
    request: Request[Any, Any, Any],
    service: NamedDependency[Service],
    prefix: Annotated[str, PathParameter(description="What stands between `pgr_` and the next `_`.")],
) -> KeyShown:
    """Servers refuse it within PGRECALL_KEY_CACHE seconds; again, it changes nothing."""
    check_text("prefix", prefix, 1, MAX_PREFIX_BYTES)
    (row,) = await registry.run(service.database, registry.revoke_key(prefix, guard.caller_of(request)))
    return KeyShown(**row)
