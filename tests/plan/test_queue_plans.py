"""Looking for pending documents, claiming and listing them reads the index of what is not ready, whatever else there is."""

import json
import uuid

import psycopg
import pytest
from sqlalchemy import text

from app import claims, documents, pending, roles
from app.conditions import Conditions
from app.local import OWNER, SERVICE
from app.statements import rendered
from tests.conftest import cloned

READY, TENANTS = 20_000, 200


@pytest.fixture(scope="module")
def corpus(cluster, template):
    with cloned(cluster, template) as name, psycopg.connect(cluster.url(name, OWNER), autocommit=True) as owner:
        owner.execute(
            "insert into sources (tenant_id, id, content, state) "
            "select 't' || n %% %s, 'd' || n, 'x', 'ready' from generate_series(1, %s) n",
            (TENANTS, READY),
        )
        owner.execute(
            "insert into sources (tenant_id, id, content, not_before) "
            "select 't7', 'p' || n, 'x', now() + interval '1 hour' * (n - 40) from generate_series(1, 3000) n"
        )
        owner.execute("insert into sources (tenant_id, id, content) values ('t9', 'p', 'x')")
        owner.execute("vacuum analyze sources")
        yield name


def plan(cluster, corpus, role, sql, values):
    """The plan of a statement as the service runs it: its role, its tenant; nothing stays."""
    with psycopg.connect(cluster.url(corpus, SERVICE)) as connection:
        for name, value in {"role": role, "pgrecall.tenant_id": "t7"}.items():
            connection.execute("select set_config(%s, %s, true)", (name, value))
        (found,) = connection.execute("explain (analyze, format json) " + sql, values).fetchone()
        connection.rollback()
        return list(nodes((found if isinstance(found, list) else json.loads(found))[0]["Plan"]))


def nodes(node):
    yield node
    for child in node.get("Plans", []):
        yield from nodes(child)


def read(plan):
    """Rows of `sources` that came from a scan, those that a filter dropped too."""
    scans = [n for n in plan if n.get("Relation Name") == "sources" and "Scan" in n["Node Type"]]
    return sum((n["Actual Rows"] + n.get("Rows Removed by Filter", 0)) * n["Actual Loops"] for n in scans)


def test_tenants_that_wait_are_found_by_one_look_each(cluster, corpus):
    found = plan(cluster, corpus, roles.WORKER, pending.WAITING, {})
    assert {n["Index Name"] for n in found if "Index Name" in n} == {"sources_pending_idx"}
    assert [n for n in found if n["Node Type"] == "Seq Scan"] == []
    assert read(found) <= 3


def test_a_claim_reads_what_is_due_and_no_more_than_it_takes(cluster, corpus):
    values = {"tenant_id": "t7", "worker": "w", "lease": 60, "documents": 32, "bytes": 64_000}
    found = plan(cluster, corpus, roles.APP, pending.CLAIM, values | {"largest": 2**62, "suspects": True})
    (looked,) = [n for n in found if n.get("Index Name") == "sources_pending_idx"]
    assert looked["Actual Rows"] == 32
    assert [n for n in found if n["Node Type"] in ("Seq Scan", "Bitmap Heap Scan")] == []


def test_documents_that_were_not_made_ready_are_listed_by_their_index(cluster, corpus):
    sql, constants = rendered(documents.listing(Conditions(), after=True, state="pending"))
    found = plan(cluster, corpus, roles.APP, sql, constants | {"tenant_id": "t7", "after": "p2", "page": 10})
    (looked,) = [n for n in found if "Index Name" in n]
    assert (looked["Index Name"], looked["Actual Rows"]) == ("sources_state_idx", 10)


@pytest.mark.parametrize("statement", [claims.RENEW, claims.RELEASE], ids=["renew", "release"])
def test_claims_are_locked_once_however_many_there_are(cluster, corpus, statement):
    holder, digests = uuid.uuid4(), [bytes([n]) * 32 for n in range(200)]
    with psycopg.connect(cluster.url(corpus, OWNER), autocommit=True) as owner:
        owner.execute("delete from embedding_claims")
        owner.execute(
            "insert into embedding_claims select 't7', 'm', 384, 'document', d, %s, now() + interval '1 hour' "
            "from unnest(%s::bytea[]) d",
            (holder, digests),
        )
    values = {"tenant_id": "t7", "model": "m", "dimensions": 384, "holder": holder, "digests": digests, "lease": 60}
    sql, constants = rendered(text(statement))
    found = plan(cluster, corpus, roles.APP, sql, constants | values)
    (locked,) = [n for n in found if n["Node Type"] == "LockRows"]
    assert (locked["Actual Rows"], locked["Actual Loops"]) == (len(digests), 1)
    looked = [n for n in found if n.get("Index Name") == "embedding_claims_pkey"]
    assert [(n["Actual Rows"], n["Actual Loops"]) for n in looked] == [(len(digests), 1)] * 2
