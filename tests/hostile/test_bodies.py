"""Bodies that are JSON to the letter, or nearly, and made to be large once read, to be misread, or to name what they are not."""

import json

import pytest

from app.api import faults
from app.api.documents import PutDocuments
from app.api.search import SearchRequest
from app.errors import BadInput, TooLarge
from tests.api.test_documents_api import assert_problem

DEEP = 100_000


def refused(body, kind=SearchRequest):
    with pytest.raises(BadInput) as caught:
        faults.decoded(body, kind)
    return caught.value


@pytest.mark.parametrize(
    "name", [" - at `$.a.a", " - at `$" * 3, "x - at `$.top_k", "`", "`" * 100, "x" * 100_000, "a.b[0]"]
)
@pytest.mark.parametrize("within", ["", "rerank"])
def test_a_field_is_named_by_its_beginning_whatever_its_name_looks_like(name, within):
    asked = {"tenant_id": "acme", "query": "x"} | ({within: {name: 1}} if within else {name: 1})
    fault = refused(json.dumps(asked).encode())
    assert fault.field == ".".join(filter(None, (within, name[:60])))
    assert fault.fault.startswith("there is no such field; allowed: ")


@pytest.mark.parametrize(
    ("value", "most", "what"),
    [
        ("{}", faults.MOST_PARTS, "lists, objects and names"),
        ('{"":0}', faults.MOST_PARTS, "lists, objects and names"),
        ("[]", faults.MOST_PARTS, "lists, objects and names"),
        ('""', faults.MOST_VALUES, "values"),
        ("0", faults.MOST_VALUES, "values"),
    ],
)
def test_a_body_that_would_be_large_once_read_is_not_read(value, most, what):
    several = ",".join([value] * (most + 1))
    for text in ("", 'a\\\\\\"[', "\\\\"):
        body = f'{{"documents": [{{"id": "a", "content": "{text}", "metadata": {{"a": [{several}]}}}}]}}'
        fault = refused(body.encode(), PutDocuments)
        assert isinstance(fault, TooLarge)
        assert fault.fault.endswith(f" {what}; allowed: at most {most:,}")


def test_in_texts_there_may_be_any_number_of_marks():
    for text in ("[{:," * 1_300_000, '"' * 700_000 + "[{:," * 1_300_000, "\\" * 700_001 + "," * 5_100_000):
        body = json.dumps({"documents": [{"id": "a", "content": text}]}).encode()
        assert faults.decoded(body, PutDocuments).documents[0].content == text


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ('{"a": 1e400}', "is out of range"),
        ('{"a": %s}' % ("9" * 5_000), "Integer value out of range"),
        ('{"a": NaN}', "the body is not JSON"),
        ('{"a": Infinity}', "the body is not JSON"),
        ('{"a": "\\ud800"}', "has a lone surrogate"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "is nested too deeply"),
        ('{"a":' + "[" * DEEP, "is nested too deeply"),
        ('{"a": ' + "[" * 20 + "]" * 20 + "}", "is nested too deep"),
    ],
    ids=[
        "beyond double",
        "endless integer",
        "NaN",
        "infinity",
        "surrogate",
        "deep objects",
        "deep lists",
        "deeper than 8",
    ],
)
async def test_what_cannot_be_stored_is_refused_by_each_route_that_reads_it(client, metadata, fault):
    json_type = {"Content-Type": "application/json"}
    bodies = {
        "/documents": f'{{"tenant_id": "acme", "documents": [{{"id": "a", "content": "x", "metadata": {metadata}}}]}}',
        "/search": f'{{"tenant_id": "acme", "query": "x", "metadata": {metadata}}}',
        "/rag": f'{{"tenant_id": "acme", "question": "x", "metadata": {metadata}}}',
    }
    for path, body in bodies.items():
        problem = assert_problem(await client.post(path, content=body.encode(), headers=json_type), 400)
        assert fault in problem["detail"] or (path != "/documents" and "metadata" in problem["detail"])
    if len(metadata) < 60_000:
        listed = await client.get("/documents", params={"tenant_id": "acme", "metadata": metadata})
        assert_problem(listed, 400)
    line = f'{{"id": "a", "content": "x", "metadata": {metadata}}}\n{{"id": "b", "content": "y"}}\n'
    ndjson = {"Content-Type": "application/x-ndjson"}
    streamed = await client.post("/documents/stream?tenant_id=acme", content=line.encode(), headers=ndjson)
    first, second, summary = map(json.loads, streamed.text.splitlines())
    assert (first["status"], second["status"], summary["done"]) == ("failed", "created", True)


async def test_numbers_beyond_what_machines_count_in_come_back_to_the_letter(client):
    numbers = [2**64, -(2**63) - 1, int("9" * 400), 1e308, 5e-324, -0.0]
    body = {"tenant_id": "acme", "content": "x", "metadata": {"numbers": numbers}}
    put = await client.put(
        "/documents/a", content=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    assert put.status_code == 201, put.text
    read = await client.get("/documents/a?tenant_id=acme")
    back = json.loads(read.text)["metadata"]["numbers"]
    assert (back[:3], [float(each) for each in back[3:]]) == (numbers[:3], numbers[3:])
    found = await client.post(
        "/search", json={"tenant_id": "acme", "embedding": [1.0] * 64, "metadata": {"numbers": int("9" * 400)}}
    )
    assert found.json()["count"] == 1, found.text
