"""The database roles pgrecall works under, and the statements that make them.

Roles belong to the cluster, not to a database: `pgrecall roles` prints or applies these statements once, as an
administrator; migrations only grant to the roles. Everything here may be run again.
"""

from collections.abc import Sequence

from psycopg import sql

APP = "pgrecall_app"
WORKER = "pgrecall_worker"
BACKUP = "pgrecall_backup"
ANALYST = "pgrecall_analyst"
LONGEST_NAME = 64
"""PostgreSQL cuts names to fewer bytes than this."""

ROLES = {
    APP: "What the service becomes in each transaction: one tenant's rows, read through views, written under policies.",
    WORKER: "Claims pending documents of any tenant, then works as pgrecall_app.",
    ANALYST: "Reads the tables under row-level security: the tenants listed in analyst_tenants.",
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


# What a login needs of its own: settings of a role are not handed on to its members.
_LOGIN = """\
do $$ begin
    create role {login} login;
exception when duplicate_object or unique_violation then null;
end $$"""
_PATH = """\
do $$
declare place text := (select n.nspname from pg_extension e join pg_namespace n on n.oid = e.extnamespace
                        where e.extname = 'vector' and n.nspname <> current_schema);
begin
    if place is not null then
        execute 'alter role ' || quote_ident({text}) || ' in database ' || quote_ident(current_database())
            || ' set search_path = ' || quote_ident(current_schema) || ', ' || quote_ident(place);
    end if;
end $$"""

# Of a name that was mistyped an analyst would see no rows and no reason. Nothing is said where it cannot be known.
_UNKNOWN = """\
do $$
declare named text;
begin
    foreach named in array {tenants}::text[] loop
        if named <> '*' and not row_security_active('sources') and not row_security_active('tenants')
           and not exists (select from sources where tenant_id = named)
           and not exists (select from tenants where tenant_id = named) then
            raise warning 'tenant %: has no document, and is not registered', named;
        end if;
    end loop;
exception when insufficient_privilege or undefined_table then null;
end $$"""


def admission(login: str, tenants: Sequence[str], timeout: float) -> list[str]:
    """The idempotent SQL that lets a login read these tenants ("*": all) and no others, no statement for over `timeout` s.

    To be run in the database, by who may create roles and write its `analyst_tenants`. Without an iterative scan a
    nearest-neighbour query of the analyst's own, which the policy filters, could come back short.
    """
    name, listed = sql.Identifier(login), sql.Literal(list(tenants))
    made = [
        sql.SQL(_LOGIN).format(login=name),
        sql.SQL("grant {} to {}").format(sql.Identifier(ANALYST), name),
        sql.SQL("alter role {} set statement_timeout = {}").format(name, sql.Literal(f"{round(1000 * timeout)}ms")),
        sql.SQL("select '[1]'::vector"),  # loads pgvector, whose setting is not known before
        sql.SQL("alter role {} set hnsw.iterative_scan = 'strict_order'").format(name),
        sql.SQL(_PATH).format(text=sql.Literal(login)),
        sql.SQL("delete from analyst_tenants where analyst = {} and tenant_id <> all ({}::text[])").format(
            sql.Literal(login), listed
        ),
        sql.SQL(
            "insert into analyst_tenants (analyst, tenant_id) select {}, unnest({}::text[]) on conflict do nothing"
        ).format(sql.Literal(login), listed),
        sql.SQL(_UNKNOWN).format(tenants=listed),
    ]
    return [statement.as_string(None) for statement in made]


def dismissal(login: str) -> list[str]:
    """The SQL that takes every tenant and the role from a login, and leaves the login."""
    made = [
        sql.SQL("delete from analyst_tenants where analyst = {}").format(sql.Literal(login)),
        sql.SQL("revoke {} from {}").format(sql.Identifier(ANALYST), sql.Identifier(login)),
    ]
    return [statement.as_string(None) for statement in made]
