"""How well chunks hold what a question asks for: our chunker, fixed windows and three libraries at the same budgets.

    pip install langchain-text-splitters llama-index-core semantic-text-splitter
    python -m bench.chunks PATH_TO_chunk_eval [--budgets 200/40 200/80 …] [--splitters pgrecall ...] [--cache FOLDER]

The folder has `references.jsonl` (a question, the text it is about, and spans of that text that answer it) and
`full_texts/*.md`, as in Chroma's chunking evaluation (github.com/brandonstarxel/chunking_evaluation). Every splitter cuts
all texts; the local model embeds chunks and questions, its tokenizer counts, and the chunks of all texts are ranked
together by cosine similarity. Vectors are kept in FOLDER by the hash of their text, so a second run takes two minutes.
"""

import argparse
import asyncio
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from app import chunking, statistics
from app.embedding import LocalEmbedder
from app.tokens import VOCABULARY

TOP = 5
EQUAL = 600
"""Tokens at which splitters are compared as well: five chunks of one are more text than five of another."""
RANKED = 100
"""Chunks looked at for those; an average chunk has far more than EQUAL / RANKED tokens."""
Span = tuple[int, int]
"""Start and end of a stretch of a text, in characters."""


class Place(NamedTuple):
    """A stretch of one of the texts."""

    text: str
    start: int
    end: int


class Question(NamedTuple):
    """What is asked, and where the answers stand."""

    query: str
    spans: list[Place]


# What is measured


def whole(spans: Iterable[Place], chunks: Sequence[Place]) -> int:
    """How many of the spans lie fully inside one of the chunks."""
    return sum(
        any(each.text == span.text and each.start <= span.start and span.end <= each.end for each in chunks)
        for span in spans
    )


def union(places: Iterable[Place]) -> list[Place]:
    """The same characters, each once: sorted, disjoint, not adjacent."""
    merged: list[Place] = []
    for place in sorted(places):
        if merged and merged[-1].text == place.text and place.start <= merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(merged[-1].end, place.end))
        else:
            merged.append(place)
    return merged


def characters(places: Iterable[Place]) -> int:
    """How many different characters the places hold."""
    return sum(place.end - place.start for place in union(places))


def precision(spans: Sequence[Place], chunks: Sequence[Place]) -> float:
    """The share of the chunks' characters that lies in a span, every character counted once."""
    total = characters(chunks)
    # what both hold is what they hold one by one less what they hold together
    return (total + characters(spans) - characters([*chunks, *spans])) / total


def within(ranked: Sequence[Place], sizes: Sequence[int], budget: int) -> Sequence[Place]:
    """The best chunks, in order, that have `budget` tokens together at most."""
    return ranked[: int(np.searchsorted(np.cumsum(sizes), budget, side="right"))]


# Splitters


class Splitter(NamedTuple):
    """A way to cut. `cut` is given a text, the limit and the overlap, both in tokens."""

    name: str
    cut: Callable[[str, int, int], list[Span]]


def located(text: str, parts: Iterable[str]) -> list[Span]:
    """Where the parts of a text stand that a library returned without their places."""
    spans: list[Span] = []
    for part in parts:
        start = text.index(part, spans[-1][0] + 1 if spans else 0)
        spans.append((start, start + len(part)))
    return spans


def splitters(embedder: LocalEmbedder) -> list[Splitter]:
    """Ours and those it is compared with, each as its documentation shows it."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter  # noqa: PLC0415 - what only this needs
    from llama_index.core.node_parser import SentenceSplitter  # noqa: PLC0415
    from semantic_text_splitter import TextSplitter  # noqa: PLC0415
    from tokenizers import BertWordPieceTokenizer  # noqa: PLC0415

    windows = BertWordPieceTokenizer(str(VOCABULARY), lowercase=True)

    def tokens(text: str) -> int:
        return embedder.count_tokens([text])[0]

    def ours(text: str, limit: int, overlap: int) -> list[Span]:
        found = chunking.chunk(text, embedder.count_tokens, max_tokens=limit, overlap_tokens=overlap)
        return [(each.start, each.start + len(each.content)) for each in found]

    def fixed(text: str, limit: int, overlap: int) -> list[Span]:
        places = windows.encode(text, add_special_tokens=False).offsets
        starts = range(0, max(len(places) - overlap, 1), limit - overlap)
        return [(places[at][0], places[min(at + limit, len(places)) - 1][1]) for at in starts]

    def langchain(text: str, limit: int, overlap: int) -> list[Span]:
        splitter = RecursiveCharacterTextSplitter(chunk_size=limit, chunk_overlap=overlap, length_function=tokens)
        return located(text, splitter.split_text(text))

    def llama(text: str, limit: int, overlap: int) -> list[Span]:
        splitter = SentenceSplitter(chunk_size=limit, chunk_overlap=overlap, tokenizer=lambda t: range(tokens(t)))
        return located(text, splitter.split_text(text))

    def semantic(text: str, limit: int, overlap: int) -> list[Span]:
        parts = TextSplitter.from_callback(tokens, limit, overlap).chunk_indices(text)
        return [(start, start + len(part)) for start, part in parts]

    return [
        Splitter("pgrecall", ours),
        Splitter("fixed windows", fixed),
        Splitter("langchain", langchain),
        Splitter("llama-index", llama),
        Splitter("semantic-text-splitter", semantic),
    ]


class Vectors:
    """Vectors by the hash of their text, kept in a file that only grows."""

    def __init__(self, embedder: LocalEmbedder, folder: Path) -> None:
        self.embedder = embedder
        self._record = np.dtype([("digest", "V32"), ("vector", "<f4", embedder.dimensions)])
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{embedder.model}.vectors"
        self._known: dict[bytes, npt.NDArray[np.float32]] = {}
        if self._file.exists():
            size = self._file.stat().st_size // self._record.itemsize
            rows = np.fromfile(self._file, self._record, size)
            self._known = {bytes(row["digest"]): row["vector"] for row in rows}

    async def of(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Shape (len(texts), dimensions), L2-normalised."""
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        missing = {d: text for d, text in zip(digests, texts, strict=True) if d not in self._known}
        todo = list(missing.items())
        for at in range(0, len(todo), 256):
            part = todo[at : at + 256]
            found = await self.embedder.embed([text for _, text in part], "document")
            rows = np.array([(np.void(d), v) for (d, _), v in zip(part, found, strict=True)], self._record)
            with self._file.open("ab") as file:
                file.write(rows.tobytes())
            self._known |= {d: v for (d, _), v in zip(part, found, strict=True)}
        return np.stack([self._known[d] for d in digests])


def read(folder: Path) -> tuple[dict[str, str], list[Question]]:
    """The texts by name, and the questions."""
    texts = {path.stem: path.read_text("utf-8") for path in sorted((folder / "full_texts").glob("*.md"))}
    queries = {
        row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").read_text("utf-8").splitlines())
    }
    questions = []
    for row in map(json.loads, (folder / "references.jsonl").read_text("utf-8").splitlines()):
        spans = [Place(row["corpus_id"], each["start"], each["end"]) for each in row["references"]]
        for span, each in zip(spans, row["references"], strict=True):
            if texts[span.text][span.start : span.end] != each["content"]:
                raise SystemExit(f"{folder}: a reference of {row['_id']} is not at its place in {span.text}")
        questions.append(Question(queries[row["_id"]], spans))
    return texts, questions


class Row(NamedTuple):
    """What one splitter gives at one budget."""

    budget: str
    splitter: str
    chunks: int
    tokens: int
    """In all chunks together: what is embedded and stored."""
    cut: float
    """Share of the spans that lie fully inside some chunk: what the cuts leave whole."""
    found: float
    """Share of the spans that lie fully inside one of the TOP chunks for their question."""
    precision: float
    """Share of the characters of the TOP chunks that lies in a span; the mean over the questions."""
    characters: float
    """In the TOP chunks, each once; the mean over the questions."""
    equal: float
    """Share of the spans that lie fully inside one of the best chunks with EQUAL tokens together."""
    parts: npt.NDArray[np.float64]
    """What each question adds, shape (questions, 2); the means are `found` and `equal`."""

    def against(self, other: "Row") -> str:
        """How much more this one finds, with the intervals of the differences, questions drawn in pairs."""
        differences = self.parts - other.parts
        shown = [
            f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
            for mean, (low, high) in zip(differences.mean(axis=0), statistics.intervals(differences), strict=True)
        ]
        return f"{self.splitter} against {other.splitter} at {self.budget}: {' and '.join(shown)}"

    def __str__(self) -> str:
        shares = f"{self.found:.3f} | {self.precision:.3f} | {self.equal:.3f} | {self.cut:.3f}"
        size = f"{self.chunks:,} | {self.tokens / 1000:.0f} k | {self.characters:,.0f}"
        return f"| {self.budget} | {self.splitter} | {shares} | {size} |"


HEADER = f"""\
| budget | splitter | spans in top {TOP} | precision | spans in {EQUAL} tokens | spans left whole | chunks | tokens | \
characters returned |
|---|---|---|---|---|---|---|---|---|"""


async def measured(
    texts: dict[str, str], questions: Sequence[Question], splitter: Splitter, budget: str, vectors: Vectors
) -> Row:
    """Cut, embed, ask."""
    limit, overlap = map(int, budget.split("/"))
    chunks = [Place(name, *span) for name, text in texts.items() for span in splitter.cut(text, limit, overlap)]
    contents = [texts[chunk.text][chunk.start : chunk.end] for chunk in chunks]
    sizes = np.array(vectors.embedder.count_tokens(contents))
    embedded = await vectors.of(contents)
    asked = await vectors.of([question.query for question in questions])
    cut = 0
    whole_spans, precisions, returned = [], [], []
    for question, vector in zip(questions, asked, strict=True):
        order = np.argsort(-(embedded @ vector), kind="stable")[:RANKED]
        ranked = [chunks[at] for at in order]
        cut += whole(question.spans, chunks)
        best = within(ranked, sizes[order], EQUAL)
        whole_spans.append((whole(question.spans, ranked[:TOP]), whole(question.spans, best)))
        precisions.append(precision(question.spans, ranked[:TOP]))
        returned.append(characters(ranked[:TOP]))
    spans = sum(len(question.spans) for question in questions)
    parts = np.array(whole_spans) * len(questions) / spans
    found, equal = parts.mean(axis=0)
    return Row(
        budget=budget,
        splitter=splitter.name,
        chunks=len(chunks),
        tokens=int(sizes.sum()),
        cut=cut / spans,
        found=found,
        precision=fmean(precisions),
        characters=fmean(returned),
        equal=equal,
        parts=parts,
    )


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chunks", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path, metavar="PATH_TO_chunk_eval")
    parser.add_argument(
        "--budgets", nargs="+", default=["200/40", "200/80", "250/50", "250/100"], metavar="TOKENS/OVERLAP"
    )
    parser.add_argument("--splitters", nargs="+", metavar="NAME", help="these only")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "pgrecall-bench-chunks")
    given = parser.parse_args()
    texts, questions = read(given.folder)
    embedder = LocalEmbedder()
    vectors = Vectors(embedder, given.cache)
    print(HEADER)
    differences = []
    for budget in given.budgets:
        ours: Row | None = None
        for splitter in splitters(embedder):
            if not given.splitters or splitter.name in given.splitters:
                row = await measured(texts, questions, splitter, budget, vectors)
                print(row, flush=True)
                ours = ours or row
                if row is not ours:
                    differences.append(ours.against(row))
    print(f"\nMore spans in top {TOP}, and in {EQUAL} tokens, with 95 % intervals:", *differences, sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
