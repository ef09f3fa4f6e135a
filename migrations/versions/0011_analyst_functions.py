"""The functions for analysts again: arguments checked as the API checks them, words found in one look at each row.

Functions only: no lock that anyone waits for, and the previous release does not call them. Their SQL stands beside it, as that
of 0008 does, which the downgrade brings back.
"""

from pathlib import Path

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

FUNCTIONS = Path(__file__).with_suffix(".sql")

CHECK = "search_fault(text, text, integer, text, vector, text, double precision, text, text[], jsonb, timestamptz, timestamptz, integer, boolean, boolean, text, double precision, double precision, integer, bigint)"
COMMENTS = {
    "refuse(text, text)": "Raises the fault with its hint (SQLSTATE 22023), or does nothing without one.",
    CHECK: "What is wrong with the arguments of the function that was called, and what to do about it; nulls where nothing is. Ranges and words are the API's.",
    "similar_documents(text, text, integer)": "The documents of a tenant nearest to the mean of one document's vectors, without itself; content is their nearest chunk. "
    "top_k: the most rows, 1 to 1000. No rows where there is no such document, or none with a vector. "
    "Example: select id, similarity from similar_documents('acme', 'faq/password', 5);",
    "recall_check(text, integer, integer, integer, bigint)": "Searches a tenant with a sample of its own chunks, as search_documents does and exactly. "
    "top_k: 1 to 999, one less than elsewhere, because each of the sample finds itself. sample: how many, 1 to 10000. ef_search: breadth of the index walk, 10 to 1000. "
    "seed chooses another sample. walked: of the queries, how many were answered by the index. recall, least_recall: share of the top_k nearest that were found, mean and worst. "
    "search_ms, exact_ms: medians. Example: select * from recall_check('acme', 10, 100);",
}


def _run(statement: str) -> None:
    op.execute(statement.replace(":", r"\:"))


def upgrade() -> None:
    for statement in FUNCTIONS.read_text().split("\n-- ;;\n"):
        _run(statement.strip())
    for function, comment in COMMENTS.items():
        _run("comment on function {} is '{}'".format(function, comment.replace("'", "''")))


def downgrade() -> None:
    op.get_context().script.get_revision("0008").module.upgrade()
    _run(f"drop function if exists {CHECK}")
    _run("drop function if exists refuse(text, text)")
