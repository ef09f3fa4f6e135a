"""Text -> chunks: whole sentences, bounded in tokens, and cut where the text itself says so.

A text is first read as *units*: headings, table rows and code lines as they stand, paragraphs and list items sentence
by sentence. Every unit carries the strength of a cut before it (heading > paragraph > list item > sentence > …) and a
rank, which is a hash of its own text. A sentence over the limit becomes several units: inner stops, lines, clauses,
words, and in the end characters. White space belongs to the unit before it, so units tile the text.

Units are then packed into chunks. Filling chunks from the start would be simple and wrong: one sentence inserted at
the top would move every cut below it, and every chunk would be embedded again. So cuts are chosen strongest first,
among equals by rank, wherever the stretch between the two cuts already made is over the limit and both sides keep a
fair size. Whether a place is a cut depends on its neighbourhood alone, so an edit changes the chunks around it, and
the rest of the document keeps its chunks, even in one paragraph of a thousand sentences (content-defined chunking,
with priorities in the place of a rolling hash).

Token counts do not add up exactly, so chunks are counted as they are, and those over the limit are cut again. Last,
a chunk takes over the final sentences of the one before, where they fit and no heading stands between.
"""

import hashlib
import re
import unicodedata
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, repeat
from typing import NamedTuple

import sentencex

VERSION = "sentences-1"
"""Stored with each source; another one whenever the same text would be cut otherwise."""

TokenCounter = Callable[[Sequence[str]], list[int]]
"""The number of tokens of each text."""

MAX_CHARACTERS = 8_000
"""No chunk is longer, whatever its tokens: to some tokenizers one endless word is a single token."""

WINDOW = 4_000
"""Characters sentencex sees at once: it is quadratic in quotation marks, and an unpaired one spoils all that follows."""

HEADING, BLOCK, ITEM, SENTENCE, AFTER_HEADING, STOP, LINE, CLAUSE, WORD, CHARACTER = range(9, -1, -1)
"""Strength of the cut before a unit; a heading of level n has HEADING + 6 - n."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a text: `content == text[start : start + len(content)]`. `key` comes from the content alone."""

    key: str
    start: int
    content: str


class _Unit(NamedTuple):
    start: int
    end: int
    strength: int
    size: int


_Measure = Callable[[Sequence[tuple[int, int]]], list[int]]
"""Sizes of spans of the text: one token is MAX_CHARACTERS, one character max_tokens, whichever comes to more."""


def key(content: str, occurrence: int = 1) -> str:
    """Name of a chunk within its document: 32 hex digits of its SHA-256, and which one it is where the text repeats."""
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    return digest if occurrence == 1 else f"{digest}-{occurrence}"


def chunk(text: str, count: TokenCounter, *, max_tokens: int, overlap_tokens: int) -> list[Chunk]:
    """Cut `text` into chunks that cover it, each at most `max_tokens` and MAX_CHARACTERS long.

    `overlap_tokens` bounds what a chunk repeats of the one before. A text of white space has no chunks. `text` holds no
    lone surrogates, and no single character is over `max_tokens`.
    """
    if not text.strip():
        return []

    def measure(spans: Sequence[tuple[int, int]]) -> list[int]:
        texts = {span: text[span[0] : span[1]] for span in spans}
        distinct = list(dict.fromkeys(texts.values()))
        tokens = dict(zip(distinct, count(distinct), strict=True))
        return [max(tokens[texts[a, b]] * MAX_CHARACTERS, (b - a) * max_tokens) for a, b in spans]

    limit = max_tokens * MAX_CHARACTERS
    groups = _pack(text, _units(text, measure, limit), measure, limit)
    starts = _overlap(groups, measure, limit, overlap_tokens * MAX_CHARACTERS)
    contents = [text[start : group[-1].end] for start, group in zip(starts, groups, strict=True)]
    seen: Counter[str] = Counter()
    chunks = []
    for start, content in zip(starts, contents, strict=True):
        seen[content] += 1
        chunks.append(Chunk(key(content, seen[content]), start, content))
    return chunks


# Reading

_FENCE = re.compile(r"`{3,}|~{3,}")
_ATX = re.compile(r"(#{1,6})(?!\S)")
_UNDERLINE = re.compile(r"([=\-~^\"'*+#])\1{2,}")
_MARKER = re.compile(r"([-*+•]|\d{1,3}[.)]|[a-z]\))\s+")


def _blocks(text: str) -> Iterator[tuple[int, int, bool]]:
    """Start and strength of every block, and whether it is prose: what is known before sentences are."""
    lines = [(m.start(), m[0].strip()) for m in re.finditer(r"[^\n]*\n|[^\n]+", text)]
    fence, kind, gap = "", "", True
    for (start, line), (_, following) in pairwise([*lines, (len(text), "")]):
        if fence:
            if line:
                yield start, LINE, False
            if line.startswith(fence) and not line.strip(fence[0]):
                fence = ""
            continue
        before, kind = kind, "text"
        if not line:
            gap, kind = True, before
            continue
        if opening := _FENCE.match(line):
            fence, kind = opening[0], "code"
            yield start, BLOCK, False
        elif heading := _ATX.match(line):
            kind = "heading"
            yield start, HEADING + 6 - len(heading[1]), False
        elif line.startswith("|"):
            kind = "row"
            yield start, LINE if before == "row" and not gap else BLOCK, False
        elif _MARKER.match(line):
            kind = "item"
            yield start, ITEM, True
        elif before == "underlined" and not gap:
            kind = "heading"
        elif (gap or before not in {"text", "item"}) and _UNDERLINE.fullmatch(following):
            kind = "underlined"
            yield start, HEADING + (5 if following[0] in "=*" else 4), False
        elif gap or before not in {"text", "item"}:
            yield start, BLOCK, True
        gap = False
