"""Settings: read once, typed, and every fault named."""

import contextlib
import re

import msgspec
import pytest

from app import settings
from app.errors import WrongSetting
from app.settings import Settings


def test_defaults_need_no_environment():
    assert settings.read({}) == Settings()
    assert (settings.read({}).model, settings.read({}).dimensions) == ("all-MiniLM-L6-v2-int8", 384)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PGRECALL_POOL_SIZE": "0"}, ["PGRECALL_POOL_SIZE", "'0'", "from 1 to 1000"]),
        ({"PGRECALL_POOL_SIZE": "many"}, ["PGRECALL_POOL_SIZE", "'many'", "whole number"]),
        ({"PGRECALL_POOL_TIMEOUT": "nan"}, ["PGRECALL_POOL_TIMEOUT", "'nan'", "above 0 to 300"]),
        ({"PGRECALL_EMBEDDER": "remote"}, ["PGRECALL_EMBEDDER", "'remote'", "auto, local, openai"]),
        ({"PGRECALL_PREPARED_STATEMENTS": "perhaps"}, ["PGRECALL_PREPARED_STATEMENTS", "true or false"]),
        ({"DATABASE_URL": "mysql://u:hidden@h/d"}, ["DATABASE_URL", "postgresql://"]),
        ({"OPENAI_BASE_URL": "localhost"}, ["OPENAI_BASE_URL", "http(s)://"]),
        ({"PGRECALL_ALLOWED_HOSTS": "a, http://b"}, ["PGRECALL_ALLOWED_HOSTS", "commas between; or *"]),
        ({"PGRECALL_POOLSIZE": "3"}, ["PGRECALL_POOLSIZE", "no such setting"]),
        ({"PGRECALL_CHUNK_OVERLAP_TOKENS": "150"}, ["PGRECALL_CHUNK_OVERLAP_TOKENS", "at most half"]),
        ({"PGRECALL_EMBEDDING_DIMENSIONS": "512"}, ["PGRECALL_EMBEDDING_DIMENSIONS", "384"]),
        (
            {"PGRECALL_EMBEDDING_DIMENSIONS": "4096", "OPENAI_API_KEY": "k"},
            ["PGRECALL_EMBEDDING_DIMENSIONS", "'4096'", "1 to 4000", "pgvector's index takes no longer vectors"],
        ),
        (
            {"OPENAI_BASE_URL": "http://h/v1", "PGRECALL_EMBEDDING_MODEL": "bge-m3"},
            ["PGRECALL_EMBEDDING_DIMENSIONS", "'bge-m3'", "is not set", "the length of this model's vectors"],
        ),
        ({"OPENAI_BASE_URL": "https://h/deployments/d?api-version=1"}, ["OPENAI_BASE_URL", "without a query"]),
        ({"PGRECALL_EMBEDDING_MODEL": "x"}, ["PGRECALL_EMBEDDING_MODEL", "OPENAI_API_KEY"]),
        ({"PGRECALL_RERANK_URL": "http://h/v1"}, ["PGRECALL_RERANK_MODEL", "is not set"]),
        ({"PGRECALL_RERANK_KEY": "hidden"}, ["PGRECALL_RERANK_URL", "is not set"]),
        ({"PGRECALL_CHUNK_MAX_TOKENS": "255"}, ["PGRECALL_CHUNK_MAX_TOKENS", "16 to 254"]),
    ],
)
def test_a_wrong_value_names_the_setting_the_fault_and_what_is_allowed(environment, words):
    with pytest.raises(WrongSetting) as fault:
        settings.read(environment)
    for word in words:
        assert word in str(fault.value)
    assert "hidden" not in str(fault.value)


@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(Settings)])
def test_every_setting_can_be_set(field):
    base = {"OPENAI_API_KEY": "k", "PGRECALL_EMBEDDING_DIMENSIONS": "8"}
    base |= {"PGRECALL_RERANK_URL": "http://r", "PGRECALL_RERANK_MODEL": "m"}
    seen = set()
    for text in (
        "postgresql://u@h/d",
        "http://h/v1",
        "openai",
        "keys",
        "debug",
        "json",
        "x",
        "7",
        "120",
        "2000",
        "0.25",
        "false",
        "true",
    ):
        with contextlib.suppress(WrongSetting):
            seen.add(getattr(settings.read(base | {settings.variable(field): text}), field))
    assert seen - {getattr(settings.read(base), field)}


def test_an_empty_value_counts_as_absent():
    assert settings.read({"DATABASE_URL": " ", "OPENAI_API_KEY": ""}) == Settings()


def test_a_key_or_a_base_url_switches_to_the_server():
    assert settings.read({"OPENAI_API_KEY": "k"}).dimensions == 1536
    assert settings.read({"OPENAI_API_KEY": "k"}).chat == "gpt-4o-mini"
    with_base = settings.read({"OPENAI_BASE_URL": "http://h/v1"})
    assert (with_base.uses_openai, with_base.chat) == (True, None)
    assert not settings.read({"OPENAI_API_KEY": "k", "PGRECALL_EMBEDDER": "local"}).uses_openai


def test_secrets_are_masked():
    assert settings.masked("openai_api_key", "sk-123") == "********"
    assert settings.masked("rerank_key", "rk-123") == "********"
    assert settings.masked("database_url", "postgresql://u:pw@h:5/d?x=1") == "postgresql://u:********@h:5/d?x=1"
    assert settings.masked("database_url", "postgresql://u@h/d") == "postgresql://u@h/d"
    assert settings.masked("database_url", "postgresql://h/d?user=u&password=pw&x=1").endswith("&password=********&x=1")
    assert settings.masked("pool_size", 3) == 3


def test_every_setting_is_documented_and_nothing_else(root):
    documented = set(re.findall(r"^\| `([A-Z_]+)` \|", (root / "docs/settings.md").read_text(), re.MULTILINE))
    assert documented == {settings.variable(field.name) for field in msgspec.structs.fields(Settings)}


def test_documented_defaults_are_the_real_ones(root):
    for name, default in re.findall(
        r"^\| `([A-Z_]+)` \| ([^|]+) \|", (root / "docs/settings.md").read_text(), re.MULTILINE
    ):
        field = next(f for f in msgspec.structs.fields(Settings) if settings.variable(f.name) == name)
        if isinstance(field.default, (int, float)):
            assert str(field.default).lower().removesuffix(".0") == default.strip("` "), name


def test_smaller_chunks_repeat_less_unless_told_otherwise():
    given = {"PGRECALL_CHUNK_MAX_TOKENS": "100"}
    assert settings.read(given).chunk_overlap_tokens == 40
    assert settings.read({"PGRECALL_CHUNK_MAX_TOKENS": "254"}).chunk_overlap_tokens == 100
    assert settings.read(given | {"PGRECALL_CHUNK_OVERLAP_TOKENS": "0"}).chunk_overlap_tokens == 0
