"""The two worlds, made once for a module and cloned for each test."""

import contextlib
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import Cluster, cloned
from tests.isolation import worlds
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
