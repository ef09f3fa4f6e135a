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

WINDOW = 2_000
"""Characters sentencex sees at once: it is quadratic in quotation marks, and an unpaired one spoils all that follows."""

HEADING, BLOCK, ITEM, SENTENCE, STOP, AFTER_HEADING, LINE, CLAUSE, WORD, CHARACTER = range(9, -1, -1)
"""Strength of the cut before a unit; a heading of level n has HEADING + 6 - n."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a text: `content == text[start : start + len(content)]`. `key` comes from the content alone."""

    key: str
    start: int
    content: str


class _Unit(NamedTuple):
    """What is not cut any further. `size` is in the measure of `chunk`."""

    start: int
    end: int
    strength: int
    size: int
    rank: bytes


_Sizes = Callable[[Sequence[tuple[int, int]]], list[int]]


def key(content: str, occurrence: int = 1) -> str:
    """Name of a chunk within its document: 32 hex digits of its SHA-256, and which one it is where the text repeats."""
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    return digest if occurrence == 1 else f"{digest}-{occurrence}"


def chunk(text: str, count: TokenCounter, *, max_tokens: int, overlap_tokens: int) -> list[Chunk]:
    """Cut `text` into chunks that cover it, each of at most `max_tokens` and MAX_CHARACTERS.

    At most `overlap_tokens` are repeated from the chunk before. A text of white space has no chunks. `text` holds no
    lone surrogates, and no single character counts more than `max_tokens`.
    """
    if not text.strip():
        return []
    tokens: dict[str, int] = {}

    def sizes(spans: Sequence[tuple[int, int]]) -> list[int]:
        """A token weighs MAX_CHARACTERS, a character max_tokens; the heavier sum is the size, so one limit is both."""
        texts = [text[start:end] for start, end in spans]
        unknown = list(dict.fromkeys(t for t in texts if t not in tokens))
        tokens.update(zip(unknown, count(unknown), strict=True))
        return [max(tokens[t] * MAX_CHARACTERS, len(t) * max_tokens) for t in texts]

    limit = max_tokens * MAX_CHARACTERS
    groups = _groups(_units(text, sizes, limit), sizes, limit)
    starts = _starts(groups, sizes, limit, overlap_tokens * MAX_CHARACTERS)
    seen: Counter[str] = Counter()
    chunks = []
    for start, group in zip(starts, groups, strict=True):
        content = text[start : group[-1].end]
        seen[content] += 1
        chunks.append(Chunk(key(content, seen[content]), start, content))
    return chunks


# Reading: text -> units

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r"`{3,}|~{3,}")
_HASHES = re.compile(r"(#{1,6})(?!\S)")
_UNDERLINE = re.compile(r"([=\-~^\"'*+#])\1{2,}")
_MARKER = re.compile(r"\s*([-*+•]|\d{1,3}[.)]|[a-z]\))\s+")


def _units(text: str, sizes: _Sizes, limit: int) -> list[_Unit]:
    """The units of `text`, in order and without gaps."""
    strengths: dict[int, int] = {}
    heading = False
    for (start, strength, prose), (end, *_) in pairwise([*_blocks(text), (len(text), 0, False)]):
        strengths[start if strengths else 0] = AFTER_HEADING if heading else strength
        heading = strength >= HEADING
        if prose:
            strengths |= dict.fromkeys(_sentences(text, start, end), SENTENCE)
    for strength, places in chain(_FRAGMENTS, repeat((CHARACTER, _half))):
        spans = list(pairwise([*strengths, len(text)]))
        large = [s for s, size in zip(spans, sizes(spans), strict=True) if size > limit and s[1] - s[0] > 1]
        if not large:
            break
        strengths |= {at: strength for start, end in large for at in _apart(text, start, end, places)}
        strengths = dict(sorted(strengths.items()))
    return [
        _Unit(
            start,
            end,
            strengths[start],
            size,
            hashlib.blake2b(text[start:end].strip().encode(), digest_size=8).digest(),
        )
        for (start, end), size in zip(spans, sizes(spans), strict=True)
    ]


def _blocks(text: str) -> Iterator[tuple[int, int, bool]]:
    """Start and strength of each block, and whether it is prose: what is known before sentences are."""
    lines = [(line.start(), line[0].strip()) for line in _LINES.finditer(text)]
    fence, kind, gap = "", "", True
    for (start, line), (_, following) in pairwise([*lines, (len(text), "")]):
        if fence:
            if line:
                yield start, LINE, False
            if line.startswith(fence) and not line.strip(fence[0]):
                fence = ""
            continue
        if not line:
            gap = True
            continue
        before, kind = kind, "prose"
        if before == "underlined" and not gap:
            kind = "heading"
        elif opening := _FENCE.match(line):
            fence, kind = opening[0], "code"
            yield start, BLOCK, False
        elif hashes := _HASHES.match(line):
            kind = "heading"
            yield start, HEADING + 6 - len(hashes[1]), False
        elif line.startswith("|"):
            kind = "row"
            yield start, LINE if before == "row" and not gap else BLOCK, False
        elif _MARKER.match(line + " "):
            yield start, ITEM, True
        elif gap or before != "prose":
            if _UNDERLINE.fullmatch(following) and (following[0] in "=-" or len(following) >= len(line)):
                kind = "underlined"
                yield start, HEADING + (5 if following[0] in "=*" else 4), False
            else:
                yield start, BLOCK, True
        gap = False


_SURE = re.compile(r"(?<=[a-zà-ÿα-ωа-я]{4})[.!?]\s+(?=[A-ZÀ-ÞΑ-ΩА-Я])|[。！？।]\s*(?![」』”’）\s])")


def _sentences(text: str, start: int, end: int) -> Iterator[int]:
    """Where the sentences of the block text[start:end] start, its first one left out."""
    if marker := _MARKER.match(text, start, end):
        start = marker.end()
    windows = [start, end]
    if end - start > WINDOW:
        sure = (stop.end() for stop in _SURE.finditer(text, start, end))
        windows[1:1] = (at for at in sure if zlib.crc32(text[at : at + 24].encode()) % 4 == 0 and at < end)
    for first, last in pairwise(windows):
        stops = [last]
        if last - first <= 4 * WINDOW:
            stops = [first + found["end_index"] for found in sentencex.get_sentence_boundaries("en", text[first:last])]
        for stop in stops:
            before = text[max(start, stop - 16) : stop].rstrip()[-1:]
            after = next((at for at in range(stop, end) if not text[at].isspace()), end)
            # two repairs: no sentence ends in "call f (a) (b)", nor in "approx. 5"
            if after < end and not before.isalnum() and not (before == "." and text[after].isdigit()):
                yield after


# Cutting what is over the limit

_Places = Callable[[str, int, int], Iterator[int]]


def _ends(pattern: str) -> _Places:
    compiled = re.compile(pattern)
    return lambda text, start, end: (match.end() for match in compiled.finditer(text, start, end))


def _word_groups(text: str, start: int, end: int) -> Iterator[int]:
    """Ends of groups of at most 16 words; which word ends one is told by the word."""
    size = 0
    for word in _WORD.finditer(text, start, end):
        size += 1
        if size == 16 or zlib.crc32(word[0].encode()) % 8 == 0:
            size = 0
            yield word.end()


def _half(_: str, start: int, end: int) -> Iterator[int]:
    yield (start + end) // 2


_WORD = re.compile(r"\S{1,64}\s{0,64}|\s{1,64}")
_FRAGMENTS: tuple[tuple[int, _Places], ...] = (
    (STOP, _ends(r"[.!?…][\"'”’»)\]]{0,4}\s+|[。！？｡।]\s*")),
    (LINE, _ends(r"\n\s*")),
    (CLAUSE, _ends(r"[,;:)\]]\s+|\s(?=[(\[])|[—–]\s*|\s-\s+|[，；：、）]\s*")),
    (WORD, _word_groups),
    (WORD, _ends(_WORD.pattern)),
)
"""What a sentence over the limit is cut at, best first."""


def _apart(text: str, start: int, end: int, places: _Places) -> Iterator[int]:
    """The places inside text[start:end], moved back where they would cut through what a reader sees as one character."""
    for at in places(text, start, end):
        if start < at < end:
            yield next((p for p in range(at, max(start, at - 32), -1) if not _joined(text[p - 1], text[p])), at)


def _joined(before: str, after: str) -> bool:
    return (
        unicodedata.category(after)[0] == "M"
        or "\u200d" in {before, after}
        or "\U0001f3fb" <= after <= "\U0001f3ff"
        or "\U000e0020" <= after <= "\U000e007f"
        or ("\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= after <= "\U0001f1ff")
        or before + after == "\r\n"
    )


# Packing: units -> chunks

ROOM = {"H": 0.25, "B": 0.35, "S": 0.42, "ends": 8, "c": 0.4, "t": 1}


def _groups(units: list[_Unit], sizes: _Sizes, limit: int) -> list[list[_Unit]]:
    """The units of each chunk, before overlap."""
    groups: list[list[_Unit]] = []
    todo = [units]
    while todo:
        drafts = [group for several in todo for group in _split(several, limit)]
        todo = []
        for group, size in zip(drafts, sizes([(g[0].start, g[-1].end) for g in drafts]), strict=True):
            if size <= limit or len(group) == 1:
                groups.append(group)
            else:
                total = sum(u.size for u in group)
                todo.append([u._replace(size=u.size * size // total + 1) for u in group])
    return sorted(groups)


def _split(units: list[_Unit], limit: int) -> list[list[_Unit]]:
    ends = list(accumulate((u.size for u in units), initial=0))
    order = sorted(range(1, len(units)), key=lambda i: (-units[i].strength, units[i].rank))
    cuts = [0, len(units)]
    free = ends[-1] > limit * ROOM["ends"]
    for share in (1, 0.5, 0):
        for i in order:
            at = bisect(cuts, i)
            if cuts[at - 1] == i:
                continue
            left, right = ends[i] - ends[cuts[at - 1]], ends[cuts[at]] - ends[i]
            head = units[i].strength >= HEADING and share == 1
            if not head and left + right <= limit:
                continue
            room = (
                limit
                * share
                * ROOM["H" if units[i].strength >= HEADING else "B" if units[i].strength >= BLOCK else "S"]
            )
            if left + right < 2 * limit:
                room = max(room, min(left + right - limit * ROOM["t"], (left + right) * ROOM["c"]) * share)
            if (left >= room or (free and at == 1)) and (right >= room or (free and at == len(cuts) - 1)):
                cuts.insert(at, i)
        if max(ends[b] - ends[a] for a, b in pairwise(cuts)) <= limit:
            break
    return [units[a:b] for a, b in pairwise(cuts)]


def _starts(groups: list[list[_Unit]], sizes: _Sizes, limit: int, overlap: int) -> list[int]:
    """Where each chunk starts: at its first unit, or at the sentences it repeats of the chunk before."""
    starts = [group[0].start for group in groups]
    cores = sizes([(g[0].start, g[-1].end) for g in groups])
    for i in range(1, len(groups)):
        first = groups[i][0]
        if not AFTER_HEADING <= first.strength < HEADING:
            continue
        room = min(overlap, limit - cores[i])
        for unit in reversed(groups[i - 1]):
            room -= unit.size
            if room < 0:
                break
            if unit.strength >= AFTER_HEADING:
                starts[i] = unit.start
            if unit.strength >= HEADING:
                break
    whole = sizes([(start, group[-1].end) for start, group in zip(starts, groups)])
    repeated = sizes([(start, group[0].start) for start, group in zip(starts, groups)])
    return [
        start if w <= limit and r <= overlap else group[0].start
        for start, group, w, r in zip(starts, groups, whole, repeated)
    ]
