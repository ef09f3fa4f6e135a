"""How a search was done, in words and figures: for a person who asks why it took so long or found what it did."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from app.database import Database
from app.search import Found, Step
from app.statements import Statement

PURPOSE = {
    "few": "counts the rows that pass, up to the size from which the index pays, and measures them if there are no more",
    "nearest": "walks the HNSW index of the tenant's bucket, filtering as it goes, and measures its candidates again",
    "exact": "measures every row that passes",
    "text": "finds the chunks whose words can reach the best scores, and scores them by BM25",
} | {
    f"hybrid {strategy}": f"BM25 over the words, fused with a vector leg that {purpose}"
    for strategy, purpose in (
        ("few", "measures the rows that pass if they are few"),
        ("nearest", "walks the HNSW index of the tenant's bucket"),
        ("exact", "measures every row that passes"),
    )
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What PostgreSQL measured when it ran the statement once more: rows visited, pages of 8 kB read from memory and disk.

    `rows_visited` are the tenant's: what a walk of the index passed over is left out.
    """

    milliseconds: float
    rows_visited: int
    pages_hit: int
    pages_read: int


@dataclass(frozen=True, slots=True)
class Run:
    """One statement of the search: what it is for, how long it took, the indexes in its plan."""

    statement: str
    purpose: str
    milliseconds: float
    indexes: list[str]
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The strategy and why it was taken; milliseconds in each part; each statement.

    `milliseconds`: in the embedder, the database, the reranker (`reranking`, where one was asked) and the rest.
    `embedding_remembered`: the question was asked lately, its vector was not computed again.
    """

    strategy: str
    reason: str
    milliseconds: dict[str, float]
    embedding_remembered: bool
    statements: list[Run]


async def of(
    database: Database, tenant_id: str, found: Found, *, embedding: float, remembered: bool, total: float, analyze: bool
) -> Explanation:
    """Explain a search that took `total` milliseconds, `embedding` of them for the question's vector.

    With `analyze` each of its statements is run once more.
    """
    runs = [await _run(database, tenant_id, step, analyze=analyze) for step in found.steps]
    spent = sum(step.milliseconds for step in found.steps)
    milliseconds = {"embedding": embedding, "database": spent}
    if found.reranking is not None:
        milliseconds["reranking"] = found.reranking
    milliseconds["rest"] = max(total - sum(milliseconds.values()), 0.0)
    return Explanation(
        found.scan.strategy,
        _reason(found),
        {name: round(value, 3) for name, value in milliseconds.items()},
        remembered,
        runs,
    )


def _reason(found: Found) -> str:
    names = [step.statement.name.removeprefix("hybrid ") for step in found.steps]
    if names == ["text"]:
        return "the mode text was asked for"
    bound = found.steps[0].statement.values["bound"] - 1
    if names == ["exact"]:
        return "exact was asked for"
    if names == ["few"]:
        return f"at most {bound:,} chunks pass the conditions: fewer than the index would visit"
    if names[-1] == "exact":
        return "the index ended short, so every chunk that passes was measured"
    if not found.scan.full:
        return "the index ended short, and the time limit forbade measuring every chunk that passes"
    known = "" if "few" in names else ", as a search within the last minute has counted"
    return f"more than {bound:,} chunks pass the conditions{known}: the index visits fewer"


async def _run(database: Database, tenant_id: str, step: Step, *, analyze: bool) -> Run:
    name, sql, values = step.statement
    options = "analyze, buffers, format json" if analyze else "format json"
    ((row,),) = await database.fetch(
        tenant_id, [Statement(f"explain {name}", f"explain ({options}) {sql}", values)], step.config
    )
    (plan,) = row["QUERY PLAN"]
    nodes = list(_nodes(plan["Plan"]))
    measured = None
    if analyze:
        top = plan["Plan"]
        visited = sum(_visited(node) for node in nodes if node.get("Relation Name") == "documents")
        measured = Measured(
            round(plan["Execution Time"], 3), visited, top["Shared Hit Blocks"], top["Shared Read Blocks"]
        )
    indexes = sorted({node["Index Name"] for node in nodes if "Index Name" in node and _ran(node)})
    return Run(name, PURPOSE[name], round(step.milliseconds, 3), indexes, measured)


def _visited(node: dict[str, Any]) -> int:
    rows: float = node["Actual Rows"]
    # What a walk of the graph or of lossy pages passed over are other tenants' rows too, whose number is theirs.
    if "tenant_id" in node.get("Index Cond", "") + node.get("Recheck Cond", ""):
        rows += node.get("Rows Removed by Filter", 0)
        rows += 0 if node.get("Lossy Heap Blocks") else node.get("Rows Removed by Index Recheck", 0)
    loops: float = node["Actual Loops"]
    return round(rows * loops)


def _ran(node: dict[str, Any]) -> bool:
    return bool(node.get("Actual Loops", 1))


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
