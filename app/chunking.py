"""Text -> chunks: whole sentences, bounded in tokens, and cut where the text itself says so.

A text is read as *units*: headings, table rows and code lines as they stand, paragraphs and list items sentence by
sentence. White space belongs to the unit before it, so units tile the text. Each has the strength of a cut before it
(heading > paragraph > list item > sentence > ...) and a rank, a hash of its words. A sentence over the limit becomes
several units: inner stops, lines, clauses, words, and in the end characters.

Units are then packed into chunks. Filling one chunk after the other would be simple and wrong: a sentence inserted at
the top would move every cut below it, and every chunk would be embedded again. Here nothing counts from the start.
A place is the better for a cut the farther it reaches, that is, the longer the stretch around it that holds no
stronger place (or one as strong and of higher rank). Best first, a place becomes a cut if the stretch between the two
cuts around it is still over the limit. Worst first, a cut is given up if the chunks beside it fit into one. So an edit
touches the chunks around it and no others, even in one paragraph of a thousand sentences; and since places that reach
far stand apart, chunks are fairly full (70 % on prose).

Token counts do not add up exactly, so chunks are counted as they are, and those over the limit are cut again. Last,
a chunk takes over sentences of the chunks before and after it, where they fit and no heading stands between. So most
are nearly full and of about one size, which finds more (docs/chunking.md).
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

VERSION = "sentences-2"
"""Stored with each source; another one whenever the same text would be cut otherwise."""

TokenCounter = Callable[[Sequence[str]], list[int]]
"""The number of tokens of each text."""

MAX_CHARACTERS = 8_000
"""No chunk is longer, whatever its tokens: to some tokenizers one endless word is a single token."""

WINDOW = 2_000
"""Longer blocks reach sentencex in parts: it is quadratic in quotation marks, and an unpaired one spoils what follows."""

HEADING, BLOCK, ITEM, SENTENCE, STOP, AFTER_HEADING, LINE, CLAUSE, WORD, CHARACTER = range(9, -1, -1)
"""Strength of a cut before a unit; a heading of level n has HEADING + 6 - n."""


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
    rank: int
    size: int


_Sizes = Callable[[Sequence[tuple[int, int]]], list[int]]


def key(content: str, occurrence: int = 1) -> str:
    """Name of a chunk within its document: 32 hex digits of its SHA-256, and which one it is where the text repeats."""
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    return digest if occurrence == 1 else f"{digest}-{occurrence}"


def chunk(text: str, count: TokenCounter, *, max_tokens: int, overlap_tokens: int) -> list[Chunk]:
    """Cut `text` into chunks that cover it, each of at most `max_tokens` and MAX_CHARACTERS.

    At most `overlap_tokens` are repeated from the chunk before, and at most as many from the one after. A text of
    white space has no chunks. `text` holds no lone surrogates, and no single character counts more than `max_tokens`.
    """
    if not text.strip():
        return []
    tokens: dict[str, int] = {}

    def sizes(spans: Sequence[tuple[int, int]]) -> list[int]:
        """A token weighs MAX_CHARACTERS, a character max_tokens; the heavier sum is the size, so one limit is both."""
        texts = [text[start:end] for start, end in spans]
        unknown = list(dict.fromkeys(each for each in texts if each not in tokens))
        tokens.update(zip(unknown, count(unknown), strict=True))
        return [max(tokens[each] * MAX_CHARACTERS, len(each) * max_tokens) for each in texts]

    limit = max_tokens * MAX_CHARACTERS
    groups = _pack(_units(text, sizes, limit), sizes, limit)
    seen: Counter[str] = Counter()
    chunks = []
    for start, end in _spans(groups, sizes, limit, overlap_tokens * MAX_CHARACTERS):
        content = text[start:end]
        seen[content] += 1
        chunks.append(Chunk(key(content, seen[content]), start, content))
    return chunks


def _units(text: str, sizes: _Sizes, limit: int) -> list[_Unit]:
    """The units of a text, in order and without gaps."""
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
        strengths |= {at: strength for start, end in large for at in _whole(text, start, end, places)}
        strengths = dict(sorted(strengths.items()))
    ranks = _ranks(text[start:end] for start, end in spans)
    return [
        _Unit(*span, strengths[span[0]], rank, size)
        for span, rank, size in zip(spans, ranks, sizes(spans), strict=True)
    ]


def _ranks(texts: Iterator[str]) -> Iterator[int]:
    """A pseudo-random number for each unit, told by its words, and by its predecessors where a sequence repeats."""
    recent: dict[tuple[bytes, bytes], int] = {}
    before, rank = b"", b""
    for place, text in enumerate(texts):
        words = text.strip().encode()
        repeats = place - recent.get((before, words), -REPEAT) < REPEAT
        recent[before, words] = place
        before, rank = words, hashlib.blake2b(words + rank if repeats else words, digest_size=8).digest()
        yield int.from_bytes(rank)


REPEAT = 64
"""Units within which repetitions need other ranks: among a thousand equal rows there is no best place for a cut."""

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r"`{3,}(?=[^`]*$)|~{3,}")
_HASHES = re.compile(r"(#{1,6})(?!\S)")
_UNDERLINE = re.compile(r"={3,}|-{3,}|([~^\"'*+#])\1{3,}")
_MARKER = re.compile(r"\s*([-*+•]|\d{1,3}[.)]|[a-z]\))\s+")


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
        elif not line:
            gap = True
        elif kind == "underlined" and not gap:
            kind = "heading"
        else:
            before = "" if gap else kind
            kind, strength = _line(line, before, following)
            if strength:
                yield start, strength, kind == "prose"
            if kind == "code":
                fence = _FENCE.findall(line)[0]
            gap = False


def _line(line: str, before: str, following: str) -> tuple[str, int]:
    """Kind of a line and strength of a cut before it, 0 where it goes on with the block before."""
    if _FENCE.match(line) and (line[0] == "`" or before != "prose"):
        return "code", BLOCK
    if hashes := _HASHES.match(line):
        return "heading", HEADING + 6 - len(hashes[1])
    if line.startswith("|"):
        return "row", LINE if before == "row" else BLOCK
    if before != "prose" and _UNDERLINE.fullmatch(following):
        return "underlined", HEADING + (5 if following[0] in "=*" else 4)
    if _MARKER.match(line + " "):
        return "prose", ITEM
    return "prose", 0 if before == "prose" else BLOCK


_SURE = re.compile(r"(?<=[a-zà-ÿα-ωа-я]{4})[.!?]\s+(?=[A-ZÀ-ÞΑ-ΩА-Я])|[。！？।]\s*(?![」』”’）\s])")
"""Ends of sentences beyond doubt."""


def _sentences(text: str, start: int, end: int) -> Iterator[int]:
    """Where the sentences of the block text[start:end] start, its first one left out."""
    if marker := _MARKER.match(text, start, end):
        start = marker.end()
    end = start + len(text[start:end].rstrip())
    windows = [start, end]
    if end - start > WINDOW:
        sure = (stop.end() for stop in _SURE.finditer(text, start, end))
        windows[1:1] = (at for at in sure if zlib.crc32(text[at : at + 24].encode()) % 4 == 0)
    for first, last in pairwise(windows):
        stops = [last]
        if last - first <= 4 * WINDOW:
            stops = [first + found["end_index"] for found in sentencex.get_sentence_boundaries("en", text[first:last])]
        for stop in stops:
            before = text[max(start, stop - 16) : stop].rstrip()[-1:]
            after = next((at for at in range(stop, end) if not text[at].isspace()), end)
            # two repairs: no sentence ends in "call f (a) (b)", nor in "approx. 5"
            if before and after < end and not before.isalnum() and not (before == "." and text[after].isdigit()):
                yield after


_Places = Callable[[str, int, int], Iterator[int]]
_WORD = re.compile(r"\S{1,64}\s{0,64}|\s{1,64}")


def _ends(pattern: str) -> _Places:
    compiled = re.compile(pattern)
    return lambda text, start, end: (found.end() for found in compiled.finditer(text, start, end))


def _phrases(text: str, start: int, end: int) -> Iterator[int]:
    """Ends of groups of at most 16 words; whether a word ends one is told by the word."""
    words = 0
    for word in _WORD.finditer(text, start, end):
        words += 1
        if words == 16 or zlib.crc32(word[0].encode()) % 8 == 0:
            words = 0
            yield word.end()


def _half(_: str, start: int, end: int) -> Iterator[int]:
    yield (start + end) // 2


_FRAGMENTS: tuple[tuple[int, _Places], ...] = (
    (STOP, _ends(r"[.!?…][\"'”’»)\]]{0,4}\s+|[。！？｡।]\s*")),
    (LINE, _ends(r"\n\s*")),
    (CLAUSE, _ends(r"[,;:)\]]\s+|\s(?=[(\[])|[—–]\s*|\s-\s+|[，；：、）]\s*")),
    (WORD, _phrases),
    (WORD, _ends(_WORD.pattern)),
)
"""Where a sentence over the limit is cut, best first."""


def _whole(text: str, start: int, end: int, places: _Places) -> Iterator[int]:
    """The places within text[start:end], moved back where they stand inside what a reader sees as one character."""
    for at in places(text, start, end):
        if start < at < end:
            yield next((to for to in range(at, max(start, at - 32), -1) if not _joined(text[to - 1], text[to])), at)


def _joined(before: str, after: str) -> bool:
    return (
        unicodedata.category(after)[0] == "M"
        or "\u200d" in {before, after}
        or "\U0001f3fb" <= after <= "\U0001f3ff"
        or "\U000e0020" <= after <= "\U000e007f"
        or ("\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= after <= "\U0001f1ff")
        or before + after == "\r\n"
    )


def _pack(units: list[_Unit], sizes: _Sizes, limit: int) -> list[list[_Unit]]:
    """The units of each chunk, in order, before overlap."""
    packed = []
    todo = [units]
    while todo:
        groups = [group for each in todo for group in _cut(each, limit)]
        todo = []
        for group, size in zip(groups, sizes([(group[0].start, group[-1].end) for group in groups]), strict=True):
            if size <= limit or len(group) == 1:
                packed.append(group)
            else:
                total = sum(unit.size for unit in group)
                todo.append([unit._replace(size=unit.size * size // total + 1) for unit in group])
    return sorted(packed)


def _cut(units: list[_Unit], limit: int) -> list[list[_Unit]]:
    """The units in groups whose sizes add up to `limit` at most."""
    ends = list(accumulate((unit.size for unit in units), initial=0))
    worth = [(unit.strength, unit.rank) for unit in units]
    reach = [0] * len(units)
    stronger = [0]
    for place in range(1, len(units) + 1):
        while len(stronger) > 1 and (place == len(units) or worth[stronger[-1]] < worth[place]):
            weaker = stronger.pop()
            reach[weaker] = min(reach[weaker], ends[place] - ends[weaker])
        if place < len(units):
            reach[place] = ends[place] - ends[stronger[-1]]
            stronger.append(place)
    # coarse steps: a sentence more or less nearby must not change the order
    steps = [min(10 * each // limit, 4) for each in reach]

    def order(place: int) -> tuple[int, tuple[int, int]]:
        return steps[place], worth[place]

    def section(place: int) -> bool:
        """A section has its own chunks, unless it is hardly more than its heading."""
        return worth[place][0] >= HEADING and steps[place] >= 3

    cuts = [0, len(units)]
    for place in sorted(range(1, len(units)), key=order, reverse=True):
        at = bisect(cuts, place)
        if section(place) or ends[cuts[at]] - ends[cuts[at - 1]] > limit:
            cuts.insert(at, place)
    # a cut was needed when it was made; later ones may have left little on both of its sides
    for place in sorted(cuts[1:-1], key=order):
        at = bisect(cuts, place)
        if not section(place) and ends[cuts[at]] - ends[cuts[at - 2]] <= limit:
            del cuts[at - 1]
    return [units[start:end] for start, end in pairwise(cuts)]


def _spans(groups: list[list[_Unit]], sizes: _Sizes, limit: int, overlap: int) -> list[tuple[int, int]]:
    """Where each chunk starts and ends: with its own units, or with sentences of the chunks beside it.

    That is told by the units of the three, never by how far another chunk was widened: else an edit would spread.
    """
    own = [(group[0].start, group[-1].end) for group in groups]
    wide = []
    for before, group, after, size in zip([[], *groups[:-1]], groups, [*groups[1:], []], sizes(own), strict=True):
        # the far unit stays out: repeating all of a chunk would make that chunk superfluous
        left = [_Step(0, group[0].start, group[0].strength)]
        left += [_Step(unit.size, unit.start, unit.strength) for unit in before[:0:-1]]
        right = [_Step(0, group[-1].end, after[0].strength if after else HEADING)]
        right += [_Step(unit.size, unit.end, following.strength) for unit, following in pairwise(after)]
        room = limit - size
        _, taken = _reach(left, min(overlap, room // 2))
        end, taken = _reach(right, min(overlap, room - taken))
        start, _ = _reach(left, min(overlap, room - taken))
        wide.append((start, end))
    pairs = list(zip(wide, own, strict=True))
    repeated_before = sizes([(wider[0], narrow[0]) for wider, narrow in pairs])
    repeated_after = sizes([(narrow[1], wider[1]) for wider, narrow in pairs])
    return [
        wider if size <= limit and max(repeated) <= overlap else narrow
        for (wider, narrow), size, *repeated in zip(pairs, sizes(wide), repeated_before, repeated_after, strict=True)
    ]


class _Step(NamedTuple):
    """A unit that a chunk can take over from one beside it, where that ends, and the strength of a cut there."""

    size: int
    place: int
    strength: int


def _reach(steps: list[_Step], room: int) -> tuple[int, int]:
    """The farthest end of a sentence within the room and this side of a heading, and the size of what lies before it."""
    place, taken, total = steps[0].place, 0, 0
    if steps[0].strength >= AFTER_HEADING:
        for step in steps:
            total += step.size
            if total > room:
                break
            if step.strength >= AFTER_HEADING:
                place, taken = step.place, total
            if step.strength >= HEADING:
                break
    return place, taken
