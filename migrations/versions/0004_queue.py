"""Documents that wait for their vectors: who works on one, when it became searchable, and indexes that find what waits.

Locks: `sources` and its view, for two columns without a value, a constraint and views, for a moment; the constraint is then checked against what
is stored, and indexes over the rows that are not ready are built and dropped, beside readers and writers. The previous release works on this
schema; it leaves the new columns as they are.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SOURCES = (
    "tenant_id, id, title, content, content_sha256, doc_type, metadata, created_at, updated_at, version, chunk_keys, "
    "start_offsets, state, attempts, not_before, error, chunker, embedding_origin, embedding_model"
)
VIEW = "create {} view tenant_sources as select {} from sources where tenant_id = current_setting('pgrecall.tenant_id', true)"

# The view before the table it reads, as its readers lock them: the other way round the two would wait for each other.
COLUMNS = f"""
lock table tenant_sources in access exclusive mode;
alter table sources add column if not exists claimed_by text, add column if not exists ready_at timestamptz;
alter table sources drop constraint if exists sources_moments_check;
alter table sources add constraint sources_moments_check check (
    created_at >= '0002-01-01T00:00:00Z' and created_at < '9999-01-01T00:00:00Z'
    and updated_at >= '0002-01-01T00:00:00Z' and updated_at < '9999-01-01T00:00:00Z') not valid;
{VIEW.format("or replace", SOURCES + ", claimed_by, ready_at")};
create or replace view ingest_status with (security_invoker = true) as
    select tenant_id, count(*) as documents, coalesce(sum(cardinality(chunk_keys)), 0)::bigint as chunks,
           count(*) filter (where state = 'pending') as pending, count(*) filter (where state = 'failed') as failed,
           min(updated_at) filter (where state = 'pending') as oldest_pending_at,
           count(*) filter (where ready_at > now() - interval '1 minute') as ready_last_minute,
           count(*) filter (where ready_at > now() - interval '1 hour') as ready_last_hour,
           max(updated_at) as updated_at
      from sources group by tenant_id;
"""

# Reads the table beside its writers. What is stored already may break the rule: then it binds new rows only.
VALIDATE = """do $$ begin
    alter table sources validate constraint sources_moments_check;
exception when check_violation then
    raise warning 'sources holds documents whose created_at or updated_at is outside of the years 2 to 9998'
        using hint = 'Correct them, then: ALTER TABLE sources VALIDATE CONSTRAINT sources_moments_check';
end $$"""

# The worker finds what waits and in whose name to work; texts it reads and rows it writes as pgrecall_app.
SEEN = "tenant_id, id, state, version, attempts, not_before, error, claimed_by, ready_at, chunk_keys, created_at, updated_at"
RIGHTS = f"""
drop policy if exists worker_sources_update on sources;
revoke select, update on sources from pgrecall_worker;
grant select ({SEEN}) on sources to pgrecall_worker;
grant select on ingest_status to pgrecall_app, pgrecall_worker, pgrecall_analyst, pgrecall_backup;
"""

CONTENT = "The whole text. Once the document is ready, every chunk is an exact part of it."
NOT_BEFORE = "Not to be worked on before this moment: the next try, or the end of a worker's claim. Null for at once."
CLAIMED_BY = "The worker that has the document in hand until not_before; null for none."
READY_AT = "When the stored text became searchable; null until then, and where an older release stored it."
COMMENTS = {
    "column sources.content": CONTENT,
    "column tenant_sources.content": CONTENT,
    "column sources.not_before": NOT_BEFORE,
    "column tenant_sources.not_before": NOT_BEFORE,
    "column sources.claimed_by": CLAIMED_BY,
    "column tenant_sources.claimed_by": CLAIMED_BY,
    "column sources.ready_at": READY_AT,
    "column tenant_sources.ready_at": READY_AT,
    "view document_chunks": "Every chunk with its place in its document: chunk_index from 0, start_offset in characters from 0. "
    "While a document is pending, its chunks and places are those of the text before.",
    "column document_chunks.start_offset": "Where the chunk starts in sources.content, in characters from 0; of a document "
    "that is not ready, in the text before.",
    "view ingest_status": "How much each tenant has and how much of it waits. Reads every document of the tenants asked for.",
    "column ingest_status.tenant_id": "Whose documents.",
    "column ingest_status.documents": "How many documents, whatever their state.",
    "column ingest_status.chunks": "How many chunks can be searched.",
    "column ingest_status.pending": "Documents whose text waits for its vectors.",
    "column ingest_status.failed": "Documents that were given up; sources.error says why.",
    "column ingest_status.oldest_pending_at": "When the document that waits longest was put; null where none waits.",
    "column ingest_status.ready_last_minute": "Documents that became searchable in the last minute.",
    "column ingest_status.ready_last_hour": "Documents that became searchable in the last hour.",
    "column ingest_status.updated_at": "When a document of the tenant last changed.",
}
BEFORE = {
    "column sources.content": "The whole text. Every chunk is an exact part of it.",
    "column sources.not_before": "Not to be tried again before this moment; null for at once.",
    "view document_chunks": "Every chunk with its place in its document: chunk_index from 0, start_offset in characters from 0.",
    "column document_chunks.start_offset": "Where the chunk starts in sources.content, in characters from 0.",
}

PENDING = (
    "sources_pending_idx",
    "(tenant_id, coalesce(not_before, '-infinity'::timestamptz)) where state = 'pending'",
    "What waits, by tenant and when it is due; holds nothing else.",
)
BY_STATE = (
    "sources_state_idx",
    "(tenant_id, state, id) where state <> 'ready'",
    "Lists what is pending or failed by id; holds nothing else.",
)
NOT_READY = (
    "sources_not_ready_idx",
    "(tenant_id, state, not_before) where state <> 'ready'",
    "Finds what is pending or failed; holds nothing else.",
)


def _execute(statement: str) -> None:
    op.execute(statement.strip().replace(":", r"\:"))


def _run(statements: str) -> None:
    for statement in statements.split(";\n"):
        if statement.strip():
            _execute(statement)


def _comment(comments: dict[str, str]) -> None:
    for thing, comment in comments.items():
        text = comment.replace("'", "''")
        _execute(f"comment on {thing} is '{text}'")


def _swap(build: list[tuple[str, str, str]], drop: list[str], *also: str) -> None:
    with op.get_context().autocommit_block():
        # Concurrent work waits for long transactions without anyone waiting for it.
        _execute("set lock_timeout = '1h'")
        _execute("set statement_timeout = 0")
        for name, definition, comment in build:
            _execute(f"""do $$ begin
    if exists (select from pg_index where indexrelid = to_regclass('{name}') and not indisvalid) then
        set local lock_timeout = '4s';  -- unlike what is concurrent, this makes others wait behind it
        execute 'drop index {name}';
    end if;
end $$""")
            _execute(f"create index concurrently if not exists {name} on sources {definition}")
            _comment({f"index {name}": comment})
        for statement in also:
            _execute(statement)
        for name in drop:
            _execute(f"drop index concurrently if exists {name}")
        _execute("set lock_timeout = '4s'")
        _execute("set statement_timeout = '60s'")


def upgrade() -> None:
    _run(COLUMNS)
    _comment(COMMENTS)
    _run(RIGHTS)
    _swap([PENDING, BY_STATE], ["sources_not_ready_idx"], VALIDATE)


def downgrade() -> None:
    _swap([NOT_READY], ["sources_pending_idx", "sources_state_idx"])
    _run(f"""
drop view if exists ingest_status;
drop view if exists tenant_sources;
{VIEW.format("", SOURCES)};
grant select on tenant_sources to pgrecall_app, pgrecall_backup;
comment on view tenant_sources is 'The sources of the tenant named by the setting pgrecall.tenant_id; none while it is unset.';
alter table sources drop constraint if exists sources_moments_check;
revoke select on sources from pgrecall_worker;
alter table sources drop column if exists claimed_by, drop column if exists ready_at;
grant select, update on sources to pgrecall_worker;
drop policy if exists worker_sources_update on sources;
create policy worker_sources_update on sources for update to pgrecall_worker using (true) with check (true);
""")
    _comment(BEFORE)
    # The view was made anew, and its columns' comments with it: they are those of the table. No percent sign in here:
    # offline mode would print it twice.
    _execute("""do $$ declare named record; begin
    for named in select v.attname, col_description(s.attrelid, s.attnum) as says
                   from pg_attribute v join pg_attribute s on s.attname = v.attname and s.attrelid = 'sources'::regclass
                  where v.attrelid = 'tenant_sources'::regclass and v.attnum > 0 and not v.attisdropped loop
        execute 'comment on column tenant_sources.' || quote_ident(named.attname) || ' is ' || quote_nullable(named.says);
    end loop;
end $$""")
