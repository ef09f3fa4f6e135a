"""Every command that names a tenant, with what it is run with."""

from tests.isolation.routes import IDS, QUESTION
from tests.isolation.worlds import MARK

ACME = ("--tenant", "acme", "--json")
RECIPES: dict[str, list[tuple[str, ...]]] = {
    "ingest": [
        ("FILE", *ACME),
        ("FILE", "--dry-run", *ACME),
        ("FILE", "--as", "load", "--delete-missing", "--force", *ACME),
    ],
    "search": [
        (question, "--mode", mode, "--top-k", "100", *ACME)
        for question in (QUESTION, MARK)
        for mode in ("vector", "text", "hybrid")
    ],
    "ask": [(QUESTION, *ACME), (MARK, "--mode", "text", *ACME)],
    "worker": [("--once", *ACME)],
    "queue": [ACME, ("--state", "failed", *ACME)],
    "retry": [*(("--id", f"failed/{name}", *ACME) for name in ("theirs", "nobody", "shared")), ("--all", *ACME)],
    "evaluate": [("JUDGED", *ACME), ("--ann", "--sample", "10", *ACME)],
    "erase": [*(("--id", each, "--yes", *ACME) for each in IDS), ("--yes", *ACME)],
}
"""Arguments of each run, one after the other. FILE and JUDGED stand for files."""

READING = {"search", "ask", "queue", "evaluate"}
"""Those that change nothing."""

FILTERED = {"queue"}
"""Whose predicate is a filter and no lock: the operator's, run as pgrecall_worker, which sees ids, states and errors of all."""
