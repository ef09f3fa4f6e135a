import asyncio
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from litestar import Litestar, get
from msgspec import structs

from app.api.request_id import RequestId
from app.settings import Settings
from app.telemetry import request_id, secrets, set_up

log = logging.getLogger("app.test")
SETTINGS = Settings(
    openai_api_key="sk-key",
    database_url="postgresql://user:p%40ss@host/db",
    database_read_url="postgresql://user@host/db",
)


@pytest.fixture(autouse=True)
def root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    yield
    root.handlers = handlers
    root.setLevel(level)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_record_is_one_line_of_fields(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(SETTINGS)
    log.info("put %d documents", 3)
    fields = last_line(capsys)
    assert fields.startswith("time=20")
    assert fields.endswith('Z level=info logger=app.test request_id=- message="put 3 documents"')


def test_nothing_a_record_says_breaks_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(SETTINGS)
    said = 'a\nlevel=error b\r\x1b[31m\u2028\x85"c"=d é'
    log.info(said)
    _, _, message = last_line(capsys).partition(" message=")
    assert message.isascii()
    assert json.loads(message) == said


def test_a_trace_stands_on_the_line_of_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(SETTINGS)
    log.error("failed", exc_info=ValueError("no\nway"))
    line = last_line(capsys)
    assert "level=error" in line
    assert "message=failed " in line
    assert json.loads(line.partition(" trace=")[2]).endswith("ValueError: no\nway")


def test_the_level_is_the_settings_and_setting_up_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(Settings(log_level="debug"))
    set_up(Settings(log_level="warning"))
    log.info("unsaid")
    log.warning("said")
    assert last_line(capsys).endswith("message=said")


@pytest.mark.parametrize(("level", "said"), [("debug", True), ("info", False)])
def test_libraries_say_at_info_what_we_say_only_when_debugging(
    capsys: pytest.CaptureFixture[str], level: str, *, said: bool
) -> None:
    set_up(Settings(log_level=level))  # type: ignore[arg-type]
    logging.getLogger("httpx").info("HTTP Request")
    assert ("HTTP Request" in capsys.readouterr().err) is said


def test_secrets_are_blotted_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert secrets(SETTINGS) == {"sk-key", "p%40ss", "p@ss"}
    set_up(SETTINGS)
    refused = ConnectionError("password p@ss was refused")
    log.error("%s with %s", SETTINGS.database_url, "sk-key", exc_info=refused)
    line = last_line(capsys)
    assert not any(secret in line for secret in secrets(SETTINGS))
    assert "postgresql://user:********@host/db with ********" in line
    assert "password ******** was refused" in line


@get("/id")
async def own_id() -> str:
    before = request_id.get()
    await asyncio.sleep(0)
    assert request_id.get() == before
    return before


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = Litestar([own_id], openapi_config=None, logging_config=None)
    app.asgi_handler = RequestId(app.asgi_handler)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("given", ["a", "x" * 128, "!~/=+-_.:@\"'"])
async def test_the_callers_id_is_kept(client: httpx.AsyncClient, given: str) -> None:
    answer = await client.get("/id", headers={"X-Request-ID": given})
    assert answer.text == given
    assert answer.headers.get_list("X-Request-ID") == [given]
    assert request_id.get() == "-"


@pytest.mark.parametrize("given", [None, b"", b"x" * 129, b"a b", b"a\tb", "é".encode()])
async def test_any_other_is_made_here(client: httpx.AsyncClient, given: bytes | None) -> None:
    headers = {} if given is None else {b"X-Request-ID": given}
    answer = await client.get("/id", headers=headers)
    assert len(answer.text) == 32
    assert int(answer.text, 16)
    assert answer.headers["X-Request-ID"] == answer.text


async def test_requests_at_once_have_ids_of_their_own(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(client.get("/id") for _ in range(20)))
    assert len({answer.text for answer in answers}) == 20
    assert all(answer.headers["X-Request-ID"] == answer.text for answer in answers)


async def test_a_route_that_does_not_exist_answers_with_the_id(client: httpx.AsyncClient) -> None:
    answer = await client.get("/nowhere", headers={"X-Request-ID": "mine"})
    assert answer.status_code == 404
    assert answer.headers["X-Request-ID"] == "mine"


async def test_lines_of_a_request_carry_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    @get("/")
    async def talk() -> None:
        log.info("talking")

    app = Litestar([talk], openapi_config=None, logging_config=None)
    app.asgi_handler = RequestId(app.asgi_handler)
    set_up(SETTINGS)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get("/", headers={"X-Request-ID": "mine"})
    assert " request_id=mine message=talking" in last_line(capsys)


def test_what_a_record_says_besides_stands_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(SETTINGS)
    facts = {"revision": "0002", "seconds": 1.5, "statements": {"create table": 3, "comment": 9}, "error": "no p@ss"}
    log.info("migrated", extra={"facts": facts})
    expected = 'message=migrated revision=0002 seconds=1.5 statements="create table 3, comment 9" error="no ********"'
    assert last_line(capsys).endswith(expected)


def test_in_json_a_record_is_an_object_on_one_line_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(structs.replace(SETTINGS, log_format="json"))
    facts = {"revision": "0002", "seconds": 1.5, "statements": {"create table": 3}, "error": "no p@ss"}
    log.error('a\n"b" sk-key', extra={"facts": facts}, exc_info=ValueError("no p@ss\nway"))
    said = json.loads(last_line(capsys))
    assert said.pop("time").endswith("Z")
    assert "ValueError: no ********\nway" in said.pop("trace")
    assert said == {
        "level": "error",
        "logger": "app.test",
        "request_id": "-",
        "message": 'a\n"b" ********',
        **facts,
        "error": "no ********",
    }
