"""Write app/isolation.json: what keeps tenants apart in a database that the migrations have just made (`make isolation`)."""

import io
import json
import re

import msgspec
import psycopg
from alembic import command
from psycopg.rows import dict_row

from app import catalogue, isolation, schema, settings

EVERYTHING = """
select array(select relname::text from pg_class where relnamespace = n.oid and relkind in ('r', 'v')) as relations,
       array(select p.proname::text from pg_proc p where p.pronamespace = n.oid
                and not exists (select from pg_depend d where d.objid = p.oid and d.deptype = 'e')) as functions
  from pg_namespace n where n.oid = (select relnamespace from pg_class where oid = to_regclass('sources'))
"""
"""What there is in a schema that holds nothing but what the migrations made."""


def made(url: str, revision: str) -> isolation.Rules:
    """What keeps tenants apart in a migrated database that holds nothing else."""
    with psycopg.connect(url, row_factory=dict_row) as connection:
        for name, value in catalogue.CONFIG.items():
            connection.execute("select set_config(%s, %s, true)", (name, value))
        everything = connection.execute(EVERYTHING).fetchone() or {}
        statement = catalogue.preflight(**everything)
        row = connection.execute(statement.sql.encode(), statement.values).fetchone() or {}
    rules = msgspec.structs.replace(catalogue.read(row, revision), owner="")
    steps = steps_of(revision)
    functions = {
        name: msgspec.structs.replace(each, steps=steps[name.partition("(")[0]])
        for name, each in rules.functions.items()
    }
    return msgspec.structs.replace(rules, functions=functions)


def steps_of(revision: str) -> dict[str, str]:
    """The migration that makes each function, the last that does, as `alembic upgrade` takes it."""
    config = schema.config(settings.Settings())
    config.output_buffer = io.StringIO()
    command.upgrade(config, revision, sql=True)
    found: dict[str, str] = {}
    steps = ""
    for line in config.output_buffer.getvalue().splitlines():
        if running := re.fullmatch(r"-- Running upgrade (\w*) -> (\w+)", line):
            steps = f"{running[1] or 'base'}:{running[2]}"
        elif creates := re.match(r"create (?:or replace )?(?:function|procedure) (\w+)\(", line):
            found[creates[1]] = steps
    return found


def written(rules: isolation.Rules) -> str:
    """The text of isolation.json."""
    return json.dumps(msgspec.to_builtins(rules), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    config = settings.read()
    with schema.provided(config) as ready:
        isolation.FILE.write_text(written(made(ready.migration_url or "", schema.head())))
