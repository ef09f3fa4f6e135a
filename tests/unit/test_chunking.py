"""What a chunk is, where a text is cut, and which chunks survive an edit. Invariants on arbitrary text are beside it."""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import pairwise
from pydoc_data.topics import topics
from statistics import fmean
from time import process_time

import pytest
from tokenizers import BertWordPieceTokenizer

from app.chunking import MAX_CHARACTERS, Chunk, TokenCounter, chunk, key
from app.settings import Settings

REFERENCE = "\n\n".join(topics[name] for name in sorted(topics))
PARAGRAPHS = [
    paragraph
    for paragraph in (" ".join(each.split()) for each in REFERENCE.split("\n\n"))
    if len(paragraph) > 80 and paragraph.endswith(".") and paragraph[0].isupper()
]
DEFAULT = {"max_tokens": Settings().chunk_max_tokens, "overlap_tokens": Settings().chunk_overlap_tokens}
SENTENCES = [sentence for each in PARAGRAPHS for sentence in re.split(r"(?<=[a-z]{3}\.) (?=[A-Z])", each)]


def words(texts: Sequence[str]) -> list[int]:
    """Close to WordPiece on prose, and additive."""
    return [len(re.findall(r"\w{1,6}|[^\w\s]", text)) for text in texts]


def letters(texts: Sequence[str]) -> list[int]:
    """An estimate that does not add up: every text is rounded up."""
    return [-(-len(text.encode()) // 3) for text in texts]


@pytest.fixture(scope="session")
def wordpiece() -> TokenCounter:
    tokenizer = BertWordPieceTokenizer(str(files("app") / "minilm" / "vocab.txt"), lowercase=True)
    return lambda texts: [len(each.ids) for each in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def contents(text: str, *, max_tokens: int = 200, overlap_tokens: int = 0) -> list[str]:
    return [each.content for each in chunk(text, words, max_tokens=max_tokens, overlap_tokens=overlap_tokens)]


def restored(chunks: Sequence[Chunk]) -> str:
    text = ""
    for each in chunks:
        assert each.start <= len(text)
        assert each.content.startswith(text[each.start :])
        text = text[: each.start] + each.content
    return text


# What a chunk is


def test_a_short_text_is_one_chunk_and_is_named_by_its_hash() -> None:
    text = "Hello there. How are you?\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert chunk(text, words, max_tokens=200, overlap_tokens=40) == [Chunk(digest, 0, text)]
    assert key(text) == digest


def test_repeated_text_gets_numbered_keys() -> None:
    text = "The same row again and again, twelve words in all, no more.\n\n" * 4
    chunks = chunk(text, words, max_tokens=16, overlap_tokens=0)
    assert [each.key for each in chunks] == [key(chunks[0].content, n) for n in (1, 2, 3, 4)]
    assert chunks[2].key == key(chunks[0].content) + "-3"


@pytest.mark.parametrize("text", ["", " ", "\n\n\t\r\n", "\u2003\u3000"])
def test_white_space_has_no_chunks(text: str) -> None:
    assert chunk(text, words, max_tokens=16, overlap_tokens=4) == []


def test_white_space_goes_to_the_chunk_before() -> None:
    found = contents(" \n\nFirst sentence here.\r\n \r\n\tSecond sentence here.  \n\n", max_tokens=5)
    assert found == [" \n\nFirst sentence here.\r\n \r\n", "\tSecond sentence here.  \n\n"]


# Where sentences end


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Dr. Smith met Mrs. Jones of Acme Inc. at 5 p.m. today.", "They talked."),
        ("Fruit, e.g. apples, i.e. pomes, cf. Fig. 3 and No. 5 (approx. 5 km).", "Then more."),
        ("Version 3.14.2 costs $1,234.56 or 0.5 percent.", "It is out now."),
        ("Well... it works... somehow.", "Or so they say..."),
        ('She asked: "Why now? Tell me," and left.', "He said nothing."),
        ("“Really?!” he asked.", "«Non.» Elle rit."),
        ("See https://example.org/a.b?c=d.e and os.path.join(a).", "Next one."),
        ("Call f (a) (b) and see [1] for it.", "Done at last."),
        ("The U.S. Army and J. R. R. Tolkien.", "Another one."),
        ("我是学生。", "你好吗？"),
        ("यह पहला वाक्य है।", "यह दूसरा वाक्य है।"),
        ("Emoji 👩‍👩‍👧 end here.", "Cafe\u0301 is next."),
        ("Windows line.\r\nstill the same sentence here.", "Next sentence."),
    ],
)
def test_sentences_are_whole(first: str, second: str) -> None:
    text = f"{first} {second}"
    limit = max(words([first, second]))
    assert [each.strip() for each in contents(text, max_tokens=limit)] == [first, second]


def test_a_sentence_over_the_limit_is_cut_at_clauses() -> None:
    text = (
        "When the rain had stopped, the children ran out; they played in the mud (and it was deep) - until dusk fell."
    )
    found = contents(text, max_tokens=12)
    assert "".join(found) == text
    assert all(each.rstrip()[-1] in ",;).-" for each in found)


def test_a_clause_over_the_limit_is_cut_at_words() -> None:
    text = "these are many short words without any stop or comma at all " * 5
    found = contents(text, max_tokens=16)
    assert "".join(found) == text
    assert all(each.endswith(" ") for each in found)


def test_a_quotation_over_the_limit_is_cut_at_its_own_sentences() -> None:
    text = '"' + "I came home. You were gone. Nobody knew. " * 6 + 'The end."'
    assert all(each.rstrip(' "').endswith(".") for each in contents(text, max_tokens=24))


def test_what_a_reader_sees_as_one_character_stays_whole() -> None:
    family, accent, flag = "👩‍👩‍👧‍👦", "e\u0301\u0302", "👍🏽"
    for unit in (family, accent, flag):
        text = unit * 400
        found = [each.content for each in chunk(text, letters, max_tokens=40, overlap_tokens=0)]
        assert len(found) > 5
        assert all(each.replace(unit, "") == "" for each in found)


# Blocks of Markdown


MARKDOWN = """# Guide

Intro of the guide, which says what it is about. It has a second sentence.

## Install

Run this command. It takes a minute or two, and needs no rights at all on the machine:

```bash
pip install guide
# not a heading

guide --help. Not a sentence. Really not.
```

1. First item, with some words in it. It goes on.
2. Second item
   goes on in the next line.

| name | value |
|------|-------|
| one. Two | 1 |
| three. Four | 3 |

Notes
-----

- bullet one is short
- bullet two is a bit longer than that; it has clauses

The end of the guide has come. Good bye.
"""


def test_headings_start_chunks_and_stay_with_their_text() -> None:
    found = contents(MARKDOWN, max_tokens=60)
    assert "".join(found) == MARKDOWN
    starts = [each.splitlines()[0] for each in found]
    assert starts[0] == "# Guide"
    assert {"## Install", "Notes"} <= set(starts)
    for each in found:
        assert not re.search(r"(^|\n)#+ \w+\n*$|\n-----\n*$", each)


@pytest.mark.parametrize("limit", [24, 32, 40, 60])
def test_blocks_are_cut_at_their_lines(limit: int) -> None:
    lines = {line.strip() for line in MARKDOWN.splitlines()}
    for each in contents(MARKDOWN, max_tokens=limit):
        for line in each.strip().splitlines():
            if line.startswith(("|", "guide", "pip", "#", "-")):
                assert line.strip() in lines


def test_text_after_an_open_fence_is_code_until_a_fence_as_long() -> None:
    text = "````\n```\n# no heading\n```\n````\n\n# Heading\n\nText of it.\n"
    assert contents(text, max_tokens=18)[-1] == "# Heading\n\nText of it.\n"


def test_underlined_headings_of_every_kind() -> None:
    for line in ("=====", "-----", "~~~~~", "*****", "^^^^^"):
        section = "The words of this section are quite a few in number, and they end here.\n\n"
        text = f"First\n{line}\n\n{section}Second\n{line}\n\n{section}"
        assert [each[:5] for each in contents(text, max_tokens=40)] == ["First", "Secon"]


def test_small_paragraphs_share_a_chunk() -> None:
    text = "".join(f"Paragraph {n} is short.\n\n" for n in range(300))
    found = contents(text)
    assert len(found) < 300 * 6 / 200 / 0.5
    assert all(re.fullmatch(r"(Paragraph \d+ is short\.\n\n)+", each) for each in found)


# Overlap


def test_overlap_is_whole_sentences_of_the_chunks_beside() -> None:
    text = " ".join(PARAGRAPHS)[:40_000]
    own = chunk(text, words, max_tokens=200, overlap_tokens=0)
    with_overlap = chunk(text, words, max_tokens=200, overlap_tokens=40)
    assert restored(with_overlap) == text
    before = [wide.content[: narrow.start - wide.start] for wide, narrow in zip(with_overlap, own, strict=True)]
    after = [
        wide.content[len(extra) + len(narrow.content) :]
        for wide, narrow, extra in zip(with_overlap, own, before, strict=True)
    ]
    for repeated in (before, after):
        assert sum(map(bool, repeated)) > len(own) / 3
        assert max(words(repeated)) <= 40
    whole = re.compile(r"[.!?:][\"”’)]*\s+$|^$")
    for chunk_before, chunk_after, left, right in zip(own, own[1:], before[1:], after, strict=False):
        assert chunk_before.content.endswith(left)
        assert chunk_after.content.startswith(right)
        assert not left or whole.search(chunk_before.content.removesuffix(left))
        assert whole.search(right)


def test_overlap_does_not_cross_a_heading() -> None:
    section = "This is sentence one. Here is another one. There is a third as well. And the fourth.\n\n"
    text = "".join(f"## Heading {n}\n\n{section}" for n in range(20))
    for each in chunk(text, words, max_tokens=60, overlap_tokens=20)[1:]:
        assert each.content.startswith("## Heading")
        assert "## Heading" not in each.content[1:]


def test_overlap_keeps_the_limit() -> None:
    text = " ".join(PARAGRAPHS)[:40_000]
    assert max(letters(c.content for c in chunk(text, letters, max_tokens=120, overlap_tokens=60))) <= 120


# Limits


def test_counts_that_do_not_add_up_still_keep_the_limit() -> None:
    def grudging(texts: Sequence[str]) -> list[int]:
        return [len(text) ** 2 // 400 for text in texts]

    text = " ".join(PARAGRAPHS)[:20_000]
    chunks = chunk(text, grudging, max_tokens=200, overlap_tokens=40)
    assert restored(chunks) == text
    assert max(grudging([each.content for each in chunks])) <= 200


RANDOM = random.Random(7)
HOSTILE = {
    "prose": lambda n: (REFERENCE * (n // len(REFERENCE) + 1))[:n],
    "one paragraph": lambda n: (" ".join(REFERENCE.split()) * (n // len(REFERENCE) + 2))[:n],
    "no full stop": lambda n: " ".join(RANDOM.choices(["river", "of", "stone", "light", "and"], k=n // 5))[:n],
    "one word": lambda n: "a" * n,
    "one sentence again and again": lambda n: "This is one sentence. " * (n // 22),
    "white space": lambda n: "a. " + " \n" * (n // 2) + "b",
    "quotes": lambda n: "'a' " * (n // 4),
    "fences": lambda n: "```\n" * (n // 4),
    "dots": lambda n: "." * n,
    "no spaces": lambda n: "".join(RANDOM.choices("的一是不了人我在有他", k=n)),
    "combining": lambda n: "e" + "\u0301" * n,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_long_texts_of_every_kind(name: str) -> None:
    """A quarter of a megabyte in a few seconds of this process's own, and within the limits."""
    text = HOSTILE[name](250_000)
    began = process_time()
    chunks = chunk(text, letters, max_tokens=200, overlap_tokens=40)
    assert process_time() - began < 15
    assert restored(chunks) == text
    assert max(letters([each.content for each in chunks])) <= 200
    assert len({each.key for each in chunks}) == len(chunks)


def test_time_grows_with_the_length() -> None:
    def seconds(text: str) -> float:
        began = process_time()
        chunk(text, words, max_tokens=200, overlap_tokens=40)
        return process_time() - began

    shuffled = [*PARAGRAPHS] * 8
    random.Random(1).shuffle(shuffled)
    text = " ".join(shuffled)
    # The better of two: a busy machine takes caches away.
    assert min(seconds(text[:1_000_000]) for _ in range(2)) < 10 * max(seconds(text[:250_000]), 0.1)


def test_a_megabyte_of_prose_with_the_real_tokenizer(wordpiece: TokenCounter) -> None:
    calls: list[int] = []

    def counted(texts: Sequence[str]) -> list[int]:
        calls.append(len(texts))
        return wordpiece(texts)

    text = " ".join(f"{n} {each}" for n, each in enumerate(PARAGRAPHS * 8))[:1_000_000]
    began = process_time()
    chunks = chunk(text, counted, max_tokens=200, overlap_tokens=40)
    assert process_time() - began < 60  # of both cores
    assert len(calls) < 20
    assert restored(chunks) == text
    assert max(wordpiece([each.content for each in chunks])) <= 200


def test_one_endless_word_is_cut_by_characters(wordpiece: TokenCounter) -> None:
    text = "x" * 100_000
    assert wordpiece([text]) == [1]
    chunks = chunk(text, wordpiece, max_tokens=200, overlap_tokens=40)
    assert restored(chunks) == text
    assert max(len(each.content) for each in chunks) <= MAX_CHARACTERS


# What an edit changes


def shuffled(seed: int) -> list[str]:
    return random.Random(seed).sample(PARAGRAPHS, len(PARAGRAPHS))


def sections(seed: int) -> str:
    heads = random.Random(seed)
    parts = (f"## Section {n}\n\n{each}" if heads.random() < 0.2 else each for n, each in enumerate(shuffled(seed)))
    return "# Title\n\n" + "\n\n".join(parts)


DOCUMENTS: dict[str, Callable[[], str]] = {
    "reference": lambda: REFERENCE[:150_000],
    "one paragraph": lambda: " ".join(shuffled(1)),
    "paragraphs": lambda: "\n\n".join(shuffled(2)),
    "Windows paragraphs": lambda: "\r\n\r\n".join(shuffled(3)),
    "sections": lambda: sections(4),
    "list": lambda: "- " + "\n- ".join(random.Random(5).sample(SENTENCES, len(SENTENCES))),
    "lines": lambda: "\n".join(random.Random(6).sample(SENTENCES, len(SENTENCES))),
    "numbered": lambda: " ".join(f"Sentence {n} says that item {n} is no worse than {n * n}." for n in range(3000)),
    "rows": lambda: "\n\n".join(f"Item {n}: red." for n in range(8000)),
    "no full stop": lambda: " ".join(random.Random(8).choices(REFERENCE.replace(".", "").split(), k=20_000)),
    "Chinese": lambda: "".join(
        "".join(random.Random(n).choices("的一是不了人我在有他这为之大来以个中上们", k=20)) + "。" for n in range(8000)
    ),
}
NEW = "An entirely new sentence was written here yesterday."


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_sentence_at_the_start_changes_the_first_chunks_alone(name: str) -> None:
    """Two, and rarely a third: where the first comes apart, the one after it repeats other sentences."""
    text = DOCUMENTS[name]()
    before = {each.key for each in chunk(text, words, **DEFAULT)}
    assert len(before) >= 200
    changed = []
    for sentence in (NEW, "Read this first!", SENTENCES[100]):
        for space in (" ", "\n\n"):
            after = {each.key for each in chunk(sentence + space + text, words, **DEFAULT)}
            changed.append(len(after - before))
            assert 1 <= changed[-1] <= 3
            assert len(before - after) <= 3
    assert fmean(changed) <= 2


def test_the_same_with_the_real_tokenizer(wordpiece: TokenCounter) -> None:
    text = DOCUMENTS["one paragraph"]()
    before = {each.key for each in chunk(text, wordpiece, **DEFAULT)}
    after = {each.key for each in chunk(f"{NEW} {text}", wordpiece, **DEFAULT)}
    assert len(before) >= 200
    assert len(after - before) <= 2


@pytest.mark.parametrize("name", ["reference", "one paragraph", "paragraphs", "sections", "list"])
def test_an_edit_anywhere_changes_the_chunks_around_it(name: str) -> None:
    text = DOCUMENTS[name]()[:60_000]
    chance = random.Random(9)
    starts = [found.end() for found in re.finditer(r"[a-z]{3}\.\s+(- )?(?=[A-Z])", text)]
    before = {each.key for each in chunk(text, words, **DEFAULT)}
    changed = []
    for _ in range(40):
        at = chance.randrange(len(starts) - 1)
        start, end = starts[at : at + 2]
        inserted, kept = chance.choice([(NEW + " ", start), (NEW + " ", end), ("", end)])
        edited = text[:start] + inserted + text[kept:]
        after = {each.key for each in chunk(edited, words, **DEFAULT)}
        changed.append(len(after - before))
    assert sum(each <= 2 for each in changed) >= 0.85 * len(changed)
    assert max(changed) <= 8


@pytest.mark.parametrize("name", ["reference", "one paragraph", "paragraphs", "sections", "list", "lines"])
def test_chunks_of_prose_are_fairly_full(name: str) -> None:
    chunks = chunk(DOCUMENTS[name](), words, max_tokens=200, overlap_tokens=0)
    sizes = words([each.content for each in chunks])
    assert sum(sizes) / len(sizes) >= 0.65 * 200
    assert sum(size < 40 for size in sizes) < 0.05 * len(sizes)


def test_cuts_prefer_paragraphs_to_sentences() -> None:
    own = chunk(DOCUMENTS["paragraphs"](), words, max_tokens=200, overlap_tokens=0)
    at_paragraphs = sum(before.content.endswith("\n\n") for before, _ in pairwise(own))
    assert at_paragraphs > 0.8 * len(own)
