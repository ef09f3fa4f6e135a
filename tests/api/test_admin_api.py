"""Tenants, keys and limits over HTTP."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

import pytest

from app import keys, telemetry
from tests.api.test_documents_api import assert_problem
from tests.api.test_keys_api import make, prefix, served
from tests.conftest import PATIENCE
from tests.database.test_limits import within_one

CALLS = [
    ("GET", "/admin/tenants", {}),
    ("POST", "/admin/tenants", {"json": {"tenant_id": "novel"}}),
    ("DELETE", "/admin/tenants/novel", {}),
    ("GET", "/admin/keys", {}),
    ("POST", "/admin/keys", {"json": {"scopes": ["read"], "tenant_id": "acme"}}),
    ("DELETE", "/admin/keys/aaaaaaaa", {}),
]


async def test_nobody_administers_without_an_admin_key_not_even_in_open_mode(settings, owner):
    async with served(settings) as client:
        for method, path, given in CALLS:
            assert "key create" in assert_problem(await client.request(method, path, **given), 401)["detail"]
        key = make(owner, "read", "write")
        for method, path, given in CALLS:
            assert_problem(await client.request(method, path, headers=key, **given), 403)
            assert_problem(await client.request(method, path, **given), 401)
        assert owner.execute("select count(*) from tenants").fetchone() == (1,)


async def test_a_tenants_life(settings, owner):
    admin = make(owner, "admin", tenant=None)
    async with served(settings) as client:
        client.headers.update(admin)
        made = await client.post("/admin/tenants", json={"tenant_id": "acme", "max_rows": 5})
        assert (made.status_code, made.json()["max_rows"], made.json()["chunks"]) == (201, 5, 0)
        again = await client.post("/admin/tenants", json={"tenant_id": "acme", "tokens_per_day": 900})
        assert (again.status_code, again.json()["max_rows"], again.json()["tokens_per_day"]) == (200, 5, 900)
        freed = await client.post("/admin/tenants", json={"tenant_id": "acme", "max_rows": None})
        assert (freed.json()["max_rows"], freed.json()["tokens_per_day"]) == (None, 900)

        asked = {"scopes": ["read", "write"], "tenant_id": "acme", "name": "site", "requests_per_minute": 600}
        created = await client.post("/admin/keys", json=asked)
        assert (created.status_code, created.headers["cache-control"]) == (201, "no-store")
        key = created.json()
        assert asked.items() <= key.items()
        own = {"Authorization": f"Bearer {key['key']}"}
        assert (await client.put("/documents/a", json={"content": "text"}, headers=own)).status_code == 201
        shown = next(each for each in (await client.get("/admin/keys")).json()["keys"] if each["name"] == "site")
        assert shown.keys() == key.keys() - {"key"}
        assert key["key"] not in (await client.get("/admin/keys")).text
        (tenant,) = (await client.get("/admin/tenants")).json()["tenants"]
        assert (tenant["tenant_id"], tenant["chunks"], tenant["keys"]) == ("acme", 1, 1)

        gone = (await client.delete("/admin/tenants/acme")).json()
        assert (gone["revoked"], gone["erasure"]["complete"], gone["erasure"]["removed"]["sources"]) == (1, True, 1)
        assert (await client.get("/status", headers=own)).status_code == 401
        assert (await client.get("/admin/tenants")).json() == {"tenants": [], "next": None}
        assert owner.execute("select count(*) from sources").fetchone() == (0,)
        # Made again under the same name, it does not give the old keys back.
        await client.post("/admin/tenants", json={"tenant_id": "acme"})
        assert (await client.get("/status", headers=own)).status_code == 401


async def test_a_tenant_that_never_was_cannot_be_deleted_and_one_that_only_waits_can(settings, owner):
    admin = make(owner, "admin", tenant=None)
    owner.execute("insert into sources (tenant_id, id, content) values ('waiting', 'a', 'text')")
    async with served(settings) as client:
        client.headers.update(admin)
        assert "no tenant 'typo'" in assert_problem(await client.delete("/admin/tenants/typo"), 404)["detail"]
        gone = await client.delete("/admin/tenants/waiting")
        assert (gone.status_code, gone.json()["erasure"]["removed"]["sources"]) == (200, 1)
        assert_problem(await client.delete("/admin/tenants/waiting"), 404)


async def test_many_keys_and_tenants_come_in_pages(settings, owner):
    admin = make(owner, "admin", tenant=None)
    owner.execute("insert into tenants (tenant_id) select 'T-' || n from generate_series(1, 25) n")
    owner.execute(
        "insert into api_keys (prefix, key_hash, scopes, tenant_id) select lpad(n::text, 8, 'k'), sha256(n::text::bytea), "
        "'{read}', 'T-' || 1 + n % 25 from generate_series(1, 10000) n"
    )

    async def pages(path, kind, name, limit):
        found, after = [], {}
        while True:
            answer = (await client.get(path, params={"limit": limit, **after})).json()
            assert len(answer[kind]) <= limit
            found += [each[name] for each in answer[kind]]
            if answer["next"] is None:
                return found
            after = {"after": answer["next"]}

    async with served(settings) as client:
        client.headers.update(admin)
        assert len((await client.get("/admin/keys")).json()["keys"]) == 100
        prefixes = await pages("/admin/keys", "keys", "prefix", 1000)
        assert (len(prefixes), prefixes) == (10_001, sorted(set(prefixes)))
        names = await pages("/admin/tenants", "tenants", "tenant_id", 10)
        assert names == sorted(f"T-{n}" for n in range(1, 26))
        for path in ("/admin/keys", "/admin/tenants"):
            for wrong, words in (
                ({"limit": 0}, "limit: is 0; allowed: 1 to 1,000"),
                ({"limit": 1001}, "limit: is 1001; allowed: 1 to 1,000"),
                ({"after": "\0"}, "after: has a NUL"),
                ({"tenant_id": "T-1"}, "tenant_id: there is no such parameter"),
            ):
                assert words in assert_problem(await client.get(path, params=wrong), 400)["detail"]
        client.headers.update(make(owner, "admin", tenant="T-7"))
        assert len(await pages("/admin/keys", "keys", "prefix", 150)) == 401
        assert await pages("/admin/tenants", "tenants", "tenant_id", 1) == ["T-7"]


async def test_an_admin_key_of_no_tenant_reads_no_text(settings, owner):
    admin, key = make(owner, "admin", tenant=None), make(owner, "write")
    async with served(settings) as client:
        await client.put("/documents/a", json={"content": "MARKED text"}, headers=key)
        for method, path in (
            ("GET", "/documents"),
            ("GET", "/documents/a"),
            ("GET", "/status"),
            ("DELETE", "/documents/a"),
        ):
            assert_problem(await client.request(method, path, headers=admin, params={"tenant_id": "acme"}), 403)
        for path in ("/search", "/rag", "/search/batch"):
            assert_problem(await client.post(path, headers=admin, json={"tenant_id": "acme", "query": "x"}), 403)
        for path in ("/admin/tenants", "/admin/keys"):
            assert "MARKED" not in (await client.get(path, headers=admin)).text


async def test_an_admin_key_of_a_tenant_is_confined_to_it(settings, owner):
    soon = datetime.now(UTC) + timedelta(hours=1)
    mine = make(owner, "admin", expires_at=soon, requests_per_minute=500, concurrent_streams=2)
    theirs = make(owner, "read", tenant="umbra")
    async with served(settings) as client:
        client.headers.update(mine)
        assert [each["tenant_id"] for each in (await client.get("/admin/tenants")).json()["tenants"]] == ["acme"]
        assert {each["tenant_id"] for each in (await client.get("/admin/keys")).json()["keys"]} == {"acme"}
        for given in ({"tenant_id": "umbra", "scopes": ["read"]}, {"tenant_id": "nowhere", "scopes": ["read"]}):
            assert_problem(await client.post("/admin/keys", json=given), 403)
        made = (await client.post("/admin/keys", json={"scopes": ["admin"], "requests_per_minute": 10**6})).json()
        # Without a tenant named it is its own, and with no more than it has itself.
        assert (made["tenant_id"], made["requests_per_minute"], made["concurrent_streams"]) == ("acme", 500, 2)
        assert datetime.fromisoformat(made["expires_at"]) == soon
        for path in (f"/admin/keys/{prefix(theirs)}", "/admin/keys/aaaaaaaa", "/admin/keys/%00", "/admin/keys/x%2Fy"):
            refused = await client.delete(path)
            assert refused.status_code in {400, 404}, path
        answers = [(await client.delete(f"/admin/keys/{each}")).json() for each in (prefix(theirs), "aaaaaaaa")]
        assert answers[0]["detail"].replace(prefix(theirs), "aaaaaaaa") == answers[1]["detail"]
        for path, given in (
            ("/admin/tenants", {"json": {"tenant_id": "novel"}}),
            ("/admin/tenants", {"json": {"max_rows": None}}),
        ):
            assert_problem(await client.post(path, **given), 403)
        for name in ("acme", "umbra", "nowhere"):
            assert_problem(await client.delete(f"/admin/tenants/{name}"), 403)
        assert_problem(await client.delete("/tenants/umbra"), 403)
    assert owner.execute("select count(*) from api_keys where revoked_at is not null").fetchone() == (0,)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"tenant_id": "acme", "scopes": []}, 400, "one or more of read, write, admin"),
        ({"tenant_id": "acme", "scopes": ["read", "read"]}, 400, "names one twice"),
        ({"tenant_id": "acme", "scopes": ["all"]}, 400, "'admin', 'read', 'write'"),
        ({"scopes": ["read"]}, 400, "tenant_id: is missing"),
        ({"scopes": ["admin", "read"]}, 400, "tenant_id: is missing"),
        ({"tenant_id": "a b", "scopes": ["read"]}, 400, "1 to 128 letters"),
        ({"tenant_id": "nowhere", "scopes": ["read"]}, 404, "there is no tenant 'nowhere'"),
        ({"tenant_id": "acme", "scopes": ["read"], "name": ""}, 400, "name: is empty"),
        ({"tenant_id": "acme", "scopes": ["read"], "name": "x\0"}, 400, "NUL"),
        ({"tenant_id": "acme", "scopes": ["read"], "name": "x" * 201}, 413, "200 bytes"),
        ({"tenant_id": "acme", "scopes": ["read"], "expires_at": "2020-01-01T00:00:00Z"}, 400, "expires_at"),
        ({"tenant_id": "acme", "scopes": ["read"], "expires_at": "2150-01-01T00:00:00"}, 400, "time zone"),
        (
            {"tenant_id": "acme", "scopes": ["read"], "requests_per_minute": 0},
            400,
            "requests_per_minute: is 0; allowed: 1 to",
        ),
        ({"tenant_id": "acme", "scopes": ["read"], "concurrent_streams": -1}, 400, "concurrent_streams"),
        ({"tenant_id": "acme", "scopes": ["read"], "requests_per_minute": 10**20}, 400, "requests_per_minute"),
    ],
)
async def test_a_key_that_cannot_be_made_is_refused_by_field(settings, owner, body, status, words):
    admin = make(owner, "admin", tenant=None)
    make(owner, "read")
    async with served(settings) as client:
        problem = assert_problem(await client.post("/admin/keys", json=body, headers=admin), status)
        assert words in problem["detail"]
    assert owner.execute("select count(*) from api_keys").fetchone() == (2,)


async def test_two_servers_share_the_requests_of_a_key(settings, owner):
    async def check():
        key = make(owner, "read", requests_per_minute=40)
        async with served(settings) as one, served(settings) as two:
            answers = await asyncio.gather(
                *(client.get("/status", headers=key) for client in (one, two) for _ in range(40))
            )
        passed = [each for each in answers if each.status_code == 200]
        refused = [each for each in answers if each.status_code == 429]
        assert (len(passed), len(refused)) == (40, 40)
        assert all(1 <= int(each.headers["retry-after"]) <= 60 for each in refused)
        assert_problem(refused[0], 429)

    await within_one("minute", owner, check)


async def test_answers_say_what_the_limit_of_a_key_is_and_when_it_is_reached(settings, owner):
    async def check():
        limited, free = make(owner, "read", requests_per_minute=4, concurrent_streams=0), make(owner, "read")
        async with served(settings) as client:
            asked = [
                await client.get("/status", headers=limited),
                await client.get("/documents/none", headers=limited),
                await client.delete("/documents/none", headers=limited),
                await client.post("/rag", json={"question": "text?", "stream": True}, headers=limited),
                await client.get("/status", headers=limited),
            ]
            assert [each.status_code for each in asked] == [200, 404, 403, 429, 429]
            assert {each.headers["ratelimit-policy"] for each in asked} == {'"requests";q=4;w=60'}
            # The fourth is another limit, of which the field has nothing to say.
            assert [each.headers.get("ratelimit") for each in asked[:4]] == [None] * 4
            assert asked[4].headers["ratelimit"] == f'"requests";r=0;t={asked[4].headers["retry-after"]}'
            for other in (await client.get("/status", headers=free), await client.get("/status")):
                assert not {"ratelimit", "ratelimit-policy"} & set(other.headers)

    await within_one("minute", owner, check)


async def test_rows_of_a_tenant_have_an_end(settings, owner):
    key = make(owner, "read", "write")
    owner.execute("update tenants set max_rows = 2")
    async with served(settings, key_cache=0.0) as client:
        client.headers.update(key)
        for name in ("a", "b"):
            assert (await client.put(f"/documents/{name}", json={"content": f"text {name}"})).status_code == 201
        refused = await client.put("/documents/c", json={"content": "text c"})
        assert (assert_problem(refused, 429)["detail"][:8], refused.headers["retry-after"]) == ("2 chunks", "3600")
        lines = b'{"id": "d", "content": "text d"}\n'
        stream = {"Content-Type": "application/x-ndjson"}
        assert_problem(await client.post("/documents/stream", content=lines, headers=stream), 429)
        assert (await client.post("/search", json={"query": "text"})).json()["count"] == 2
        await client.delete("/documents/a")
        assert (
            await client.put("/documents/c", json={"content": "text c"}, params={"wait": "false"})
        ).status_code == 202
        assert_problem(await client.put("/documents/d", json={"content": "text d"}, params={"wait": "false"}), 429)


async def test_a_stream_ends_where_the_rows_do(settings, owner):
    key = make(owner, "write")
    owner.execute("update tenants set max_rows = 2")
    async with served(settings) as client:

        async def body():
            for number in range(6):
                yield f'{{"id": "{number}", "content": "text {number}"}}\n'.encode()
                async with asyncio.timeout(PATIENCE):
                    while owner.execute("select count(*) from sources").fetchone()[0] < min(number + 1, 2):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)

        headers = key | {"Content-Type": "application/x-ndjson"}
        answer = await client.post("/documents/stream", content=body(), headers=headers)
        last = answer.text.splitlines()[-1]
        assert '"done":false' in last
        assert "2 chunks are what this tenant may have" in last
    assert owner.execute("select count(*) from sources").fetchone() == (2,)


async def test_tokens_of_a_tenant_end_for_puts_and_answers_alike(settings, owner, openai):
    key = make(owner, "read", "write")
    owner.execute("update tenants set tokens_per_day = 40")
    async with served(settings) as client:
        client.headers.update(key)
        assert (await client.put("/documents/a", json={"content": "words " * 60})).status_code == 201
        refused = await client.put("/documents/b", json={"content": "text"})
        assert "40 tokens a day" in assert_problem(refused, 429)["detail"]
        assert 1 <= int(refused.headers["retry-after"]) <= 86_400
        assert_problem(await client.post("/rag", json={"question": "words?"}), 429)
        assert (await client.post("/search", json={"query": "words"})).status_code == 200
        assert (await client.get("/documents/b")).status_code == 404


async def test_streams_of_a_key_are_counted_until_they_end(settings, owner):
    key = make(owner, "read", "write", concurrent_streams=1)
    headers = key | {"Content-Type": "application/x-ndjson"}
    go_on, begun = asyncio.Event(), asyncio.Event()

    async def body():
        yield b'{"id": "a", "content": "text"}\n'
        begun.set()
        await go_on.wait()

    async with served(settings) as one, served(settings) as two:
        first = asyncio.create_task(one.post("/documents/stream", content=body(), headers=headers))
        await begun.wait()
        async with asyncio.timeout(PATIENCE):
            while owner.execute("select count(*) from key_streams").fetchone() == (0,):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for client in (one, two):
            refused = await client.post("/rag", json={"question": "text?", "stream": True}, headers=key)
            assert "1 streams at once" in assert_problem(refused, 429)["detail"]
            assert (await client.post("/rag", json={"question": "text?"}, headers=key)).status_code == 200
        go_on.set()
        assert (await first).status_code == 200
        async with asyncio.timeout(PATIENCE):
            while owner.execute("select count(*) from key_streams").fetchone() != (0,):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        answer = await two.post("/rag", json={"question": "text?", "stream": True}, headers=key)
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_a_key_in_a_log_record_is_blotted_out(settings, owner, capsys):
    token = keys.mint().token
    telemetry.set_up(settings)
    logging.getLogger("app").warning("refused %s", token)
    logged = capsys.readouterr().err
    assert token[:12] in logged
    assert token[13:] not in logged
