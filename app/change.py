"""Changing the embedding model while it serves: its steps as the tables' owner, each of which may be run again.

    (nothing) --start--> filling --switch--> switched --finish--> (nothing)
                            |  <--rollback--    |
                            +--abandon--> (nothing)

While it fills, every write puts the vectors of both models (`shadow`), after the switch too, so that a rollback loses
nothing. `embedding_models` says where it stands: a row `filling` beside the active one, or one `retired` after the switch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from app import indexes, pool, swap
from app.database import connect
from app.errors import BadInput, SetupError
from app.indexes import Told
from app.model import Model, Provider, Recorded
from app.settings import passwords
from app.tables import INDEXED_AS_VECTOR, Kind, default_kind

Connection = psycopg.Connection[Any]

MODELS = "select name, dimensions, state, provider, base_url from embedding_models order by changed_at"
"""Every model that is recorded, as `model.Recorded`."""

SEARCH_PATH = (
    f"select set_config('search_path', search_path, false) from ({pool.PGVECTOR}) p where search_path <> '' limit 1"  # noqa: S608  a constant
)
"""Finds pgvector where it is in a schema of its own."""

GAPS = """
select count(*) as missing, count(*) filter (where s.embedding_origin = 'caller') as callers,
       (select count(*) from pgrecall_run_documents r
         where not exists (select from documents d where d.tenant_id = r.tenant_id and d.id = r.id and d.chunk_key = r.chunk_key)
       ) as extra
  from documents d
  join sources s on s.tenant_id = d.tenant_id and s.id = d.id
 where not exists (select from pgrecall_run_documents r
                    where r.tenant_id = d.tenant_id and r.id = d.id and r.chunk_key = d.chunk_key)
"""
"""Chunks without a second vector, those of callers' vectors among them, and second vectors of chunks that are not there."""

STALE = """
select count(*) from documents d
  join pgrecall_run_documents r on r.tenant_id = d.tenant_id and r.id = d.id and r.chunk_key = d.chunk_key
 where (d.doc_type, d.metadata, d.created_at, d.content) is distinct from (r.doc_type, r.metadata, r.created_at, r.content)
"""
"""Chunks whose text or labels differ in the two, which no write leaves behind."""

FOLLOW = """
with batch as materialized (
    select tenant_id, id from sources
     where (tenant_id, id) > (%(tenant_id)s, %(id)s) and state = 'ready' and embedding_model is distinct from %(name)s
     order by tenant_id, id limit %(batch)s for no key update
), followed as (
    update sources s set embedding_model = %(name)s from batch b where s.tenant_id = b.tenant_id and s.id = b.id
)
select tenant_id, id, count(*) over () from batch order by tenant_id desc, id desc limit 1
"""
"""The model's name in a batch of sources, locked in the order in which writers lock; the last of them, how many they are."""

BEHIND = """
select count(*) from sources where state = 'ready' and embedding_model is distinct from %(name)s
"""
"""Sources that have the name of another model than this one."""

COMPLETE = """
select not exists (select from documents d
                    where not exists (select from pgrecall_run_documents r
                                       where r.tenant_id = d.tenant_id and r.id = d.id and r.chunk_key = d.chunk_key))
   and not exists (select from pgrecall_run_documents r
                    where not exists (select from documents d
                                       where d.tenant_id = r.tenant_id and d.id = r.id and d.chunk_key = r.chunk_key))
"""
"""Whether the two tables have the same chunks; writers wait for the answer."""


class Gaps(NamedTuple):
    """Chunks without a second vector (`callers` of them of vectors that callers brought), second vectors without a chunk."""

    missing: int
    callers: int
    extra: int


class Standing(NamedTuple):
    """Where a change stands. `gaps` and `unfinished` (indexes to be built) only while there is another model."""

    models: list[Recorded]
    active: Recorded
    other: Recorded | None
    chunks: int
    gaps: Gaps | None
    unfinished: list[str]


@contextmanager
def operating(url: str, *, alone: bool = True) -> Iterator[Connection]:
    """A connection of the owner's, other operations kept out."""
    with connect(url) as connection:
        connection.execute(SEARCH_PATH)
        if not alone:
            yield connection
            return
        with indexes.alone(connection):
            yield connection


def models(connection: Connection) -> list[Recorded]:
    """Every model that is recorded."""
    return [Recorded(**row) for row in connection.cursor(row_factory=dict_row).execute(MODELS).fetchall()]


def active(connection: Connection) -> Recorded:
    """The model that is searched."""
    return next(each for each in models(connection) if each.state == "active")


def other(connection: Connection) -> Recorded | None:
    """The model that is being filled, or was searched before the switch."""
    return next((each for each in models(connection) if each.state in ("filling", "retired")), None)


def required(connection: Connection, state: str, step: str) -> Recorded:
    """The other model, in this state. Raises SetupError, saying what to run, where the change stands elsewhere."""
    found = other(connection)
    if found is None:
        raise SetupError(f"no change of the embedding model is under way, there is nothing to {step}")
    if found.state != state:
        said = (
            f"the switch to {active(connection).name} is done: `pgrecall model rollback` or `finish` is what can follow"
            if found.state == "retired"
            else f"{found.name} is being filled and not searched yet: `pgrecall model switch` or `abandon` is what can follow"
        )
        raise SetupError(f"cannot {step}: {said}")
    return found


def standing(connection: Connection) -> Standing:
    """Where it stands, counted now."""
    found = other(connection)
    row = connection.execute("select count(*) from documents").fetchone()
    chunks = int(row[0]) if row else 0
    if found is None:
        return Standing(models(connection), active(connection), None, chunks, None, [])
    counted = gaps(connection)
    connection.execute(
        "update embedding_models set filled = %s where name = %s and dimensions = %s",
        (chunks - counted.missing, *found.model),
    )
    unfinished = swap.unfinished(connection, kind(connection, found), found.dimensions)
    return Standing(models(connection), active(connection), found, chunks, counted, unfinished)


def gaps(connection: Connection) -> Gaps:
    """What the second table lacks."""
    row = connection.cursor(row_factory=dict_row).execute(GAPS).fetchone()
    return Gaps(**(row or {}))


def kind(connection: Connection, model: Recorded) -> Kind:
    """The precision of the second table's index: what it has, else that of the active one, where the length allows it."""
    found: Kind | None = swap.kind(connection, swap.SHADOW)
    if found is not None:
        return found
    row = connection.execute("select kind from vector_indexes where state = 'active'").fetchone()
    return chosen_kind(row[0] if row else "full", model.dimensions)


def chosen_kind(now: Kind, dimensions: int) -> Kind:
    """The precision of a new model's index."""
    return default_kind(dimensions) if now == "full" and dimensions > INDEXED_AS_VECTOR else now


def refusals(connection: Connection) -> list[str]:
    """Why a change cannot be begun now."""
    found = [
        f"{thing} is bound to the table documents: drop it, and make it again after `finish`"
        for thing in swap.obstacles(connection)
    ]
    row = connection.execute("select count(*) from vector_indexes").fetchone()
    if row and row[0] != 1:
        found.append("a change of the vector index is not finished: run `pgrecall index` with the kind it is to have")
    return found


def start(connection: Connection, new: Recorded, provider: Provider, base_url: str | None) -> Recorded:
    """Record the model and make the table for its vectors, unless that is done. `provider` and `base_url`: of the active one.

    Raises BadInput for another model than the one that is being filled, or the active one, SetupError for `refusals`.
    """
    under_way = other(connection)
    if under_way is not None:
        if new.model != under_way.model:
            raise BadInput(
                "model",
                f"{under_way.name} with {under_way.dimensions} dimensions is under way; allowed: none or this one, or "
                "`pgrecall model abandon` first",
            )
        return under_way
    if new.model == active(connection).model:
        raise BadInput("model", f"{new.name} with {new.dimensions} dimensions is the model already")
    if refused := refusals(connection):
        raise SetupError("; ".join(refused))
    _check_address(base_url)
    swap.patiently(partial(_begin, connection, new, provider, base_url))
    return new


def _begin(connection: Connection, new: Recorded, provider: Provider, base_url: str | None) -> None:
    with connection.transaction():
        connection.execute(
            "update embedding_models set provider = %s, base_url = %s where state = 'active' and provider is null",
            (provider, base_url),
        )
        connection.execute(
            "insert into embedding_models (name, dimensions, state, provider, base_url, filled) "
            "values (%s, %s, 'filling', %s, %s, 0) on conflict (name, dimensions) do update "
            "set state = 'filling', provider = excluded.provider, base_url = excluded.base_url, filled = 0, changed_at = now()",
            (*new.model, new.provider, new.base_url),
        )
        swap.create(connection, new.dimensions)


def build(connection: Connection, url: str, new: Recorded, told: Told) -> None:
    """Build the second table's indexes that are missing; those that are there and valid stay."""
    wanted = swap.needed(connection, kind(connection, new), new.dimensions)
    missing = set(swap.unfinished(connection, kind(connection, new), new.dimensions))
    connection.execute("set lock_timeout = 0")  # concurrent work makes nobody wait
    todo = [index for index in wanted if index.name in missing]
    for done, index in enumerate(todo):
        connection.execute(sql.SQL("drop index concurrently if exists {}").format(sql.Identifier(index.name)))
        with indexes.watched(connection, url, partial(_tell, told, index.name, done, len(todo))):
            connection.execute(index.definition.replace(" INDEX ", " index concurrently ", 1).encode())
        swap.describe(connection, index.name, index.comment)
    connection.execute("set lock_timeout = '4s'")


def _tell(told: Told, name: str, done: int, count: int, share: float) -> None:
    told(f"building {name}", (done + share) / count)


def switch(connection: Connection) -> Recorded:
    """Have the new model searched. Raises SetupError, changing nothing, while anything is missing."""
    new = required(connection, "filling", "switch")
    _exchange(connection, new, "switch", "retired")
    return new


def rollback(connection: Connection) -> Recorded:
    """Have the former model searched again; the one it takes the place of is kept in step, and can be switched to again."""
    former = required(connection, "retired", "rollback")
    _exchange(connection, former, "rollback", "filling")
    return former


def _exchange(connection: Connection, to: Recorded, step: str, leaves: str) -> None:
    _complete(connection, to, step)
    row = connection.execute(STALE).fetchone()
    if row is None or row[0]:
        raise SetupError(
            f"cannot {step}: {row[0] if row else ''} chunks differ in their labels; `pgrecall model abandon`"
        )

    def record() -> None:
        precision = swap.kind(connection, "documents") or default_kind(to.dimensions)
        connection.execute(
            "update embedding_models set state = %s, changed_at = now() where state = 'active'", (leaves,)
        )
        connection.execute(
            "update embedding_models set state = 'active', changed_at = now() where name = %s and dimensions = %s",
            to.model,
        )
        connection.execute(
            "update vector_indexes set state = 'retired' where state = 'active' and kind <> %s", (precision,)
        )
        connection.execute(
            "insert into vector_indexes (kind, state, oversampling) values (%s, 'active', %s) "
            "on conflict (kind) do update set state = 'active'",
            (precision, indexes.OVERSAMPLING[precision]),
        )

    check = partial(_complete, connection, to, step)
    swap.patiently(partial(swap.exchange, connection, check, record))
    swap.validate(connection)


def _complete(connection: Connection, to: Recorded, step: str) -> None:
    """Raise SetupError unless every chunk has its second vector, and every index is there."""
    if unfinished := swap.unfinished(connection, kind(connection, to), to.dimensions):
        raise SetupError(
            f"cannot {step}: {len(unfinished)} indexes for {to.name} are not built yet: run `pgrecall model backfill`"
        )
    if swap.columns(connection, "documents") != swap.columns(connection, swap.SHADOW):
        raise SetupError(
            f"cannot {step}: a migration has changed the table documents meanwhile: run `pgrecall model abandon` and "
            "backfill again"
        )
    if obstacles := swap.obstacles(connection):
        raise SetupError(f"cannot {step}: {'; '.join(obstacles)} is bound to the table documents: drop it first")
    if connection.execute(COMPLETE).fetchone() == (True,):
        return
    found = gaps(connection)
    if found.callers:
        raise SetupError(
            f"cannot {step}: {found.callers:,} chunks have vectors that their callers brought and none of {to.name}: put "
            f'them again with "embedding_model": "{to.name}" and its vectors, or without vectors'
        )
    if found.missing:
        raise SetupError(
            f"cannot {step}: {found.missing:,} chunks have no vector of {to.name} yet: run `pgrecall model backfill`"
        )
    if found.extra:
        raise SetupError(
            f"cannot {step}: {found.extra:,} chunks were removed past the second table, by a process of an older "
            "release or by hand: run `pgrecall model abandon` and backfill again"
        )


def finish(connection: Connection, told: Callable[[int], None], batch: int = 1_000) -> Recorded:
    """Drop what was kept for a rollback, then let the sources' records of their model follow, in batches."""
    former = next((each for each in reversed(models(connection)) if each.state == "dropped"), None)
    if other(connection) is not None or former is None:
        former = required(connection, "retired", "finish")
        swap.patiently(partial(_drop, connection, former, "dropped"))
    follow(connection, told, batch)
    return former


def abandon(connection: Connection, told: Callable[[int], None], batch: int = 1_000) -> Recorded:
    """Give the new model up: its vectors are dropped, the active one stays."""
    new = required(connection, "filling", "abandon")
    swap.patiently(partial(_drop, connection, new, None))
    follow(connection, told, batch)  # after a rollback some name it
    return new


def _drop(connection: Connection, gone: Recorded, state: str | None) -> None:
    with connection.transaction():
        connection.execute("set local lock_timeout = '10s'")
        # Writers first: they hold sources when they look which models there are.
        connection.execute("lock table sources in exclusive mode")
        swap.against_readers(connection, ["sources", swap.SHADOW])
        connection.execute(sql.SQL("drop table {}").format(sql.Identifier(swap.SHADOW)))
        if state is None:
            connection.execute("delete from embedding_models where name = %s and dimensions = %s", gone.model)
        else:
            connection.execute(
                "update embedding_models set state = %s, filled = null, changed_at = now() where name = %s and dimensions = %s",
                (state, *gone.model),
            )
        connection.execute("delete from vector_indexes where state = 'retired'")


def behind(connection: Connection) -> int:
    """How many sources have another model's name than the active one's: what `follow` has to do."""
    row = connection.execute(BEHIND, {"name": active(connection).name}).fetchone()
    return int(row[0]) if row else 0


def follow(connection: Connection, told: Callable[[int], None], batch: int = 1_000) -> None:
    """Write the active model's name into every source that has another, in short transactions. May be run again."""
    name = active(connection).name
    place: dict[str, Any] = {"tenant_id": "", "id": ""}
    done = 0
    while True:
        row = connection.execute(FOLLOW, place | {"name": name, "batch": batch}).fetchone()
        if row is None:
            return
        place = {"tenant_id": row[0], "id": row[1]}
        done += row[2]
        told(done)


def model_of(name: str, dimensions: int, provider: Provider, base_url: str | None) -> Recorded:
    """A model that is to be filled. Raises SetupError for an address with a password in it."""
    _check_address(base_url)
    return Recorded(*Model(name, dimensions), "filling", provider, base_url)


def _check_address(address: str | None) -> None:
    # A password with a slash in it ends what counts as the host.
    if address is not None and ("@" in address.partition("://")[2].partition("/")[0] or passwords(address)):
        raise SetupError(
            "the model's address has a user or a password in it, which would stand in embedding_models for all to read: "
            "give the key as OPENAI_API_KEY or PGRECALL_OTHER_API_KEY"
        )
