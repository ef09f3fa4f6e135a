"""Sixteen HNSW indexes in place of one, each over the tenants of one bucket; type and metadata in one GIN index.

In a graph of the whole table a small tenant is one node in many hundred, and most of a walk is thrown away. A partial
index holds the rows of one bucket only: every row is in exactly one, so writing costs what it did.

Locks: CREATE INDEX CONCURRENTLY and DROP INDEX CONCURRENTLY only, each outside a transaction; the table is read once for
each index and the old one serves until the last is there. A build that failed leaves an invalid index, which the next
run replaces. The previous release works on this schema, by the exact scan where it looked for the old index.
"""

from collections.abc import Iterator

from alembic import op
from sqlalchemy import text

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BUCKETS = 16

TABLE = """
create table if not exists vector_indexes (
    kind text not null,
    state text not null,
    oversampling double precision not null,
    created_at timestamptz not null default now(),
    constraint vector_indexes_pkey primary key (kind),
    constraint vector_indexes_kind_check check (kind in ('full', 'half', 'binary')),
    constraint vector_indexes_state_check check (state in ('active', 'building', 'retired')),
    constraint vector_indexes_oversampling_check check (oversampling between 1 and 100)
);
create unique index if not exists vector_indexes_active_idx on vector_indexes (state) where state = 'active';
grant select on vector_indexes to pgrecall_app, pgrecall_worker, pgrecall_analyst, pgrecall_backup;
"""

COMMENTS = {
    "table vector_indexes": "The kinds of HNSW index over documents.embedding. Exactly one is active.",
    "column vector_indexes.kind": "full, half (half precision) or binary (one bit a dimension).",
    "column vector_indexes.state": "active: searched. building: being made. retired: to be dropped.",
    "column vector_indexes.oversampling": "Candidates taken from the index for each hit, then measured by the stored vectors.",
    "column vector_indexes.created_at": "When it was asked for.",
    "index vector_indexes_pkey": "One row a kind.",
    "index vector_indexes_active_idx": "At most one kind is active.",
}
NEED_BTREE_GIN = {"documents_labels_idx", "documents_metadata_idx"}
LABELS = "Type and metadata conditions of one tenant together: doc_type = any (…) and metadata @> '{\"key\": value}'."
BUCKET = "HNSW over cosine distance for the tenants where hashtextextended(tenant_id, 0) & 15 = {bucket}: nearest chunks, filtered while it is walked."


def _indexes(dimensions: int) -> Iterator[tuple[str, str, str]]:
    """Name, definition and comment of each HNSW index."""
    kind, indexed = (
        ("full", "embedding vector_cosine_ops")
        if dimensions <= 2_000
        else ("half", f"(embedding::halfvec({dimensions})) halfvec_cosine_ops")
    )
    for bucket in range(BUCKETS):
        yield (
            f"documents_embedding_{kind}_{bucket:02}_idx",
            f"using hnsw ({indexed}) with (m = 16, ef_construction = 200) where ((hashtextextended(tenant_id, 0) & 15) = {bucket})",
            BUCKET.format(bucket=bucket),
        )


def _run(statement: str) -> None:
    op.execute(statement.strip().replace(":", r"\:"))


def _comment(thing: str, comment: str, note: str = "") -> None:
    _run("{}comment on {} is '{}'".format(note, thing, comment.replace("'", "''")))


def _build(name: str, definition: str, comment: str) -> None:
    """An index made without keeping writers out, in place of an invalid one that a failed run left."""
    # Nothing concurrent can be made conditional in SQL, so what is printed (--sql) tells its reader.
    note = "-- Only where the extension btree_gin is:\n" if name in NEED_BTREE_GIN and op.get_context().as_sql else ""
    _run(f"""do $$ begin
    if exists (select from pg_index where indexrelid = to_regclass('{name}') and not indisvalid) then
        set local lock_timeout = '4s';  -- unlike what is concurrent, this makes others wait behind it
        execute 'drop index {name}';
    end if;
end $$""")
    _run(f"{note}create index concurrently if not exists {name} on documents {definition}")
    _comment(f"index {name}", comment, note)


def _has_btree_gin() -> bool:
    if op.get_context().as_sql:
        return True
    return op.get_bind().execute(text("select from pg_extension where extname = 'btree_gin'")).first() is not None


def _swap(build: list[tuple[str, str, str]], drop: list[str]) -> None:
    with op.get_context().autocommit_block():
        # Concurrent work waits for long transactions without anyone waiting for it.
        _run("set lock_timeout = '1h'")
        _run("set statement_timeout = 0")
        for index in build:
            _build(*index)
        for name in drop:
            _run(f"drop index concurrently if exists {name}")
        _run("set lock_timeout = '4s'")
        _run("set statement_timeout = '60s'")


def upgrade() -> None:
    dimensions = int(op.get_context().opts["embedding_dimensions"])
    kind = "full" if dimensions <= 2_000 else "half"
    labels = [
        ("documents_labels_idx", "using gin (tenant_id, doc_type, metadata jsonb_path_ops)", LABELS),
    ]
    _swap(
        [*_indexes(dimensions), *(labels if _has_btree_gin() else [])],
        ["documents_embedding_idx", "documents_metadata_idx"],
    )
    for statement in TABLE.split(";\n"):
        if statement.strip():
            _run(statement)
    for thing, comment in COMMENTS.items():
        _comment(thing, comment)
    _run(
        f"insert into vector_indexes (kind, state, oversampling) values ('{kind}', 'active', 4) on conflict do nothing"
    )


def downgrade() -> None:
    dimensions = int(op.get_context().opts["embedding_dimensions"])
    whole = (
        "using hnsw (embedding vector_cosine_ops) with (m = 16, ef_construction = 64)"
        if dimensions <= 2_000
        else f"using hnsw ((embedding::halfvec({dimensions})) halfvec_cosine_ops) with (m = 16, ef_construction = 64)"
    )
    metadata = (
        "documents_metadata_idx",
        "using gin (tenant_id, metadata jsonb_path_ops)",
        "Metadata conditions of the form metadata @> '{\"key\": value}' within a tenant.",
    )
    comment = "HNSW over cosine distance: nearest chunks of all tenants, filtered while it is walked."
    _swap(
        [("documents_embedding_idx", whole, comment), *([metadata] if _has_btree_gin() else [])],
        [
            f"documents_embedding_{kind}_{bucket:02}_idx"
            for kind in ("full", "half", "binary")
            for bucket in range(BUCKETS)
        ]
        + ["documents_labels_idx"],
    )
    _run("drop table vector_indexes")
