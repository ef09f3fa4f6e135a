"""API keys and the register of tenants, with the functions through which the service looks keys up and counts.

Three new, empty tables. pgrecall_app has no right on them: it calls functions of the owner's, each of which does one thing,
most of them only for whoever holds a key whose hash it can show. The previous release works on this schema and asks for no
key, so stop it before keys are relied upon.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

ANALYST = (
    "(select exists (select from analyst_tenants where analyst = session_user and tenant_id = '*'))"
    " or tenant_id in (select tenant_id from analyst_tenants where analyst = session_user)"
)

TABLES = f"""
create table if not exists tenants (
    tenant_id text collate "C" not null,
    created_at timestamptz not null default now(),
    max_rows bigint,
    tokens_per_day bigint,
    tokens_day date,
    tokens_taken bigint not null default 0,
    constraint tenants_pkey primary key (tenant_id),
    constraint tenants_tenant_id_check check (tenant_id ~ '^[A-Za-z0-9_.:-]{{1,128}}$'),
    constraint tenants_max_rows_check check (max_rows >= 0),
    constraint tenants_tokens_per_day_check check (tokens_per_day >= 0)
);
create table if not exists api_keys (
    prefix text collate "C" not null,
    key_hash bytea not null,
    name text,
    scopes text[] not null,
    tenant_id text collate "C",
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    requests_per_minute bigint,
    concurrent_streams bigint,
    minute timestamptz,
    requests_taken bigint not null default 0,
    constraint api_keys_pkey primary key (prefix),
    constraint api_keys_prefix_check check (prefix ~ '^[a-z0-9]{{8}}$'),
    constraint api_keys_key_hash_check check (octet_length(key_hash) = 32),
    constraint api_keys_scopes_check check (cardinality(scopes) > 0 and scopes <@ array['read', 'write', 'admin']),
    constraint api_keys_tenant_id_check check (tenant_id is not null or scopes <@ array['admin']),
    constraint api_keys_requests_per_minute_check check (requests_per_minute > 0),
    constraint api_keys_concurrent_streams_check check (concurrent_streams >= 0)
);
create table if not exists key_streams (
    prefix text collate "C" not null,
    holder uuid not null,
    streams bigint not null,
    expires_at timestamptz not null,
    constraint key_streams_pkey primary key (prefix, holder)
);
alter table tenants enable row level security;
alter table api_keys enable row level security;
alter table key_streams enable row level security;
drop policy if exists analyst_tenants on tenants;
drop policy if exists backup_tenants on tenants;
drop policy if exists backup_api_keys on api_keys;
drop policy if exists backup_key_streams on key_streams;
create policy analyst_tenants on tenants for select to pgrecall_analyst using ({ANALYST});
create policy backup_tenants on tenants for select to pgrecall_backup using (true);
create policy backup_api_keys on api_keys for select to pgrecall_backup using (true);
create policy backup_key_streams on key_streams for select to pgrecall_backup using (true);
grant select on tenants to pgrecall_analyst, pgrecall_backup;
grant select on api_keys, key_streams to pgrecall_backup;
"""

# SQLSTATEs RK401, RK403 and RK404 are told apart by app/database.py, which takes the messages as they are.
FUNCTIONS = {
    "keys_in_use()": """
create or replace function keys_in_use() returns boolean language sql stable security definer as $$
    select exists (select from api_keys)
$$""",
    "find_key(text)": """
create or replace function find_key(given_prefix text)
returns table (key_hash bytea, tenant_id text, scopes text[], expires_in double precision, revoked boolean,
               requests_per_minute bigint, concurrent_streams bigint, max_rows bigint, tokens_per_day bigint)
language sql stable security definer as $$
    select k.key_hash, k.tenant_id, k.scopes, extract(epoch from k.expires_at - clock_timestamp())::double precision,
           k.revoked_at is not null, k.requests_per_minute, k.concurrent_streams, t.max_rows, t.tokens_per_day
      from api_keys k left join tenants t on t.tenant_id = k.tenant_id
     where k.prefix = given_prefix
$$""",
    "use_key(text, bytea, bigint)": """
create or replace function use_key(given_prefix text, given_hash bytea, wanted bigint)
returns table (granted bigint, ends_in double precision) language plpgsql security definer as $$
declare
    this_minute constant timestamptz := date_trunc('minute', clock_timestamp());
    taken_before bigint;
    allowed bigint;
begin
    perform set_config('synchronous_commit', 'off', true);
    select case when k.minute = this_minute then k.requests_taken else 0 end, k.requests_per_minute
      into taken_before, allowed
      from api_keys k where k.prefix = given_prefix and k.key_hash = given_hash for no key update;
    if not found then
        return;
    end if;
    granted := case when allowed is null then wanted else greatest(0, least(wanted, allowed - taken_before)) end;
    ends_in := extract(epoch from this_minute + interval '1 minute' - clock_timestamp());
    update api_keys k
       set minute = this_minute, requests_taken = taken_before + granted, last_used_at = clock_timestamp()
     where k.prefix = given_prefix;
    return next;
end $$""",
    "hold_streams(text, bytea, uuid, bigint)": """
create or replace function hold_streams(given_prefix text, given_hash bytea, given_holder uuid, wanted bigint)
returns boolean language plpgsql security definer as $$
declare
    allowed bigint;
    others bigint;
    held bigint;
begin
    perform set_config('synchronous_commit', 'off', true);
    select k.concurrent_streams into allowed
      from api_keys k where k.prefix = given_prefix and k.key_hash = given_hash for no key update;
    if not found then
        return false;
    end if;
    delete from key_streams s where s.prefix = given_prefix and s.expires_at < clock_timestamp();
    select coalesce(sum(s.streams) filter (where s.holder <> given_holder), 0),
           coalesce(sum(s.streams) filter (where s.holder = given_holder), 0)
      into others, held from key_streams s where s.prefix = given_prefix;
    if wanted > held and others + wanted > allowed then
        return false;
    end if;
    if wanted = 0 then
        delete from key_streams s where s.prefix = given_prefix and s.holder = given_holder;
    else
        insert into key_streams as s values (given_prefix, given_holder, wanted, clock_timestamp() + interval '1 minute')
            on conflict (prefix, holder) do update set streams = excluded.streams, expires_at = excluded.expires_at;
    end if;
    return true;
end $$""",
    "take_tokens(bigint)": """
create or replace function take_tokens(wanted bigint)
returns table (granted bigint, ends_in double precision) language plpgsql security definer as $$
declare
    this_moment constant timestamp := clock_timestamp() at time zone 'UTC';
    taken_before bigint;
    allowed bigint;
begin
    perform set_config('synchronous_commit', 'off', true);
    select case when t.tokens_day = this_moment::date then t.tokens_taken else 0 end, t.tokens_per_day
      into taken_before, allowed
      from tenants t where t.tenant_id = current_setting('pgrecall.tenant_id', true) for no key update;
    granted := case when allowed is null then wanted else greatest(0, least(wanted, allowed - taken_before)) end;
    ends_in := extract(epoch from date_trunc('day', this_moment) + interval '1 day' - this_moment);
    update tenants t
       set tokens_day = this_moment::date, tokens_taken = taken_before + granted
     where t.tenant_id = current_setting('pgrecall.tenant_id', true);
    return next;
end $$""",
    "admin_tenant(text, bytea)": """
create or replace function admin_tenant(given_prefix text, given_hash bytea) returns text language plpgsql stable as $$
declare
    bound text;
begin
    -- The service has taken the role pgrecall_app; whoever is here as the owner and has taken none needs no key.
    if current_setting('role') = 'none' and pg_has_role(session_user, current_user, 'usage') then
        return null;
    end if;
    select k.tenant_id into bound from api_keys k
     where k.prefix = given_prefix and k.key_hash = given_hash and 'admin' = any (k.scopes)
       and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp());
    if not found then
        raise exception using errcode = 'RK401', message = 'a valid key with the scope admin is required';
    end if;
    return bound;
end $$""",
    "list_keys(text, bytea)": """
create or replace function list_keys(given_prefix text, given_hash bytea)
returns table (prefix text, name text, scopes text[], tenant_id text, created_at timestamptz, expires_at timestamptz,
               revoked_at timestamptz, last_used_at timestamptz, requests_per_minute bigint, concurrent_streams bigint)
language plpgsql stable security definer as $$
declare
    bound constant text := admin_tenant(given_prefix, given_hash);
begin
    return query select k.prefix, k.name, k.scopes, k.tenant_id, k.created_at, k.expires_at, k.revoked_at, k.last_used_at,
                        k.requests_per_minute, k.concurrent_streams
                   from api_keys k where bound is null or k.tenant_id = bound
                  order by k.tenant_id nulls first, k.created_at, k.prefix;
end $$""",
    "create_key(text, bytea, text, bytea, text, text[], text, timestamptz, bigint, bigint)": """
create or replace function create_key(given_prefix text, given_hash bytea, new_prefix text, new_hash bytea, new_name text,
                                      new_scopes text[], new_tenant text, new_expires_at timestamptz,
                                      new_requests bigint, new_streams bigint)
returns table (prefix text, name text, scopes text[], tenant_id text, created_at timestamptz, expires_at timestamptz,
               revoked_at timestamptz, last_used_at timestamptz, requests_per_minute bigint, concurrent_streams bigint)
language plpgsql security definer as $$
declare
    bound constant text := admin_tenant(given_prefix, given_hash);
begin
    if bound is not null and new_tenant is distinct from bound then
        raise exception using errcode = 'RK403', message = 'this key makes keys for its own tenant only';
    end if;
    if new_tenant is not null and not exists (select from tenants t where t.tenant_id = new_tenant for key share) then
        raise exception using errcode = 'RK404', message = 'there is no tenant ' || quote_literal(new_tenant);
    end if;
    -- A key made with a tenant's own admin key lives no longer and may do no more at once than that one.
    return query insert into api_keys as k (prefix, key_hash, name, scopes, tenant_id, expires_at, requests_per_minute,
                                            concurrent_streams)
        select new_prefix, new_hash, new_name, new_scopes, new_tenant, least(new_expires_at, m.expires_at),
               least(new_requests, m.requests_per_minute), least(new_streams, m.concurrent_streams)
          from (values (1)) one left join api_keys m on m.prefix = given_prefix and bound is not null
        returning k.prefix, k.name, k.scopes, k.tenant_id, k.created_at, k.expires_at, k.revoked_at, k.last_used_at,
                  k.requests_per_minute, k.concurrent_streams;
end $$""",
    "revoke_key(text, bytea, text)": """
create or replace function revoke_key(given_prefix text, given_hash bytea, which text)
returns table (prefix text, name text, scopes text[], tenant_id text, created_at timestamptz, expires_at timestamptz,
               revoked_at timestamptz, last_used_at timestamptz, requests_per_minute bigint, concurrent_streams bigint)
language plpgsql security definer as $$
declare
    bound constant text := admin_tenant(given_prefix, given_hash);
begin
    return query update api_keys k set revoked_at = coalesce(k.revoked_at, clock_timestamp())
         where k.prefix = which and (bound is null or k.tenant_id = bound)
        returning k.prefix, k.name, k.scopes, k.tenant_id, k.created_at, k.expires_at, k.revoked_at, k.last_used_at,
                  k.requests_per_minute, k.concurrent_streams;
    if not found then
        raise exception using errcode = 'RK404', message = 'there is no key ' || quote_literal(which);
    end if;
end $$""",
    "list_tenants(text, bytea, text)": """
create or replace function list_tenants(given_prefix text, given_hash bytea, which text)
returns table (tenant_id text, created_at timestamptz, max_rows bigint, tokens_per_day bigint, tokens_today bigint,
               chunks bigint, keys bigint)
language plpgsql stable security definer as $$
declare
    bound constant text := admin_tenant(given_prefix, given_hash);
    today constant date := (clock_timestamp() at time zone 'UTC')::date;
begin
    return query
    with counted as (select c.tenant_id, sum(c.chunks)::bigint as chunks from collection_statistics c group by c.tenant_id),
         valid as (select k.tenant_id, count(*) as keys from api_keys k
                    where k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp())
                    group by k.tenant_id)
    select coalesce(t.tenant_id, c.tenant_id), t.created_at, t.max_rows, t.tokens_per_day,
           case when t.tokens_day = today then t.tokens_taken else 0 end, coalesce(c.chunks, 0), coalesce(v.keys, 0)
      from tenants t full join counted c on c.tenant_id = t.tenant_id
      left join valid v on v.tenant_id = coalesce(t.tenant_id, c.tenant_id)
     where (bound is null or coalesce(t.tenant_id, c.tenant_id) = bound)
       and (which is null or coalesce(t.tenant_id, c.tenant_id) = which)
     order by 1;
end $$""",
    "put_tenant(text, bytea, text, boolean, bigint, boolean, bigint)": """
create or replace function put_tenant(given_prefix text, given_hash bytea, new_tenant text, sets_rows boolean,
                                      new_rows bigint, sets_tokens boolean, new_tokens bigint)
returns boolean language plpgsql security definer as $$
declare
    made boolean;
begin
    if admin_tenant(given_prefix, given_hash) is not null then
        raise exception using errcode = 'RK403', message = 'this key is one tenant''s and makes no others';
    end if;
    insert into tenants (tenant_id) values (new_tenant) on conflict do nothing;
    made := found;
    update tenants t set max_rows = case when sets_rows then new_rows else t.max_rows end,
                         tokens_per_day = case when sets_tokens then new_tokens else t.tokens_per_day end
     where t.tenant_id = new_tenant and (sets_rows or sets_tokens);
    return made;
end $$""",
    "delete_tenant(text, bytea, text)": """
create or replace function delete_tenant(given_prefix text, given_hash bytea, which text)
returns bigint language plpgsql security definer as $$
declare
    bound constant text := admin_tenant(given_prefix, given_hash);
    revoked bigint;
begin
    if bound is not null then
        raise exception using errcode = 'RK403', message = 'this key is one tenant''s and deletes none';
    end if;
    delete from tenants t where t.tenant_id = which;
    update api_keys k set revoked_at = clock_timestamp() where k.tenant_id = which and k.revoked_at is null;
    get diagnostics revoked = row_count;
    return revoked;
end $$""",
}

INTERNAL = frozenset({"admin_tenant(text, bytea)"})
"""Called by other functions only."""

COMMENTS = {
    "table tenants": "Tenants that keys can be made for, and their limits. A tenant needs no row here where no keys are asked for.",
    "column tenants.tenant_id": "The tenant's name, as in sources.",
    "column tenants.created_at": "When it was registered.",
    "column tenants.max_rows": "From so many chunks and pending documents on, keys store no more; null for no limit.",
    "column tenants.tokens_per_day": "Tokens that keys may have embedded and answered with in a day, by UTC; null for no limit.",
    "column tenants.tokens_day": "The day that tokens_taken counts.",
    "column tenants.tokens_taken": "Tokens of that day that server processes have taken, in shares.",
    "table api_keys": "Keys of the HTTP API. The keys themselves are not here. Rows stay when a key is revoked, so that a database that ever had keys asks for them.",
    "column api_keys.prefix": "The part of the key that is no secret and names it: pgr_PREFIX_….",
    "column api_keys.key_hash": "SHA-256 of the whole key.",
    "column api_keys.name": "What it is for, in its maker's words.",
    "column api_keys.scopes": "read: search, answer, read documents. write: store and delete them. admin: tenants and keys.",
    "column api_keys.tenant_id": "The only tenant it acts for; null for one that administers them all and reads no documents.",
    "column api_keys.created_at": "When it was made.",
    "column api_keys.expires_at": "From then on it is refused; null for never.",
    "column api_keys.revoked_at": "When it was revoked; null while it is not.",
    "column api_keys.last_used_at": "When it was used last, to about a minute.",
    "column api_keys.requests_per_minute": "Most requests in a minute of the clock; null for no limit.",
    "column api_keys.concurrent_streams": "Most streams at once; null for no limit.",
    "column api_keys.minute": "The minute that requests_taken counts.",
    "column api_keys.requests_taken": "Requests of that minute that server processes have taken, in shares.",
    "table key_streams": "How many streams each server process has open with a key that has a limit of them. May be emptied at any time.",
    "column key_streams.prefix": "The key.",
    "column key_streams.holder": "The server process, by an id of its own.",
    "column key_streams.streams": "How many it has open.",
    "column key_streams.expires_at": "From then on they count no more. The process moves this on while it lives.",
    "function keys_in_use()": "Whether this database ever had a key.",
    "function find_key(text)": "What there is to know of the key with this prefix, its hash included; no row for none.",
    "function use_key(text, bytea, bigint)": "Take a share of a key's requests of this minute, and say that it was used. No row without the key's hash.",
    "function hold_streams(text, bytea, uuid, bigint)": "Say how many streams a process has open with a key; false where that would be too many.",
    "function take_tokens(bigint)": "Take a share of the tokens of today, for the tenant named by the setting pgrecall.tenant_id.",
    "function admin_tenant(text, bytea)": "The tenant an admin key is bound to, null for none; an error unless the hash is that of a valid admin key, or the caller is the owner.",
    "function list_keys(text, bytea)": "The keys an admin key may see, without their hashes.",
    "function create_key(text, bytea, text, bytea, text, text[], text, timestamptz, bigint, bigint)": "Store a key made by the caller, who alone knows it.",
    "function revoke_key(text, bytea, text)": "Revoke a key; again, it changes nothing.",
    "function list_tenants(text, bytea, text)": "The tenants an admin key may see, registered or in use; with a name, that one.",
    "function put_tenant(text, bytea, text, boolean, bigint, boolean, bigint)": "Register a tenant, or set the limits named of one that is; true where it is new.",
    "function delete_tenant(text, bytea, text)": "Strike a tenant off the register and revoke its keys; how many. Its rows elsewhere are for an erasure.",
}


def _execute(statement: str) -> None:
    op.execute(statement.strip().replace(":", r"\:"))


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            _execute(statement)
    for signature, definition in FUNCTIONS.items():
        _execute(definition)
        # Whoever may create objects somewhere else must not slip them in: the path is this schema and nothing before it.
        _execute(f"""do $$ begin
    execute 'alter function {signature} set search_path = pg_catalog, ' || quote_ident(current_schema()) || ', pg_temp';
end $$""")
        _execute(f"revoke all on function {signature} from public")
        if signature not in INTERNAL:
            _execute(f"grant execute on function {signature} to pgrecall_app")
    for thing, comment in COMMENTS.items():
        text = comment.replace("'", "''")
        _execute(f"comment on {thing} is '{text}'")


def downgrade() -> None:
    for signature in reversed(FUNCTIONS):
        _execute(f"drop function if exists {signature}")
    for table in ("key_streams", "api_keys", "tenants"):
        _execute(f"drop table if exists {table}")
