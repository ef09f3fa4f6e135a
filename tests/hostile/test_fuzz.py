"""schemathesis over the whole OpenAPI document of a served application: no 5xx, every answer as the document says.

Operations are taken from the document, so a new route is fuzzed without a word here. `make fuzz` is the long run.
"""

import contextlib
import json
import time
from collections import Counter, defaultdict
from functools import partial

import httpx
import hypothesis
import psycopg
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from app import keys, registry
from app.registry import Asked
from tests.conftest import DIMENSIONS, THOROUGH

EXAMPLES = 10 * THOROUGH
"""Requests for each operation that the document allows, and as many that it does not."""
GIVEN = {"parameters", "requestBody", "security"}
"""What an operation may be given. To ask Hypothesis for a wrong one of none is a failure, which it tells with a seed."""
TENANT = "acme"
KEY_CACHE = 0.1
DOCUMENTS = [
    {
        "id": document_id,
        "content": f"Document {number} is about otters, herons and rivers.",
        "doc_type": doc_type,
        "metadata": {"lang": "en", "year": 2020 + number, "tags": ["a", "b"], "deep": {"er": None}},
    }
    for number, (document_id, doc_type) in enumerate([("faq/one", "faq"), ("ö/%2F ü", "page"), ("plain", None)])
]
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
_keys = st.sampled_from(["lang", "year", "tags", "deep", "deep.er", "$and", "", "a'b"])
_scalars = st.sampled_from(["en", 2020, 2021.5, True, None, "a", "$in", ""])
_conditions = st.recursive(
    st.dictionaries(_keys, _scalars, max_size=2),
    lambda inner: st.one_of(
        st.dictionaries(_keys, inner, max_size=2),
        st.builds(
            lambda key, name, value: {key: {name: value}},
            _keys,
            st.sampled_from(["$gt", "$gte", "$lt", "$lte"]),
            _scalars,
        ),
        st.builds(lambda key, values: {key: {"$in": values}}, _keys, st.lists(_scalars, max_size=3)),
        st.builds(lambda key, value: {key: {"$exists": value}}, _keys, st.booleans()),
        st.builds(lambda name, several: {name: several}, st.sampled_from(["$and", "$or"]), st.lists(inner, max_size=2)),
        st.builds(lambda each: {"$not": each}, inner),
    ),
    max_leaves=6,
)
_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
_items = st.fixed_dictionaries(
    {"id": st.sampled_from(["a", "b", "ö/ü"]), "content": _texts}, optional={"title": _texts, "metadata": _conditions}
)
_lines = st.lists(st.one_of(_items.map(json.dumps), _texts), max_size=4).map("\n".join)
# Fields that random values rarely fit: some requests have a value that means something here instead.
_meant = {
    "content": _texts.map("Otters: {}".format),
    "title": _texts,
    "created_at": st.sampled_from([None, "2026-01-31T12:00:00+01:00"]),
    "tenant_id": st.just(TENANT),
    "embedding": st.lists(st.floats(-1, 1, width=32), min_size=DIMENSIONS, max_size=DIMENSIONS),
    "embedding_model": st.just("text-embedding-3-small"),
    "metadata": _conditions,
    "document_id": st.sampled_from([each["id"] for each in DOCUMENTS]),
    "after": st.just("faq/one"),
    "ids": st.lists(st.sampled_from([each["id"] for each in DOCUMENTS]), min_size=1, max_size=3),
    "doc_type": st.sampled_from(["faq", "page"]),
    "id": st.sampled_from([each["id"] for each in DOCUMENTS]),
}


def give_meaning(value, draw, *, text=False):
    """Replace, in place, fields anywhere inside of it. `text`: JSON has to be written, as in a query."""
    if isinstance(value, list):
        for each in value:
            give_meaning(each, draw)
    elif isinstance(value, dict):
        if "embedding" not in value:
            value.pop("embedding_model", None)
        for name, each in value.items():
            if name in _meant:
                meant = draw(_meant[name])
                value[name] = json.dumps(meant) if text and isinstance(meant, dict) else meant
            else:
                give_meaning(each, draw)


@schemathesis.serializer("application/x-ndjson")
def lines(context, value):
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def operations(document):
    return [(method, path) for path, methods in document["paths"].items() for method in methods]


def check_body(response):
    """What a stream is made of."""
    kind, body = response.headers["content-type"][0].partition(";")[0], response.content
    if kind == "text/event-stream":
        frames = body.decode().split("\n\n")
        assert frames.pop() == ""
        assert frames.pop() == "data: [DONE]"
        assert frames[0].startswith("event: sources\n")
        for frame in frames:
            json.loads(frame.rpartition("data: ")[2])
    elif kind == "application/x-ndjson":
        lines = [json.loads(line) for line in body.splitlines()]
        assert "done" in lines[-1]
        assert all({"line", "status"} <= line.keys() for line in lines[:-1])
    elif response.status_code >= 400:
        problem = json.loads(body)
        assert problem["status"] == response.status_code
        assert problem["detail"]


def check(address, session, counts, key, case):
    # Now and then with the wrong key that it thinks of, or none; every route but health asks for one.
    if counts.total() % 8 == 7:
        response = case.call(base_url=address, session=session, timeout=60)
    else:  # not by `call`, which leaves a key out where it thought of none
        case.headers["Authorization"] = f"Bearer {key}"
        given = case.as_transport_kwargs(base_url=address)
        response = schemathesis.Response.from_requests(session.request(**given, timeout=60), verify=True)
    counts[response.status_code] += 1
    assert response.status_code < 500, response.content[:500]
    check_body(response)
    case.validate_response(response, checks=CHECKS)


def new_key(owner, path):
    """A key that may do this, the tenant's, or for what is administered one for all; requests before may have revoked others."""
    minted = keys.mint()
    registry.run_as_owner(owner, registry.put_tenant(TENANT))
    whole = path.startswith(("/admin", "/tenants"))
    asked = Asked(scopes=["admin"]) if whole else Asked(scopes=["read", "write"], tenant_id=TENANT)
    registry.run_as_owner(owner, registry.create_key(asked, minted))
    return minted.token


def fuzz(strategy, checked, *, meaning):
    """Check EXAMPLES requests. `meaning`: some of them with values that mean something here."""

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=THOROUGH == 1,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate,),  # shrinking a request takes minutes; as it was found it says enough
    )
    @hypothesis.given(data=st.data())
    def run(data):
        case = data.draw(strategy)
        if meaning and data.draw(st.booleans()):
            for name in ("If-Match", "If-None-Match"):
                (case.headers or {}).pop(name, None)
            if case.media_type == "application/x-ndjson":
                case.body = data.draw(_lines)
            for part, text in ((case.body, False), (case.query, True), (case.path_parameters, True)):
                give_meaning(part, data.draw, text=text)
        checked(case)

    run()


@pytest.mark.timeout(600 * max(1, THOROUGH // 4))
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as documented", "otherwise"])
def test_every_answer_is_as_documented(served, mode):
    document = served.document()
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(document)))
    schema.config.update(base_url=served.address)
    stack = contextlib.ExitStack()
    owner = stack.enter_context(psycopg.connect(served.owner, autocommit=True))
    headers = {"Authorization": f"Bearer {new_key(owner, '/documents')}"}
    time.sleep(KEY_CACHE)  # the process may have learnt that there are no keys
    body = {"tenant_id": TENANT, "documents": DOCUMENTS}
    stored = httpx.post(f"{served.address}/documents", json=body, headers=headers, timeout=60)
    assert stored.status_code == 200, stored.text
    counts, faults = defaultdict(Counter), []
    session = requests.Session()
    began = time.monotonic()
    for method, path in operations(document):
        operation = schema[path][method]
        label = f"{method.upper()} {path}"
        if mode is GenerationMode.NEGATIVE and document["paths"][path][method].keys().isdisjoint(GIVEN):
            counts[label]["nothing to get wrong"] += 1
            continue
        try:
            fuzz(
                operation.as_strategy(generation_mode=mode),
                partial(check, served.address, session, counts[label], new_key(owner, path)),
                meaning=mode is GenerationMode.POSITIVE,
            )
        except Exception as error:  # noqa: BLE001  all that is wrong is told at once
            faults.append(f"{label}: {error!r} {error}")
            print(faults[-1], flush=True)  # a run that is cut off has told then
    stack.close()
    took = time.monotonic() - began
    for label, answered in counts.items():
        print(f"{label:35}", "  ".join(f"{status}: {n}" for status, n in sorted(answered.items(), key=str)))
    print(
        f"{sum(n for each in counts.values() for status, n in each.items() if isinstance(status, int))} requests in {took:.0f} s"
    )
    assert not faults, "\n\n".join(faults)
    assert counts.keys() == {f"{method.upper()} {path}" for method, path in operations(document)}
    assert "Traceback" not in served.said.read_text()
    assert "unexpected error" not in served.said.read_text()
