"""What a search may assume about a database without asking each time: how its index is laid out, which sets are large.

Such knowledge may be up to FRESH seconds old. It chooses between scans; no row is lost by its being wrong, because an
index scan that ends short is completed exactly.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import msgspec

from app.database import Database
from app.statements import Rendered
from app.tables import Kind

FRESH = 60.0
"""Seconds for which what was read is taken to be still so."""

REMEMBERED = 10_000
"""Facts kept per database; the longest unused go first."""

VISIT = 8
"""Visiting a node of the graph takes as long as measuring so many rows one after the other (docs/search.md)."""

LEAST, MOST = 500, 20_000
"""Rows up to which a set is measured exactly whatever the index, and above which it never is at first."""


class Layout(NamedTuple):
    """The active index as one tenant sees it: `rows` is how many its bucket holds, by PostgreSQL's last estimate."""

    kind: Kind = "full"
    oversampling: float = 4.0
    rows: float = 0.0


def breakeven(rows: float, candidates: int) -> int:
    """The size of a set from which walking the graph of `rows` nodes beats measuring every row of the set.

    To find `candidates` of n rows among `rows`, a walk visits candidates * rows / n nodes; measuring takes n steps.
    """
    return round(min(max(math.sqrt(VISIT * candidates * rows), LEAST), MOST))


LAYOUT = Rendered(
    """
select i.kind, i.oversampling,
       (select greatest(c.reltuples, 0)::float8 from pg_class c
         where c.oid = to_regclass(format('documents_embedding_%%s_%%s_idx', i.kind,
                                          to_char(hashtextextended(%(tenant_id)s::text, 0) & 15, 'FM00')))) as rows
  from vector_indexes i where i.state = 'active'
""",
    {},
)
"""The active kind of index, and how many rows the tenant's bucket of it holds."""


class _Facts:
    """A bounded memory of what was true a short while ago."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[float, Any]] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        moment, value = self._kept.get(key, (0.0, None))
        if time.monotonic() - moment > FRESH:
            return None
        self._kept.move_to_end(key)
        return value

    def put(self, key: Hashable, value: Any) -> None:
        self._kept[key] = (time.monotonic(), value)
        self._kept.move_to_end(key)
        if len(self._kept) > REMEMBERED:
            self._kept.popitem(last=False)


_known: WeakKeyDictionary[Database, _Facts] = WeakKeyDictionary()


def _facts(database: Database) -> _Facts:
    return _known.setdefault(database, _Facts())


async def of(database: Database, tenant_id: str) -> Layout:
    """The layout for a tenant, read at most every FRESH seconds."""
    known: Layout | None = _facts(database).get(tenant_id)
    if known is None:
        (found,) = await database.fetch(tenant_id, [LAYOUT.with_values("layout", {"tenant_id": tenant_id})])
        # Without its index a kind is searched by the exact scan only.
        known = Layout(*found[0].values()) if found and found[0]["rows"] is not None else Layout()
        _facts(database).put(tenant_id, known)
    return known


def is_large(database: Database, values: Mapping[str, Any], shape: Hashable) -> bool:
    """Whether the set of these conditions was above the bound, which is part of `shape`, when it was last counted."""
    return bool(_facts(database).get(_key(values, shape)))


def note(database: Database, values: Mapping[str, Any], shape: Hashable, *, large: bool) -> None:
    """Remember whether a set was above the bound."""
    _facts(database).put(_key(values, shape), large)


def forget(database: Database) -> None:
    """Forget all that is known of a database: its searches may name what was erased, or its vectors are others now."""
    _known.pop(database, None)


def _key(values: Mapping[str, Any], shape: Hashable) -> Hashable:
    return shape, msgspec.json.encode(values, order="sorted")
