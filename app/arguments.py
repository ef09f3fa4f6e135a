"""The arguments of the command line: every command with its options and examples."""

import argparse
from collections.abc import Callable
from pathlib import Path

from msgspec import UNSET

from app import (
    __version__,
    admission,
    backlog,
    commands,
    demo,
    erasing,
    floors,
    formats,
    ingest,
    keys,
    psql,
    ranges,
    scorecard,
    transition,
    weighing,
)
from app.settings import Settings

Command = Callable[[argparse.Namespace, Settings], int]


def parser() -> argparse.ArgumentParser:
    """Every command with its options and examples."""
    made = argparse.ArgumentParser(
        prog="pgrecall",
        description="Retrieval and RAG inside PostgreSQL. Without DATABASE_URL an embedded PostgreSQL is used.",
        epilog="`pgrecall COMMAND --help` shows examples. Settings: docs/settings.md and `pgrecall settings`.",
    )
    made.add_argument("--version", action="version", version=f"pgrecall {__version__}")
    several = made.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Command, summary: str, *examples: str) -> argparse.ArgumentParser:
        added = several.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    _serving(
        command(
            "serve",
            commands.serve,
            "Serve the API.",
            "pgrecall serve",
            "pgrecall serve --port 9000 --workers 2",
            "DATABASE_URL=postgresql://service@db/app pgrecall serve --host 0.0.0.0",
        )
    )
    demonstrated = command(
        "demo",
        demo.demo,
        "Ingest the Python reference, search it, ask about it, then serve.",
        "pgrecall demo",
        "pgrecall demo --once",
    )
    _serving(demonstrated)
    demonstrated.add_argument("--once", action="store_true", help="stop after the answer")
    migrated = command(
        "migrate",
        commands.migrate,
        "Bring the database to this release's schema.",
        "pgrecall migrate",
        "pgrecall migrate --check",
        "PGRECALL_MIGRATION_URL=postgresql://owner@db/app pgrecall migrate --json",
    )
    migrated.add_argument(
        "--check", action="store_true", help="change nothing; list what is pending, exit with 3 if anything is, else 0"
    )
    _json(migrated)
    made_roles = command(
        "roles",
        commands.apply_roles,
        "Print, or apply, the SQL that makes the database roles.",
        "pgrecall roles --login service | psql postgresql://postgres@db/app",
        "pgrecall roles --apply --url postgresql://postgres@db/app --login service",
    )
    made_roles.add_argument("--apply", action="store_true", help="run the statements instead of printing them")
    made_roles.add_argument(
        "--login", help="login that may become the service's roles (default: the one in DATABASE_URL)"
    )
    made_roles.add_argument("--url", help="an administrator's URL, with --apply")
    _ingesting(command)
    for name, run, summary in (
        ("search", commands.find, "Find the chunks most similar to a question."),
        ("ask", commands.ask, "Answer a question from the documents, citing them."),
    ):
        asked = command(
            name,
            run,
            summary,
            f'pgrecall {name} "How do I reset my password?" --tenant acme',
            f'pgrecall {name} "late delivery" --tenant acme --doc-type faq --metadata \'{{"lang": "en"}}\' --json',
        )
        asked.add_argument("query", help="the question")
        asked.add_argument("--tenant", required=True, help="whose documents are searched")
        asked.add_argument(
            "--top-k", type=ranges.whole(1, 100), default=5, metavar="N", help="at most so many chunks (5)"
        )
        asked.add_argument(
            "--threshold", type=ranges.number(-1, 1), metavar="S", help="least cosine similarity, -1 to 1"
        )
        asked.add_argument(
            "--mode",
            choices=["vector", "text", "hybrid"],
            default="vector",
            help="by meaning, by words (BM25), or both (vector)",
        )
        asked.add_argument("--rerank", action="store_true", help="order what is found by PGRECALL_RERANK_MODEL")
        asked.add_argument("--doc-type", action="append", help="only this type; may be repeated")
        asked.add_argument("--metadata", help='conditions as JSON, such as {"lang": "en"}')
        _json(asked)
    _queueing(command)
    _evaluating(command)
    erased = command(
        "erase",
        erasing.erase,
        "Erase a tenant, or one of its documents, and say what is left where.",
        "pgrecall erase --tenant acme --yes",
        "pgrecall erase --tenant acme --id faq/password --vacuum --yes --json",
    )
    erased.add_argument("--tenant", required=True, help="whose documents, and all that came of them")
    erased.add_argument("--id", help="only this document")
    erased.add_argument("--vacuum", action="store_true", help="then take the dead rows out of tables and indexes")
    erased.add_argument("--yes", action="store_true", help="do not ask")
    _json(erased)
    indexed = command(
        "index",
        commands.index,
        "Show the vector index, or change its precision while it serves.",
        "pgrecall index",
        "pgrecall index half --oversampling 4",
    )
    indexed.add_argument("kind", nargs="?", choices=["full", "half", "binary"], help="precision to change to")
    indexed.add_argument("--oversampling", type=float, metavar="N", help="candidates for each hit, 1 to 100 (by kind)")
    indexed.add_argument("--keep", action="store_true", help="do not drop the index used until now")
    _json(indexed)
    _changing(command)
    _admitting(command)
    _querying(command)
    _json(command("settings", commands.show_settings, "Show every setting and its source.", "pgrecall settings"))
    _json(
        command(
            "status",
            commands.status,
            "Show schema, model and documents per tenant.",
            "pgrecall status",
            "pgrecall status --json",
        )
    )
    return made


def _queueing(command: Callable[..., argparse.ArgumentParser]) -> None:
    working = command(
        "worker",
        backlog.work,
        "Embed the documents that were put with ?wait=false or by SQL.",
        "pgrecall worker",
        "pgrecall worker --once --tenant acme",
    )
    working.add_argument("--tenant", action="append", help="only this tenant's; may be repeated")
    working.add_argument("--once", action="store_true", help="end when nothing is due: for cron")
    _json(working)
    queued = command(
        "queue",
        backlog.queue,
        "List the documents that are pending or were given up, with the reason.",
        "pgrecall queue --state failed",
        "pgrecall queue --tenant acme --json",
    )
    queued.add_argument("--tenant", help="only this tenant's")
    queued.add_argument("--state", choices=["pending", "failed"], help="only these")
    queued.add_argument(
        "--limit", type=ranges.whole(1, 100_000), default=100, metavar="N", help="at most so many (100)"
    )
    _json(queued)
    retried = command(
        "retry",
        backlog.retry,
        "Queue documents that were given up again.",
        "pgrecall retry --tenant acme --id faq/password",
        "pgrecall retry --tenant acme --all",
    )
    retried.add_argument("--tenant", required=True, help="whose documents")
    which = retried.add_mutually_exclusive_group(required=True)
    which.add_argument("--id", action="append", help="this document; may be repeated")
    which.add_argument("--all", action="store_true", help="every one that was given up")
    _json(retried)


def _ingesting(command: Callable[..., argparse.ArgumentParser]) -> None:
    added = command(
        "ingest",
        ingest.ingest,
        "Store files, folders or standard input as documents: text, Markdown, HTML, PDF, CSV, TSV, JSONL.",
        "pgrecall ingest docs/ --tenant acme",
        "pgrecall ingest docs/ --tenant acme --as handbook --delete-missing --dry-run",
        'pgrecall ingest faq.jsonl --tenant acme --doc-type faq --metadata \'{"lang": "en"}\'',
        "pgrecall ingest faq.csv --tenant acme --field id=key --field content=question --field content=answer",
        "zcat dump.jsonl.gz | pgrecall ingest - --format jsonl --tenant acme --prefix dump/",
    )
    added.add_argument(
        "path", nargs="+", type=Path, help="file, folder, or - for standard input; ids are paths below the folder"
    )
    added.add_argument("--tenant", required=True, help="whose documents they become")
    added.add_argument("--doc-type", help="type of the documents that name none")
    added.add_argument("--metadata", help="JSON object for every document")
    added.add_argument("--prefix", default="", help="put before each id, such as handbook/")
    added.add_argument(
        "--date-from", choices=["mtime", "none"], default="none", help="date of the files that name none (none: now)"
    )
    added.add_argument("--format", choices=formats.FORMATS, help="what the files are, whatever their names say")
    added.add_argument("--encoding", help="of text that is not UTF-8 (guessed)")
    added.add_argument(
        "--separator", metavar="C", help="between the cells of CSV, such as ; or tab (by the first line)"
    )
    added.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="TARGET=FIELD",
        help="which field of CSV or JSONL becomes id, content, title, doc_type, created_at, embedding, metadata or "
        "metadata.KEY; may be repeated, content is then joined",
    )
    added.add_argument(
        "--other-fields", choices=["refuse", "ignore", "metadata"], default="refuse", help="fields not named (refuse)"
    )
    added.add_argument("--as", dest="load_name", metavar="NAME", help="remember, as metadata, what they came with")
    added.add_argument(
        "--delete-missing", action="store_true", help="delete what came with --as NAME before and is gone now"
    )
    added.add_argument("--force", action="store_true", help="delete it even where that may be a mistake")
    added.add_argument(
        "--defer-index",
        action="store_true",
        help="for many rows whose vectors come along, into an empty database: build the vector index afterwards",
    )
    added.add_argument("--dry-run", action="store_true", help="write nothing, say what would change and be embedded")
    added.add_argument(
        "--max-tokens", type=ranges.whole(0, 10**12), metavar="N", help="stop before more tokens than this are embedded"
    )
    added.add_argument(
        "--price", type=ranges.number(0, 10_000), metavar="P", help="of a million tokens (PGRECALL_EMBEDDING_PRICE)"
    )
    _json(added)


def _evaluating(command: Callable[..., argparse.ArgumentParser]) -> None:
    judged = command(
        "evaluate",
        scorecard.evaluate,
        "Measure the search against queries whose documents are known.",
        "pgrecall evaluate judged.jsonl --tenant acme --mode hybrid --fail-under recall@10=0.8",
        "pgrecall evaluate judged.jsonl --tenant acme --fail-under hybrid:recall@10=0.8",
        "pgrecall evaluate beir/scifact --report report.html --save today.json",
        "pgrecall evaluate beir/scifact --report report.html --compare yesterday.json",
        "pgrecall evaluate --ann --tenant acme --fail-under recall@10=0.95",
    )
    judged.add_argument(
        "path",
        type=Path,
        nargs="?",
        help="JSONL file of {query, expected_doc_ids, tenant_id}, or folder with corpus.jsonl, queries.jsonl and qrels.tsv",
    )
    judged.add_argument(
        "--tenant",
        help="tenant of the lines that name none; of a folder's documents (eval- and the folder's name); with --ann, to sample (all)",
    )
    judged.add_argument(
        "-k", type=ranges.whole(1, 1000), default=10, metavar="N", help="so many documents are looked at (10)"
    )
    judged.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page to look at")
    judged.add_argument("--save", type=Path, metavar="FILE", help="write the results as JSON, to compare with later")
    judged.add_argument(
        "--compare", type=Path, metavar="FILE", help="compare with a run of the same queries, by --save"
    )
    judged.add_argument(
        "--ann", action="store_true", help="instead of judged queries: stored vectors, served against exact search"
    )
    judged.add_argument(
        "--sample", type=ranges.whole(2, 100_000), default=200, metavar="N", help="so many vectors, with --ann (200)"
    )
    judged.add_argument(
        "--mode",
        action="append",
        choices=["vector", "text", "hybrid"],
        help="how to search; may be repeated (all three, side by side)",
    )
    judged.add_argument("--rerank", action="store_true", help="order what is found by PGRECALL_RERANK_MODEL")
    judged.add_argument("--per-query", action="store_true", help="every query's figures too, the worst first")
    judged.add_argument(
        "--fail-under",
        type=floors.floor,
        action="append",
        default=[],
        metavar="[MODE:]METRIC=VALUE",
        help="exit with status 1 if the metric is under the value, in that mode or in any that is searched; may be repeated",
    )
    _json(judged)


def _changing(command: Callable[..., argparse.ArgumentParser]) -> None:
    changed = command(
        "model",
        transition.show,
        "Show the embedding models, or change the one that is searched, while it serves.",
        "pgrecall model plan text-embedding-3-large --price 0.13",
        "pgrecall model backfill text-embedding-3-large --rate 200",
        "pgrecall model switch",
        "pgrecall model rollback",
        "pgrecall model finish",
    )
    _json(changed)
    steps = changed.add_subparsers(title="steps", metavar="STEP")

    def step(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = steps.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        _json(added)
        return added

    for name, run, summary in (
        ("plan", transition.plan, "Say what a change would take: chunks, tokens, time, disk, obstacles."),
        (
            "backfill",
            transition.fill,
            "Give every chunk a vector of the new model and build its index; may be run again.",
        ),
    ):
        added = step(name, run, summary)
        added.add_argument(
            "model",
            nargs=None if name == "plan" else "?",
            help="name of the new model; local for the one inside the package",
        )
        added.add_argument("--dimensions", type=ranges.whole(1, 4_000), metavar="N", help="length of its vectors")
        added.add_argument("--base-url", metavar="URL", help="its server, if not the one of OPENAI_BASE_URL")
        added.add_argument(
            "--rate", type=ranges.number(0.001, 10**6), metavar="N", help="at most so many chunks a second"
        )
        added.add_argument("--price", type=ranges.number(0, 10_000), metavar="P", help="of a million tokens")
        if name == "backfill":
            added.add_argument(
                "--callers", action="store_true", help="embed texts whose vectors their callers brought, too"
            )
            added.add_argument(
                "--max-tokens", type=ranges.whole(1, 10**12), metavar="N", help="stop before more tokens are embedded"
            )
    compared = step(
        "compare", transition.compare, "Set the new model beside the former one: judged queries, or sampled chunks."
    )
    switched = step(
        "switch", transition.switch, "Have the new model searched, at once; refused while anything is missing."
    )
    for added in (compared, switched):
        added.add_argument(
            "--judged", type=Path, metavar="PATH", help="queries whose documents are known, as for pgrecall evaluate"
        )
        added.add_argument("--tenant", help="tenant of the lines that name none")
        added.add_argument(
            "-k", type=ranges.whole(1, 1000), default=10, metavar="N", help="so many documents are looked at (10)"
        )
    compared.add_argument(
        "--sample",
        type=ranges.whole(2, 100_000),
        default=200,
        metavar="N",
        help="so many chunks, without --judged (200)",
    )
    switched.add_argument(
        "--tolerance",
        type=ranges.number(0, 1),
        default=weighing.TOLERANCE,
        metavar="D",
        help=f"refuse where nDCG on --judged falls by more ({weighing.TOLERANCE:g})",
    )
    step("rollback", transition.rollback, "Have the former model searched again, at once; until finish.")
    step("finish", transition.finish, "Drop the former model's vectors and index.")
    step("abandon", transition.abandon, "Before a switch: drop the new model's vectors and index.")


def _admitting(command: Callable[..., argparse.ArgumentParser]) -> None:
    def several(name: str, run: Command, summary: str, *examples: str) -> Callable[..., argparse.ArgumentParser]:
        added = command(name, run, summary, *examples)
        _json(added)
        steps = added.add_subparsers(title="steps", metavar="STEP")

        def step(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
            made: argparse.ArgumentParser = steps.add_parser(name, help=summary, description=summary)
            made.set_defaults(run=run)
            _json(made)
            return made

        return step

    step = several(
        "tenant",
        admission.list_tenants,
        "Register tenants that keys are made for, set their limits, list and delete them.",
        "pgrecall tenant create acme --max-rows 1000000 --tokens-per-day 5000000",
        "pgrecall tenant limit acme --max-rows none",
        "pgrecall tenant delete acme",
    )
    for verb, run, summary in (
        ("create", admission.create_tenant, "Register a tenant, or set limits of one that is registered."),
        ("limit", admission.limit_tenant, "Set limits of a tenant that is registered."),
    ):
        made = step(verb, run, summary)
        made.add_argument("tenant", help="its name")
        for name, what in (("--max-rows", "chunks it may have"), ("--tokens-per-day", "tokens its keys may spend")):
            made.add_argument(name, type=ranges.limit, default=UNSET, metavar="N", help=f"{what}; none: no limit")
    step("list", admission.list_tenants, "List the tenants, registered or in use.")
    made = step("delete", admission.delete_tenant, "Revoke a tenant's keys, erase all it has, strike it off.")
    made.add_argument("tenant", help="its name")
    made.add_argument("--yes", action="store_true", help="do not ask")

    step = several(
        "key",
        admission.list_keys,
        "Make, list and revoke the keys of the API.",
        "pgrecall key create --tenant acme --scope read --scope write",
        "pgrecall key create --tenant acme --scope read --days 90 --requests-per-minute 600 --name 'the website'",
        "pgrecall key create --scope admin",
        "pgrecall key revoke 3fh2k9qa",
    )
    made = step("create", admission.create_key, "Make a key. It is shown once and not stored.")
    made.add_argument("--tenant", help="the only tenant it acts for; without one it administers them all")
    made.add_argument("--scope", action="append", choices=keys.SCOPES, required=True, help="may be repeated")
    made.add_argument("--name", help="what it is for")
    made.add_argument("--days", type=float, metavar="N", help="after which it expires (never)")
    made.add_argument("--requests-per-minute", type=ranges.whole(1, 10**12), metavar="N", help="(no limit)")
    made.add_argument("--concurrent-streams", type=ranges.whole(0, 10**12), metavar="N", help="(no limit)")
    made = step("list", admission.list_keys, "List the keys, without what is secret of them.")
    made.add_argument("--tenant", help="only this tenant's")
    step("revoke", admission.revoke_key, "Have a key refused from now on.").add_argument(
        "prefix", help="what stands between pgr_ and the next _"
    )


def _querying(command: Callable[..., argparse.ArgumentParser]) -> None:
    opened = command(
        "sql",
        psql.open_psql,
        "Open psql as the analyst: every table, view and function of docs/sql.md.",
        "pgrecall sql",
        "pgrecall sql -c 'select * from statistics_by_tenant'",
        "pgrecall sql -- --csv -c 'select * from statistics_by_tenant'",
        "PGRECALL_ANALYST_URL=postgresql://jane@db/app pgrecall sql --print-url",
    )
    opened.add_argument("--owner", action="store_true", help="as the owner of the tables, who may also write")
    opened.add_argument("--print-url", action="store_true", help="print where to connect, for another program")
    opened.add_argument("-c", "--command", action="append", metavar="SQL", help="run this and leave; may be repeated")
    opened.add_argument(
        "-f", "--file", action="append", metavar="PATH", help="run this file and leave; may be repeated"
    )
    opened.add_argument("options", nargs="*", metavar="-- OPTION", help="handed to psql as they are")
    embedded = command(
        "embed",
        psql.embed,
        "Print the vector of a question, by the model this database is of: for search_documents in SQL.",
        'pgrecall embed "How do I reset my password?"',
        "in psql: \\set question `pgrecall embed 'How do I reset my password?'`",
    )
    embedded.add_argument("query", help="the question")
    _json(embedded)
    admitted = command(
        "analyst",
        psql.admit,
        "Print, or apply, the SQL that makes a login an analyst's: read-only, some tenants or all, with a time limit.",
        "pgrecall analyst jane --tenant acme --tenant umbra | psql postgresql://postgres@db/app",
        "pgrecall analyst jane --all-tenants --statement-timeout 300 --apply --url postgresql://postgres@db/app",
        "pgrecall analyst jane --revoke --apply",
    )
    admitted.add_argument("login", help="its name; made if it is not there")
    whose = admitted.add_mutually_exclusive_group()
    whose.add_argument("--tenant", action="append", help="a tenant it may read, and no others; may be repeated")
    whose.add_argument("--all-tenants", action="store_true", help="it may read every tenant, those to come too")
    whose.add_argument("--revoke", action="store_true", help="it may read nothing any more; the login stays")
    admitted.add_argument(
        "--statement-timeout",
        type=ranges.number(0.001, 86_400),
        default=60.0,
        metavar="S",
        help="seconds a statement may take (60)",
    )
    admitted.add_argument("--apply", action="store_true", help="run the statements instead of printing them")
    admitted.add_argument("--url", help="an administrator's URL, with --apply")


def _serving(added: argparse.ArgumentParser) -> None:
    added.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    added.add_argument("--port", type=ranges.whole(0, 65_535), default=8000, help="port, 0 for a free one (8000)")
    added.add_argument("--workers", type=ranges.whole(1, 64), default=1, metavar="N", help="server processes (1)")
    worker = added.add_mutually_exclusive_group()
    worker.add_argument(
        "--with-worker",
        action="store_true",
        default=None,
        help="embed what is put with ?wait=false in the server itself (with the embedded database)",
    )
    worker.add_argument(
        "--without-worker", dest="with_worker", action="store_false", help="leave that to `pgrecall worker`"
    )
    insecure = "listen on an address others can reach although the database has no keys"
    added.add_argument("--insecure", action="store_true", help=insecure)


def _json(added: argparse.ArgumentParser) -> None:
    added.add_argument("--json", action="store_true", help="one JSON document on standard output")
