"""The two worlds, made once for a module and cloned for each test."""

import contextlib
import json
from collections.abc import Iterator

import psycopg
import pytest

from app.__main__ import main
from tests.conftest import Cluster, cloned
from tests.isolation import worlds
from tests.isolation.routes import IDS, QUESTION
from tests.openai_server import OpenAIServer


@pytest.fixture(scope="session")
def answering() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


@pytest.fixture(scope="session")
def templates(cluster: Cluster, template: str, answering: OpenAIServer) -> Iterator[tuple[str, str]]:
    """The name of a database with umbral in it, and of one without, which are alike but for that."""
    with contextlib.ExitStack() as stack:
        alone = stack.enter_context(cloned(cluster, template))
        worlds.fill(cluster, alone, answering.url, "acme")
        both = stack.enter_context(cloned(cluster, alone))
        worlds.fill(cluster, both, answering.url, "umbral")
        with psycopg.connect(cluster.url(both)) as admin:
            buckets = "select count(distinct hashtextextended(tenant_id, 0) & 15) from documents"
            assert admin.execute(buckets).fetchone() == (1,)
        yield both, alone


@pytest.fixture
def pair(cluster: Cluster, templates: tuple[str, str], answering: OpenAIServer):
    with worlds.pair(cluster, templates, answering.url) as made:
        yield made


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, answering):
    """Run a command on a world; its exit status, standard output and standard error."""
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"id": each, "content": f"Of {each}."}) + "\n" for each in IDS)
    )
    judged = {"query": QUESTION, "expected_doc_ids": ["theirs", "mine", "nobody"]}
    (tmp_path / "judged.jsonl").write_text(json.dumps(judged) + "\n")
    places = {"FILE": str(tmp_path / "own.jsonl"), "JUDGED": str(tmp_path / "judged.jsonl")}

    def _run(world, command: str, arguments: tuple[str, ...]) -> tuple[object, ...]:
        environment = {
            "DATABASE_URL": world.cluster.service(world.name),
            "PGRECALL_MIGRATION_URL": world.owner,
            "OPENAI_API_KEY": "sk-test",
            "OPENAI_BASE_URL": answering.url,
            "PGRECALL_EMBEDDING_MODEL": "text-embedding-3-small",
            "PGRECALL_EMBEDDING_DIMENSIONS": "64",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        try:
            status = main([*command.split(), *(places.get(each, each) for each in arguments)])
        except SystemExit as ended:
            status = ended.code
        given = capsys.readouterr()
        said = [worlds.VOLATILE.sub("*", each.replace(world.name, "DATABASE")) for each in (given.out, given.err)]
        return (status, *said)

    return _run
