"""What is asked of each route: a recipe for every method and path of the application's route table.

A recipe is given the tenant it names in its requests and asks, also, for what only the other tenant has.
"""

import json
from collections.abc import Callable
from urllib.parse import quote

from tests.isolation.worlds import MARK, Asked

Recipe = Callable[[str], list[Asked]]

IDS = ("mine", "shared", "shared/second", "theirs", "pending/theirs", "failed/theirs", "pending/shared", "nobody")
QUESTION = "How do I reset my password?"
TYPE = f"faq {MARK}"
HAS_MARK = {MARK: {"$exists": True}}
VECTOR = [1.0] + [0.0] * 63


def searches(tenant: str) -> list[dict[str, object]]:
    base: dict[str, object] = {"tenant_id": tenant, "query": QUESTION, "top_k": 100}
    by_vector = {"tenant_id": tenant, "embedding": VECTOR, "top_k": 100}
    return [
        base,
        by_vector,
        *({**base, "mode": mode, "fusion": fusion} for mode in ("text", "hybrid") for fusion in ("rrf", "relative")),
        {**base, "query": MARK, "mode": "text"},
        {**base, "query": MARK, "mode": "hybrid", "group_by": "id"},
        {**base, "exact": True},
        {**base, "group_by": "id", "diversity": 0.5},
        {**base, "doc_type": TYPE},
        {**base, "doc_type": ["faq", TYPE], "threshold": -1},
        {**base, "metadata": HAS_MARK},
        {**base, "metadata": {"$not": {"lang": "de"}}, "mode": "hybrid"},
        {**base, "created_after": "2020-01-01T00:00:00Z", "created_before": "2030-01-01T00:00:00Z"},
        {**base, "explain": True},
        {**base, "explain": "analyze"},
    ]


def search(tenant: str) -> list[Asked]:
    return [Asked("POST", "/search", each) for each in searches(tenant)]


def batch(tenant: str) -> list[Asked]:
    return [Asked("POST", "/search/batch", {"searches": searches(tenant)})]


def rag(tenant: str) -> list[Asked]:
    asked = {"tenant_id": tenant, "question": QUESTION, "top_k": 20}
    return [
        Asked("POST", "/rag", asked | more)
        for more in (
            {},
            {"stream": True},
            {"mode": "text", "question": MARK},
            {"mode": "hybrid", "doc_type": ["faq", TYPE]},
        )
    ]


def at(document_id: str) -> str:
    return f"/documents/{quote(document_id, safe='')}"


def put(tenant: str) -> list[Asked]:
    body = {"tenant_id": tenant, "content": "A new text about otters.", "doc_type": "faq"}
    return [
        *(Asked("PUT", at(each), body, {"If-Match": "*"}) for each in IDS),
        *(Asked("PUT", at(each), body, {"If-Match": '"1"'}) for each in IDS),
        *(Asked("PUT", at(each), body, {"If-None-Match": "*"}) for each in IDS),
        *(Asked("PUT", at(each), body) for each in IDS),
        *(Asked("PUT", f"{at(each)}?wait=false", body | {"content": "Later."}) for each in IDS),
        *(Asked("GET", f"{at(each)}?tenant_id={tenant}") for each in IDS),
    ]


def get(tenant: str) -> list[Asked]:
    return [
        *(Asked("GET", f"{at(each)}?tenant_id={tenant}") for each in IDS),
        *(Asked("GET", f"{at(each)}?tenant_id={tenant}", headers={"If-None-Match": '"1"'}) for each in IDS),
        *(Asked("HEAD", f"{at(each)}?tenant_id={tenant}") for each in IDS),
    ]


def delete(tenant: str) -> list[Asked]:
    return [
        *(Asked("DELETE", f"{at(each)}?tenant_id={tenant}", headers={"If-Match": '"9"'}) for each in IDS),
        *(Asked("DELETE", f"{at(each)}?tenant_id={tenant}") for each in IDS),
        *(Asked("DELETE", f"{at(each)}?tenant_id={tenant}") for each in IDS),
    ]


def listed(tenant: str) -> list[Asked]:
    first = f"/documents?tenant_id={tenant}"
    narrowed = ("", "&limit=1", "&after=nobody", "&state=failed", "&state=pending", f"&doc_type={quote(TYPE)}")
    return [
        *(Asked("GET", first + each) for each in narrowed),
        Asked("GET", f"{first}&metadata={quote(json.dumps(HAS_MARK))}"),
    ]


def put_several(tenant: str) -> list[Asked]:
    items = [{"id": each, "content": f"A new text of {each}."} for each in IDS]
    return [
        Asked("POST", "/documents", {"tenant_id": tenant, "documents": items}),
        Asked("POST", "/documents?wait=false", {"tenant_id": tenant, "documents": [items[0] | {"content": "Later."}]}),
        *listed(tenant),
    ]


def delete_matching(tenant: str) -> list[Asked]:
    first = f"/documents?tenant_id={tenant}"
    return [
        Asked("DELETE", first),
        Asked("DELETE", f"{first}&doc_type={quote(TYPE)}"),
        Asked("DELETE", f"{first}&metadata={quote(json.dumps(HAS_MARK))}"),
        Asked("DELETE", f"{first}&doc_type=faq&doc_type={quote(TYPE)}"),
        *listed(tenant),
    ]


def stream(tenant: str) -> list[Asked]:
    lines = "".join(json.dumps({"id": each, "content": f"A new text of {each}."}) + "\n" for each in IDS)
    headers = {"Content-Type": "application/x-ndjson"}
    return [
        Asked("POST", f"/documents/stream?tenant_id={tenant}", headers=headers, content=lines.encode()),
        *listed(tenant),
    ]


def status(tenant: str) -> list[Asked]:
    return [Asked("GET", f"/status?tenant_id={tenant}")]


def retry(tenant: str) -> list[Asked]:
    some = [f"failed/{name}" for name in ("mine", "shared", "theirs", "nobody")]
    return [
        Asked("POST", "/queue/retry", {"tenant_id": tenant, "ids": some}),
        Asked("POST", "/queue/retry", {"tenant_id": tenant, "all": True}),
        *status(tenant),
    ]


def erase(tenant: str) -> list[Asked]:
    return [Asked("DELETE", f"/tenants/{tenant}"), *listed(tenant), *search(tenant)[:2]]


def public(path: str) -> Recipe:
    return lambda _: [Asked("GET", path)]


RECIPES: dict[tuple[str, str], Recipe] = {
    ("POST", "/search"): search,
    ("POST", "/search/batch"): batch,
    ("POST", "/rag"): rag,
    ("PUT", "/documents/{document_id}"): put,
    ("GET", "/documents/{document_id}"): get,
    ("DELETE", "/documents/{document_id}"): delete,
    ("GET", "/documents"): listed,
    ("POST", "/documents"): put_several,
    ("DELETE", "/documents"): delete_matching,
    ("POST", "/documents/stream"): stream,
    ("GET", "/status"): status,
    ("POST", "/queue/retry"): retry,
    ("DELETE", "/tenants/{tenant_id}"): erase,
}
"""What belongs to a tenant."""

SEARCHES = {("POST", "/search"), ("POST", "/search/batch"), ("POST", "/rag")}
"""Those that only read although they are posted."""

WALKING = (("POST", "/search"), ("POST", "/rag"))
"""Those that are also asked to walk the index. Of a batch's searches some know what others have counted, as it happens."""

KEYED: dict[tuple[str, str], Asked] = {
    ("GET", "/admin/tenants"): Asked("GET", "/admin/tenants"),
    ("POST", "/admin/tenants"): Asked("POST", "/admin/tenants", {"tenant_id": "umbral"}),
    ("DELETE", "/admin/tenants/{tenant_id}"): Asked("DELETE", "/admin/tenants/umbral"),
    ("GET", "/admin/keys"): Asked("GET", "/admin/keys"),
    ("POST", "/admin/keys"): Asked("POST", "/admin/keys", {"tenant_id": "umbral", "scopes": ["read"]}),
    ("DELETE", "/admin/keys/{prefix}"): Asked("DELETE", "/admin/keys/aaaaaaaa"),
}
"""Not served without a key; what keys see is in tests/api/test_admin_api.py and test_keys_api.py."""

PUBLIC: dict[tuple[str, str], Recipe] = {
    (method, path): public(asked)
    for method, path, asked in (
        ("GET", "/health/live", "/health/live"),
        ("GET", "/health/ready", "/health/ready"),
        ("GET", "/docs", "/docs"),
        ("GET", "/docs/{path}", "/docs/nothing"),
        ("GET", "/docs/openapi.json", "/docs/openapi.json"),
        ("GET", "/docs/oauth2-redirect.html", "/docs/oauth2-redirect.html"),
        ("GET", "/docs/assets/{file_path}", "/docs/assets/swagger-ui.css"),
        ("HEAD", "/docs/assets/{file_path}", "/docs/assets/swagger-ui.css"),
    )
}
"""What anybody may see: it names no tenant."""
