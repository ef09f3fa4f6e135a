"""The functions for analysts: search_documents, hybrid_search, similar_documents, recall_check.

Only new functions: no lock that anyone waits for, and the previous release does not know them. Their SQL was rendered from
the builder of the API's statements (app/analysts.py) when this revision was written and stands beside it, because a
migration must not change when the builder does.
"""

from pathlib import Path

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

FUNCTIONS = Path(__file__).with_suffix(".sql")

CONDITIONS = (
    "top_k: the most rows, 1 to 1000. threshold: least cosine similarity, -1 to 1. doc_type, or one of doc_types. metadata: "
    "the conditions of the API ({}). created_after, created_before: from, to before. by_document: the best chunk of each "
    "document. ef_search: breadth of the index walk, 10 to 1000. exact: measure every row that passes. "
)
COMMENTS = {
    "search_documents(text, vector, integer, double precision, text, jsonb, timestamptz, timestamptz, text[], boolean, integer, boolean)": "The chunks of a tenant nearest to a vector, best first, as POST /search gives them. "
    + CONDITIONS.format('{"lang": "en", "year": {"$gte": 2024}}')
    + "scan says how they were found: exact (every row measured), index (the HNSW index walked), completed (walked, short, then measured). "
    "Example: select id, similarity from search_documents('acme', (select embedding from documents where tenant_id = 'acme' and id = 'faq/password' limit 1), 5, doc_type => 'faq');",
    "hybrid_search(text, text, vector, integer, double precision, text, jsonb, timestamptz, timestamptz, text[], boolean, integer, boolean, text, double precision, double precision)": "The chunks of a tenant by words (BM25) and by nearness to a vector, fused as POST /search does in the mode hybrid; by words alone without a vector. "
    + CONDITIONS.format('{"lang": "en"}')
    + "fusion: relative or rrf. vector_weight, text_weight: of the legs, 0 to 100. "
    "Example: select id, score, similarity, text_score from hybrid_search('acme', 'reset password', null, 5);",
    "similar_documents(text, text, integer)": "The documents of a tenant nearest to the mean of one document's vectors, without itself; content is their nearest chunk. "
    "Example: select id, similarity from similar_documents('acme', 'faq/password', 5);",
    "recall_check(text, integer, integer, bigint, integer)": "",
    "search_chunks(text, vector, text, integer, double precision, text[], jsonb, timestamptz, timestamptz, integer, boolean, boolean, text, double precision, double precision)": "What search_documents and hybrid_search call: chooses the scan by how many rows pass, walks the index, completes what comes back short.",
    "search_statement(text)": "The statements of search_chunks by name, as the service's, over the tables; braces stand for what a call puts in.",
    "metadata_condition(jsonb, text, text[], integer)": 'A filter on metadata in the API\'s language as a condition in SQL on documents.metadata; raises where the API refuses. Example: select metadata_condition(\'{"year": {"$gte": 2024}}\');',
    "metadata_equality(text, jsonb[], text[])": "For metadata_condition: the value under these keys is one of those asked for, or an array that holds one.",
    "metadata_value(text[])": "For metadata_condition: the value under these keys; a dotted first key is looked for as it is, then as a path.",
    "text_question_read(text, text, integer, integer)": "text_question over the tables, for who reads them under row-level security.",
}
del COMMENTS["recall_check(text, integer, integer, bigint, integer)"]
COMMENTS["recall_check(text, integer, integer, integer, bigint)"] = (
    "Searches a tenant with a sample of its own chunks, as search_documents does and exactly. walked: of the queries, how "
    "many were answered by the index. recall, least_recall: share of the top_k nearest that were found, mean and worst. "
    "search_ms, exact_ms: medians. seed chooses another sample. Example: select * from recall_check('acme', 10, 100);"
)


def _run(statement: str) -> None:
    op.execute(statement.replace(":", r"\:"))


def upgrade() -> None:
    for statement in FUNCTIONS.read_text().split("\n-- ;;\n"):
        _run(statement.strip())
    for function, comment in COMMENTS.items():
        _run("comment on function {} is '{}'".format(function, comment.replace("'", "''")))


def downgrade() -> None:
    for function in COMMENTS:
        _run(f"drop function if exists {function}")
