"""Ways to fuse words and vectors on judged collections: nDCG@10, and what each gains on reciprocal ranks.

    python -m bench.fusion DIR [DIR ...]

Folders are in the BEIR layout, cut at the default chunk size; two with the same corpus are two sets of questions. The
local model's vectors are kept in .bench/fusion, so a second run takes minutes; words and weights come out of the migrated
database, and BM25 and cosine are exact. A document stands where its best chunk does. The second table chooses the
parameters of each way on the other corpora: what it shows of a collection was not tuned on it.
"""

import argparse
import asyncio
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psycopg

from app import chunking, evaluation, fusion, judgements, statistics, text
from app.embedding import Kind, LocalEmbedder
from app.settings import Settings
from bench.text import opened, store

K = 10
DEPTHS = (fusion.LEG, 2 * fusion.LEG)

Floats = npt.NDArray[np.float64]


class Met(NamedTuple):
    """What the two legs of one question found: arrays over chunks, in the order of their ids.

    `rank` is (vectors', words'), infinite where that leg did not find the chunk; `similarity` and `words` are of all of them.
    `bound` is what BM25 cannot pass.
    """

    chunks: npt.NDArray[np.int64]
    rank: tuple[Floats, Floats]
    similarity: Floats
    words: Floats
    vectors: npt.NDArray[np.float32]
    documents: npt.NDArray[np.int64]
    bound: float


Fusion = Callable[[Met], Floats]


class Collection(NamedTuple):
    """Questions with what was met, by the legs' depth. `corpus` is equal where the documents are the same."""

    name: str
    corpus: str
    grades: list[dict[str, int]]
    ids: list[str]
    met: dict[int, list[Met]]

    def ndcg(self, fuse: Fusion, depth: int = fusion.LEG) -> Floats:
        """Of each question."""
        return np.array(
            [self._ndcg(fuse, met, grades) for met, grades in zip(self.met[depth], self.grades, strict=True)]
        )

    def _ndcg(self, fuse: Fusion, met: Met, grades: dict[str, int]) -> float:
        order = met.chunks[np.argsort(-fuse(met).round(12), kind="stable")]
        return evaluation.ndcg(list(dict.fromkeys(self.ids[chunk] for chunk in order)), grades, K)


# Ways to fuse


def by_rank(met: Met, constant: float = 60, share: float = 0.5) -> Floats:
    return share / (constant + met.rank[0]) + (1 - share) / (constant + met.rank[1])


def both_ranks(met: Met, constant: float = 60) -> Floats:
    """Every chunk ranked in both legs by its true scores."""
    similar, worded = ((-s).argsort(kind="stable").argsort() + 1 for s in (met.similarity, met.words))
    return 1 / (constant + similar) + np.where(met.words > 0, 1 / (constant + worded), 0)


def spread(scores: Floats) -> Floats:
    """0 for the least, 1 for the most."""
    return (scores - scores.min()) / (np.ptp(scores) or 1)


def leg_scores(met: Met, share: float = 0.5) -> Floats:
    """Relative score fusion as Weaviate has it: a chunk that one leg did not find gets nothing from it."""
    total = np.zeros(len(met.chunks))
    for weight, scores, rank in zip((share, 1 - share), (met.similarity, met.words), met.rank, strict=True):
        if np.isfinite(rank).any():
            total[np.isfinite(rank)] += weight * spread(scores[np.isfinite(rank)])
    return total


def highest(scores: Floats) -> Floats:
    return scores / (scores.max() or 1)


def both_scores(met: Met, share: float = fusion.SHARES[0]) -> Floats:
    return share * spread(met.similarity) + (1 - share) * highest(met.words)


def theoretical(met: Met, share: float = 0.8) -> Floats:
    """TM2C2 of Bruch, Gai and Ingber 2023: cosine from -1 and BM25 from 0 to the highest met."""
    return share * highest(met.similarity + 1) + (1 - share) * highest(met.words)


def bounded(met: Met, share: float = 0.4) -> Floats:
    """Cosine as it is, and BM25 as a share of what it cannot pass."""
    return share * met.similarity + (1 - share) * met.words / (met.bound or 1)


def standardised(met: Met, share: float = 0.5) -> Floats:
    return share * standard(met.similarity) + (1 - share) * standard(met.words)


def standard(scores: Floats) -> Floats:
    return (scores - scores.mean()) / (scores.std() or 1)


def covered(met: Met, share: float = 0.6, slope: float = 0.3) -> Floats:
    """Words count the more, the nearer the best BM25 is to what it cannot pass."""
    return both_scores(met, float(np.clip(share - slope * (met.words.max() / (met.bound or 1) - 0.5), 0, 1)))


def second(met: Met, inner: Fusion = both_scores, weight: float = 0.1) -> Floats:
    """A document's best chunk gains a share of its second."""
    scores = inner(met)
    gained, seen = scores.copy(), dict[int, list[int]]()
    for place in np.argsort(-scores, kind="stable"):
        places = seen.setdefault(int(met.documents[place]), [])
        places.append(int(place))
        if len(places) == 2:
            gained[places[0]] += weight * scores[place]
    return gained


def feedback(
    met: Met, inner: Fusion = both_scores, best: int = fusion.FEEDBACK, weight: float = fusion.FEEDBACK_WEIGHT
) -> Floats:
    """Rocchio: the question moved to the mean of the best, what was met measured again (nothing is searched again)."""
    relevant = np.argsort(-inner(met).round(12), kind="stable")[:best]
    middle = met.vectors[relevant].mean(0)
    nearness = met.similarity + weight * (met.vectors @ middle / np.linalg.norm(middle)).astype(np.float64)
    place = np.argsort(np.argsort(-nearness, kind="stable"), kind="stable") + 1.0
    return inner(met._replace(similarity=nearness, rank=(place, met.rank[1])))


SHARES = tuple(np.round(np.arange(0.3, 0.9, 0.1), 1).tolist())
BEFORE = "reciprocal ranks"
FIXED: dict[str, tuple[Fusion, int]] = {
    "vectors alone": (lambda met: -met.rank[0], DEPTHS[0]),
    "words alone": (lambda met: -met.rank[1], DEPTHS[0]),
    BEFORE: (by_rank, DEPTHS[0]),
    "reciprocal ranks, constant 20": (partial(by_rank, constant=20), DEPTHS[0]),
    "reciprocal ranks, legs of 200": (by_rank, DEPTHS[1]),
    "reciprocal ranks in both legs": (both_ranks, DEPTHS[0]),
    "reciprocal ranks, feedback": (partial(feedback, inner=by_rank), DEPTHS[0]),
    "scores of each leg, .5": (leg_scores, DEPTHS[0]),
    "TM2C2, .8": (theoretical, DEPTHS[0]),
    "standardised, .5": (standardised, DEPTHS[0]),
    "both scores, .5": (partial(both_scores, share=0.5), DEPTHS[0]),
    "both scores, .6": (both_scores, DEPTHS[0]),
    "both scores, .6, legs of 200": (both_scores, DEPTHS[1]),
    "both scores, .6, tenth of the second chunk": (second, DEPTHS[0]),
    "`relative`: both scores, .6, feedback": (feedback, DEPTHS[0]),
}
FAMILIES: dict[str, dict[str, Fusion]] = {
    "reciprocal ranks: constant, share": {
        f"{k}, {s}": partial(by_rank, constant=k, share=s) for k in (5, 10, 20, 40, 60, 100) for s in SHARES
    },
    "scores of each leg: share": {f"{s}": partial(leg_scores, share=s) for s in SHARES},
    "TM2C2: share": {f"{s}": partial(theoretical, share=s) for s in SHARES},
    "BM25 by its bound: share": {f"{s}": partial(bounded, share=s) for s in SHARES},
    "standardised: share": {f"{s}": partial(standardised, share=s) for s in SHARES},
    "both scores: share": {f"{s}": partial(both_scores, share=s) for s in SHARES},
    "both scores: share, slope by coverage": {
        f"{s}, {x}": partial(covered, share=s, slope=x) for s in SHARES for x in (-0.6, -0.3, 0.0, 0.3, 0.6)
    },
    "both scores: share, second chunk": {
        f"{s}, {w}": partial(second, inner=partial(both_scores, share=s), weight=w)
        for s in SHARES
        for w in (0.0, 0.02, 0.05, 0.1)
    },
    "both scores: share, feedback": {
        f"{s}, {best}, {w}": partial(feedback, inner=partial(both_scores, share=s), best=best, weight=w)
        for s in SHARES
        for best in (3, 5)
        for w in (0.0, 0.2, 0.3, 0.5)
    },
}


# Collections


def embedded(embedder: LocalEmbedder, texts: Sequence[str], kind: Kind, cache: Path) -> npt.NDArray[np.float32]:
    kept = cache / f"{hashlib.sha256(chr(0).join((kind, *texts)).encode()).hexdigest()[:32]}.npy"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        np.save(kept, asyncio.run(embedder.embed(texts, kind)))
    vectors: npt.NDArray[np.float32] = np.load(kept)
    return vectors


def words(
    owner: psycopg.Connection[Any], tenant: str, place: dict[tuple[str, str], int]
) -> tuple[dict[str, Any], Floats]:
    """Which chunks hold each word how often, and how long they are."""
    holding: dict[str, list[tuple[int, int]]] = {}
    length = np.ones(len(place))
    query = "select id, chunk_key, length, lexeme, cardinality(positions) from document_terms, unnest(terms) where tenant_id = %s"
    for id_, key, size, lexeme, count in owner.execute(query, (tenant,)):
        holding.setdefault(lexeme, []).append((place[id_, key], count))
        length[place[id_, key]] = size
    return {lexeme: np.array(found).T for lexeme, found in holding.items()}, length


def chunks(embedder: LocalEmbedder, collection: judgements.Collection) -> dict[tuple[str, str], str]:
    """The collection cut at the default size, by document and key, in their order."""
    config = Settings()
    cut = {
        (draft.id, chunking.key(chunk.content)): chunk.content
        for draft in collection.drafts
        for chunk in chunking.chunk(
            draft.content,
            embedder.count_tokens,
            max_tokens=config.chunk_max_tokens,
            overlap_tokens=config.chunk_overlap_tokens,
        )
    }
    return dict(sorted(cut.items()))


def read(owner: psycopg.Connection[Any], embedder: LocalEmbedder, folder: Path, cache: Path) -> Collection:
    collection, tenant = judgements.read(folder, folder.name), folder.name
    cut = chunks(embedder, collection)
    keys = list(cut)
    vectors = embedded(embedder, list(cut.values()), "document", cache)
    queries = embedded(embedder, [question.text for question in collection.questions], "query", cache)
    documents = {id_: [cut[key] for key in several] for id_, several in itertools.groupby(keys, key=lambda key: key[0])}
    store(owner, tenant, documents)
    owner.execute("call fill_terms()")
    holding, length = words(owner, tenant, {key: place for place, key in enumerate(keys)})
    owner.execute("select set_config('pgrecall.tenant_id', %s, false)", (tenant,))
    of = np.unique([id_ for id_, _ in keys], return_inverse=True)[1]
    met: dict[int, list[Met]] = {depth: [] for depth in DEPTHS}
    for question, query in zip(collection.questions, queries, strict=True):
        scores, bound = bm25(owner, tenant, question.text, holding, length)
        similarity = (vectors @ query).astype(np.float64)
        for depth, several in met.items():
            several.append(found(depth, similarity, scores, vectors, of, bound))
    corpus = hashlib.sha256((folder / judgements.CORPUS).read_bytes()).hexdigest()
    return Collection(
        folder.name, corpus, [dict(q.grades) for q in collection.questions], [id_ for id_, _ in keys], met
    )


def bm25(
    owner: psycopg.Connection[Any], tenant: str, question: str, holding: dict[str, Any], length: Floats
) -> tuple[Floats, float]:
    """Of every chunk, with the words and weights that the database gives, and what it cannot pass."""
    asked = "select queries::text[], weights, total, mean_length from text_question(%s, %s, %s, %s)"
    row = owner.execute(asked, (tenant, text.plain(question), text.TERMS[-1], text.READING)).fetchone()
    queries, weights, total, mean = row or (None, None, 0, 1)
    scores = np.zeros(len(length))
    norm = text.K1 * (1 - text.B + text.B * length / mean)
    for query, weight in zip(queries or (), weights or (), strict=True):
        chunks, count = holding[query[1:-1].replace("''", "'")]
        scores[chunks] += weight * count / (count + norm[chunks])
    return scores, total


def found(
    depth: int,
    similarity: Floats,
    scores: Floats,
    vectors: npt.NDArray[np.float32],
    of: npt.NDArray[np.int64],
    bound: float,
) -> Met:
    legs = [np.argsort(-each, kind="stable")[:depth] for each in (similarity, scores)]
    legs[1] = legs[1][scores[legs[1]] > 0]
    chunks = np.union1d(*legs)
    ranks = np.full((2, len(chunks)), np.inf)
    for rank, leg in zip(ranks, legs, strict=True):
        rank[np.searchsorted(chunks, leg)] = np.arange(1, len(leg) + 1)
    return Met(chunks, (ranks[0], ranks[1]), similarity[chunks], scores[chunks], vectors[chunks], of[chunks], bound)


# Tables


def row(name: str, several: Sequence[Floats], before: Sequence[Floats], notes: Sequence[str] = ()) -> str:
    """The nDCG of each collection, bold where the interval of its difference to `before` leaves out 0; their mean."""
    cells = []
    for each, former, note in itertools.zip_longest(several, before, notes, fillvalue=""):
        low, high = statistics.intervals((each - former)[:, None])[0]
        mark = "**" if low > 0 or high < 0 else ""
        cells.append(f"{mark}{each.mean():.3f}{mark} ({low:+.3f} to {high:+.3f}){f' [{note}]' if note else ''}")
    return f"| {name} | {' | '.join(cells)} | {np.mean([each.mean() for each in several]):.3f} |"


def left_out(collections: Sequence[Collection], family: dict[str, Fusion]) -> Iterator[tuple[Floats, str]]:
    """Each collection with the parameters that are best in the mean of the other corpora, and which those are."""
    all_ = {name: [collection.ndcg(fuse) for collection in collections] for name, fuse in family.items()}
    for place, collection in enumerate(collections):
        others = [n for n, other in enumerate(collections) if other.corpus != collection.corpus]
        best = max(all_, key=lambda name: np.mean([all_[name][n].mean() for n in others]))
        yield all_[best][place], best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="judged collections in the BEIR layout")
    parser.add_argument("--cache", type=Path, default=Path(".bench/fusion"), help="of vectors (.bench/fusion)")
    parser.add_argument("--admin", help="URL of a superuser on a server that asks local roles for no password")
    args = parser.parse_args()
    embedder = LocalEmbedder()
    with opened(args.admin) as (_, owner):
        collections = [read(owner, embedder, folder, args.cache) for folder in args.folders]
    names = [f"{c.name} ({len(c.grades)} questions)" for c in collections]
    before = [collection.ndcg(by_rank) for collection in collections]
    heading = f"| {' | '.join(names)} | mean |\n|{'---|' * (len(names) + 2)}"
    print(f"| fixed {heading}")
    for name, (fuse, depth) in FIXED.items():
        print(row(name, [collection.ndcg(fuse, depth) for collection in collections], before), flush=True)
    if len({collection.corpus for collection in collections}) > 1:
        print(f"\n| chosen on the others {heading}")
        for name, family in FAMILIES.items():
            several, notes = zip(*left_out(collections, family), strict=True)
            print(row(name, several, before, notes), flush=True)


if __name__ == "__main__":
    main()
