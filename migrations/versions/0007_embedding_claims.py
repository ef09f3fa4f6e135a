"""Claims on texts that are being embedded, so that two processes do not pay for the same text at once.

One new, empty table. The previous release works on this schema and claims nothing: beside it the same text may be
embedded twice, which costs but breaks nothing.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TENANT = "tenant_id = current_setting('pgrecall.tenant_id', true)"
TABLE = f"""
create table if not exists embedding_claims (
    tenant_id text collate "C" not null,
    model text not null,
    dimensions integer not null,
    input_type text not null,
    content_sha256 bytea not null,
    holder uuid not null,
    expires_at timestamptz not null,
    constraint embedding_claims_pkey primary key (tenant_id, model, dimensions, input_type, content_sha256),
    constraint embedding_claims_input_type_check check (input_type in ('document', 'query'))
);
-- As many rows go as come: without vacuum the few there are would be looked for among the dead.
alter table embedding_claims set (autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);
alter table embedding_claims enable row level security;
drop policy if exists app_embedding_claims on embedding_claims;
drop policy if exists backup_embedding_claims on embedding_claims;
create policy app_embedding_claims on embedding_claims to pgrecall_app using ({TENANT}) with check ({TENANT});
create policy backup_embedding_claims on embedding_claims for select to pgrecall_backup using (true);
grant select, insert, update, delete on embedding_claims to pgrecall_app;
grant select on embedding_claims to pgrecall_backup;
"""

COMMENTS = {
    "table embedding_claims": "Texts whose vectors are being computed. A row goes when the vector is in embedding_cache, or when its time is over. May be emptied at any time.",
    "column embedding_claims.tenant_id": "Whose text it is.",
    "column embedding_claims.model": "Name of the model.",
    "column embedding_claims.dimensions": "Length of the vector.",
    "column embedding_claims.input_type": "document or query, as in embedding_cache.",
    "column embedding_claims.content_sha256": "SHA-256 of the text in UTF-8.",
    "column embedding_claims.holder": "The call that computes it; another one each time.",
    "column embedding_claims.expires_at": "From then on anyone may take it over. Its holder moves this on while it works.",
    "index embedding_claims_pkey": "One claim a text of a tenant, model, length and kind.",
}


def upgrade() -> None:
    for statement in TABLE.split(";\n"):
        if statement.strip():
            op.execute(statement.strip())
    for thing, comment in COMMENTS.items():
        op.execute("comment on {} is '{}'".format(thing, comment.replace("'", "''")))


def downgrade() -> None:
    op.execute("drop table if exists embedding_claims")
