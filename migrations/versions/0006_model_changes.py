"""What a change of the embedding model needs to know of each model: who computes its vectors, and that they are gone.

Locks: `embedding_models`, a table of a few rows, for as long as a catalogue entry takes. The previous release works on this
schema as long as no model is being changed; `pgrecall model backfill` belongs after its last process has stopped.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UPGRADE = """
alter table embedding_models
    add column if not exists provider text,
    add column if not exists base_url text,
    add column if not exists filled bigint,
    add column if not exists changed_at timestamptz not null default now();
alter table embedding_models drop constraint if exists embedding_models_state_check;
alter table embedding_models add constraint embedding_models_state_check
    check (state in ('active', 'filling', 'retired', 'dropped'));
alter table embedding_models drop constraint if exists embedding_models_provider_check;
alter table embedding_models add constraint embedding_models_provider_check check (provider in ('local', 'openai'));
"""

STATE = "active: searched. filling: being prepared. retired: no longer searched."
COMMENTS = {
    "column embedding_models.state": "active: searched. filling: being prepared beside it. retired: searched until lately and kept in step, for a rollback. dropped: its vectors are gone.",
    "column embedding_models.provider": "local: the model inside the package. openai: a server that speaks OpenAI's protocol. Null until a change of the model records it.",
    "column embedding_models.base_url": "The server's address where it is not OpenAI's; the key is in the environment of each process.",
    "column embedding_models.filled": "How many chunks had a vector of it when that was last counted; null for a model nothing was filled for.",
    "column embedding_models.changed_at": "When its state last changed.",
}

# A change under way is given up: what is active stays.
DOWNGRADE = f"""
drop table if exists pgrecall_run_documents;
delete from embedding_models where state <> 'active';
delete from vector_indexes where state = 'retired';
alter table embedding_models drop constraint embedding_models_state_check;
alter table embedding_models add constraint embedding_models_state_check
    check (state in ('active', 'filling', 'retired'));
alter table embedding_models drop column provider, drop column base_url, drop column filled, drop column changed_at;
comment on column embedding_models.state is '{STATE}'
"""


def _run(statements: str) -> None:
    for statement in statements.split(";\n"):
        if statement.strip():
            op.execute(statement.strip().replace(":", r"\:"))


def upgrade() -> None:
    _run(UPGRADE)
    for thing, comment in COMMENTS.items():
        text = comment.replace("'", "''")
        _run(f"comment on {thing} is '{text}'")


def downgrade() -> None:
    _run(DOWNGRADE)
