"""Cached vectors know the document that had their text, so that its deletion takes them along.

Adding a column without a default is a change of the catalogue only; the index is made without keeping writers out. The
previous release works on this schema: what it replaces leaves no name, and such vectors go with their tenant or by age.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COMMENTS = {
    "column embedding_cache.left_by": "Id of the document that had this text last and has it no more; its deletion takes the vector along.",
    "index embedding_cache_left_by_idx": "What former versions of a document left.",
}


def upgrade() -> None:
    op.execute('alter table embedding_cache add column if not exists left_by text collate "C"')
    with op.get_context().autocommit_block():
        # Concurrent work waits for long transactions without anyone waiting for it.
        op.execute("set lock_timeout = '1h'")
        op.execute("set statement_timeout = 0")
        op.execute("""do $$ begin
    if exists (select from pg_index where indexrelid = to_regclass('embedding_cache_left_by_idx') and not indisvalid) then
        set local lock_timeout = '4s';  -- unlike what is concurrent, this makes others wait behind it
        execute 'drop index embedding_cache_left_by_idx';
    end if;
end $$""")
        op.execute(
            "create index concurrently if not exists embedding_cache_left_by_idx on embedding_cache (tenant_id, left_by) "
            "where left_by is not null"
        )
        op.execute("set lock_timeout = '4s'")
        op.execute("set statement_timeout = '60s'")
    for thing, comment in COMMENTS.items():
        op.execute("comment on {} is '{}'".format(thing, comment.replace("'", "''")))


def downgrade() -> None:
    op.execute("alter table embedding_cache drop column left_by")
