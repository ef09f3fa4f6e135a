"""An embedded database of its own for each module, and commands run in process."""

import contextlib
import os
from unittest import mock

import pytest

from app import embedded
from app.__main__ import main


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """An embedded database that stays up for the module, as beside a running server."""
    path = tmp_path_factory.mktemp("data") / "pg"
    with contextlib.closing(embedded.start(path, durable=False)):
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
