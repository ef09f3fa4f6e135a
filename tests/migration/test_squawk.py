"""Every statement of `alembic upgrade head --sql` before squawk, a linter for migrations of live databases."""

import io
import json
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
from alembic import command

from app import schema
from tests.conftest import settings_for

EXEMPT = {
    # Alembic's own table, of one row.
    ("0001", "prefer-text-field"): "version_num of Alembic's table; its length never changes",
    # Counts and lengths far below two thousand million by what they count, in rows of which there may be many.
    ("0001", "prefer-bigint-over-int"): "dimensions are at most 16,000, offsets at most 10 MB",
    ("0001", "prefer-bigint-over-smallint"): "attempts end at PGRECALL_WORKER_ATTEMPTS",
    ("0002", "prefer-bigint-over-int"): "words of one chunk, and chunks of one tenant with one word",
    ("0007", "prefer-bigint-over-int"): "dimensions are at most 16,000",
    # What is dropped is nothing the previous release reads, or is there again before the transaction ends.
    ("0002", "ban-drop-view"): "made again without a column two statements on, in the same transaction",
    ("0002", "ban-drop-column"): "documents.terms, which the first release fills by itself and never reads",
    ("0004", "ban-drop-constraint"): "of the same name as the one made next: for a second run",
    ("0006", "ban-drop-constraint"): "widened by the next statement, in the same transaction",
    # NOT VALID and VALIDATE spare a scan under a lock. Here the scan is over a handful of rows.
    ("0006", "constraint-missing-not-valid"): "embedding_models has a row for each model ever used",
}
"""Revision and rule -> why it may be broken there. An exemption that nothing needs fails the test."""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """A file with the SQL a DBA is given, from nothing to head."""
    config = schema.config(
        settings_for(None, "http://127.0.0.1:9/v1", migration_url="postgresql://nobody@127.0.0.1:9/x")
    )
    config.output_buffer = io.StringIO()
    command.upgrade(config, "head", sql=True)
    path = tmp_path_factory.mktemp("squawk") / "head.sql"
    path.write_text(config.output_buffer.getvalue())
    return path


def found(path):
    """What squawk says: revision and rule, and its line in full."""
    program = Path(sysconfig.get_path("scripts"), "squawk")
    done = subprocess.run(
        [program, "--pg-version", "15.0", "--reporter", "json", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    revision, at = "0001", []
    for line in path.read_text().splitlines():
        revision = match[1] if (match := re.match(r"-- Running upgrade .*-> (\d+)", line)) else revision
        at.append(revision)
    return [
        ((at[each["line"]], each["rule_name"]), f"{each['line'] + 1}: {each['message']}")
        for each in json.loads(done.stdout)
    ]


def test_squawk_finds_nothing_that_is_not_exempt_for_a_reason(printed):
    faults = found(printed)
    assert [fault for key, fault in faults if key not in EXEMPT] == []
    assert set(EXEMPT) == {key for key, _ in faults}


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        ("create index novel_idx on documents (content)", "require-concurrent-index-creation"),
        ("alter table documents alter column content type varchar(9)", "changing-column-type"),
        ("drop table sources", "ban-drop-table"),
    ],
)
def test_squawk_is_heard(printed, tmp_path, statement, rule):
    bad = tmp_path / "bad.sql"
    bad.write_text(f"{printed.read_text()}\n-- Running upgrade 0007 -> 9999\n{statement};\n")
    assert ("9999", rule) in dict(found(bad))
