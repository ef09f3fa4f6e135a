"""The first release: sources, documents, their indexes, views, roles' rights and policies.

Creates everything in an empty schema: no lock touches a table that existed before. The roles belong to the cluster and
are made by `pgrecall roles --apply`; this revision only grants to them, and the downgrade leaves them alone.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# No percent sign in here: offline mode would print it twice.
PREREQUISITES = """
do $$
declare
    name text;
    version int[];
    place name;
begin
    if current_setting('server_encoding') <> 'UTF8' then
        raise exception using
            message = 'pgrecall needs a database in UTF8, this one is in ' || current_setting('server_encoding'),
            hint = 'Make one with: CREATE DATABASE … ENCODING ''UTF8'' TEMPLATE template0';
    end if;
    foreach name in array array['vector', 'btree_gin'] loop
        continue when exists (select from pg_extension where extname = name);
        if name = 'btree_gin' and not exists (select from pg_available_extensions e where e.name = 'btree_gin') then
            raise warning using
                message = 'this server does not have the extension btree_gin: without the indexes documents_metadata_idx and '
                    'documents_terms_idx, conditions on metadata look at every row of the tenant',
                hint = 'It is in PostgreSQL''s contrib package; with it in place before the migration they are made';
            continue;
        end if;
        begin
            execute 'create extension ' || quote_ident(name);
        exception
            when insufficient_privilege then
                raise exception using
                    message = 'pgrecall needs the extension ' || name || ', which this login may not create',
                    hint = 'Ask an administrator to run in this database: CREATE EXTENSION ' || quote_ident(name);
            when undefined_file or feature_not_supported then
                raise exception using
                    message = 'pgrecall needs the extension ' || name || ', which this server does not have',
                    hint = 'Ask an administrator to install ' || case name when 'vector' then 'pgvector 0.8.0 or newer'
                        else 'PostgreSQL''s contrib package' end;
        end;
    end loop;
    select string_to_array(regexp_replace(extversion, '[^0-9.].*', ''), '.')::int[] into version
      from pg_extension where extname = 'vector';
    if version < array[0, 8, 0] then
        raise exception using
            message = 'pgrecall needs pgvector 0.8.0 or newer, this database has ' || array_to_string(version, '.'),
            hint = 'Ask an administrator to install it and to run: ALTER EXTENSION vector UPDATE';
    elsif version < array[0, 8, 6] then
        raise warning using
            message = 'pgvector ' || array_to_string(version, '.') || ' can corrupt an index under vacuum',
            hint = 'Update to 0.8.6 or newer';
    end if;
    select nspname into place from pg_extension e join pg_namespace n on n.oid = extnamespace where extname = 'vector';
    foreach name in array array['pgrecall_app', 'pgrecall_worker', 'pgrecall_analyst', 'pgrecall_backup', current_user] loop
        if not exists (select from pg_roles where rolname = name) then
            raise exception using
                message = 'the role ' || name || ' is missing',
                hint = 'Run as an administrator of the cluster: pgrecall roles --apply';
        end if;
        continue when has_schema_privilege(name, place, 'usage');
        begin
            execute 'grant usage on schema ' || quote_ident(place) || ' to ' || quote_ident(name);
        exception when insufficient_privilege then
            null;
        end;
        if not has_schema_privilege(name, place, 'usage') then
            raise exception using
                message = 'pgvector is in the schema ' || place || ', which ' || name || ' may not use',
                hint = 'Ask an administrator to run: GRANT USAGE ON SCHEMA ' || quote_ident(place) || ' TO '
                    || quote_ident(current_user) || ' WITH GRANT OPTION';
        end if;
    end loop;
end $$
"""

TABLES = """
create table embedding_models (
    name text not null,
    dimensions integer not null,
    state text not null default 'active',
    created_at timestamptz not null default now(),
    constraint embedding_models_pkey primary key (name, dimensions),
    constraint embedding_models_state_check check (state in ('active', 'filling', 'retired'))
);
create unique index embedding_models_active_idx on embedding_models (state) where state = 'active';

create table sources (
    tenant_id text collate "C" not null,
    id text collate "C" not null,
    title text,
    content text not null,
    content_sha256 bytea,
    doc_type text,
    metadata jsonb not null default '{}',
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    version bigint not null default 1,
    chunk_keys text[] not null default '{}',
    start_offsets integer[] not null default '{}',
    state text not null default 'pending',
    attempts smallint not null default 0,
    not_before timestamptz,
    error text,
    chunker text,
    embedding_origin text not null default 'pgrecall',
    embedding_model text,
    constraint sources_pkey primary key (tenant_id, id),
    constraint sources_state_check check (state in ('pending', 'ready', 'failed')),
    constraint sources_embedding_origin_check check (embedding_origin in ('pgrecall', 'caller')),
    constraint sources_tenant_id_check check (tenant_id ~ '^[A-Za-z0-9_.:-]{1,128}$'),
    constraint sources_id_check check (octet_length(id) between 1 and 512),
    constraint sources_metadata_check check (jsonb_typeof(metadata) = 'object')
);
create index sources_not_ready_idx on sources (tenant_id, state, not_before) where state <> 'ready';

-- Punctuation becomes space first: no host, URL or hyphen compounds that a plain question could not match.
create function chunk_terms(content text) returns tsvector
    language sql immutable strict parallel safe
    return to_tsvector('pg_catalog.english'::regconfig, regexp_replace(content, '[^[:alnum:]]+', ' ', 'g'));

create table documents (
    tenant_id text collate "C" not null,
    id text collate "C" not null,
    chunk_key text collate "C" not null,
    doc_type text,
    metadata jsonb not null default '{}',
    created_at timestamptz not null default now(),
    content text not null,
    embedding vector({dimensions}) not null,
    terms tsvector generated always as (chunk_terms(content)) stored,
    constraint documents_pkey primary key (tenant_id, id, chunk_key),
    constraint documents_sources_fkey foreign key (tenant_id, id) references sources (tenant_id, id) on delete cascade
);
-- Vectors stay in the row where a page can hold them: an exact scan reads each, and fetching them from TOAST is 4 to 10
-- times slower.
alter table documents alter column embedding set storage main;
create index documents_tenant_id_idx on documents (tenant_id);
create index documents_doc_type_idx on documents (tenant_id, doc_type);
create index documents_created_at_idx on documents (tenant_id, created_at);
create index documents_embedding_idx on documents using hnsw ({indexed}) with (m = 16, ef_construction = 64);

create table embedding_cache (
    tenant_id text collate "C" not null,
    model text not null,
    dimensions integer not null,
    input_type text not null,
    content_sha256 bytea not null,
    embedding vector not null,
    created_at timestamptz not null default now(),
    constraint embedding_cache_pkey primary key (tenant_id, model, dimensions, input_type, content_sha256),
    constraint embedding_cache_input_type_check check (input_type in ('document', 'query'))
);
create index embedding_cache_age_idx on embedding_cache (tenant_id, created_at);

create table analyst_tenants (
    analyst text not null,
    tenant_id text collate "C" not null,
    constraint analyst_tenants_pkey primary key (analyst, tenant_id)
);
"""

# Decided by the server, not here, so that the SQL for a DBA is the same.
CONTRIB_INDEXES = """
do $$ begin
    if exists (select from pg_extension where extname = 'btree_gin') then
        create index documents_metadata_idx on documents using gin (tenant_id, metadata jsonb_path_ops);
        comment on index documents_metadata_idx is
            'Metadata conditions of the form metadata @> ''{"key": value}'' within a tenant.';
        create index documents_terms_idx on documents using gin (tenant_id, terms);
        comment on index documents_terms_idx is 'Full-text conditions of the form terms @@ query within a tenant.';
    end if;
end $$
"""

VIEWS = """
create view tenant_sources as
    select tenant_id, id, title, content, content_sha256, doc_type, metadata, created_at, updated_at, version, chunk_keys,
           start_offsets, state, attempts, not_before, error, chunker, embedding_origin, embedding_model
      from sources where tenant_id = current_setting('pgrecall.tenant_id', true);
create view tenant_documents as
    select tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding, terms
      from documents where tenant_id = current_setting('pgrecall.tenant_id', true);
create view document_chunks with (security_invoker = true) as
    select s.tenant_id, s.id, (place.ordinal - 1)::integer as chunk_index, place.start_offset, d.chunk_key, d.doc_type,
           d.metadata, d.created_at, s.title, d.content, d.embedding
      from sources s
     cross join lateral unnest(s.chunk_keys, s.start_offsets) with ordinality as place (chunk_key, start_offset, ordinal)
      join documents d on d.tenant_id = s.tenant_id and d.id = s.id and d.chunk_key = place.chunk_key;
"""

COMMENTS = {
    "table pgrecall_revision": "Which revision of pgrecall's schema this database has.",
    "column pgrecall_revision.version_num": "The revision's number; migrations/versions/ has a file for each.",
    "index pgrecall_revision_pkc": "At most one row a revision.",
    "index embedding_models_pkey": "One row a model and length.",
    "index sources_pkey": "One row a document of a tenant; in the order of the ids, for pages.",
    "index documents_pkey": "One row a chunk of a document of a tenant.",
    "index embedding_cache_pkey": "One row a text of a tenant, model, length and kind.",
    "index analyst_tenants_pkey": "One row a login and tenant.",
    "table embedding_models": "The embedding models whose vectors this database holds. Exactly one is active.",
    "column embedding_models.name": "Name of the model, as its maker writes it.",
    "column embedding_models.dimensions": "Length of each of its vectors.",
    "column embedding_models.state": "active: searched. filling: being prepared. retired: no longer searched.",
    "column embedding_models.created_at": "When the model was recorded here.",
    "index embedding_models_active_idx": "At most one model is active.",
    "table sources": "One row per document: its whole text, its metadata and its state.",
    "column sources.tenant_id": "Whose document this is. First in every key: the same id in two tenants is two documents.",
    "column sources.id": "The document's id, chosen by the caller, unique within the tenant; 1 to 512 bytes.",
    "column sources.title": "The document's title, if it has one. Not embedded.",
    "column sources.content": "The whole text. Every chunk is an exact part of it.",
    "column sources.content_sha256": "SHA-256 of the text in UTF-8; null until the text has been chunked.",
    "column sources.doc_type": "A free label to filter by, such as faq or manual; null if none was given.",
    "column sources.metadata": "A JSON object of the caller's own keys to filter by.",
    "column sources.created_at": "When the document came into being: as given by the caller, else when first stored.",
    "column sources.updated_at": "When this row last changed.",
    "column sources.version": "Counts the changes, from 1. The API's ETag.",
    "column sources.chunk_keys": "The chunk_key of each chunk, in reading order. See the view document_chunks.",
    "column sources.start_offsets": "Where each chunk starts in content, in characters from 0, in the order of chunk_keys.",
    "column sources.state": "pending: text stored, chunks not yet. ready: searchable. failed: see error.",
    "column sources.attempts": "How often embedding this version was tried without success.",
    "column sources.not_before": "Not to be tried again before this moment; null for at once.",
    "column sources.error": "Why the last attempt failed.",
    "column sources.chunker": "How the text was cut: name of the rules, most tokens, overlap.",
    "column sources.embedding_origin": "pgrecall: embedded here. caller: the vector came with the document, which is one chunk.",
    "column sources.embedding_model": "Name of the model whose space the vectors of this document belong to.",
    "index sources_not_ready_idx": "Finds what is pending or failed; holds nothing else.",
    "table documents": "One row per embedded chunk, always complete: text and vector. A short document has one row.",
    "column documents.tenant_id": "Whose chunk this is.",
    "column documents.id": "The document it belongs to: sources.id.",
    "column documents.chunk_key": "Names the chunk within its document by a hash of its text, so that a chunk that did not change keeps its row when others do.",
    "column documents.doc_type": "As in sources; repeated so that a filter needs no join.",
    "column documents.metadata": "As in sources; repeated so that a filter needs no join.",
    "column documents.created_at": "As in sources; repeated so that a filter needs no join.",
    "column documents.content": "The chunk's text.",
    "column documents.embedding": "Its vector. Cosine similarity of two is 1 - (a <=> b), in [-1, 1].",
    "column documents.terms": "Its words for full-text search: chunk_terms(content), kept by PostgreSQL.",
    "index documents_tenant_id_idx": "All chunks of one tenant: exact search of small tenants, and counting up to a bound.",
    "index documents_doc_type_idx": "Chunks of one type within a tenant.",
    "index documents_created_at_idx": "Chunks of a period within a tenant.",
    "index documents_embedding_idx": "HNSW over cosine distance: nearest chunks of all tenants, filtered while it is walked.",
    "function chunk_terms(text)": "The words of a text as full-text search sees them: punctuation dropped, English stemming.",
    "table embedding_cache": "Vectors already computed, so that the same text is not paid for twice. May be emptied at any time.",
    "column embedding_cache.tenant_id": "Whose text it was; never shared between tenants.",
    "column embedding_cache.model": "Name of the model.",
    "column embedding_cache.dimensions": "Length of the vector.",
    "column embedding_cache.input_type": "document or query: some models embed them differently.",
    "column embedding_cache.content_sha256": "SHA-256 of the text in UTF-8.",
    "column embedding_cache.embedding": "The vector.",
    "column embedding_cache.created_at": "When it was computed; the oldest go first.",
    "index embedding_cache_age_idx": "The oldest entries of a tenant.",
    "table analyst_tenants": "Which tenants' rows a login with the role pgrecall_analyst may read. Filled by the owner.",
    "column analyst_tenants.analyst": "Name of the login.",
    "column analyst_tenants.tenant_id": "A tenant it may read, or * for all.",
    "view tenant_sources": "The sources of the tenant named by the setting pgrecall.tenant_id; none while it is unset.",
    "view tenant_documents": "The documents of the tenant named by the setting pgrecall.tenant_id; none while it is unset.",
    "view document_chunks": "Every chunk with its place in its document: chunk_index from 0, start_offset in characters from 0.",
}
for _view, _table, _columns in (
    ("tenant_sources", "sources", [k.split(".")[1] for k in COMMENTS if k.startswith("column sources.")]),
    ("tenant_documents", "documents", [k.split(".")[1] for k in COMMENTS if k.startswith("column documents.")]),
):
    COMMENTS |= {f"column {_view}.{c}": COMMENTS[f"column {_table}.{c}"] for c in _columns}
COMMENTS |= {
    "column document_chunks.chunk_index": "The chunk's position in its document, from 0.",
    "column document_chunks.start_offset": "Where the chunk starts in sources.content, in characters from 0.",
    "column document_chunks.title": COMMENTS["column sources.title"],
} | {
    f"column document_chunks.{c}": COMMENTS[f"column documents.{c}"]
    for c in ("tenant_id", "id", "chunk_key", "doc_type", "metadata", "created_at", "content", "embedding")
}

# The service reads through the views, whose filter lets every index be used, and writes on the tables under these
# policies: under a policy PostgreSQL only uses leakproof operators as index conditions, which keys are and @> is not.
TENANT = "tenant_id = current_setting('pgrecall.tenant_id', true)"
ANALYST = (
    "(select exists (select from analyst_tenants where analyst = session_user and tenant_id = '*'))"
    " or tenant_id in (select tenant_id from analyst_tenants where analyst = session_user)"
)
RIGHTS = f"""
alter table sources enable row level security;
alter table documents enable row level security;
alter table embedding_cache enable row level security;
alter table analyst_tenants enable row level security;
create policy app_sources on sources to pgrecall_app using ({TENANT}) with check ({TENANT});
create policy app_documents on documents to pgrecall_app using ({TENANT}) with check ({TENANT});
create policy app_embedding_cache on embedding_cache to pgrecall_app using ({TENANT}) with check ({TENANT});
create policy worker_sources_select on sources for select to pgrecall_worker using (true);
create policy worker_sources_update on sources for update to pgrecall_worker using (true) with check (true);
create policy analyst_sources on sources for select to pgrecall_analyst using ({ANALYST});
create policy analyst_documents on documents for select to pgrecall_analyst using ({ANALYST});
create policy analyst_analyst_tenants on analyst_tenants for select to pgrecall_analyst using (analyst = session_user);
create policy backup_sources on sources for select to pgrecall_backup using (true);
create policy backup_documents on documents for select to pgrecall_backup using (true);
create policy backup_embedding_cache on embedding_cache for select to pgrecall_backup using (true);
create policy backup_analyst_tenants on analyst_tenants for select to pgrecall_backup using (true);
grant select on tenant_sources, tenant_documents to pgrecall_app;
grant select, insert, update, delete on sources, documents, embedding_cache to pgrecall_app;
grant select on embedding_models, pgrecall_revision to pgrecall_app, pgrecall_worker, pgrecall_analyst, pgrecall_backup;
grant select, update on sources to pgrecall_worker;
grant select on sources, documents, document_chunks, analyst_tenants to pgrecall_analyst;
grant select on sources, documents, embedding_cache, analyst_tenants, tenant_sources, tenant_documents, document_chunks
    to pgrecall_backup;
"""


def _execute(statement: str) -> None:
    op.execute(statement.strip().replace(":", r"\:"))


def _run(statements: str) -> None:
    for statement in statements.split(";\n"):
        if statement.strip():
            _execute(statement)


def upgrade() -> None:
    _execute(PREREQUISITES)
    options = op.get_context().opts
    dimensions = int(options["embedding_dimensions"])
    indexed = (
        "embedding vector_cosine_ops"
        if dimensions <= 2_000
        else f"(embedding::halfvec({dimensions})) halfvec_cosine_ops"
    )
    _run(TABLES.replace("{dimensions}", str(dimensions)).replace("{indexed}", indexed))
    _execute(CONTRIB_INDEXES)
    model = options["embedding_model"].replace("'", "''")
    _execute(f"insert into embedding_models (name, dimensions) values ('{model}', {dimensions})")
    _run(VIEWS)
    for thing, comment in COMMENTS.items():
        text = comment.replace("'", "''")
        _execute(f"comment on {thing} is '{text}'")
    _run(RIGHTS)


def downgrade() -> None:
    _run(
        """
drop view document_chunks;
drop view tenant_documents;
drop view tenant_sources;
drop table embedding_cache;
drop table documents;
drop function chunk_terms(text);
drop table sources;
drop table analyst_tenants;
drop table embedding_models;
"""
    )
