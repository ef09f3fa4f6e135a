"""The SQL that compose.yaml runs as the administrator, run by psql against the tests' server."""

import os
import secrets
import subprocess

import psycopg
import pytest
import yaml
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from app import embedded, local
from tests.conftest import NEEDS_CONTRIB

VARIABLES = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}


@pytest.fixture
def prefix():
    """In place of `pgrecall_` in logins: roles belong to the cluster, and other tests use the real ones."""
    return f"test_{secrets.token_hex(6)}_"


@pytest.fixture
def empty(cluster, prefix, contrib):
    """The URL of an administrator in an empty database."""
    if not contrib:
        pytest.skip(NEEDS_CONTRIB)
    name = sql.Identifier(f"{prefix}database")
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(name))
        yield cluster.url(f"{prefix}database")
        admin.execute(sql.SQL("drop database {} with (force)").format(name))
        for login in (local.OWNER, local.SERVICE):
            admin.execute(sql.SQL("drop role {}").format(sql.Identifier(login.replace("pgrecall_", prefix))))


def test_the_logins_are_made_once_and_take_new_passwords(root, empty, prefix):
    service = yaml.safe_load((root / "compose.yaml").read_text())["services"]["logins"]
    (script,) = service["command"]
    connection = {VARIABLES[name]: str(value) for name, value in conninfo_to_dict(empty).items()}
    seen = []
    for owner_password, service_password in [("local-owner", "local-service"), ('it\'s "new" $x', "other \\ one")]:
        environment = connection | {
            "PATH": f"{embedded.binaries()}{os.pathsep}{os.environ['PATH']}",
            "OWNER_PASSWORD": owner_password,
            "SERVICE_PASSWORD": service_password,
        }
        done = subprocess.run(
            [*service["entrypoint"], script.replace("pgrecall_", prefix)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        with psycopg.connect(empty) as admin:
            seen.append(
                admin.execute(
                    "select rolname, rolcanlogin, rolinherit, rolsuper, rolpassword from pg_authid "
                    "where starts_with(rolname, %s) order by 1",
                    (prefix,),
                ).fetchall()
            )
            owner = admin.execute(
                "select rolname from pg_database d join pg_roles r on r.oid = datdba where datname = current_database()"
            ).fetchone()
            extensions = admin.execute("select extname from pg_extension order by 1").fetchall()
        assert owner == (f"{prefix}owner",)
        assert extensions == [("btree_gin",), ("plpgsql",), ("vector",)]
    first, second = seen
    expected = [(f"{prefix}owner", True, True, False), (f"{prefix}service", True, False, False)]
    assert [row[:4] for row in first] == [row[:4] for row in second] == expected
    assert all(old[4] != new[4] for old, new in zip(first, second, strict=True))
