"""The database roles pgrecall works under, and the statements that make them.

Roles belong to the cluster, not to a database: `pgrecall roles` prints or applies these statements once, as an
administrator; migrations only grant to the roles. Everything here may be run again.
"""

from psycopg import sql

APP = "pgrecall_app"
WORKER = "pgrecall_worker"
BACKUP = "pgrecall_backup"

ROLES = {
    APP: "What the service becomes in each transaction: one tenant's rows, read through views, written under policies.",
    WORKER: "Claims pending documents of any tenant, then works as pgrecall_app.",
    "pgrecall_analyst": "Reads the tables under row-level security: the tenants listed in analyst_tenants.",
    BACKUP: "Reads every row of every tenant, for pg_dump.",
}

# Two sessions may run this at once: the loser of either race finds the work done.
_CREATE = """\
do $$ begin
    create role {role} nologin;
exception when duplicate_object or unique_violation then null;
end $$"""
# The login must ask for the roles (SET ROLE) and have none of their rights otherwise. Before 16 that is a property of the
# login, since then of the grant.
_GRANT = """\
do $$ begin
    if current_setting('server_version_num')::int >= 160000 then
        execute 'grant ' || {role_text} || ' to ' || quote_ident({login_text}) || ' with inherit false, set true';
    else
        execute 'grant ' || {role_text} || ' to ' || quote_ident({login_text});
        execute 'alter role ' || quote_ident({login_text}) || ' noinherit';
    end if;
exception when internal_error or unique_violation then null;
end $$"""


def statements(login: str | None = None) -> list[str]:
    """The idempotent SQL that makes the roles and, where a login is named, lets it become the service's two."""
    made: list[sql.Composable] = []
    for role, purpose in ROLES.items():
        name = sql.Identifier(role)
        made.append(sql.SQL(_CREATE).format(role=name))
        made.append(sql.SQL("comment on role {} is {}").format(name, sql.Literal(purpose)))
    if login is not None:
        made += [
            sql.SQL(_GRANT).format(login_text=sql.Literal(login), role_text=sql.Literal(role)) for role in (APP, WORKER)
        ]
    return [statement.as_string(None) for statement in made]
