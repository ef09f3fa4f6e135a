"""BM25: the words of each chunk in a narrow table of their own, and the statistics they are weighed by.

Everything here may be run again: filling happens in short transactions of its own, and a migration that is stopped in
the middle goes on where it was. `documents` is neither rewritten nor read under a lock; making the foreign key and
dropping the column `terms`, which nothing reads, each take a lock on it for as long as a catalogue entry takes. The
previous release keeps working: chunks it writes are not found by their words until `call fill_terms()`, or
`pgrecall migrate` of a later revision, has been run. The downgrade puts the column back, which rewrites `documents`.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

DOCUMENTS = """
drop view if exists tenant_documents;
alter table documents drop column if exists terms;
create view tenant_documents as
    select tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding
      from documents where tenant_id = current_setting('pgrecall.tenant_id', true);
"""

# No index leads with the tenant alone: the planner would intersect it with the index of the words, all 200,000 entries.
TABLES = """
create table if not exists document_terms (
    tenant_id text collate "C" not null,
    id text collate "C" not null,
    chunk_key text collate "C" not null,
    terms tsvector not null,
    length integer not null,
    constraint document_terms_pkey primary key (id, chunk_key, tenant_id),
    constraint document_terms_documents_fkey foreign key (tenant_id, id, chunk_key)
        references documents (tenant_id, id, chunk_key) on delete cascade
);
create table if not exists term_statistics (
    tenant_id text collate "C" not null,
    term text collate "C" not null,
    chunks integer not null,
    peak integer not null,
    density real not null
);
create table if not exists collection_statistics (
    tenant_id text collate "C" not null,
    chunks bigint not null,
    length bigint not null
);
create index if not exists term_statistics_tenant_id_term_idx on term_statistics (tenant_id, term)
    include (chunks, peak, density);
create index if not exists collection_statistics_tenant_id_idx on collection_statistics (tenant_id)
    include (chunks, length);
-- Many rows come and go between two folds; each is read by its index alone once vacuum has seen it.
alter table term_statistics set (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05);
alter table collection_statistics set (autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0);
create or replace view tenant_document_terms as
    select tenant_id, id, chunk_key, terms, length
      from document_terms where tenant_id = current_setting('pgrecall.tenant_id', true);
create or replace view tenant_term_statistics as
    select tenant_id, term, chunks, peak, density
      from term_statistics where tenant_id = current_setting('pgrecall.tenant_id', true);
create or replace view tenant_collection_statistics as
    select tenant_id, chunks, length
      from collection_statistics where tenant_id = current_setting('pgrecall.tenant_id', true);
"""

LOCALE = """
do $$
begin
    if (select datctype in ('C', 'POSIX') from pg_database where datname = current_database()) then
        raise warning using
            message = 'under the LC_CTYPE C of this database text search takes typographic quotes for letters',
            hint = 'Make the database with LC_CTYPE ''C.UTF-8'' or another in UTF-8';
    end if;
end
$$
"""

FUNCTIONS = [
    """
create or replace function text_language() returns regconfig language sql immutable parallel safe
    return '{language}'::regconfig
""",
    # Punctuation becomes space first: no host, URL or hyphen compounds that a plain question could not match.
    """
create or replace function chunk_terms(content text) returns tsvector language sql immutable strict parallel safe
    return to_tsvector(text_language(), regexp_replace(content, '[[:punct:]]+', ' ', 'g'))
""",
    # 255 characters and the tenant fit into a lexeme; words that begin alike for so long are told apart by their score.
    """
create or replace function tenant_terms(tenant_id text, terms tsvector) returns tsvector
    language sql immutable strict parallel safe cost 1000
    return array_to_tsvector(array(select tenant_id || ':' || left(term, 255) from unnest(tsvector_to_array(terms)) term))
""",
    """
create or replace function learn_terms(tenant text, ids text[], keys text[]) returns bigint language sql
begin atomic
    with added as (
        insert into document_terms (tenant_id, id, chunk_key, terms, length)
        select d.tenant_id, d.id, d.chunk_key, w.terms, w.length
          from unnest(ids, keys) as wanted (id, chunk_key)
          join documents d on d.tenant_id = tenant and d.id = wanted.id and d.chunk_key = wanted.chunk_key
         cross join lateral (
               select t.terms, (select coalesce(sum(cardinality(positions)), 0) from unnest(t.terms)) as length
                 from (select chunk_terms(d.content) as terms offset 0) t) w
            on conflict do nothing
        returning terms, length
    ), counted as (
        insert into term_statistics (tenant_id, term, chunks, peak, density)
        select tenant, w.lexeme, count(*), max(cardinality(w.positions)),
               max(cardinality(w.positions)::double precision / a.length)
          from added a cross join unnest(a.terms) w group by w.lexeme
    )
    insert into collection_statistics (tenant_id, chunks, length)
    select tenant, count(*), sum(length) from added having count(*) > 0;
    select count(*) from collection_statistics where tenant_id = tenant;
end
""",
    """
create or replace function forget_terms(tenant text, ids text[], keys text[] default null) returns bigint language sql
begin atomic
    with gone as (
        delete from document_terms t
         where t.tenant_id = tenant and t.id = any (ids)
           and (keys is null or (t.id, t.chunk_key) in (select * from unnest(ids, keys)))
        returning t.terms, t.length
    ), counted as (
        insert into term_statistics (tenant_id, term, chunks, peak, density)
        select tenant, w.lexeme, -count(*), 0, 0 from gone cross join unnest(gone.terms) w group by w.lexeme
    )
    insert into collection_statistics (tenant_id, chunks, length)
    select tenant, -count(*), -sum(length) from gone having count(*) > 0;
    select count(*) from collection_statistics where tenant_id = tenant;
end
""",
    # Writers only insert, so what is folded here nobody else touches; the lock comes first, for the snapshot to be later.
    """
create or replace function fold_statistics(tenant text) returns boolean language plpgsql as $$
begin
    if not pg_try_advisory_xact_lock(hashtextextended('pgrecall fold ' || tenant, 0)) then
        return false;
    end if;
    with several as materialized (
        select term from term_statistics where tenant_id = tenant group by term having count(*) > 1
    ), gone as (
        delete from term_statistics s using several
         where s.tenant_id = tenant and s.term = several.term
        returning s.term, s.chunks, s.peak, s.density
    )
    insert into term_statistics (tenant_id, term, chunks, peak, density)
    select tenant, term, sum(chunks), max(peak), max(density) from gone group by term having sum(chunks) <> 0;
    with gone as (
        delete from collection_statistics where tenant_id = tenant returning chunks, length
    )
    insert into collection_statistics (tenant_id, chunks, length)
    select tenant, sum(chunks), sum(length) from gone having count(*) > 0;
    return true;
end $$
""",
    """
create or replace function recount_statistics(tenant text) returns void language plpgsql as $$
begin
    perform pg_advisory_xact_lock(hashtextextended('pgrecall fold ' || tenant, 0));
    with gone as (
        delete from term_statistics where tenant_id = tenant
    ), all_gone as (
        delete from collection_statistics where tenant_id = tenant
    ), counted as (
        insert into term_statistics (tenant_id, term, chunks, peak, density)
        select tenant, w.lexeme, count(*), max(cardinality(w.positions)),
               max(cardinality(w.positions)::double precision / t.length)
          from document_terms t cross join unnest(t.terms) w where t.tenant_id = tenant group by w.lexeme
    )
    insert into collection_statistics (tenant_id, chunks, length)
    select tenant, count(*), sum(length) from document_terms where tenant_id = tenant having count(*) > 0;
end $$
""",
    """
create or replace procedure fill_terms(batch integer default 2000) language plpgsql as $$
declare
    tenant text;
    at_id text;
    at_key text;
    ids text[];
    keys text[];
begin
    loop
        select min(tenant_id) into tenant from documents where tenant is null or tenant_id > tenant;
        exit when tenant is null;
        at_id := '';
        at_key := '';
        loop
            select array_agg(id), array_agg(chunk_key) into ids, keys from (
                select id, chunk_key from documents
                 where tenant_id = tenant and (id, chunk_key) > (at_id, at_key)
                 order by id, chunk_key limit batch) b;
            exit when ids is null;
            at_id := ids[cardinality(ids)];
            at_key := keys[cardinality(keys)];
            select array_agg(w.id), array_agg(w.chunk_key) into ids, keys from (
                select d.id, d.chunk_key
                  from unnest(ids, keys) as k (id, chunk_key)
                  join documents d on d.tenant_id = tenant and d.id = k.id and d.chunk_key = k.chunk_key
                 where not exists (select from document_terms t
                                    where t.tenant_id = tenant and t.id = k.id and t.chunk_key = k.chunk_key)
                   for key share of d skip locked) w;
            if ids is not null then
                perform learn_terms(tenant, ids, keys);
            end if;
            commit;
        end loop;
        perform fold_statistics(tenant);
        commit;
    end loop;
end $$
""",
    """
create or replace function text_question(
    tenant text, question text, most_terms integer, most_chunks integer, out terms text[], out queries tsquery[],
    out weights double precision[], out bounds double precision[], out total double precision,
    out mean_length double precision, out required text, out restriction tsquery
) language plpgsql stable as $$
declare
    excluded constant text := '(^|\\s)-("[^"]*"|[^\\s"]+)';
    positive text := regexp_replace(question, excluded, ' ', 'g');
    collection double precision;
    part text;
    query tsquery;
begin
    for part in select (regexp_matches(question, excluded, 'g'))[2] loop
        query := phraseto_tsquery(text_language(), regexp_replace(part, '[[:punct:]]+', ' ', 'g'));
        if numnode(query) > 0 then
            restriction := coalesce(restriction && !! query, !! query);
        end if;
    end loop;
    for part in select (regexp_matches(positive, '"([^"]*)"', 'g'))[1] loop
        query := phraseto_tsquery(text_language(), regexp_replace(part, '[[:punct:]]+', ' ', 'g'));
        if numnode(query) > 0 then
            restriction := coalesce(restriction && query, query);
            required := concat_ws('&', required, (
                select string_agg(quote_literal(tenant || ':' || left(term, 255)), '&')
                  from unnest(tsvector_to_array(chunk_terms(part))) term));
        end if;
    end loop;
    select sum(s.chunks), greatest(sum(s.length) / nullif(sum(s.chunks), 0)::double precision, 1)
      into collection, mean_length from tenant_collection_statistics s where s.tenant_id = tenant;
    select array_agg(quote_literal(tenant || ':' || left(w.term, 255)) order by w.bound desc, w.term),
           array_agg(quote_literal(w.term)::tsquery order by w.bound desc, w.term),
           array_agg(w.weight order by w.bound desc, w.term), array_agg(w.bound order by w.bound desc, w.term),
           coalesce(sum(w.bound), 0)
      into terms, queries, weights, bounds, total
      from (select c.*, row_number() over (order by c.bound desc, c.term) as place,
                   sum(c.chunks) over (order by c.bound desc, c.term rows unbounded preceding) as reading
            from (select q.lexeme as term, i.weight, s.chunks,
                           1.0001 * i.weight / (1 + 0.3 / s.peak + 0.9 / (s.density * mean_length)) as bound
                      from (select lexeme, positions, bool_or(octet_length(lexeme) > 1) over () as several
                              from unnest(chunk_terms(positive))) q
                     cross join lateral (
                           select sum(t.chunks)::double precision as chunks, max(t.peak) as peak,
                                  max(t.density)::double precision as density
                             from tenant_term_statistics t where t.tenant_id = tenant and t.term = q.lexeme) s
                     cross join lateral (
                           select 2.2 * cardinality(q.positions)
                                  * ln(1 + (greatest(collection - s.chunks, 0) + 0.5) / (s.chunks + 0.5)) as weight) i
                     where s.chunks > 0 and (octet_length(q.lexeme) > 1 or not q.several)) c) w
     where w.place <= 8 or w.place <= most_terms and w.reading <= most_chunks;
end $$
""",
    """
create or replace function threshold_formula(
    terms text[], bounds double precision[], rest double precision[], place integer, need double precision
) returns text language plpgsql immutable as $$
declare
    last constant integer := cardinality(terms);
    with_it text;
    without text;
begin
    if need <= 0 then
        return '';
    elsif place > last or rest[place] < need then
        return null;
    elsif bounds[last] >= need then
        return array_to_string(terms[place:], '|');
    elsif rest[place] - bounds[last] < need then
        return array_to_string(terms[place:], '&');
    end if;
    with_it := threshold_formula(terms, bounds, rest, place + 1, need - bounds[place]);
    without := threshold_formula(terms, bounds, rest, place + 1, need);
    return concat_ws('|',
        case when with_it = '' then terms[place] when with_it is not null then terms[place] || '&(' || with_it || ')' end,
        without);
end $$
""",
    """
create or replace function text_candidates(
    terms text[], bounds double precision[], threshold double precision, required text
) returns tsquery language plpgsql immutable as $$
declare
    need constant double precision := threshold * 0.99999;
    rest double precision[] := array_fill(0::double precision, array[cardinality(terms) + 1]);
    essential integer := cardinality(terms);
    used integer := least(cardinality(terms), 8);
    made text;
begin
    for place in reverse cardinality(terms)..1 loop
        rest[place] := rest[place + 1] + bounds[place];
    end loop;
    while essential > 1 and rest[essential] < need loop
        essential := essential - 1;
    end loop;
    loop
        if need <= 0 or essential >= used then
            made := array_to_string(terms[1:essential], '|');
            exit;
        end if;
        made := threshold_formula(
            terms[1:used], bounds[1:used], array(select r - rest[used + 1] from unnest(rest[1:used]) r), 1,
            need - rest[used + 1]);
        exit when used <= 2 or made is null or length(made) - length(translate(made, '|&', '')) <= 20 or essential >= used - 1;
        used := used - 1;
    end loop;
    return nullif(concat_ws('&', required, '(' || nullif(made, '') || ')'), '')::tsquery;
end $$
""",
]

INDEXES = """
create index if not exists document_terms_tenant_terms_idx on document_terms using gin (tenant_terms(tenant_id, terms))
    with (fastupdate = off)
"""

COMMENTS = {
    "table document_terms": "One row per chunk whose words can be searched: what BM25 needs of it. Written with the chunk.",
    "column document_terms.tenant_id": "As in documents.",
    "column document_terms.id": "As in documents.",
    "column document_terms.chunk_key": "As in documents.",
    "column document_terms.terms": "chunk_terms(content): the chunk's words and where they stand.",
    "column document_terms.length": "How many words those are, repetitions counted.",
    "index document_terms_pkey": "One row a chunk. The tenant comes last, for the planner not to read a whole tenant beside the index of the words.",
    "index document_terms_tenant_terms_idx": "The chunks of a tenant that hold certain words: tenant_terms(tenant_id, terms) @@ query.",
    "table term_statistics": "In how many chunks of a tenant a word stands: the sum of its rows. Writers only add rows; fold_statistics makes one of several.",
    "column term_statistics.tenant_id": "Whose chunks were counted.",
    "column term_statistics.term": "The word, as in document_terms.terms.",
    "column term_statistics.chunks": "How many more chunks hold it; negative for chunks that went.",
    "column term_statistics.peak": "The most times it stands in one of them; deletions do not lower it.",
    "column term_statistics.density": "The largest share of a chunk's words that it makes up; deletions do not lower it.",
    "index term_statistics_tenant_id_term_idx": "A word's rows, read by the index alone.",
    "table collection_statistics": "How many chunks a tenant has and how long they are: the sum of its rows. Writers only add rows.",
    "column collection_statistics.tenant_id": "Whose chunks were counted.",
    "column collection_statistics.chunks": "How many more chunks there are; negative for chunks that went.",
    "column collection_statistics.length": "How many words more there are, repetitions counted.",
    "index collection_statistics_tenant_id_idx": "A tenant's rows, read by the index alone.",
    "view tenant_document_terms": "The document_terms of the tenant named by the setting pgrecall.tenant_id; none while it is unset.",
    "view tenant_term_statistics": "The term_statistics of the tenant named by the setting pgrecall.tenant_id; none while it is unset.",
    "view tenant_collection_statistics": "The collection_statistics of the tenant named by the setting pgrecall.tenant_id; none while it is unset.",
    "view tenant_documents": "The documents of the tenant named by the setting pgrecall.tenant_id; none while it is unset.",
    "function text_language()": "The text search configuration that chunks and questions are read with. Chosen when the database is made.",
    "function chunk_terms(text)": "The words of a text as full-text search sees them: punctuation dropped, stemmed in text_language().",
    "function tenant_terms(text, tsvector)": "The words with the tenant before each, so that every tenant has its own lists in the index.",
    "function learn_terms(text, text[], text[])": "Make chunks searchable by their words and count them. Returns the rows a fold would make one.",
    "function forget_terms(text, text[], text[])": "Take chunks, or whole documents where no keys are given, out again and count them off.",
    "function fold_statistics(text)": "Make one row of several in a tenant's statistics. False where another session is at it.",
    "function recount_statistics(text)": "Count a tenant's statistics afresh, after rows were deleted without forget_terms.",
    "procedure fill_terms(integer)": "Make every chunk searchable by its words that is not yet, in short transactions. May be run again.",
    "function text_question(text, text, integer, integer)": "The words of a question with their BM25 weights and most possible scores, rarest first, and what quotation marks and minus signs ask.",
    "function threshold_formula(text[], double precision[], double precision[], integer, double precision)": "Which combinations of words can reach a score: a formula without negation, null for none, empty for any.",
    "function text_candidates(text[], double precision[], double precision, text)": "The query that finds every chunk whose score can reach the threshold, for the index of the words.",
}
for _view, _table in (
    ("tenant_document_terms", "document_terms"),
    ("tenant_term_statistics", "term_statistics"),
    ("tenant_collection_statistics", "collection_statistics"),
):
    COMMENTS |= {
        key.replace(f"column {_table}.", f"column {_view}."): comment
        for key, comment in COMMENTS.items()
        if key.startswith(f"column {_table}.")
    }
DOCUMENTS_COMMENTS = {
    "tenant_id": "Whose chunk this is.",
    "id": "The document it belongs to: sources.id.",
    "chunk_key": "Names the chunk within its document by a hash of its text, so that a chunk that did not change keeps its row when others do.",
    "doc_type": "As in sources; repeated so that a filter needs no join.",
    "metadata": "As in sources; repeated so that a filter needs no join.",
    "created_at": "As in sources; repeated so that a filter needs no join.",
    "content": "The chunk's text.",
    "embedding": "Its vector. Cosine similarity of two is 1 - (a <=> b), in [-1, 1].",
}
COMMENTS |= {f"column tenant_documents.{name}": comment for name, comment in DOCUMENTS_COMMENTS.items()}

TENANT = "tenant_id = current_setting('pgrecall.tenant_id', true)"
ANALYST = (
    "(select exists (select from analyst_tenants where analyst = session_user and tenant_id = '*'))"
    " or tenant_id in (select tenant_id from analyst_tenants where analyst = session_user)"
)
GUARDED = ("document_terms", "term_statistics", "collection_statistics")
RIGHTS = (
    "".join(
        f"""
alter table {table} enable row level security;
drop policy if exists app_{table} on {table};
drop policy if exists analyst_{table} on {table};
drop policy if exists backup_{table} on {table};
create policy app_{table} on {table} to pgrecall_app using ({TENANT}) with check ({TENANT});
create policy analyst_{table} on {table} for select to pgrecall_analyst using ({ANALYST});
create policy backup_{table} on {table} for select to pgrecall_backup using (true);
grant select, insert, update, delete on {table} to pgrecall_app;
grant select on {table} to pgrecall_analyst, pgrecall_backup;
grant select on tenant_{table} to pgrecall_app, pgrecall_backup;
"""
        for table in GUARDED
    )
    + """
grant select on tenant_documents to pgrecall_app, pgrecall_backup;
"""
)


def _execute(statement: str) -> None:
    op.execute(statement.strip().replace(":", r"\:"))


def _run(statements: str) -> None:
    for statement in statements.split(";\n"):
        if statement.strip():
            _execute(statement)


def upgrade() -> None:
    language = op.get_context().opts["text_language"]
    _execute(LOCALE)
    _run(DOCUMENTS)
    _run(TABLES)
    for function in FUNCTIONS:
        _execute(function.replace("{language}", language))
    _execute(INDEXES)
    for thing, comment in COMMENTS.items():
        text = comment.replace("'", "''")
        _execute(f"comment on {thing} is '{text}'")
    _run(RIGHTS)
    with op.get_context().autocommit_block():
        _execute("set statement_timeout = 0")
        _execute("call fill_terms()")
        _execute("set statement_timeout = '60s'")


def downgrade() -> None:
    _run(
        """
drop procedure fill_terms(integer);
drop function text_candidates(text[], double precision[], double precision, text);
drop function threshold_formula(text[], double precision[], double precision[], integer, double precision);
drop function text_question(text, text, integer, integer);
drop function recount_statistics(text);
drop function fold_statistics(text);
drop function forget_terms(text, text[], text[]);
drop function learn_terms(text, text[], text[]);
drop view tenant_document_terms;
drop view tenant_term_statistics;
drop view tenant_collection_statistics;
drop table document_terms;
drop table term_statistics;
drop table collection_statistics;
drop function tenant_terms(text, tsvector);
create or replace function chunk_terms(content text) returns tsvector
    language sql immutable strict parallel safe
    return to_tsvector('pg_catalog.english'::regconfig, regexp_replace(content, '[^[:alnum:]]+', ' ', 'g'));
drop function text_language();
comment on function chunk_terms(text) is
    'The words of a text as full-text search sees them: punctuation dropped, English stemming.';
alter table documents add column terms tsvector generated always as (chunk_terms(content)) stored;
do $$ begin if exists (select from pg_extension where extname = 'btree_gin') then create index documents_terms_idx on documents using gin (tenant_id, terms); comment on index documents_terms_idx is 'Full-text conditions of the form terms @@ query within a tenant.'; end if; end $$;
create or replace view tenant_documents as
    select tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding, terms
      from documents where tenant_id = current_setting('pgrecall.tenant_id', true);
comment on column documents.terms is 'Its words for full-text search: chunk_terms(content), kept by PostgreSQL.';
comment on column tenant_documents.terms is 'Its words for full-text search: chunk_terms(content), kept by PostgreSQL.';
"""
    )
