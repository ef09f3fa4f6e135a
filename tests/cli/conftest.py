"""An embedded database of its own for each module, and commands run in process."""

import os
from unittest import mock

import pytest

from app.__main__ import main
from tests.conftest import started_copy


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, ready_data):
    """An embedded database that stays up for the module, as beside a running server."""
    with started_copy(ready_data, tmp_path_factory.mktemp("data") / "pg") as path:
        yield path


@pytest.fixture
def run(data_dir, monkeypatch, capsys):
    """Run a command; its exit status, standard output and standard error."""
    monkeypatch.setenv("PGRECALL_DATA_DIR", str(data_dir))

    def _run(*arguments):
        status = main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    with mock.patch.dict(os.environ):  # `serve` hands its settings to other processes that way
        yield _run
