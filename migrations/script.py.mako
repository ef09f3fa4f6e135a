"""${message}

Runs under: the release before it (expand first, contract in a later release). Locks: say which, and for how long.
"""

from alembic import op

revision = "${up_revision}"
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}

# env.py sets lock_timeout and statement_timeout for every statement. An index on a table with rows is built
# CONCURRENTLY inside `op.get_context().autocommit_block()`, with a statement_timeout of its own, after dropping an
# invalid leftover; the downgrade drops it CONCURRENTLY. Such blocks come first: views, policies and grants change in the
# transaction that writes the revision, by which services know what to expect (`make isolation` writes that down). Lock a
# view before the tables it reads, as its readers do: `lock table a_view in access exclusive mode`.


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
