create or replace function search_statement(name text) returns text language plpgsql immutable as $function$
begin
    -- Rendered by app/analysts.py. Values are $1 to $14; what stands in braces is put in by search_chunks.
    return case name
    when 'few' then $statement$WITH size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM (SELECT 1::INTEGER AS one 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} 
 LIMIT $4::INTEGER) AS counted), 
hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM (SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} AND (SELECT size.candidates 
FROM size) < $4::INTEGER) AS near ORDER BY near.distance, near.id, near.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.content, found.doc_type, found.metadata, found.created_at, found.chunk_index, found.start_offset, found.similarity 
FROM size LEFT OUTER JOIN (SELECT documents.id AS id, documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, array_position(sources.chunk_keys, hit.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, hit.chunk_key)] AS start_offset, 1::INTEGER - hit.distance AS similarity 
FROM hit JOIN documents ON documents.id = hit.id AND documents.chunk_key = hit.chunk_key JOIN sources ON sources.id = hit.id 
WHERE documents.tenant_id = $1::VARCHAR AND sources.tenant_id = $1::VARCHAR AND 1::INTEGER - hit.distance >= $6) AS found ON true ORDER BY found.similarity DESC, found.id, found.chunk_index$statement$
    when 'few metadata' then $statement$WITH near AS MATERIALIZED 
(SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} 
 LIMIT $4::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM near), 
hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM near 
WHERE (SELECT size.candidates 
FROM size) < $4::INTEGER ORDER BY near.distance, near.id, near.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.content, found.doc_type, found.metadata, found.created_at, found.chunk_index, found.start_offset, found.similarity 
FROM size LEFT OUTER JOIN (SELECT documents.id AS id, documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, array_position(sources.chunk_keys, hit.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, hit.chunk_key)] AS start_offset, 1::INTEGER - hit.distance AS similarity 
FROM hit JOIN documents ON documents.id = hit.id AND documents.chunk_key = hit.chunk_key JOIN sources ON sources.id = hit.id 
WHERE documents.tenant_id = $1::VARCHAR AND sources.tenant_id = $1::VARCHAR AND 1::INTEGER - hit.distance >= $6) AS found ON true ORDER BY found.similarity DESC, found.id, found.chunk_index$statement$
    when 'nearest' then $statement$WITH near AS MATERIALIZED 
(SELECT documents.id AS id, documents.chunk_key AS chunk_key, documents.embedding <=> $2 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} AND (hashtextextended(documents.tenant_id, 0) & 15) = (hashtextextended($1::VARCHAR, 0) & 15) ORDER BY {order} 
 LIMIT $5::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates, count(DISTINCT round(CAST(near.distance AS NUMERIC), 3::INTEGER)) AS different 
FROM near), 
hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM near ORDER BY near.distance + 0.0, near.id, near.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, size.different, found.id, found.content, found.doc_type, found.metadata, found.created_at, found.chunk_index, found.start_offset, found.similarity 
FROM size LEFT OUTER JOIN (SELECT documents.id AS id, documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, array_position(sources.chunk_keys, hit.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, hit.chunk_key)] AS start_offset, 1::INTEGER - hit.distance AS similarity 
FROM hit JOIN documents ON documents.id = hit.id AND documents.chunk_key = hit.chunk_key JOIN sources ON sources.id = hit.id 
WHERE documents.tenant_id = $1::VARCHAR AND sources.tenant_id = $1::VARCHAR AND 1::INTEGER - hit.distance >= $6) AS found ON true ORDER BY found.similarity DESC, found.id, found.chunk_index$statement$
    when 'relative nearest' then $statement$WITH RECURSIVE near AS MATERIALIZED 
(SELECT documents.id AS id, documents.chunk_key AS chunk_key, documents.embedding <=> $2 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} AND (hashtextextended(documents.tenant_id, 0) & 15) = (hashtextextended($1::VARCHAR, 0) & 15) ORDER BY {order} 
 LIMIT $5::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates, count(DISTINCT round(CAST(near.distance AS NUMERIC), 3::INTEGER)) AS different 
FROM near), 
hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM near ORDER BY near.distance + 0.0, near.id, near.chunk_key 
 LIMIT $14::INTEGER), 
question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_5, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
met AS MATERIALIZED 
(SELECT coalesce(hit.id, text_leg.id) AS id, coalesce(hit.chunk_key, text_leg.chunk_key) AS chunk_key, text_leg.text_score AS text_score 
FROM hit FULL OUTER JOIN text_leg ON hit.id = text_leg.id AND hit.chunk_key = text_leg.chunk_key), 
measured AS MATERIALIZED 
(SELECT met.id AS id, met.chunk_key AS chunk_key, nullif(coalesce(met.text_score, scored.score), 0.0) AS text_score, chunk.embedding AS embedding, chunk.similarity AS similarity 
FROM met JOIN question ON true JOIN LATERAL (SELECT documents.embedding AS embedding, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = met.id AND documents.chunk_key = met.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true LEFT OUTER JOIN LATERAL (SELECT {score} AS score 
FROM LATERAL (SELECT document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE met.text_score IS NULL AND document_terms.tenant_id = $1::VARCHAR AND document_terms.id = met.id AND document_terms.chunk_key = met.chunk_key AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction))
 LIMIT ALL OFFSET 0::INTEGER) AS candidate) AS scored ON true), 
first AS 
(SELECT measured.id AS id, measured.chunk_key AS chunk_key, measured.text_score AS text_score, measured.embedding AS embedding, measured.similarity AS similarity, 0.6 * coalesce((measured.similarity - min(measured.similarity) OVER ()) / nullif(max(measured.similarity) OVER () - min(measured.similarity) OVER (), 0.0), 1.0) * $12 + 0.4 * coalesce(measured.text_score / max(measured.text_score) OVER (), 0.0) * $13 AS score 
FROM measured), 
second AS MATERIALIZED 
(SELECT measured.id AS id, measured.chunk_key AS chunk_key, measured.text_score AS text_score, measured.similarity + 0.3 * (1::INTEGER - (measured.embedding <=> (SELECT avg(relevant.embedding) AS avg_1 
FROM (SELECT first.embedding AS embedding 
FROM first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT 3::INTEGER) AS relevant))) AS nearness 
FROM measured), 
fused AS MATERIALIZED 
(SELECT second.id AS id, second.chunk_key AS chunk_key, second.text_score AS text_score, 0.6 * coalesce((second.nearness - min(second.nearness) OVER ()) / nullif(max(second.nearness) OVER () - min(second.nearness) OVER (), 0.0), 1.0) * $12 + 0.4 * coalesce(second.text_score / max(second.text_score) OVER (), 0.0) * $13 AS score 
FROM second), 
best AS MATERIALIZED 
(SELECT passing.id AS id, passing.chunk_key AS chunk_key, passing.text_score AS text_score, passing.score AS score 
FROM (SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused JOIN LATERAL (SELECT 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = fused.id AND documents.chunk_key = fused.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true 
WHERE chunk.similarity >= $6) AS passing ORDER BY passing.score DESC, passing.id, passing.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, size.different, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'rrf nearest' then $statement$WITH RECURSIVE near AS MATERIALIZED 
(SELECT documents.id AS id, documents.chunk_key AS chunk_key, documents.embedding <=> $2 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} AND (hashtextextended(documents.tenant_id, 0) & 15) = (hashtextextended($1::VARCHAR, 0) & 15) ORDER BY {order} 
 LIMIT $5::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates, count(DISTINCT round(CAST(near.distance AS NUMERIC), 3::INTEGER)) AS different 
FROM near), 
hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM near ORDER BY near.distance + 0.0, near.id, near.chunk_key 
 LIMIT $14::INTEGER), 
vector_leg AS 
(SELECT hit.id AS id, hit.chunk_key AS chunk_key, hit.distance AS distance, 1.0 / CAST((60::INTEGER + row_number() OVER (ORDER BY hit.distance, hit.id, hit.chunk_key)) AS NUMERIC) AS share 
FROM hit), 
question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_1, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
word_leg AS 
(SELECT text_leg.id AS id, text_leg.chunk_key AS chunk_key, text_leg.text_score AS text_score, 1.0 / CAST((60::INTEGER + row_number() OVER (ORDER BY text_leg.text_score DESC, text_leg.id, text_leg.chunk_key)) AS NUMERIC) AS share 
FROM text_leg), 
fused AS MATERIALIZED 
(SELECT coalesce(vector_leg.id, word_leg.id) AS id, coalesce(vector_leg.chunk_key, word_leg.chunk_key) AS chunk_key, word_leg.text_score AS text_score, coalesce(vector_leg.share, 0.0) * $12 + coalesce(word_leg.share, 0.0) * $13 AS score 
FROM vector_leg FULL OUTER JOIN word_leg ON vector_leg.id = word_leg.id AND vector_leg.chunk_key = word_leg.chunk_key), 
best AS MATERIALIZED 
(SELECT passing.id AS id, passing.chunk_key AS chunk_key, passing.text_score AS text_score, passing.score AS score 
FROM (SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused JOIN LATERAL (SELECT 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = fused.id AND documents.chunk_key = fused.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true 
WHERE chunk.similarity >= $6) AS passing ORDER BY passing.score DESC, passing.id, passing.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, size.different, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'exact' then $statement$WITH hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM (SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions}) AS near ORDER BY near.distance, near.id, near.chunk_key 
 LIMIT $3::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM hit)
 SELECT size.candidates, found.id, found.content, found.doc_type, found.metadata, found.created_at, found.chunk_index, found.start_offset, found.similarity 
FROM size LEFT OUTER JOIN (SELECT documents.id AS id, documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, array_position(sources.chunk_keys, hit.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, hit.chunk_key)] AS start_offset, 1::INTEGER - hit.distance AS similarity 
FROM hit JOIN documents ON documents.id = hit.id AND documents.chunk_key = hit.chunk_key JOIN sources ON sources.id = hit.id 
WHERE documents.tenant_id = $1::VARCHAR AND sources.tenant_id = $1::VARCHAR AND 1::INTEGER - hit.distance >= $6) AS found ON true ORDER BY found.similarity DESC, found.id, found.chunk_index$statement$
    when 'relative exact' then $statement$WITH RECURSIVE hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM (SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions}) AS near ORDER BY near.distance, near.id, near.chunk_key 
 LIMIT $14::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM hit), 
question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_5, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
met AS MATERIALIZED 
(SELECT coalesce(hit.id, text_leg.id) AS id, coalesce(hit.chunk_key, text_leg.chunk_key) AS chunk_key, text_leg.text_score AS text_score 
FROM hit FULL OUTER JOIN text_leg ON hit.id = text_leg.id AND hit.chunk_key = text_leg.chunk_key), 
measured AS MATERIALIZED 
(SELECT met.id AS id, met.chunk_key AS chunk_key, nullif(coalesce(met.text_score, scored.score), 0.0) AS text_score, chunk.embedding AS embedding, chunk.similarity AS similarity 
FROM met JOIN question ON true JOIN LATERAL (SELECT documents.embedding AS embedding, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = met.id AND documents.chunk_key = met.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true LEFT OUTER JOIN LATERAL (SELECT {score} AS score 
FROM LATERAL (SELECT document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE met.text_score IS NULL AND document_terms.tenant_id = $1::VARCHAR AND document_terms.id = met.id AND document_terms.chunk_key = met.chunk_key AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction))
 LIMIT ALL OFFSET 0::INTEGER) AS candidate) AS scored ON true), 
first AS 
(SELECT measured.id AS id, measured.chunk_key AS chunk_key, measured.text_score AS text_score, measured.embedding AS embedding, measured.similarity AS similarity, 0.6 * coalesce((measured.similarity - min(measured.similarity) OVER ()) / nullif(max(measured.similarity) OVER () - min(measured.similarity) OVER (), 0.0), 1.0) * $12 + 0.4 * coalesce(measured.text_score / max(measured.text_score) OVER (), 0.0) * $13 AS score 
FROM measured), 
second AS MATERIALIZED 
(SELECT measured.id AS id, measured.chunk_key AS chunk_key, measured.text_score AS text_score, measured.similarity + 0.3 * (1::INTEGER - (measured.embedding <=> (SELECT avg(relevant.embedding) AS avg_1 
FROM (SELECT first.embedding AS embedding 
FROM first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT 3::INTEGER) AS relevant))) AS nearness 
FROM measured), 
fused AS MATERIALIZED 
(SELECT second.id AS id, second.chunk_key AS chunk_key, second.text_score AS text_score, 0.6 * coalesce((second.nearness - min(second.nearness) OVER ()) / nullif(max(second.nearness) OVER () - min(second.nearness) OVER (), 0.0), 1.0) * $12 + 0.4 * coalesce(second.text_score / max(second.text_score) OVER (), 0.0) * $13 AS score 
FROM second), 
best AS MATERIALIZED 
(SELECT passing.id AS id, passing.chunk_key AS chunk_key, passing.text_score AS text_score, passing.score AS score 
FROM (SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused JOIN LATERAL (SELECT 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = fused.id AND documents.chunk_key = fused.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true 
WHERE chunk.similarity >= $6) AS passing ORDER BY passing.score DESC, passing.id, passing.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'rrf exact' then $statement$WITH RECURSIVE hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM (SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions}) AS near ORDER BY near.distance, near.id, near.chunk_key 
 LIMIT $14::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM hit), 
vector_leg AS 
(SELECT hit.id AS id, hit.chunk_key AS chunk_key, hit.distance AS distance, 1.0 / CAST((60::INTEGER + row_number() OVER (ORDER BY hit.distance, hit.id, hit.chunk_key)) AS NUMERIC) AS share 
FROM hit), 
question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_1, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
word_leg AS 
(SELECT text_leg.id AS id, text_leg.chunk_key AS chunk_key, text_leg.text_score AS text_score, 1.0 / CAST((60::INTEGER + row_number() OVER (ORDER BY text_leg.text_score DESC, text_leg.id, text_leg.chunk_key)) AS NUMERIC) AS share 
FROM text_leg), 
fused AS MATERIALIZED 
(SELECT coalesce(vector_leg.id, word_leg.id) AS id, coalesce(vector_leg.chunk_key, word_leg.chunk_key) AS chunk_key, word_leg.text_score AS text_score, coalesce(vector_leg.share, 0.0) * $12 + coalesce(word_leg.share, 0.0) * $13 AS score 
FROM vector_leg FULL OUTER JOIN word_leg ON vector_leg.id = word_leg.id AND vector_leg.chunk_key = word_leg.chunk_key), 
best AS MATERIALIZED 
(SELECT passing.id AS id, passing.chunk_key AS chunk_key, passing.text_score AS text_score, passing.score AS score 
FROM (SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused JOIN LATERAL (SELECT 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = fused.id AND documents.chunk_key = fused.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true 
WHERE chunk.similarity >= $6) AS passing ORDER BY passing.score DESC, passing.id, passing.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'text' then $statement$WITH RECURSIVE question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_1, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
size AS 
(SELECT count(*) AS candidates 
FROM text_leg), 
fused AS 
(SELECT text_leg.id AS id, text_leg.chunk_key AS chunk_key, text_leg.text_score AS text_score, text_leg.text_score AS score 
FROM text_leg), 
best AS MATERIALIZED 
(SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused ORDER BY fused.score DESC, fused.id, fused.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, CAST(NULL AS DOUBLE PRECISION) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'few grouped' then $statement$WITH size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM (SELECT 1::INTEGER AS one 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} 
 LIMIT $4::INTEGER) AS counted), 
hit AS MATERIALIZED 
(SELECT each.id AS id, each.chunk_key AS chunk_key, each.distance AS distance 
FROM (SELECT DISTINCT ON (near.id) near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM (SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} AND (SELECT size.candidates 
FROM size) < $4::INTEGER) AS near ORDER BY near.id, near.distance, near.chunk_key) AS each ORDER BY each.distance, each.id 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.content, found.doc_type, found.metadata, found.created_at, found.chunk_index, found.start_offset, found.similarity 
FROM size LEFT OUTER JOIN (SELECT documents.id AS id, documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, array_position(sources.chunk_keys, hit.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, hit.chunk_key)] AS start_offset, 1::INTEGER - hit.distance AS similarity 
FROM hit JOIN documents ON documents.id = hit.id AND documents.chunk_key = hit.chunk_key JOIN sources ON sources.id = hit.id 
WHERE documents.tenant_id = $1::VARCHAR AND sources.tenant_id = $1::VARCHAR AND 1::INTEGER - hit.distance >= $6) AS found ON true ORDER BY found.similarity DESC, found.id, found.chunk_index$statement$
    when 'few metadata grouped' then $statement$WITH near AS MATERIALIZED 
(SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} 
 LIMIT $4::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM near), 
hit AS MATERIALIZED 
(SELECT each.id AS id, each.chunk_key AS chunk_key, each.distance AS distance 
FROM (SELECT DISTINCT ON (near.id) near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM near 
WHERE (SELECT size.candidates 
FROM size) < $4::INTEGER ORDER BY near.id, near.distance, near.chunk_key) AS each ORDER BY each.distance, each.id 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.content, found.doc_type, found.metadata, found.created_at, found.chunk_index, found.start_offset, found.similarity 
FROM size LEFT OUTER JOIN (SELECT documents.id AS id, documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, array_position(sources.chunk_keys, hit.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, hit.chunk_key)] AS start_offset, 1::INTEGER - hit.distance AS similarity 
FROM hit JOIN documents ON documents.id = hit.id AND documents.chunk_key = hit.chunk_key JOIN sources ON sources.id = hit.id 
WHERE documents.tenant_id = $1::VARCHAR AND sources.tenant_id = $1::VARCHAR AND 1::INTEGER - hit.distance >= $6) AS found ON true ORDER BY found.similarity DESC, found.id, found.chunk_index$statement$
    when 'nearest grouped' then $statement$WITH near AS MATERIALIZED 
(SELECT documents.id AS id, documents.chunk_key AS chunk_key, documents.embedding <=> $2 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} AND (hashtextextended(documents.tenant_id, 0) & 15) = (hashtextextended($1::VARCHAR, 0) & 15) ORDER BY {order} 
 LIMIT $5::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates, count(DISTINCT round(CAST(near.distance AS NUMERIC), 3::INTEGER)) AS different 
FROM near), 
hit AS MATERIALIZED 
(SELECT each.id AS id, each.chunk_key AS chunk_key, each.distance AS distance 
FROM (SELECT DISTINCT ON (near.id) near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM near ORDER BY near.id, near.distance + 0.0, near.chunk_key) AS each ORDER BY each.distance, each.id 
 LIMIT $3::INTEGER)
 SELECT size.candidates, size.different, found.id, found.content, found.doc_type, found.metadata, found.created_at, found.chunk_index, found.start_offset, found.similarity 
FROM size LEFT OUTER JOIN (SELECT documents.id AS id, documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, array_position(sources.chunk_keys, hit.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, hit.chunk_key)] AS start_offset, 1::INTEGER - hit.distance AS similarity 
FROM hit JOIN documents ON documents.id = hit.id AND documents.chunk_key = hit.chunk_key JOIN sources ON sources.id = hit.id 
WHERE documents.tenant_id = $1::VARCHAR AND sources.tenant_id = $1::VARCHAR AND 1::INTEGER - hit.distance >= $6) AS found ON true ORDER BY found.similarity DESC, found.id, found.chunk_index$statement$
    when 'relative nearest grouped' then $statement$WITH RECURSIVE near AS MATERIALIZED 
(SELECT documents.id AS id, documents.chunk_key AS chunk_key, documents.embedding <=> $2 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} AND (hashtextextended(documents.tenant_id, 0) & 15) = (hashtextextended($1::VARCHAR, 0) & 15) ORDER BY {order} 
 LIMIT $5::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates, count(DISTINCT round(CAST(near.distance AS NUMERIC), 3::INTEGER)) AS different 
FROM near), 
hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM near ORDER BY near.distance + 0.0, near.id, near.chunk_key 
 LIMIT $14::INTEGER), 
question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_5, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
met AS MATERIALIZED 
(SELECT coalesce(hit.id, text_leg.id) AS id, coalesce(hit.chunk_key, text_leg.chunk_key) AS chunk_key, text_leg.text_score AS text_score 
FROM hit FULL OUTER JOIN text_leg ON hit.id = text_leg.id AND hit.chunk_key = text_leg.chunk_key), 
measured AS MATERIALIZED 
(SELECT met.id AS id, met.chunk_key AS chunk_key, nullif(coalesce(met.text_score, scored.score), 0.0) AS text_score, chunk.embedding AS embedding, chunk.similarity AS similarity 
FROM met JOIN question ON true JOIN LATERAL (SELECT documents.embedding AS embedding, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = met.id AND documents.chunk_key = met.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true LEFT OUTER JOIN LATERAL (SELECT {score} AS score 
FROM LATERAL (SELECT document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE met.text_score IS NULL AND document_terms.tenant_id = $1::VARCHAR AND document_terms.id = met.id AND document_terms.chunk_key = met.chunk_key AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction))
 LIMIT ALL OFFSET 0::INTEGER) AS candidate) AS scored ON true), 
first AS 
(SELECT measured.id AS id, measured.chunk_key AS chunk_key, measured.text_score AS text_score, measured.embedding AS embedding, measured.similarity AS similarity, 0.6 * coalesce((measured.similarity - min(measured.similarity) OVER ()) / nullif(max(measured.similarity) OVER () - min(measured.similarity) OVER (), 0.0), 1.0) * $12 + 0.4 * coalesce(measured.text_score / max(measured.text_score) OVER (), 0.0) * $13 AS score 
FROM measured), 
second AS MATERIALIZED 
(SELECT measured.id AS id, measured.chunk_key AS chunk_key, measured.text_score AS text_score, measured.similarity + 0.3 * (1::INTEGER - (measured.embedding <=> (SELECT avg(relevant.embedding) AS avg_1 
FROM (SELECT first.embedding AS embedding 
FROM first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT 3::INTEGER) AS relevant))) AS nearness 
FROM measured), 
fused AS MATERIALIZED 
(SELECT second.id AS id, second.chunk_key AS chunk_key, second.text_score AS text_score, 0.6 * coalesce((second.nearness - min(second.nearness) OVER ()) / nullif(max(second.nearness) OVER () - min(second.nearness) OVER (), 0.0), 1.0) * $12 + 0.4 * coalesce(second.text_score / max(second.text_score) OVER (), 0.0) * $13 AS score 
FROM second), 
best AS MATERIALIZED 
(SELECT first.id AS id, first.chunk_key AS chunk_key, first.text_score AS text_score, first.score AS score 
FROM (SELECT DISTINCT ON (passing.id) passing.id AS id, passing.chunk_key AS chunk_key, passing.text_score AS text_score, passing.score AS score 
FROM (SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused JOIN LATERAL (SELECT 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = fused.id AND documents.chunk_key = fused.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true 
WHERE chunk.similarity >= $6) AS passing ORDER BY passing.id, passing.score DESC, passing.id, passing.chunk_key) AS first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, size.different, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'rrf nearest grouped' then $statement$WITH RECURSIVE near AS MATERIALIZED 
(SELECT documents.id AS id, documents.chunk_key AS chunk_key, documents.embedding <=> $2 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} AND (hashtextextended(documents.tenant_id, 0) & 15) = (hashtextextended($1::VARCHAR, 0) & 15) ORDER BY {order} 
 LIMIT $5::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates, count(DISTINCT round(CAST(near.distance AS NUMERIC), 3::INTEGER)) AS different 
FROM near), 
hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM near ORDER BY near.distance + 0.0, near.id, near.chunk_key 
 LIMIT $14::INTEGER), 
vector_leg AS 
(SELECT hit.id AS id, hit.chunk_key AS chunk_key, hit.distance AS distance, 1.0 / CAST((60::INTEGER + row_number() OVER (ORDER BY hit.distance, hit.id, hit.chunk_key)) AS NUMERIC) AS share 
FROM hit), 
question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_1, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
word_leg AS 
(SELECT text_leg.id AS id, text_leg.chunk_key AS chunk_key, text_leg.text_score AS text_score, 1.0 / CAST((60::INTEGER + row_number() OVER (ORDER BY text_leg.text_score DESC, text_leg.id, text_leg.chunk_key)) AS NUMERIC) AS share 
FROM text_leg), 
fused AS MATERIALIZED 
(SELECT coalesce(vector_leg.id, word_leg.id) AS id, coalesce(vector_leg.chunk_key, word_leg.chunk_key) AS chunk_key, word_leg.text_score AS text_score, coalesce(vector_leg.share, 0.0) * $12 + coalesce(word_leg.share, 0.0) * $13 AS score 
FROM vector_leg FULL OUTER JOIN word_leg ON vector_leg.id = word_leg.id AND vector_leg.chunk_key = word_leg.chunk_key), 
best AS MATERIALIZED 
(SELECT first.id AS id, first.chunk_key AS chunk_key, first.text_score AS text_score, first.score AS score 
FROM (SELECT DISTINCT ON (passing.id) passing.id AS id, passing.chunk_key AS chunk_key, passing.text_score AS text_score, passing.score AS score 
FROM (SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused JOIN LATERAL (SELECT 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = fused.id AND documents.chunk_key = fused.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true 
WHERE chunk.similarity >= $6) AS passing ORDER BY passing.id, passing.score DESC, passing.id, passing.chunk_key) AS first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, size.different, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'exact grouped' then $statement$WITH hit AS MATERIALIZED 
(SELECT each.id AS id, each.chunk_key AS chunk_key, each.distance AS distance 
FROM (SELECT DISTINCT ON (near.id) near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM (SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions}) AS near ORDER BY near.id, near.distance, near.chunk_key) AS each ORDER BY each.distance, each.id 
 LIMIT $3::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM hit)
 SELECT size.candidates, found.id, found.content, found.doc_type, found.metadata, found.created_at, found.chunk_index, found.start_offset, found.similarity 
FROM size LEFT OUTER JOIN (SELECT documents.id AS id, documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, array_position(sources.chunk_keys, hit.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, hit.chunk_key)] AS start_offset, 1::INTEGER - hit.distance AS similarity 
FROM hit JOIN documents ON documents.id = hit.id AND documents.chunk_key = hit.chunk_key JOIN sources ON sources.id = hit.id 
WHERE documents.tenant_id = $1::VARCHAR AND sources.tenant_id = $1::VARCHAR AND 1::INTEGER - hit.distance >= $6) AS found ON true ORDER BY found.similarity DESC, found.id, found.chunk_index$statement$
    when 'relative exact grouped' then $statement$WITH RECURSIVE hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM (SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions}) AS near ORDER BY near.distance, near.id, near.chunk_key 
 LIMIT $14::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM hit), 
question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_5, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
met AS MATERIALIZED 
(SELECT coalesce(hit.id, text_leg.id) AS id, coalesce(hit.chunk_key, text_leg.chunk_key) AS chunk_key, text_leg.text_score AS text_score 
FROM hit FULL OUTER JOIN text_leg ON hit.id = text_leg.id AND hit.chunk_key = text_leg.chunk_key), 
measured AS MATERIALIZED 
(SELECT met.id AS id, met.chunk_key AS chunk_key, nullif(coalesce(met.text_score, scored.score), 0.0) AS text_score, chunk.embedding AS embedding, chunk.similarity AS similarity 
FROM met JOIN question ON true JOIN LATERAL (SELECT documents.embedding AS embedding, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = met.id AND documents.chunk_key = met.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true LEFT OUTER JOIN LATERAL (SELECT {score} AS score 
FROM LATERAL (SELECT document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE met.text_score IS NULL AND document_terms.tenant_id = $1::VARCHAR AND document_terms.id = met.id AND document_terms.chunk_key = met.chunk_key AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction))
 LIMIT ALL OFFSET 0::INTEGER) AS candidate) AS scored ON true), 
first AS 
(SELECT measured.id AS id, measured.chunk_key AS chunk_key, measured.text_score AS text_score, measured.embedding AS embedding, measured.similarity AS similarity, 0.6 * coalesce((measured.similarity - min(measured.similarity) OVER ()) / nullif(max(measured.similarity) OVER () - min(measured.similarity) OVER (), 0.0), 1.0) * $12 + 0.4 * coalesce(measured.text_score / max(measured.text_score) OVER (), 0.0) * $13 AS score 
FROM measured), 
second AS MATERIALIZED 
(SELECT measured.id AS id, measured.chunk_key AS chunk_key, measured.text_score AS text_score, measured.similarity + 0.3 * (1::INTEGER - (measured.embedding <=> (SELECT avg(relevant.embedding) AS avg_1 
FROM (SELECT first.embedding AS embedding 
FROM first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT 3::INTEGER) AS relevant))) AS nearness 
FROM measured), 
fused AS MATERIALIZED 
(SELECT second.id AS id, second.chunk_key AS chunk_key, second.text_score AS text_score, 0.6 * coalesce((second.nearness - min(second.nearness) OVER ()) / nullif(max(second.nearness) OVER () - min(second.nearness) OVER (), 0.0), 1.0) * $12 + 0.4 * coalesce(second.text_score / max(second.text_score) OVER (), 0.0) * $13 AS score 
FROM second), 
best AS MATERIALIZED 
(SELECT first.id AS id, first.chunk_key AS chunk_key, first.text_score AS text_score, first.score AS score 
FROM (SELECT DISTINCT ON (passing.id) passing.id AS id, passing.chunk_key AS chunk_key, passing.text_score AS text_score, passing.score AS score 
FROM (SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused JOIN LATERAL (SELECT 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = fused.id AND documents.chunk_key = fused.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true 
WHERE chunk.similarity >= $6) AS passing ORDER BY passing.id, passing.score DESC, passing.id, passing.chunk_key) AS first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'rrf exact grouped' then $statement$WITH RECURSIVE hit AS MATERIALIZED 
(SELECT near.id AS id, near.chunk_key AS chunk_key, near.distance AS distance 
FROM (SELECT documents.id AS id, documents.chunk_key AS chunk_key, (documents.embedding <=> $2) + 0.0 AS distance 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions}) AS near ORDER BY near.distance, near.id, near.chunk_key 
 LIMIT $14::INTEGER), 
size AS MATERIALIZED 
(SELECT count(*) AS candidates 
FROM hit), 
vector_leg AS 
(SELECT hit.id AS id, hit.chunk_key AS chunk_key, hit.distance AS distance, 1.0 / CAST((60::INTEGER + row_number() OVER (ORDER BY hit.distance, hit.id, hit.chunk_key)) AS NUMERIC) AS share 
FROM hit), 
question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_1, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
word_leg AS 
(SELECT text_leg.id AS id, text_leg.chunk_key AS chunk_key, text_leg.text_score AS text_score, 1.0 / CAST((60::INTEGER + row_number() OVER (ORDER BY text_leg.text_score DESC, text_leg.id, text_leg.chunk_key)) AS NUMERIC) AS share 
FROM text_leg), 
fused AS MATERIALIZED 
(SELECT coalesce(vector_leg.id, word_leg.id) AS id, coalesce(vector_leg.chunk_key, word_leg.chunk_key) AS chunk_key, word_leg.text_score AS text_score, coalesce(vector_leg.share, 0.0) * $12 + coalesce(word_leg.share, 0.0) * $13 AS score 
FROM vector_leg FULL OUTER JOIN word_leg ON vector_leg.id = word_leg.id AND vector_leg.chunk_key = word_leg.chunk_key), 
best AS MATERIALIZED 
(SELECT first.id AS id, first.chunk_key AS chunk_key, first.text_score AS text_score, first.score AS score 
FROM (SELECT DISTINCT ON (passing.id) passing.id AS id, passing.chunk_key AS chunk_key, passing.text_score AS text_score, passing.score AS score 
FROM (SELECT fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused JOIN LATERAL (SELECT 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = fused.id AND documents.chunk_key = fused.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true 
WHERE chunk.similarity >= $6) AS passing ORDER BY passing.id, passing.score DESC, passing.id, passing.chunk_key) AS first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, 1::INTEGER - (documents.embedding <=> $2) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'text grouped' then $statement$WITH RECURSIVE question AS MATERIALIZED 
(SELECT asked.terms AS terms, asked.queries AS queries, asked.weights AS weights, asked.bounds AS bounds, asked.total AS total, asked.mean_length AS mean_length, asked.required AS required, asked.restriction AS restriction, CAST(array_to_string(CAST(asked.queries AS TEXT[]), '|'::VARCHAR) AS TSQUERY) AS alternatives 
FROM text_question_read($1::VARCHAR, $10::VARCHAR, 24::INTEGER, 12000::INTEGER) AS asked), 
pass(step, threshold, proven, ids, chunk_keys, scores) AS 
(SELECT 0::INTEGER AS step, CAST(0 AS DOUBLE PRECISION) AS threshold, false AS proven, null::text[] collate "C" AS ids, null::text[] collate "C" AS chunk_keys, CAST(NULL AS DOUBLE PRECISION[]) AS scores 
FROM question 
WHERE question.total > 0::INTEGER UNION ALL SELECT pass.step + 1::INTEGER AS anon_2, coalesce(found.scores[$11::INTEGER], least(pass.threshold, question.total * coalesce((array[0.42, 0.3, 0.2, 0.1])[(pass.step + 1::INTEGER)], 0))) AS coalesce_1, pass.threshold <= 0::INTEGER OR coalesce(found.scores[$11::INTEGER] >= pass.threshold, false) AS anon_3, found.ids AS ids, found.chunk_keys AS chunk_keys, found.scores AS scores 
FROM pass JOIN question ON true JOIN LATERAL (SELECT array_agg(top.id ORDER BY top.score DESC, top.id, top.chunk_key) AS ids, array_agg(top.chunk_key ORDER BY top.score DESC, top.id, top.chunk_key) AS chunk_keys, array_agg(top.score ORDER BY top.score DESC, top.id, top.chunk_key) AS scores 
FROM LATERAL (SELECT candidate.id AS id, candidate.chunk_key AS chunk_key, {score} AS score 
FROM LATERAL (SELECT document_terms.id AS id, document_terms.chunk_key AS chunk_key, document_terms.terms AS terms, 0.3 + 0.8999999999999999 * (CAST(document_terms.length AS DOUBLE PRECISION) / CAST(question.mean_length AS DOUBLE PRECISION)) AS norm 
FROM document_terms 
WHERE document_terms.tenant_id = $1::VARCHAR AND (question.restriction IS NULL OR (document_terms.terms @@ question.restriction)) AND (document_terms.terms @@ question.alternatives) AND {passing}
 LIMIT ALL OFFSET 0::INTEGER) AS candidate ORDER BY score desc, candidate.id, candidate.chunk_key 
 LIMIT $11::INTEGER) AS top 
WHERE top.score > 0::INTEGER) AS found ON true 
WHERE NOT pass.proven), 
text_leg AS 
(SELECT anon_1.id AS id, anon_1.chunk_key AS chunk_key, anon_1.text_score AS text_score 
FROM pass JOIN unnest(pass.ids, pass.chunk_keys, pass.scores) AS anon_1(id, chunk_key, text_score) ON true 
WHERE pass.proven), 
size AS 
(SELECT count(*) AS candidates 
FROM text_leg), 
fused AS 
(SELECT text_leg.id AS id, text_leg.chunk_key AS chunk_key, text_leg.text_score AS text_score, text_leg.text_score AS score 
FROM text_leg), 
best AS MATERIALIZED 
(SELECT first.id AS id, first.chunk_key AS chunk_key, first.text_score AS text_score, first.score AS score 
FROM (SELECT DISTINCT ON (fused.id) fused.id AS id, fused.chunk_key AS chunk_key, fused.text_score AS text_score, fused.score AS score 
FROM fused ORDER BY fused.id, fused.score DESC, fused.id, fused.chunk_key) AS first ORDER BY first.score DESC, first.id, first.chunk_key 
 LIMIT $3::INTEGER)
 SELECT size.candidates, found.id, found.text_score, found.score, found.content, found.doc_type, found.metadata, found.created_at, found.similarity, found.chunk_index, found.start_offset 
FROM size LEFT OUTER JOIN (SELECT best.id AS id, best.text_score AS text_score, best.score AS score, chunk.content AS content, chunk.doc_type AS doc_type, chunk.metadata AS metadata, chunk.created_at AS created_at, chunk.similarity AS similarity, array_position(sources.chunk_keys, best.chunk_key) - 1::INTEGER AS chunk_index, sources.start_offsets[array_position(sources.chunk_keys, best.chunk_key)] AS start_offset 
FROM best JOIN LATERAL (SELECT documents.content AS content, documents.doc_type AS doc_type, documents.metadata AS metadata, documents.created_at AS created_at, CAST(NULL AS DOUBLE PRECISION) AS similarity 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND documents.id = best.id AND documents.chunk_key = best.chunk_key 
 LIMIT 1::INTEGER) AS chunk ON true JOIN sources ON sources.id = best.id 
WHERE sources.tenant_id = $1::VARCHAR) AS found ON true ORDER BY found.score DESC, found.id, found.chunk_index$statement$
    when 'count' then $statement$SELECT count(*) AS count_1 
FROM (SELECT 1 AS one 
FROM documents 
WHERE documents.tenant_id = $1::VARCHAR AND {conditions} 
 LIMIT $4::INTEGER) AS counted$statement$
    when 'passing' then $statement$EXISTS (SELECT 1 
FROM documents 
WHERE documents.id = document_terms.id AND documents.chunk_key = document_terms.chunk_key AND documents.tenant_id = $1::VARCHAR AND {conditions})$statement$
    when 'score' then $statement$coalesce(question.weights[1] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[1])) - 0.5), 0)), 0) + coalesce(question.weights[2] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[2])) - 0.5), 0)), 0) + coalesce(question.weights[3] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[3])) - 0.5), 0)), 0) + coalesce(question.weights[4] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[4])) - 0.5), 0)), 0) + coalesce(question.weights[5] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[5])) - 0.5), 0)), 0) + coalesce(question.weights[6] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[6])) - 0.5), 0)), 0) + case when cardinality(question.weights) > 6 then coalesce(question.weights[7] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[7])) - 0.5), 0)), 0) + coalesce(question.weights[8] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[8])) - 0.5), 0)), 0) + coalesce(question.weights[9] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[9])) - 0.5), 0)), 0) + coalesce(question.weights[10] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[10])) - 0.5), 0)), 0) + coalesce(question.weights[11] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[11])) - 0.5), 0)), 0) + coalesce(question.weights[12] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[12])) - 0.5), 0)), 0) + case when cardinality(question.weights) > 12 then coalesce(question.weights[13] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[13])) - 0.5), 0)), 0) + coalesce(question.weights[14] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[14])) - 0.5), 0)), 0) + coalesce(question.weights[15] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[15])) - 0.5), 0)), 0) + coalesce(question.weights[16] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[16])) - 0.5), 0)), 0) + coalesce(question.weights[17] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[17])) - 0.5), 0)), 0) + coalesce(question.weights[18] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[18])) - 0.5), 0)), 0) + coalesce(question.weights[19] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[19])) - 0.5), 0)), 0) + coalesce(question.weights[20] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[20])) - 0.5), 0)), 0) + coalesce(question.weights[21] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[21])) - 0.5), 0)), 0) + coalesce(question.weights[22] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[22])) - 0.5), 0)), 0) + coalesce(question.weights[23] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[23])) - 0.5), 0)), 0) + coalesce(question.weights[24] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685 * ts_rank('{1,1,1,1}', candidate.terms, question.queries[24])) - 0.5), 0)), 0) + case when cardinality(question.weights) > 24 then 0 else 0 end else 0 end else 0 end$statement$
    when 'order full' then $statement$documents.embedding <=> $2$statement$
    when 'order half' then $statement$CAST(documents.embedding AS HALFVEC({dimensions})) <=> CAST($2 AS HALFVEC({dimensions}))$statement$
    when 'order binary' then $statement$CAST(binary_quantize(documents.embedding) AS BIT({dimensions})) <~> CAST(binary_quantize($2) AS BIT({dimensions}))$statement$
    when 'doc_types' then $statement$documents.doc_type = any($7::TEXT[])$statement$
    when 'created_after' then $statement$documents.created_at >= $8::TIMESTAMP WITH TIME ZONE$statement$
    when 'created_before' then $statement$documents.created_at < $9::TIMESTAMP WITH TIME ZONE$statement$
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
    most constant integer := case called when 'recall_check' then 1000 - 1 else 1000 end;
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
        when tenant !~ '^[A-Za-z0-9_.:-]{1,128}$'
            then 'tenant: ' || quote_literal(left(tenant, 140))
                 || ' is not allowed; allowed: 1 to 128 letters, digits, ''_'', ''.'', '':'' or ''-'''
        when called = 'similar_documents' and document is null then 'id: is missing'
        when octet_length(document) not between 1 and 512
            then 'id: is ' || octet_length(document) || ' bytes; allowed: 1 to 512 bytes in UTF-8'
        when called = 'search_documents' and query_embedding is null then 'query_embedding: is missing'
        when called = 'hybrid_search' and query_text is null then 'query_text: is missing'
        when query_text !~ '[^\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]' then 'query_text: is white space only; allowed: a text'
        when octet_length(query_text) > 32000
            then 'query_text: has ' || octet_length(query_text) || ' bytes; allowed: 1 to 32000'
        when not vector_norm(query_embedding) between 1e-09 and 1000000000.0
            then 'query_embedding: has length ' || vector_norm(query_embedding) || '; allowed: 1e-09 to 1000000000.0'
        when top_k is null or top_k not between 1 and most
            then 'top_k: is ' || coalesce(top_k::text, 'null') || '; allowed: 1 to ' || most
        when query_embedding is null and threshold is not null
            then 'threshold: is on cosine similarity; allowed: only with a query_embedding'
        when not threshold between -1 and 1 then 'threshold: is ' || threshold || '; allowed: -1 to 1'
        when octet_length(doc_type) > 32000
            then 'doc_type: is ' || octet_length(doc_type) || ' bytes; allowed: 0 to 32000 bytes in UTF-8'
        when cardinality(doc_types) > 1000
            then 'doc_types: has ' || cardinality(doc_types) || ' types; allowed: at most 1000'
        when array_position(doc_types, null) is not null
            then 'doc_types[' || array_position(doc_types, null) || ']: is null; allowed: texts'
        when not (created_after >= '0002-01-01T00:00:00+00:00' and created_after < '9999-01-01T00:00:00+00:00')
            then 'created_after: is ' || created_after || '; allowed: years 0002 to 9998'
        when not (created_before >= '0002-01-01T00:00:00+00:00' and created_before < '9999-01-01T00:00:00+00:00')
            then 'created_before: is ' || created_before || '; allowed: years 0002 to 9998'
        when by_document is null then 'by_document: is null; allowed: true or false'
        when ef_search not between 10 and 1000
            then 'ef_search: is ' || ef_search || '; allowed: 10 to 1000'
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
    leg constant integer := greatest(100, top_k);
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
                                       || to_char(hashtextextended(tenant, 0) & (16 - 1), 'FM00') || '_idx')) as rows
      into layout from vector_indexes i where i.state = 'active';
    if layout.rows is null then
        select 'full' as kind, 4 as oversampling, 0 as rows into layout;
    end if;
    candidates := least(
        greatest(ceil(top_k * layout.oversampling)::integer, case when mixed then leg else top_k end, 40),
        1000);
    bound := round(least(greatest(sqrt(8 * candidates * layout.rows), 500), 20000));
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
                    set_config('hnsw.ef_search', least(greatest(coalesce(ef_search, 250), candidates), 1000)::text, true);
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
        elsif different * 3 < measured then
            step := 'exact';  -- caught among copies of one text, which are neighbours of nothing but each other
            completing := true;
        else
            exit when measured >= candidates
                and (mixed or cardinality(ids) = top_k or threshold is not null and not by_document);
            if measured < candidates or candidates = 1000 then
                step := 'exact';
                completing := true;
            else
                candidates := least(4 * candidates, 1000);  -- many chunks of few documents
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
