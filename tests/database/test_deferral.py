"""Loading first and building the vector index after: when it is allowed, and what an interruption leaves."""

import numpy as np
import pytest

from app import deferral, loading, search, upsert
from app.drafts import Draft
from app.errors import BadInput, SetupError
from app.files import Step
from app.loading import Counts
from tests.conftest import DIMENSIONS

INDEXES = "select count(*) from pg_indexes where indexname like 'documents_embedding_full_%'"
BUCKET = "select hashtextextended(%s, 0) & 15"


def own(number):
    return Draft(f"d{number}", f"Text {number}.", embedding=[float(number + 1), *[0.5] * (DIMENSIONS - 1)])


@pytest.fixture
def neighbours(owner):
    """Three tenants: the first two share an index."""
    found = {}
    for number in range(1_000):
        bucket = owner.execute(BUCKET, (f"t{number}",)).fetchone()[0]
        found.setdefault(bucket, []).append(f"t{number}")
    first, second = found[3][:2]
    return first, second, found[4][0]


async def load(database, embedder, settings, tenant, drafts):
    counts = Counts()
    steps = [Step(draft, 1) for draft in drafts]
    await loading.load(database, embedder, settings, tenant, steps, counts=counts, told=print)
    return counts


def told(what, share):
    assert 0 <= share <= 1, what


async def test_the_index_is_built_over_the_rows_and_nobody_elses_is_touched(
    database, embedder, settings, owner, owner_url, neighbours
):
    tenant, _, elsewhere = neighbours
    await upsert.put(database, embedder, settings, elsewhere, [own(1)])
    with deferral.deferred(owner_url, tenant, None) as deferred:
        assert owner.execute(INDEXES).fetchone() == (15,)
        assert await deferral.missing(database) == 1
        await load(database, embedder, settings, tenant, map(own, range(20)))
        found = await search.search(database, settings, tenant, np.asarray(own(0).embedding, np.float32), top_k=3)
        assert found.hits[0].id == "d0"
        with pytest.raises(SetupError, match="another"), deferral.deferred(owner_url, elsewhere, None):
            pass
        deferred.build(told)
    assert owner.execute(INDEXES).fetchone() == (16,)
    assert await deferral.missing(database) == 0


async def test_it_is_refused_where_others_would_suffer_or_it_does_not_pay(
    database, embedder, settings, owner, owner_url, neighbours
):
    tenant, neighbour, elsewhere = neighbours
    await upsert.put(database, embedder, settings, tenant, [own(1)])
    for name, words in ((neighbour, "other tenants"), (tenant, "has documents already")):
        with pytest.raises(BadInput, match=words), deferral.deferred(owner_url, name, None):
            pass
    with pytest.raises(BadInput, match="does not pay"), deferral.deferred(owner_url, elsewhere, 1_000):
        pass
    with (
        pytest.raises(SetupError, match="only the tables' owner"),
        deferral.deferred(settings.database_url, elsewhere, None),
    ):
        pass
    assert owner.execute(INDEXES).fetchone() == (16,)


async def test_an_interrupted_load_goes_on_and_anybody_may_finish_it(
    database, embedder, settings, owner, owner_url, neighbours
):
    tenant, neighbour, _ = neighbours
    with deferral.deferred(owner_url, tenant, None):  # and never built: the program is gone
        await load(database, embedder, settings, tenant, map(own, range(10)))
    assert await deferral.missing(database) == 1
    with deferral.deferred(owner_url, tenant, None):
        counts = await load(database, embedder, settings, tenant, map(own, range(20)))
    assert (counts.created, counts.unchanged) == (10, 10)
    assert deferral.finish(settings.database_url, told) is False
    await upsert.put(database, embedder, settings, neighbour, [own(1)])  # nobody is kept from writing
    assert deferral.finish(owner_url, told) is True
    assert await deferral.missing(database) == 0
    comment = "select count(*) from pg_class where relname like 'documents_embedding_full_%' and obj_description(oid, 'pg_class') is null"
    assert owner.execute(comment).fetchone() == (0,)
