"""What a migration's statements are called in the log."""

import pytest

from app.progress import kind


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("create table if not exists a (b text)", "create table"),
        ("CREATE OR REPLACE VIEW a AS SELECT 1", "create view"),
        ("create unique index concurrently if not exists a on b (c)", "create index concurrently"),
        ("-- Only where it is:\ncreate index concurrently if not exists a on b (c)", "create index concurrently"),
        ("drop index concurrently if exists a", "drop index concurrently"),
        ("\n  alter table a add column b text", "alter table"),
        ("comment on table create_table is 'x'", "comment"),
        ("do $$ begin end $$", "do"),
        ("call fill_terms()", "call"),
        ("grant select on a to b", "grant"),
        ("UPDATE pgrecall_revision SET version_num='0002'", "update"),
        ("set lock_timeout = '4s'", None),
        ("select pg_advisory_unlock(1)", None),
        ("", None),
    ],
)
def test_the_kind_of_a_statement(statement, expected):
    assert kind(statement) == expected
