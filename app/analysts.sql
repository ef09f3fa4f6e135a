create or replace function search_statement(name text) returns text language plpgsql immutable as $function$
begin
    -- Rendered by app/analysts.py. Values are $1 to $14; what stands in braces is put in by search_chunks.
    return case name@FRAGMENTS@
    end;
end $function$

-- ;;
create or replace function metadata_value(keys text[]) returns text language sql immutable as $function$
    select '(' || case when cardinality(parts) between 2 and 8
                       then 'coalesce(documents.metadata -> ' || quote_literal(keys[1]) || '::text, documents.metadata'
                            || (select string_agg(' -> ' || quote_literal(part) || '::text', '' order by n)
                                  from unnest(parts) with ordinality as several (part, n)) || ')'
                       else 'documents.metadata -> ' || quote_literal(keys[1]) || '::text' end
           || coalesce((select string_agg(' -> ' || quote_literal(key) || '::text', '' order by n)
                          from unnest(keys[2:]) with ordinality as several (key, n)), '') || ')'
      from string_to_array(keys[1], '.') as parts
$function$

-- ;;
create or replace function metadata_equality(place text, asked jsonb[], keys text[]) returns text
    language plpgsql immutable as $function$
declare
    parts constant text[] := string_to_array(keys[1], '.');
    dotted constant boolean := cardinality(parts) between 2 and 8;
    scalars text[];
    arrays text[];
    held text[];
    contained text;
begin
    if exists (select from unnest(asked) as value where jsonb_typeof(value) = 'object') then
        raise exception using errcode = '22023', message = place
            || ': must be a string, number, true, false, null or array; for objects use $not and $or';
    end if;
    select coalesce(array_agg(value::text order by n) filter (where jsonb_typeof(value) <> 'array'), '{}'),
           coalesce(array_agg(value::text order by n) filter (where jsonb_typeof(value) = 'array'), '{}')
      into scalars, arrays from unnest(asked) with ordinality as several (value, n);
    -- One search of an index where it can be, as in app/filters.py.
    if not dotted and cardinality(keys) = 1 and cardinality(scalars) between 1 and 8 and arrays = '{}'
       and not exists (select from unnest(scalars) as value where starts_with(value, '-')) then
        return '(documents.metadata @? ' || quote_literal('$ ? (' || (
            select string_agg('@.' || to_json(keys[1])::text || ' == ' || value, ' || ') from unnest(scalars) as value
        ) || ')') || '::jsonpath)';
    end if;
    select array_agg(
               (select string_agg('{' || to_json(key)::text || ': ', '' order by k)
                  from unnest(path.keys) with ordinality as several (key, k))
               || form || repeat('}', cardinality(path.keys)))
      into held
      from (select keys as keys union all select parts || keys[2:] where dotted) as path
     cross join (select value from unnest(scalars) as value
                 union all select '[' || value || ']' from unnest(scalars) as value
                 union all select value from unnest(arrays) as value) as forms (form);
    contained := 'documents.metadata @> any (' || quote_literal(coalesce(held, '{}')) || '::text[]::jsonb[])';
    if not dotted and arrays = '{}' and cardinality(scalars) between 1 and 8 then
        return '(' || contained || ')';
    end if;
    return '(' || contained || ' AND CASE WHEN jsonb_typeof(' || metadata_value(keys) || ') = ''array'' THEN '
        || metadata_value(keys) || ' = any (' || quote_literal(arrays) || '::text[]::jsonb[]) OR '
        || metadata_value(keys) || ' @> any (' || quote_literal(scalars) || '::text[]::jsonb[]) ELSE coalesce('
        || metadata_value(keys) || ' = any (' || quote_literal(scalars) || '::text[]::jsonb[]), false) END)';
end $function$

-- ;;
create or replace function metadata_condition(
    filter jsonb, place text default 'metadata', keys text[] default '{}', depth integer default 1
) returns text language plpgsql immutable as $function$
declare
    key text;
    value jsonb;
    at text;
    part text;
    fault text;
    parts text[] := '{}';
begin
    if jsonb_typeof(filter) is distinct from 'object' or filter = '{}' then
        fault := place || ': must be a condition with at least one key, like {"key": value}';
    elsif depth > 8 then
        fault := place || ': is nested too deep; allowed: 8 objects inside each other';
    end if;
    if fault is not null then
        raise exception using errcode = '22023', message = fault;
    end if;
    for key, value in select * from jsonb_each(filter) loop
        at := place || '.' || key;
        fault := case
            when key in ('$and', '$or') and (jsonb_typeof(value) <> 'array' or value = '[]')
                then 'must be a list of at least one condition'
            when key in ('$ne', '$in', '$exists', '$gt', '$gte', '$lt', '$lte') and keys = '{}'
                then 'belongs under a key, like {"key": {"$gt": 1}}'
            when key = '$in' and jsonb_typeof(value) <> 'array' then 'must be a list of values'
            when key = '$exists' and jsonb_typeof(value) <> 'boolean' then 'must be true or false'
            when key in ('$gt', '$gte', '$lt', '$lte') and jsonb_typeof(value) not in ('number', 'string')
                then 'must be a number or a string'
            when starts_with(key, '$')
                 and key not in ('$and', '$or', '$not', '$ne', '$in', '$exists', '$gt', '$gte', '$lt', '$lte')
                then 'unknown operator; known: $and, $exists, $gt, $gte, $in, $lt, $lte, $ne, $not, $or'
            end;
        if fault is not null then
            raise exception using errcode = '22023', message = at || ': ' || fault;
        end if;
        case key
            when '$and', '$or' then
                select '(' || string_agg(metadata_condition(each, at || '[' || n - 1 || ']', keys, depth + 1),
                                         case key when '$and' then ' AND ' else ' OR ' end order by n) || ')'
                  into part from jsonb_array_elements(value) with ordinality as several (each, n);
            when '$not' then
                part := '(NOT ' || metadata_condition(value, at, keys, depth + 1) || ')';
            when '$ne' then
                part := '(NOT ' || metadata_equality(at, array[value], keys) || ')';
            when '$in' then
                part := metadata_equality(at, array(select jsonb_array_elements(value)), keys);
            when '$exists' then
                part := '(' || metadata_value(keys) || case when value::boolean then ' IS NOT NULL)' else ' IS NULL)' end;
            when '$gt', '$gte', '$lt', '$lte' then
                part := case key when '$gt' then ' > ' when '$gte' then ' >= ' when '$lt' then ' < ' else ' <= ' end;
                part := '(CASE WHEN jsonb_typeof(' || metadata_value(keys) || ') = '
                    || quote_literal(jsonb_typeof(value)) || ' THEN '
                    || case jsonb_typeof(value)
                       when 'number' then metadata_value(keys) || part || quote_literal(value) || '::jsonb'
                       else '(' || metadata_value(keys) || ' #>> ''{}'') COLLATE "C"' || part || quote_literal(value #>> '{}')
                       end || ' ELSE false END)';
            else
                if jsonb_typeof(value) = 'object' then
                    part := metadata_condition(value, at, keys || key, depth + 1);
                else
                    part := metadata_equality(at, array[value], keys || key);
                end if;
        end case;
        parts := parts || part;
    end loop;
    return '(' || array_to_string(parts, ' AND ') || ')';
end $function$

-- ;;
create or replace function text_question_read(
    tenant text, question text, most_terms integer, most_chunks integer, out terms text[], out queries tsquery[],
    out weights double precision[], out bounds double precision[], out total double precision,
    out mean_length double precision, out required text, out restriction tsquery
) language plpgsql stable as $$
declare
    excluded constant text := '(^|\s)-("[^"]*"|[^\s"]+)';
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
      into collection, mean_length from collection_statistics s where s.tenant_id = tenant;
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
                             from term_statistics t where t.tenant_id = tenant and t.term = q.lexeme) s
                     cross join lateral (
                           select 2.2 * cardinality(q.positions)
                                  * ln(1 + (greatest(collection - s.chunks, 0) + 0.5) / (s.chunks + 0.5)) as weight) i
                     where s.chunks > 0 and (octet_length(q.lexeme) > 1 or not q.several)) c) w
     where w.place <= 8 or w.place <= most_terms and w.reading <= most_chunks;
end $$

-- ;;
create or replace function refuse(fault text, hint text) returns void language plpgsql immutable as $function$
begin
    if fault is not null then
        raise exception using errcode = '22023', message = fault, hint = coalesce(refuse.hint, '');
    end if;
end $function$

-- ;;
create or replace function search_fault(
    called text,
    tenant text,
    top_k integer,
    document text default null,
    query_embedding vector default null,
    query_text text default null,
    threshold double precision default null,
    doc_type text default null,
    doc_types text[] default null,
    metadata jsonb default null,
    created_after timestamptz default null,
    created_before timestamptz default null,
    ef_search integer default null,
    exact boolean default false,
    by_document boolean default false,
    fusion text default 'relative',
    vector_weight double precision default 1,
    text_weight double precision default 1,
    sample integer default 1,
    seed bigint default 0,
    out fault text,
    out hint text
) language plpgsql stable as $function$
declare
    most constant integer := case called when 'recall_check' then @MOST@ - 1 else @MOST@ end;
    model record;
    others text;
begin
    if query_embedding is not null then
        select m.name, m.dimensions into model from embedding_models m where m.state = 'active';
        if vector_dims(query_embedding) <> model.dimensions then
            select string_agg(m.name || ', which is ' || m.state, ', and ' order by m.name) into others
              from embedding_models m where m.state <> 'active' and m.dimensions = vector_dims(query_embedding);
            fault := 'query_embedding: has ' || vector_dims(query_embedding) || ' dimensions; allowed: '
                || model.dimensions || ', as ' || model.name;
            hint := coalesce('That is the length of ' || others || '. ', '') || model.name
                || ' is searched now: `pgrecall embed` prints the vector of a question by it.';
            return;
        end if;
    end if;
    -- What a request of the API may be, by the names that it has here.
    fault := case
        when tenant is null then 'tenant: is missing'
        when tenant !~ '@TENANT@'
            then 'tenant: ' || quote_literal(left(tenant, 140))
                 || ' is not allowed; allowed: 1 to 128 letters, digits, ''_'', ''.'', '':'' or ''-'''
        when called = 'similar_documents' and document is null then 'id: is missing'
        when octet_length(document) not between 1 and @ID_BYTES@
            then 'id: is ' || octet_length(document) || ' bytes; allowed: 1 to @ID_BYTES@ bytes in UTF-8'
        when called = 'search_documents' and query_embedding is null then 'query_embedding: is missing'
        when called = 'hybrid_search' and query_text is null then 'query_text: is missing'
        when query_text !~ '@SEEN@' then 'query_text: is white space only; allowed: a text'
        when octet_length(query_text) > @QUERY_BYTES@
            then 'query_text: has ' || octet_length(query_text) || ' bytes; allowed: 1 to @QUERY_BYTES@'
        when not vector_norm(query_embedding) between @SHORTEST@ and @LONGEST@
            then 'query_embedding: has length ' || vector_norm(query_embedding) || '; allowed: @SHORTEST@ to @LONGEST@'
        when top_k is null or top_k not between 1 and most
            then 'top_k: is ' || coalesce(top_k::text, 'null') || '; allowed: 1 to ' || most
        when query_embedding is null and threshold is not null
            then 'threshold: is on cosine similarity; allowed: only with a query_embedding'
        when not threshold between -1 and 1 then 'threshold: is ' || threshold || '; allowed: -1 to 1'
        when octet_length(doc_type) > @QUERY_BYTES@
            then 'doc_type: is ' || octet_length(doc_type) || ' bytes; allowed: 0 to @QUERY_BYTES@ bytes in UTF-8'
        when cardinality(doc_types) > @TYPES@
            then 'doc_types: has ' || cardinality(doc_types) || ' types; allowed: at most @TYPES@'
        when array_position(doc_types, null) is not null
            then 'doc_types[' || array_position(doc_types, null) || ']: is null; allowed: texts'
        when not (created_after >= '@EARLIEST@' and created_after < '@LATEST@')
            then 'created_after: is ' || created_after || '; allowed: years @YEARS@'
        when not (created_before >= '@EARLIEST@' and created_before < '@LATEST@')
            then 'created_before: is ' || created_before || '; allowed: years @YEARS@'
        when by_document is null then 'by_document: is null; allowed: true or false'
        when ef_search not between 10 and @MAX_EF_SEARCH@
            then 'ef_search: is ' || ef_search || '; allowed: 10 to @MAX_EF_SEARCH@'
        when exact is null then 'exact: is null; allowed: true or false'
        when fusion is null or fusion not in ('relative', 'rrf')
            then 'fusion: is ' || coalesce(fusion, 'null') || '; allowed: relative, rrf'
        when vector_weight is null or not vector_weight between 0 and 100
            then 'vector_weight: is ' || coalesce(vector_weight::text, 'null') || '; allowed: 0 to 100'
        when text_weight is null or not text_weight between 0 and 100
            then 'text_weight: is ' || coalesce(text_weight::text, 'null') || '; allowed: 0 to 100'
        when vector_weight = 0 and text_weight = 0
            then 'vector_weight: is 0, and so is text_weight; allowed: one of them above 0'
        when sample is null or sample not between 1 and 10000
            then 'sample: is ' || coalesce(sample::text, 'null') || '; allowed: 1 to 10000'
        when seed is null then 'seed: is null; allowed: a whole number'
        end;
    hint := case
        when fault = 'query_text: is missing' then 'search_documents searches by a query_embedding alone.'
        when fault = 'query_embedding: is missing'
            then '`pgrecall embed` prints the vector of a question; hybrid_search searches by words alone.'
        when called = 'recall_check' and starts_with(fault, 'top_k')
            then 'It searches for one more, because each of the sample finds itself.'
        else 'Every argument, with an example: \df+ ' || called end;
    if fault is null and metadata <> '{}' then
        begin
            perform metadata_condition(metadata);
        exception when invalid_parameter_value then
            fault := sqlerrm;
            hint := 'docs/filters.md has the language of conditions.';
        end;
    end if;
end $function$

-- ;;
create or replace function search_chunks(
    tenant text,
    query_embedding vector,
    query_text text default null,
    top_k integer default 10,
    threshold double precision default null,
    doc_types text[] default null,
    metadata jsonb default null,
    created_after timestamptz default null,
    created_before timestamptz default null,
    ef_search integer default null,
    exact boolean default false,
    by_document boolean default false,
    fusion text default 'relative',
    vector_weight double precision default 1,
    text_weight double precision default 1
) returns table (
    hit_id text, hit_chunk_index integer, hit_content text, hit_similarity double precision, hit_doc_type text,
    hit_metadata jsonb, hit_created_at timestamptz, hit_start_offset integer, hit_score double precision,
    hit_text_score double precision, scan text
) language plpgsql stable rows 10
    set jit = off set max_parallel_workers_per_gather = 0
    set enable_sort = on
as $function$
declare
    mixed constant boolean := query_text is not null;
    among constant text := case when by_document then ' grouped' else '' end;
    leg constant integer := greatest(@LEG@, top_k);
    model record;
    layout record;
    filter text := 'true';
    step text;
    statement text;
    completing boolean := false;
    breadth text;
    order_kept text;
    candidates integer;
    bound integer;
    measured bigint;
    different bigint;
    ids text[];
    places integer[];
    contents text[];
    similarities double precision[];
    types text[];
    metadatas jsonb[];
    moments timestamptz[];
    offsets integer[];
    scores double precision[];
    text_scores double precision[];
begin
    select m.dimensions into model from embedding_models m where m.state = 'active';
    if doc_types is not null then
        filter := filter || ' AND ' || search_statement('doc_types');
    end if;
    if created_after is not null then
        filter := filter || ' AND ' || search_statement('created_after');
    end if;
    if created_before is not null then
        filter := filter || ' AND ' || search_statement('created_before');
    end if;
    if metadata <> '{}' then
        filter := filter || ' AND ' || metadata_condition(metadata);
    end if;
    -- As app/layout.py has it: the active kind of index and how many rows the tenant's bucket of it holds.
    select i.kind, i.oversampling,
           (select greatest(c.reltuples, 0)::double precision from pg_class c
             where c.oid = to_regclass('documents_embedding_' || i.kind || '_'
                                       || to_char(hashtextextended(tenant, 0) & (@BUCKETS@ - 1), 'FM00') || '_idx')) as rows
      into layout from vector_indexes i where i.state = 'active';
    if layout.rows is null then
        select 'full' as kind, 4 as oversampling, 0 as rows into layout;
    end if;
    candidates := least(
        greatest(ceil(top_k * layout.oversampling)::integer, case when mixed then leg else top_k end, @TELLING@),
        @MAX_EF_SEARCH@);
    bound := round(least(greatest(sqrt(@VISIT@ * candidates * layout.rows), @LEAST_ROWS@), @MOST_ROWS@));
    bound := bound + 1;  -- counted to one more, so that more is known to be more
    step := case when query_embedding is null then 'text' when exact then 'exact' else 'few' end;
    if step = 'few' and filter = 'true' then
        -- In place of what the service remembers: without a filter the statistics tell that a tenant is large.
        select case when sum(s.chunks) >= bound then 'nearest' else 'few' end into step
          from collection_statistics s where s.tenant_id = tenant;
    end if;
    if step = 'few' and mixed then
        execute replace(search_statement('count'), '{conditions}', filter) into measured
          using tenant, query_embedding, top_k, bound, candidates, threshold, doc_types, created_after, created_before;
        step := case when measured < bound then 'exact' else 'nearest' end;
    end if;
    loop
        -- As scans.index_config has it. The first ends with the function, by its SET clause; pgvector's own are put back
        -- below, because a restore could not make a function that names them: they are not known before pgvector is loaded.
        perform set_config('enable_sort', case step when 'nearest' then 'off' else 'on' end, true);
        if step = 'nearest' then
            breadth := coalesce(breadth, current_setting('hnsw.ef_search'));
            order_kept := coalesce(order_kept, current_setting('hnsw.iterative_scan'));
            perform set_config('hnsw.iterative_scan', 'relaxed_order', true),
                    set_config('hnsw.ef_search', least(greatest(coalesce(ef_search, @EF_SEARCH@), candidates), @MAX_EF_SEARCH@)::text, true);
        end if;
        statement := search_statement(
            case when mixed and step <> 'text' then fusion || ' ' else '' end || step
            || case when step = 'few' and metadata <> '{}' then ' metadata' else '' end || among);
        statement := replace(replace(statement, '{score}', search_statement('score')),
                             '{order}', search_statement('order ' || layout.kind));
        statement := replace(statement, '{passing}', case filter when 'true' then filter else search_statement('passing') end);
        statement := replace(replace(statement, '{dimensions}', model.dimensions::text), '{conditions}', filter);
        execute 'select max(r.candidates), ' || case step when 'nearest' then 'max(r.different)' else 'null' end
            || ', array_agg(r.id), array_agg(r.chunk_index), array_agg(r.content), array_agg(r.similarity),'
            || ' array_agg(r.doc_type), array_agg(r.metadata), array_agg(r.created_at), array_agg(r.start_offset), '
            || case when mixed then 'array_agg(r.score), array_agg(r.text_score)' else 'array_agg(r.similarity), null' end
            || ' from (' || statement || ') r'
           into measured, different, ids, places, contents, similarities, types, metadatas, moments, offsets, scores, text_scores
          using tenant, query_embedding, top_k, bound, candidates, coalesce(threshold, '-infinity'), doc_types,
                created_after, created_before, query_text,
                case when step = 'text' and not by_document then top_k else leg end,
                vector_weight, text_weight, leg;
        ids := array_remove(ids, null);  -- a statement that found nothing gives one row without an id
        if step = 'few' then
            exit when measured < bound;
            step := 'nearest';
        elsif step <> 'nearest' then
            exit;
        elsif different * @REPETITIVE@ < measured then
            step := 'exact';  -- caught among copies of one text, which are neighbours of nothing but each other
            completing := true;
        else
            exit when measured >= candidates
                and (mixed or cardinality(ids) = top_k or threshold is not null and not by_document);
            if measured < candidates or candidates = @MAX_EF_SEARCH@ then
                step := 'exact';
                completing := true;
            else
                candidates := least(4 * candidates, @MAX_EF_SEARCH@);  -- many chunks of few documents
            end if;
        end if;
    end loop;
    if breadth is not null then
        perform set_config('hnsw.iterative_scan', order_kept, true), set_config('hnsw.ef_search', breadth, true);
    end if;
    return query
        select f.*, case step when 'nearest' then 'index' when 'few' then 'exact' when 'text' then 'text'
                         else case when completing then 'completed' else 'exact' end end
          from unnest(ids, places, contents, similarities, types, metadatas, moments, offsets, scores, text_scores)
               as f (id, place, content, similarity, doc_type, metadata, created_at, start_offset, score, text_score)
         where f.id is not null;
end $function$

-- ;;
create or replace function search_documents(
    tenant text,
    query_embedding vector,
    top_k integer default 10,
    threshold double precision default null,
    doc_type text default null,
    metadata jsonb default null,
    created_after timestamptz default null,
    created_before timestamptz default null,
    doc_types text[] default null,
    by_document boolean default false,
    ef_search integer default null,
    exact boolean default false
) returns table (
    id text, chunk_index integer, content text, similarity double precision, doc_type text, metadata jsonb,
    created_at timestamptz, start_offset integer, scan text
) language sql stable rows 10 as $function$
    select refuse(f.fault, f.hint) from search_fault(
        'search_documents', $1, $3, query_embedding => $2, threshold => $4, doc_type => $5, doc_types => $9,
        metadata => $6, created_after => $7, created_before => $8, ef_search => $11, exact => $12, by_document => $10) f;
    select h.hit_id, h.hit_chunk_index, h.hit_content, h.hit_similarity, h.hit_doc_type, h.hit_metadata,
           h.hit_created_at, h.hit_start_offset, h.scan
      from search_chunks(
               $1, $2, null, $3, $4, case when $5 is null then $9 else $9 || $5 end, $6, $7, $8, $11, $12, $10) h
$function$

-- ;;
create or replace function hybrid_search(
    tenant text,
    query_text text,
    query_embedding vector default null,
    top_k integer default 10,
    threshold double precision default null,
    doc_type text default null,
    metadata jsonb default null,
    created_after timestamptz default null,
    created_before timestamptz default null,
    doc_types text[] default null,
    by_document boolean default false,
    ef_search integer default null,
    exact boolean default false,
    fusion text default 'relative',
    vector_weight double precision default 1,
    text_weight double precision default 1
) returns table (
    id text, chunk_index integer, content text, score double precision, similarity double precision,
    text_score double precision, doc_type text, metadata jsonb, created_at timestamptz, start_offset integer, scan text
) language sql stable rows 10 as $function$
    select refuse(f.fault, f.hint) from search_fault(
        'hybrid_search', $1, $4, query_embedding => $3, query_text => $2, threshold => $5, doc_type => $6,
        doc_types => $10, metadata => $7, created_after => $8, created_before => $9, ef_search => $12, exact => $13,
        by_document => $11, fusion => $14, vector_weight => $15, text_weight => $16) f;
    select h.hit_id, h.hit_chunk_index, h.hit_content, h.hit_score, h.hit_similarity, h.hit_text_score, h.hit_doc_type,
           h.hit_metadata, h.hit_created_at, h.hit_start_offset, h.scan
      from search_chunks(
               $1, $3, $2, $4, $5, case when $6 is null then $10 else $10 || $6 end, $7, $8, $9, $12, $13,
               $11, $14, $15, $16) h
$function$

-- ;;
create or replace function similar_documents(tenant text, id text, top_k integer default 10) returns table (
    id text, similarity double precision, title text, content text, doc_type text, metadata jsonb, created_at timestamptz
) language sql stable rows 10 as $function$
    select refuse(f.fault, f.hint) from search_fault('similar_documents', $1, $3, document => $2) f;
    select h.hit_id, h.hit_similarity, s.title, h.hit_content, h.hit_doc_type, h.hit_metadata, h.hit_created_at
      from (select avg(d.embedding) as embedding from documents d
             where d.tenant_id = $1 and d.id = $2 having count(*) > 0) middle
     cross join lateral search_chunks($1, middle.embedding, null, $3 + 1, by_document => true)
               with ordinality as h (hit_id, hit_chunk_index, hit_content, hit_similarity, hit_doc_type, hit_metadata,
                                     hit_created_at, hit_start_offset, hit_score, hit_text_score, scan, place)
      join sources s on s.tenant_id = $1 and s.id = h.hit_id
     where h.hit_id <> $2 order by h.place limit $3
$function$

-- ;;
create or replace function recall_check(
    tenant text, top_k integer default 10, sample integer default 50, ef_search integer default null, seed bigint default 0
) returns table (
    queries bigint, walked bigint, recall double precision, least_recall double precision, search_ms double precision,
    exact_ms double precision
) language plpgsql volatile as $function$
declare
    wrong record;
    asked record;
    nearest double precision[];
    found double precision[];
    how text;
    begun timestamptz;
    between_them timestamptz;
    shares double precision[] := '{}';
    searching double precision[] := '{}';
    measuring double precision[] := '{}';
begin
    select f.fault, f.hint into wrong
      from search_fault('recall_check', tenant, top_k, ef_search => recall_check.ef_search, sample => sample, seed => seed) f;
    if wrong.fault is not null then
        raise exception using errcode = '22023', message = wrong.fault, hint = wrong.hint;
    end if;
    walked := 0;
    for asked in
        select d.embedding
          from (select k.id, k.chunk_key from documents k where k.tenant_id = tenant
                 order by hashtextextended(k.id || ' ' || k.chunk_key, seed) limit sample) chosen
          join documents d on d.tenant_id = tenant and d.id = chosen.id and d.chunk_key = chosen.chunk_key
    loop
        begun := clock_timestamp();
        select array_agg(h.hit_similarity order by h.hit_similarity desc), max(h.scan) into found, how
          from search_chunks(tenant, asked.embedding, null, top_k + 1, ef_search => recall_check.ef_search) h;
        between_them := clock_timestamp();
        select array_agg(h.hit_similarity order by h.hit_similarity desc) into nearest
          from search_chunks(tenant, asked.embedding, null, top_k + 1, exact => true) h;
        searching := searching || extract(epoch from between_them - begun)::double precision;
        measuring := measuring || extract(epoch from clock_timestamp() - between_them)::double precision;
        walked := walked + (how = 'index')::integer;
        -- The first is the chunk itself. What is as near as the last of the nearest is as good, whichever chunk it is.
        continue when cardinality(nearest) < 2;
        shares := shares || (
            select count(*) / (cardinality(nearest) - 1)::double precision
              from unnest(found[2:]) as similarity where similarity >= nearest[cardinality(nearest)] - 1e-6);
    end loop;
    return query
        select cardinality(searching)::bigint, walked,
               (select avg(share) from unnest(shares) as share), (select min(share) from unnest(shares) as share),
               round((1000 * (select percentile_cont(0.5) within group (order by took) from unnest(searching) as took))::numeric, 2)::double precision,
               round((1000 * (select percentile_cont(0.5) within group (order by took) from unnest(measuring) as took))::numeric, 2)::double precision;
end $function$

-- ;;
do $function$
declare
    made regprocedure;
    place text := quote_ident(current_schema);
begin
    -- Of whoever calls them only the rows are theirs: every name is looked up here, and the temporary schema last.
    select place || coalesce(', ' || string_agg(quote_ident(n.nspname), ', '), '') || ', pg_temp' into place
      from pg_extension e join pg_namespace n on n.oid = e.extnamespace
     where e.extname = 'vector' and n.nspname <> current_schema;
    for made in
        select p.oid::regprocedure from pg_proc p
         where p.pronamespace = current_schema::regnamespace
           and p.proname in ('search_statement', 'metadata_value', 'metadata_equality', 'metadata_condition',
                             'text_question_read', 'refuse', 'search_fault', 'search_chunks', 'search_documents', 'hybrid_search',
                             'similar_documents', 'recall_check')
    loop
        execute 'alter function ' || made || ' set search_path = ' || place;
        execute 'revoke all on function ' || made || ' from public';
        execute 'grant execute on function ' || made || ' to pgrecall_analyst';
    end loop;
end $function$
