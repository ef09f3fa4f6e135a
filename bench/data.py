"""Reproducible data to search: clustered unit vectors, tenants, the columns that filters look at, and the exact answers.

Needs numpy only, because the peers' processes read the same rows in an environment of their own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256
from pydoc_data.topics import topics
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Layout = Literal["mixed", "single"]

TENANTS = {"half": 0.5, "tenth": 0.1, "hundredth": 0.01, "tiny": 0.0005}
"""Share of the rows of each tenant that is searched in the layout `mixed`; the rest belongs to many small tenants."""
EVERYTHING = "everything"
"""The one tenant of the layout `single`."""
SMALL_SHARE = 0.0005
"""Of each of the other tenants."""

DAYS = 100
CONTENT = 600
"""Characters of a row's text."""
RARE_ROWS = 3
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
TOPICS, SUBTOPICS = 60, 20
_STEP = 50_000


class Narrowing(NamedTuple):
    """The conditions of a search besides its tenant; days count from EPOCH, the second one is excluded."""

    doc_type: str | None = None
    metadata: Mapping[str, str] | None = None
    days: tuple[float, float] | None = None

    @property
    def window(self) -> tuple[datetime, datetime] | None:
        """`days` as moments."""
        return None if self.days is None else (EPOCH + timedelta(self.days[0]), EPOCH + timedelta(self.days[1]))


FILTERS: dict[str, Narrowing] = {
    "none": Narrowing(),
    "type 20 %": Narrowing(doc_type="faq"),
    "key 10 %": Narrowing(metadata={"lang": "de"}),
    "both 2 %": Narrowing(doc_type="faq", metadata={"lang": "de"}),
    "day 1 %": Narrowing(days=(40.0, 41.0)),
    "3 rows": Narrowing(metadata={"batch": "rare"}),
    "no row": Narrowing(metadata={"batch": "missing"}),
}


class Row(NamedTuple):
    """A document of one chunk."""

    tenant: str
    id: str
    doc_type: str
    metadata: dict[str, str]
    created_at: datetime
    content: str


@dataclass(frozen=True)
class Corpus:
    """Rows in the order they are stored, tenants mixed as they arrive; `vectors` and `queries` are (rows, dimensions)."""

    vectors: Vectors
    queries: Vectors
    tenants: Sequence[str]
    tenant: npt.NDArray[np.int32]
    doc_type: npt.NDArray[np.bool_]
    lang: npt.NDArray[np.bool_]
    rare: npt.NDArray[np.bool_]
    day: npt.NDArray[np.float64]

    def rows(self) -> Iterator[Row]:
        """What is stored beside the vectors."""
        others = ("manual", "policy", "ticket", "article")
        for n in range(len(self.vectors)):
            metadata = {"lang": "de" if self.lang[n] else "en", "batch": "rare" if self.rare[n] else f"b{n % 50}"}
            yield Row(
                self.tenants[self.tenant[n]],
                f"d{n}",
                "faq" if self.doc_type[n] else others[n % 4],
                metadata,
                EPOCH + timedelta(days=float(self.day[n])),
                content(n),
            )

    def passes(self, tenant: str | None, narrowing: Narrowing) -> npt.NDArray[np.intp]:
        """Numbers of the rows of a tenant (None: of all) that satisfy the conditions."""
        kept = np.ones(len(self.vectors), bool) if tenant is None else self.tenant == self.tenants.index(tenant)
        if narrowing.doc_type is not None:
            kept &= self.doc_type
        for key, value in (narrowing.metadata or {}).items():
            kept &= {("lang", "de"): self.lang, ("batch", "rare"): self.rare}.get((key, value), np.zeros_like(kept))
        if narrowing.days is not None:
            kept &= (self.day >= narrowing.days[0]) & (self.day < narrowing.days[1])
        return np.flatnonzero(kept)

    def truth(self, tenant: str | None, narrowing: Narrowing, top_k: int) -> list[frozenset[str]]:
        """Ids of the min(top_k, matching) nearest rows of every query."""
        passing = self.passes(tenant, narrowing)
        if len(passing) <= top_k:
            return [frozenset(f"d{n}" for n in passing)] * len(self.queries)
        near = self.queries @ self.vectors[passing].T
        best = passing[np.argpartition(-near, top_k, axis=1)[:, :top_k]]
        return [frozenset(f"d{n}" for n in row) for row in best]


def clustered(count: int, dimensions: int, seed: int, stream: int = 0) -> Vectors:
    """Unit vectors of a mixture, (count, dimensions): topics of unequal size, subtopics within them, and a row's own part.

    A row's own part varies along few directions much and along many a little, as embeddings do. Streams of one seed are
    different draws of the same mixture.
    """
    shape = np.random.default_rng([seed, 0xC1])
    topics_ = shape.standard_normal((TOPICS, dimensions))
    centres = np.repeat(topics_, SUBTOPICS, axis=0) + 0.8 * shape.standard_normal((TOPICS * SUBTOPICS, dimensions))
    weights = 1 / np.arange(1, len(centres) + 1) ** 0.6
    weights = shape.permutation(weights / weights.sum())
    turned = np.linalg.qr(shape.standard_normal((dimensions, dimensions)))[0]
    scales = 1 / np.sqrt(np.arange(1, dimensions + 1) + 8)
    directions = (turned * (0.9 * scales / np.sqrt((scales**2).mean()))).T.astype(np.float32)
    generator = np.random.default_rng([seed, 0xD2, stream])
    made = np.empty((count, dimensions), np.float32)
    for start in range(0, count, _STEP):
        part = made[start : start + _STEP]
        chosen = generator.choice(len(centres), len(part), p=weights)
        part[:] = centres[chosen] + generator.standard_normal(part.shape, np.float32) @ directions
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return made


def corpus(
    count: int, *, layout: Layout = "mixed", dimensions: int = 384, seed: int = 11, queries: int = 100
) -> Corpus:
    """The rows of one layout. Both have the same vectors and fields; tenants differ, and so which rows are rare."""
    generator = np.random.default_rng([seed, 0xE3])
    tenant, tenants = np.zeros(count, np.int32), [EVERYTHING]
    shuffled = generator.permutation(count)
    if layout == "mixed":
        sizes = [round(share * count) for share in TENANTS.values()]
        small = max(1, round(SMALL_SHARE * count))
        rest = count - sum(sizes)
        sizes += [small] * (rest // small)
        tenants = [*TENANTS, *(f"small-{n}" for n in range(len(sizes) - len(TENANTS) + 1))]
        tenant[shuffled] = np.repeat(np.arange(len(sizes) + 1), [*sizes, count - sum(sizes)]).astype(np.int32)
    doc_type, lang = (generator.random(count) < share for share in (0.2, 0.1))
    day = generator.random(count) * DAYS
    rare = np.zeros(count, bool)
    for number in range(len(TENANTS) if layout == "mixed" else 1):
        rare[generator.choice(np.flatnonzero(tenant == number), RARE_ROWS, replace=False)] = True
    return Corpus(
        vectors=clustered(count, dimensions, seed),
        queries=clustered(queries, dimensions, seed, stream=1),
        tenants=tenants,
        tenant=tenant,
        doc_type=doc_type,
        lang=lang,
        rare=rare,
        day=day,
    )


@cache
def _prose() -> str:
    return " ".join(" ".join(topics.values()).split())


def content(number: int) -> str:
    """About CONTENT characters of prose, another piece for every row."""
    prose = _prose()
    start = number * 7_919 % (len(prose) - CONTENT)
    return f"{number}. {prose[start : start + CONTENT]}"


def chunk_key(text: str) -> str:
    """A name for the chunk, as long as the service's own."""
    return sha256(text.encode()).hexdigest()[:32]


def recall(found: Sequence[str], truth: frozenset[str]) -> float:
    """Share of the exact answer that was found; 1 where there is nothing to find."""
    return len(truth.intersection(found)) / len(truth) if truth else 1.0
