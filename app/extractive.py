"""Answers without a chat model: the sentences of the texts found that are nearest to the question."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from sentencex import segment

from app.embedding import Embedder

MOST = 4
"""Sentences in an answer."""
CANDIDATES = 80
"""Sentences looked at, from the best text on: what a local model embeds in about a second."""
LONGEST = 800
"""Characters of a sentence that is quoted; longer ones are lists and data."""
FALL = 0.15
"""How much less similar than the best sentence a further one may be."""
SAME = 0.92
"""Cosine similarity from which on two sentences say the same."""
UNENDED = 0.05
"""What a sentence without an end loses: often a heading or an introduction to something that is not quoted."""

_FENCE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
_UNDERLINE = re.compile(r"^[ \t]*([=\-~^*#\"'+_])\1{2,}[ \t]*$")
_HEADING = re.compile(r"^[ \t]*#{1,6}[ \t]")
_TABLE = re.compile(r"^[ \t]*[|+][-=|+ :]|\|.*\|")
_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+")
_QUOTE = re.compile(r"^[ \t]*(?:>(?!>>)[ \t]?)+")
_SESSION = re.compile(r"^[ \t]*(?:>>>|\.\.\.)(?:[ \t]|$)")
_BOLD = re.compile(r"\*\*([^*\s](?:[^*]*[^*\s])?)\*\*")
_ENDED = re.compile("[.!\u2026\u3002\uff01\uff0e][)\\]\"'\u201d\u2019\u00bb*_]*(?: ?\\[\\d+\\])?$")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of the answer; `text` is the position of the text it was taken from."""

    content: str
    text: int


async def extract(embedder: Embedder, question: str, texts: Sequence[str], threshold: float) -> list[Sentence]:
    """Up to MOST sentences that are at least as similar to the question as `threshold`, none that say the same.

    `texts` come best first. The sentences are ordered by the text of the best one, each text in its own order; there
    are none where nothing is similar enough. Raises EmbeddingFailed.
    """
    found = await asyncio.to_thread(_candidates, embedder, texts)
    contents = list(found)
    if not contents:
        return []
    vectors = await embedder.embed(contents, "document")
    (query,) = await embedder.embed([question], "query")
    lacks = [0.0 if _ENDED.search(content) else UNENDED for content in contents]
    similarities = np.round(vectors @ query - lacks, 5)  # so that ties are ties, and the better text goes first
    floor = max(threshold, float(similarities.max()) - FALL)
    chosen: list[int] = []
    for index in np.argsort(-similarities, kind="stable").tolist():
        if similarities[index] < floor or len(chosen) == MOST:
            break
        if not chosen or float((vectors[chosen] @ vectors[index]).max()) < SAME:
            chosen.append(index)
    rank: dict[int, int] = {}
    for position, index in enumerate(chosen):
        rank.setdefault(found[contents[index]], position)
    answer = [Sentence(contents[index], found[contents[index]]) for index in sorted(chosen)]
    return sorted(answer, key=lambda sentence: rank[sentence.text])


def _candidates(embedder: Embedder, texts: Sequence[str]) -> dict[str, int]:
    """Sentences and the first of the texts they stand in; chunks overlap, so many stand in two."""
    found: dict[str, int] = {}
    for index, text in enumerate(texts):
        for sentence in sentences(text):
            found.setdefault(sentence, index)
    contents = list(islice(found, CANDIDATES))
    counts = zip(contents, embedder.count_tokens(contents), strict=True)
    return {content: found[content] for content, count in counts if count <= embedder.max_tokens}


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text that can be quoted: no headings, tables, code or questions; white space made single."""
    for paragraph in _paragraphs(_FENCE.sub("\n\n", text)):
        for sentence in segment("en", _BOLD.sub(r"\1", paragraph)):
            line = " ".join(sentence.split())
            if _quotable(line):
                yield line


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        content = _QUOTE.sub("", line)
        if _UNDERLINE.match(content):
            if len(lines) == 1:
                lines.clear()
            continue
        skipped = (_HEADING.match, _SESSION.match, _TABLE.search)
        breaks = not content.strip() or any(sign(content) for sign in skipped)
        item = _ITEM.match(content)
        if breaks or item:
            paragraph = "\n".join(lines)
            code = all(line.startswith(("   ", "\t")) for line in lines) and not _ENDED.search(paragraph)
            if not code:
                yield paragraph
            lines = []
        if not breaks:
            lines.append(content[item.end() :] if item else content)


def _quotable(sentence: str) -> bool:
    letters = sum(character.isalpha() for character in sentence)
    if len(sentence) > LONGEST or sentence.endswith("?") or letters < 0.6 * len(sentence):
        return False
    uncased = sum(character.isalpha() and character.lower() == character.upper() for character in sentence)
    return uncased >= 4 or len(sentence.split()) >= 3
