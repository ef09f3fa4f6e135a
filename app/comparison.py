"""Evaluations side by side: how one is saved and read again, and how two over the same queries differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from app import __version__, evaluation, statistics
from app.errors import BadInput
from app.evaluation import Judged
from app.settings import Settings
from app.statistics import Interval

SHOWN = 10
"""How many queries that gained, and that lost, are named."""


class Row(Struct, frozen=True, kw_only=True):
    """One query's result as it is saved, where its figures stand beside the other fields. `found`: ids, best first."""

    id: str
    query: str
    tenant_id: str
    milliseconds: float
    found: list[str]
    expected: list[str]
    figures: dict[str, float] = {}

    @property
    def key(self) -> tuple[str, str]:
        """What tells queries apart; the tenant may be another one, with the same documents cut otherwise."""
        return self.id, self.query

    def as_json(self) -> dict[str, Any]:
        """The row with its figures beside the other fields."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__ if name != "figures"}
        return fields | self.figures


class Saved(NamedTuple):
    """One mode of a saved evaluation: what it was made with, and its rows."""

    setup: Mapping[str, Any]
    rows: list[Row]


class Difference(NamedTuple):
    """A figure of both, this minus the other, and the 95 % interval of that (None for a single query)."""

    other: float
    this: float
    difference: float
    interval: Interval | None


class Change(NamedTuple):
    """One query in both, and by how much its nDCG differs."""

    other: Row
    this: Row
    difference: float


class Comparison(NamedTuple):
    """`differences` by figure; `gained` and `lost`: the queries whose nDCG differs most, the most first."""

    differences: dict[str, Difference]
    gained: list[Change]
    lost: list[Change]


def row(one: Judged, k: int) -> Row:
    """A result as it is saved."""
    return Row(
        id=one.question.id,
        query=one.question.text,
        tenant_id=one.question.tenant_id,
        milliseconds=round(one.milliseconds, 3),
        found=list(one.found),
        expected=one.expected,
        figures=evaluation.metrics(one, k),
    )


def read(path: Path, k: int) -> dict[str, Saved]:
    """A saved evaluation by mode. Raises BadInput for one that is not, or has no rows, or another k."""
    try:
        document = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise BadInput(str(path), f"cannot be read: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeEncodeError, UnicodeDecodeError) as error:
        raise BadInput(str(path), f"is not a JSON document of an evaluation: {error}") from None
    single = "metrics" in document
    modes = {_mode(document): document} if single else document
    if not modes:
        raise BadInput(str(path), "holds no evaluation")
    return {mode: _saved(path if single else f"{path}: {mode}", each, k, mode) for mode, each in modes.items()}


def _mode(document: Mapping[str, Any]) -> str:
    setup = document.get("setup")
    return str(setup.get("mode", evaluation.MODES[0])) if isinstance(setup, dict) else evaluation.MODES[0]


def _saved(where: Path | str, document: Any, k: int, mode: str) -> Saved:
    lines = document.get("per_query") if isinstance(document, dict) else None
    if not isinstance(lines, list) or not lines:
        raise BadInput(
            str(where), "has no per_query; allowed: what `pgrecall evaluate` writes with --save, or --json --per-query"
        )
    names = evaluation.metric_names(k, mode)
    rows = []
    for number, line in enumerate(lines):
        try:
            if missing := [name for name in names if name not in line]:
                raise BadInput(f"{where}: per_query[{number}]", f"has no {missing[0]}; allowed: a run with -k {k}")
            figures = msgspec.convert({name: line[name] for name in names}, dict[str, float])
            rows.append(msgspec.structs.replace(msgspec.convert(line, Row), figures=figures))
        except (TypeError, msgspec.ValidationError) as error:
            raise BadInput(f"{where}: per_query[{number}]", str(error)) from None
    return Saved(document.get("setup") or {}, rows)


def check(where: str, other: Sequence[Row], wanted: Mapping[tuple[str, str], Sequence[str]]) -> None:
    """Raise BadInput unless a run has exactly these queries, by id and text, judged alike."""
    theirs = {row.key: row.expected for row in other}
    for whose, identity, text in (
        *(("it lacks", *key) for key in wanted.keys() - theirs.keys()),
        *(("it alone has", *key) for key in theirs.keys() - wanted.keys()),
    ):
        raise BadInput(
            where, f"is a run of other queries: {whose} {identity!r} ({text[:60]!r}); allowed: the same ids and texts"
        )
    for key, expected in wanted.items():
        if set(expected) != set(theirs[key]):
            raise BadInput(where, f"expects other documents for {key[0]!r} ({key[1][:60]!r}); allowed: the same")


def compare(this: Sequence[Row], other: Sequence[Row]) -> Comparison:
    """How two runs of the same queries differ, in the figures both have; the queries are resampled in pairs."""
    theirs = {row.key: row for row in other}
    pairs = [(theirs[row.key], row) for row in this]
    names = [name for name in this[0].figures if name in other[0].figures]
    before, now = (
        np.array([[row.figures[name] for name in names] for row in rows]) for rows in zip(*pairs, strict=True)
    )
    found = statistics.intervals(now - before) if len(pairs) > 1 else [None] * len(names)
    differences = {
        name: Difference(a, b, b - a, interval)
        for name, a, b, interval in zip(
            names, before.mean(axis=0).tolist(), now.mean(axis=0).tolist(), found, strict=True
        )
    }
    (ndcg,) = (name for name in names if name.startswith("ndcg@"))
    changes = [Change(a, b, b.figures[ndcg] - a.figures[ndcg]) for a, b in pairs]
    changes.sort(key=lambda change: change.difference)
    return Comparison(
        differences,
        [change for change in reversed(changes) if change.difference > 0][:SHOWN],
        [change for change in changes if change.difference < 0][:SHOWN],
    )


def setup(settings: Settings, mode: str, *, reranked: bool = False) -> dict[str, Any]:
    """What a run was made with."""
    return {
        "mode": mode,
        "model": settings.model,
        "dimensions": settings.dimensions,
        "chunk_max_tokens": settings.chunk_max_tokens,
        "chunk_overlap_tokens": settings.chunk_overlap_tokens,
        "ef_search": settings.ef_search,
        "exact_rows": settings.exact_rows,
        "rerank": settings.rerank_model if reranked else None,
        "version": __version__,
    }


def summary(judged: Sequence[Judged], k: int, missing: int) -> dict[str, Any]:
    """A mode's figures as JSON shows them. `missing`: how many expected documents are not stored."""
    return {
        "metrics": evaluation.mean_metrics(judged, k),
        "intervals": evaluation.mean_intervals(judged, k),
        "queries": len(judged),
        "latency_ms": evaluation.latency([one.milliseconds for one in judged]),
        "scans": evaluation.scans([one.scan for one in judged]),
        "missing_documents": missing,
    }


def differences(path: Path, theirs: Saved, found: Comparison) -> dict[str, Any]:
    """A comparison as JSON shows it."""

    def changes(several: Sequence[Change]) -> list[dict[str, Any]]:
        return [{"id": c.this.id, "query": c.this.query, "difference": c.difference} for c in several]

    return {
        "other": str(path),
        "setup": theirs.setup,
        "metrics": {name: each._asdict() for name, each in found.differences.items()},
        "gained": changes(found.gained),
        "lost": changes(found.lost),
    }
