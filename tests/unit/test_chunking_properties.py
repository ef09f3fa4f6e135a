"""What holds for the chunks of every text."""

import re
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.chunking import MAX_CHARACTERS, TokenCounter, chunk, key
from tests.conftest import THOROUGH


def words(texts: Sequence[str]) -> list[int]:
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def characters(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


def rounded_up(texts: Sequence[str]) -> list[int]:
    return [-(-len(text.encode()) // 3) for text in texts]


def rounded_down(texts: Sequence[str]) -> list[int]:
    """The whole counts more than the sum of its parts."""
    return [len(text) // 4 for text in texts]


PIECES = [
    *("word", "Word", "another", "x" * 70, "Dr.", "e.g.", "3.14", "...", "…", "U.S.", "approx. 5", "(a)", "don't"),
    *(
        ". ",
        "! ",
        "? ",
        ", ",
        "; ",
        ": ",
        " - ",
        " – ",
        '"',
        "“",
        "”",
        "'",
        "(",
        ")",
        "。",
        "，",
        "「",
        "」",
        "؟ ",
        "।",
    ),
    *("中文", "日本語です", "한국어", "ไทย", "עברית", "العربية", "हिन्दी"),
    *("👩‍👩‍👧", "👍🏽", "🇨🇭🇫🇷", "e\u0301", "a\u0308\u0304", "\u200d", "\ufe0f", "\u0301", "\u2028", "\x85"),
    *(" ", "  ", "\t", "\n", "\r\n", "\r", "\n\n", "\r\n\r\n", " \n \n", "\u3000", " " * 300),
    *("# ", "\n## Heading\n", "\nTitle\n=====\n", "\nTitle\n~~~~~\n", "\n- ", "\n1. ", "\n* ", "\n> ", "\n---\n"),
    *("\n```\n", "\n```python\n", "\n~~~\n", "\n    code\n", "\n| a | b |\n|---|---|\n", "| c |", "`x. Y`"),
    *("A sentence of some words. ", "This one, which has clauses; ends here! ", "https://a.example/b.c?d=e "),
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200),
    st.tuples(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join), st.integers(2, 60)).map(
        lambda drawn: drawn[0] * drawn[1]
    ),
)
COUNTERS = st.sampled_from([words, characters, rounded_up, rounded_down])


@settings(max_examples=400 * THOROUGH, deadline=None)
@given(TEXTS, COUNTERS, st.integers(2, 60), st.floats(0, 0.5))
@example("a" * 20_000, words, 16, 0.5)
@example("a" + " " * 20_000 + "b", words, 16, 0.5)
@example("e" + "\u0301" * 500, characters, 16, 0.5)
@example("\U0001f1e8" * 500, rounded_up, 7, 0.0)
def test_chunks_cover_the_text_within_the_limits(text: str, count: TokenCounter, limit: int, share: float) -> None:
    overlap = int(limit * share)
    chunks = chunk(text, count, max_tokens=limit, overlap_tokens=overlap)
    assert bool(chunks) == bool(text.strip())
    assert chunks == chunk(text, count, max_tokens=limit, overlap_tokens=overlap)
    if not chunks:
        return

    for each in chunks:
        assert each.content
        assert text[each.start : each.start + len(each.content)] == each.content
        assert len(each.content) <= MAX_CHARACTERS
    assert max(count([each.content for each in chunks])) <= limit

    restored = ""
    for each in chunks:
        assert each.start <= len(restored) < each.start + len(each.content)
        restored = restored[: each.start] + each.content
    assert restored == text

    assert len({each.key for each in chunks}) == len(chunks)
    assert all(each.key.startswith(key(each.content)) for each in chunks)

    own = chunk(text, count, max_tokens=limit, overlap_tokens=0)
    assert len(own) == len(chunks)
    before = [text[wide.start : narrow.start] for wide, narrow in zip(chunks, own, strict=True)]
    after = [
        text[narrow.start + len(narrow.content) : wide.start + len(wide.content)]
        for wide, narrow in zip(chunks, own, strict=True)
    ]
    assert max(count([*before, *after])) <= overlap
    # of each neighbour, something is its own
    starts = [each.start for each in chunks]
    ends = [each.start + len(each.content) for each in chunks]
    assert all(start > each.start for start, each in zip(starts[1:], own, strict=False))
    assert all(end < each.start + len(each.content) for end, each in zip(ends, own[1:], strict=False))


@settings(max_examples=100 * THOROUGH, deadline=None)
@given(TEXTS, COUNTERS, st.integers(2, 60))
def test_without_overlap_the_chunks_are_the_text_cut_up(text: str, count: TokenCounter, limit: int) -> None:
    chunks = chunk(text, count, max_tokens=limit, overlap_tokens=0)
    assert "".join(each.content for each in chunks) == (text if text.strip() else "")


@settings(max_examples=100 * THOROUGH, deadline=None)
@given(TEXTS)
def test_a_text_within_the_limit_is_cut_at_headings_only(text: str) -> None:
    text = re.sub(r"[#=~^*+\"'-]", "", text)[:MAX_CHARACTERS]
    assert len(chunk(text, characters, max_tokens=max(len(text), 2), overlap_tokens=0)) <= 1
