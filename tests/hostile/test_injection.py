"""Injection strings in every text field, key and header of the API: stored to the letter, or refused naming the field.

The fields are taken from the OpenAPI document, each beside the document's own example of a request, so that a new field
is tried without a word here.
"""

import copy
import json
from collections import Counter
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import pytest
from msgspec.structs import replace

from app import keys, registry
from app.registry import Asked
from tests.conftest import DIMENSIONS, THOROUGH
from tests.hostile.strings import STRINGS

TENANT, BYSTANDER = "acme", "bystander"
DOCUMENT = "faq/password"
KEY = "hostile-key"
"""Stands in a path for a key of an object of free form, whose name is under test."""


ITEM = {"$ref": "#/components/schemas/Item"}
HEADERS = ("X-Request-ID", "Accept", "Authorization", "Cookie")


PATHS = {"document_id": DOCUMENT, "tenant_id": TENANT}
SHARE = 6 if THOROUGH == 1 else 1
"""Of so many strings each place gets one, another place the next ones, unless there is time."""


class Place(NamedTuple):
    """Where a request has a text: `part` is body, query, path or header, `path` the steps to it in that part."""

    method: str
    route: str
    part: str
    path: tuple[str | int, ...]

    def __str__(self) -> str:
        return f"{self.method} {self.route} {self.part} {'.'.join(map(str, self.path))}"


def resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def texts(
    schema: dict[str, Any], document: dict[str, Any], path: tuple[str | int, ...] = ()
) -> list[tuple[str | int, ...]]:
    """The paths of every text that the schema allows; of an object of free form a key and a value."""
    schema = resolved(schema, document)
    found: list[tuple[str | int, ...]] = []
    for each in (*schema.get("oneOf", ()), *schema.get("anyOf", ()), *schema.get("allOf", ())):
        found += texts(each, document, path)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "string" in kinds:
        found.append(path)
    if "array" in kinds:
        found += texts(schema.get("items", {}), document, (*path, 0))
    for name, each in schema.get("properties", {}).items():
        found += texts(each, document, (*path, name))
    if "object" in kinds and not schema.get("properties"):
        found += [
            (*path, KEY),
            (*path, "lang"),
            (*path, "lang", "$in", 0),
            (*path, "lang", "$gt"),
            (*path, "$or", 0, KEY),
        ]
    return list(dict.fromkeys(found))


def places(document: dict[str, Any]) -> list[Place]:
    found = []
    for route, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                steps = [(parameter["name"], *path) for path in texts(parameter["schema"], document)]
                found += [Place(method, route, parameter["in"], path) for path in steps]
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                # A line of NDJSON is an item of POST /documents; the document only says that it is a text.
                part, schema = ("body", content["schema"]) if kind == "application/json" else ("line", ITEM)
                found += [Place(method, route, part, path) for path in texts(schema, document)]
            found += [Place(method, route, "header", (name,)) for name in HEADERS]
    return found


def put(value: Any, path: tuple[str | int, ...], text: str) -> Any:
    """The value with the text at the path, around which whatever is needed is made."""
    if not path:
        return text
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        several = list(value) if isinstance(value, list) and value else [None]
        several[step] = put(several[step], rest, text)
        return several
    if step == KEY:
        return {text: "en"}
    made = dict(value) if isinstance(value, dict) else {}
    made[step] = put(made.get(step), rest, text)
    return made


def content(operation: dict[str, Any], place: Place, text: str) -> tuple[dict[str, str], bytes | None]:
    """The body of the operation's example with the text at its place, and its headers."""
    for kind, media in operation.get("requestBody", {}).get("content", {}).items():
        if kind != "application/json":
            line = {"id": "line", "content": "A line."}
            return {"Content-Type": kind}, json.dumps(
                put(line, place.path, text) if place.part == "line" else line
            ).encode()
        example = copy.deepcopy(media["schema"]["examples"][0])
        if place.part == "body":
            example = put(example, place.path, text)
        if place.path[-1:] == ("embedding_model",):
            holder = example
            for step in place.path[:-1] if place.part == "body" else ():
                holder = holder[step]
            holder.pop("query", None)
            holder["embedding"] = [1.0] * DIMENSIONS
        return {"Content-Type": kind}, json.dumps(example).encode()
    return {}, None


def asked(client: httpx.AsyncClient, document: dict[str, Any], place: Place, text: str) -> httpx.Request | None:
    """The example of the operation with the text at its place; None where no client can send that."""
    operation = document["paths"][place.route][place.method]
    headers, body = content(operation, place, text)
    query = {
        p["name"]: TENANT for p in operation.get("parameters", ()) if (p["name"], p["in"]) == ("tenant_id", "query")
    }
    path = {p["name"]: PATHS.get(p["name"], "x") for p in operation.get("parameters", ()) if p["in"] == "path"}
    changed = {"query": query, "path": path, "header": headers}.get(place.part, {})
    if place.part in ("query", "path", "header"):
        changed[str(place.path[0])] = text
    try:
        route = place.route.format(**{name: quote(value.encode(), safe="") for name, value in path.items()})
        coded = {name.encode(): value.encode() for name, value in headers.items()}
        if any(set(value) & set(b"\r\n\0") for value in coded.values()):
            return None
        return client.build_request(place.method, route, params=query, headers=coded, content=body)
    except (UnicodeEncodeError, httpx.InvalidURL):
        return None


def fingerprint(owner) -> dict[str, tuple[object, ...]]:
    """For every table how many rows it has, and what is in those that are not the tenant's under test."""
    tables = owner.execute(
        """select c.oid::regclass::text, exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = 'tenant_id')
             from pg_class c where c.relkind in ('r', 'p') and not c.relispartition
              and c.relnamespace = 'public'::regnamespace order by 1"""
    ).fetchall()
    found = {}
    for table, has_tenant in tables:
        where = f"where tenant_id <> '{TENANT}'" if has_tenant else ""
        found[table] = owner.execute(
            f"select count(*), md5(coalesce(string_agg(t::text, '\n' order by t::text), '')) from {table} t {where}"
        ).fetchone()
    (found["functions"],) = owner.execute("select count(*) from pg_proc where pronamespace = 'public'::regnamespace")
    (found["relations"],) = owner.execute("select count(*) from pg_class where relnamespace = 'public'::regnamespace")
    # Tests beside this one make roles of their own; a role made here would be the owner's or one of pgrecall's.
    (found["roles"],) = owner.execute(
        "select string_agg(r.rolname || ' in ' || coalesce(m.roleid::regrole::text, ''), ', ' order by r.rolname, m.roleid) "
        "from pg_roles r left join pg_auth_members m on m.member = r.oid "
        "where r.rolname ~ '^pgrecall_(app|worker|analyst|backup|service|owner)$'"
    )
    return found


def counted(owner) -> dict[str, int]:
    return {
        table: owner.execute(f"select count(*) from {table}").fetchone()[0]
        for table in ("sources", "documents", "document_terms", "embedding_cache")
    }


READS = {("post", "/search"), ("post", "/search/batch"), ("post", "/rag")}
ELSEWHERE = {404, 412, 415}
"""No such document, none with such an ETag, no such type of body: nothing is named, as nothing is wrong with it."""


def named(response: httpx.Response, place: Place) -> bool:
    """Whether the problem names the place or something that holds it."""
    steps = {str(step) for step in place.path if not isinstance(step, int) and step != KEY}
    if place.path == ("document_id",):
        steps = {"id"}
    field = response.json().get("field")
    return field is not None and not steps.isdisjoint(field.replace("[", ".").split("."))


async def kept(client: httpx.AsyncClient, example: Any, place: Place, text: str) -> bool:
    """Whether what was put is what is read."""
    if place.part != "body" or place.method != "put" or place.path[0] in ("tenant_id", "created_at", "embedding_model"):
        return True
    whole = (await client.get(f"/documents/{DOCUMENT}", params={"tenant_id": TENANT})).json()
    return bool(whole[place.path[0]] == put(example, place.path, text)[place.path[0]])


async def fault(
    client: httpx.AsyncClient, document: dict[str, Any], response: httpx.Response, place: Place, text: str
) -> str | None:
    if response.status_code >= 500:
        return "a 5xx"
    if response.status_code >= 400:
        if response.status_code == 401:
            return None if place.path == ("Authorization",) else "not let in"
        if response.status_code == 403:
            return None if "tenant_id" in place.path else "not allowed"  # another tenant than the key's
        unread = place.path[0] in HEADERS or (place.part == "path" and not text)  # not what is wrong, or another route
        well = unread or response.status_code in ELSEWHERE or named(response, place)
        return None if well else "refused without a name"
    if place.part == "line":
        line = json.loads(response.text.split("\n")[0])
        if line.get("error", {}).get("status", 0) >= 500:
            return "a 5xx in a line"
    example = content(document["paths"][place.route][place.method], Place("", "", "", ()), "")[1]
    return None if await kept(client, json.loads(example or "{}"), place, text) else "not kept to the letter"


def key(owner, route: str) -> str:
    """A new key for the route: the tenant's, or for what is administered one for all."""
    minted = keys.mint()
    registry.run_as_owner(owner, registry.put_tenant(TENANT))
    whole = route.startswith(("/admin", "/tenants"))
    asked = Asked(scopes=["admin"]) if whole else Asked(scopes=["read", "write"], tenant_id=TENANT)
    registry.run_as_owner(owner, registry.create_key(asked, minted))
    return minted.token


@pytest.fixture
async def corpus(client):
    for tenant in (TENANT, BYSTANDER):
        body = {
            "tenant_id": tenant,
            "documents": [
                {
                    "id": DOCUMENT,
                    "content": "Open Settings to reset it.",
                    "doc_type": "faq",
                    "metadata": {"lang": "en"},
                },
                {"id": "other", "content": "Otters swim in rivers."},
            ],
        }
        assert (await client.post("/documents", json=body)).status_code == 200


@pytest.fixture
def settings(settings):
    return replace(settings, chat_model="gpt-test", embedding_retries=0, key_cache=0.0)


async def test_every_text_is_stored_to_the_letter_or_refused_by_name(client, corpus, owner):
    document = (await client.get("/docs/openapi.json")).json()
    before, faults, answered = fingerprint(owner), [], Counter()
    tried = places(document)
    routes = {(place.method, place.route) for place in tried}
    assert routes == {(method, route) for route, methods in document["paths"].items() for method in methods}
    for number, place in enumerate(tried):
        rows = counted(owner)
        client.headers["Authorization"] = f"Bearer {key(owner, place.route)}"
        for name, text in list(STRINGS.items())[number % SHARE :: SHARE]:
            request = asked(client, document, place, text)
            if request is None:
                continue
            response = await client.send(request)
            answered[response.status_code] += 1
            if found := await fault(client, document, response, place, text):
                faults.append(f"{found}: {place}, {name}: {response.status_code} {response.text[:300]}")
        if (place.method == "get" or (place.method, place.route) in READS) and counted(owner) != rows:
            faults.append(f"rows changed by reading: {place}")
        if place.method == "delete":
            client.headers["Authorization"] = f"Bearer {key(owner, '/documents')}"
            await put_again(client)
    after = fingerprint(owner)
    faults += [f"changed: {table}" for table in before if before[table] != after.get(table)]
    print(len(tried), "places,", answered.total(), "requests:", dict(answered))
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:100])


async def put_again(client):
    body = {"tenant_id": TENANT, "content": "Open Settings to reset it.", "doc_type": "faq", "metadata": {"lang": "en"}}
    assert (await client.put(f"/documents/{DOCUMENT}", json=body)).status_code < 300
