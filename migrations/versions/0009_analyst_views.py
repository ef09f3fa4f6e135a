"""Views for analysts: documents whole, figures by tenant, the state of the indexes, how far a change of the model is.

Only new views and one function: no lock that anyone waits for, and the previous release does not know them. Each reads with
the rights of who reads it, so that row-level security decides what is counted.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# In PL/pgSQL, because the table comes and goes.
FUNCTION = """
create or replace function other_model_chunks() returns bigint language plpgsql stable as $function$
declare
    counted bigint;
begin
    if to_regclass('pgrecall_run_documents') is not null then
        execute 'select count(*) from pgrecall_run_documents' into counted;
    end if;
    return counted;
end $function$
"""
PATH = """do $$ begin
    execute 'alter function other_model_chunks() set search_path = ' || quote_ident(current_schema) || ', pg_temp';
end $$"""

VIEWS = """
create or replace view whole_documents with (security_invoker = true) as
    select s.tenant_id, s.id, s.title, s.content, s.doc_type, s.metadata, s.created_at, s.updated_at, s.version, s.state,
           s.error, cardinality(s.chunk_keys) as chunks, s.embedding_origin,
           (select avg(d.embedding) from documents d where d.tenant_id = s.tenant_id and d.id = s.id) as embedding
      from sources s;
create or replace view statistics_by_tenant with (security_invoker = true) as
    select g.tenant_id, g.documents, g.chunks, g.pending, g.failed, g.first_created_at, g.last_created_at, g.updated_at,
           (select coalesce(sum(c.length), 0)::bigint from collection_statistics c where c.tenant_id = g.tenant_id) as words,
           (select coalesce(sum(ceil(length(d.content) / 4.0)), 0)::bigint
              from documents d where d.tenant_id = g.tenant_id) as tokens,
           g.bytes
           + (select coalesce(sum(pg_column_size(d.content) + pg_column_size(d.metadata) + pg_column_size(d.embedding)), 0)
                from documents d where d.tenant_id = g.tenant_id)::bigint
           + (select coalesce(sum(pg_column_size(t.terms)), 0) from document_terms t where t.tenant_id = g.tenant_id)::bigint
             as bytes
      from (select s.tenant_id, count(*) as documents, coalesce(sum(cardinality(s.chunk_keys)), 0)::bigint as chunks,
                   count(*) filter (where s.state = 'pending') as pending,
                   count(*) filter (where s.state = 'failed') as failed, min(s.created_at) as first_created_at,
                   max(s.created_at) as last_created_at, max(s.updated_at) as updated_at,
                   sum(pg_column_size(s.content) + pg_column_size(s.metadata))::bigint as bytes
              from sources s group by s.tenant_id) g;
create or replace view index_health with (security_invoker = true) as
    select t.relname::text as table_name, c.relname::text as index_name, m.amname::text as method,
           x.indisvalid and x.indisready as valid, pg_relation_size(c.oid) as bytes, coalesce(i.idx_scan, 0) as scans,
           greatest(c.reltuples, 0)::bigint as entries, coalesce(s.n_live_tup, 0) as live_rows,
           coalesce(s.n_dead_tup, 0) as dead_rows, greatest(s.last_vacuum, s.last_autovacuum) as vacuumed_at,
           greatest(s.last_analyze, s.last_autoanalyze) as analyzed_at
      from pg_class t
      join pg_index x on x.indrelid = t.oid
      join pg_class c on c.oid = x.indexrelid
      join pg_am m on m.oid = c.relam
      left join pg_stat_user_indexes i on i.indexrelid = c.oid
      left join pg_stat_user_tables s on s.relid = t.oid
     where t.relnamespace = (select n.relnamespace from pg_class n where n.oid = 'sources'::regclass)
       and t.relname in ('sources', 'documents', 'document_terms', 'term_statistics', 'collection_statistics',
                         'embedding_cache', 'embedding_claims', 'pgrecall_run_documents');
create or replace view model_progress with (security_invoker = true) as
    select m.name, m.dimensions, m.state, m.provider, m.created_at, m.changed_at, c.chunks, f.filled,
           round(f.filled::numeric / nullif(c.chunks, 0), 4) as share
      from embedding_models m
     cross join (select count(*) as chunks from documents) c
     cross join lateral (
           select case m.state when 'active' then c.chunks when 'dropped' then 0
                               else least(coalesce(other_model_chunks(), 0), c.chunks) end as filled) f;
revoke all on function other_model_chunks() from public;
grant execute on function other_model_chunks() to pgrecall_analyst, pgrecall_backup;
grant select on whole_documents, statistics_by_tenant, index_health, model_progress to pgrecall_analyst, pgrecall_backup;
"""

COMMENTS = {
    "function other_model_chunks()": "How many chunks, of those the caller may see, have a vector of the model that is being filled or was searched before; null while none is kept.",
    "view whole_documents": "Every document whole, with the mean of its chunks' vectors. A column that is not selected costs nothing.",
    "column whole_documents.tenant_id": "Whose document this is.",
    "column whole_documents.id": "The document's id, unique within the tenant.",
    "column whole_documents.title": "The document's title, if it has one.",
    "column whole_documents.content": "The whole text.",
    "column whole_documents.doc_type": "A free label, such as faq or manual; null if none was given.",
    "column whole_documents.metadata": "A JSON object of the caller's own keys.",
    "column whole_documents.created_at": "When the document came into being: as given by the caller, else when first stored.",
    "column whole_documents.updated_at": "When it last changed.",
    "column whole_documents.version": "Counts the changes, from 1.",
    "column whole_documents.state": "pending: text stored, chunks not yet. ready: searchable. failed: see error.",
    "column whole_documents.error": "Why the last attempt failed.",
    "column whole_documents.chunks": "How many chunks it is cut into.",
    "column whole_documents.embedding_origin": "pgrecall: embedded here. caller: the vector came with the document.",
    "column whole_documents.embedding": "The mean of its chunks' vectors; null while it has none.",
    "view statistics_by_tenant": "Figures of each tenant the reader may see. A column that is not selected costs nothing; tokens and bytes read every chunk.",
    "column statistics_by_tenant.tenant_id": "Whose documents.",
    "column statistics_by_tenant.documents": "How many documents, whatever their state: the rows of sources.",
    "column statistics_by_tenant.chunks": "How many chunks can be searched: the rows of documents.",
    "column statistics_by_tenant.pending": "Documents whose text waits for its vectors.",
    "column statistics_by_tenant.failed": "Documents that were given up; sources.error says why.",
    "column statistics_by_tenant.first_created_at": "created_at of the oldest document.",
    "column statistics_by_tenant.last_created_at": "created_at of the newest document.",
    "column statistics_by_tenant.updated_at": "When a document of the tenant last changed.",
    "column statistics_by_tenant.words": "Words of all chunks as full-text search counts them, without stop words.",
    "column statistics_by_tenant.tokens": "Tokens of all chunks, guessed at four characters each: what embedding them again comes to. No count is kept.",
    "column statistics_by_tenant.bytes": "Texts, metadata, vectors and words as they are stored, without indexes and what each row costs besides.",
    "view index_health": "Every index of the tables that hold documents. Sizes and counts are of all tenants together.",
    "column index_health.table_name": "The table it is over.",
    "column index_health.index_name": "Its name; documents_embedding_… are the HNSW indexes, one for each bucket of tenants.",
    "column index_health.method": "hnsw, btree or gin.",
    "column index_health.valid": "Whether queries may use it. False while it is built, and after a build that failed.",
    "column index_health.bytes": "Its size.",
    "column index_health.scans": "How often it was used since the server's statistics began.",
    "column index_health.entries": "How many rows it holds, by the last vacuum or analyze.",
    "column index_health.live_rows": "Rows of the table, estimated.",
    "column index_health.dead_rows": "Rows of the table that are deleted or replaced and not yet vacuumed, estimated.",
    "column index_health.vacuumed_at": "When the table was last vacuumed; null for never.",
    "column index_health.analyzed_at": "When the planner's statistics of the table were last taken; null for never.",
    "view model_progress": "The embedding models and how far a change from one to another is, of the chunks the reader may see.",
    "column model_progress.name": "Name of the model.",
    "column model_progress.dimensions": "Length of each of its vectors.",
    "column model_progress.state": "active: searched. filling: being prepared beside it. retired: searched until lately and kept in step. dropped: its vectors are gone.",
    "column model_progress.provider": "local: the model inside the package. openai: a server that speaks OpenAI's protocol. Null until a change of the model records it.",
    "column model_progress.created_at": "When the model was recorded here.",
    "column model_progress.changed_at": "When its state last changed.",
    "column model_progress.chunks": "How many chunks there are.",
    "column model_progress.filled": "How many of them have a vector of this model.",
    "column model_progress.share": "filled / chunks, 0 to 1; null without chunks.",
}

DOWNGRADE = """
drop view if exists model_progress;
drop view if exists index_health;
drop view if exists statistics_by_tenant;
drop view if exists whole_documents;
drop function if exists other_model_chunks();
"""


def _run(statements: str) -> None:
    for statement in statements.split(";\n"):
        if statement.strip():
            op.execute(statement.strip().replace(":", r"\:"))


def upgrade() -> None:
    op.execute(FUNCTION.strip())  # holds semicolons at ends of lines
    op.execute(PATH)
    _run(VIEWS)
    for thing, comment in COMMENTS.items():
        _run("comment on {} is '{}'".format(thing, comment.replace("'", "''")))


def downgrade() -> None:
    _run(DOWNGRADE)
