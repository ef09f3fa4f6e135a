"""One service for the tests of a file."""

from collections.abc import Iterator

import pytest

from tests.api.conftest import app, client
from tests.conftest import Cluster
from tests.hostile.served import Served, serving

__all__ = ["app", "client"]


@pytest.fixture(scope="module")
def served(cluster: Cluster, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(cluster, template, tmp_path_factory.mktemp("served"), key_cache=0.1) as served:
        yield served
