import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.citations import LONGEST, Citations, disarmed
from tests.conftest import THOROUGH

GIVEN = 3
ALL = "[Source 1][Source 2][Source 3]"


def passed(pieces, count=GIVEN):
    citations = Citations(count)
    return "".join([*map(citations.feed, pieces), citations.close()]), citations.cited


@pytest.mark.parametrize(
    ("text", "shown", "cited"),
    [
        ("It is so [Source 3].", "It is so [Source 3].", [3]),
        ("[source 3]", "[Source 3]", [3]),
        ("[SOURCE 3]", "[Source 3]", [3]),
        ("[ Source\t3 ]", "[Source 3]", [3]),
        ("[Source3]", "[Source 3]", [3]),
        ("[Source: 2]", "[Source 2]", [2]),
        ("[Source #2]", "[Source 2]", [2]),
        ("[Source 2.]", "[Source 2]", [2]),
        ("【Source 2】", "[Source 2]", [2]),
        ("［Source 2］", "[Source 2]", [2]),
        ("[Source ٣]", "[Source 3]", [3]),
        ("[Source 007] [Source 002]", "[Source 2]", [2]),
        ("[Sources 1, 2]", "[Source 1][Source 2]", [1, 2]),
        ("[Sources 3 and 1]", "[Source 3][Source 1]", [1, 3]),
        ("[Source 1, Source 9, and Source 2]", "[Source 1][Source 2]", [1, 2]),
        ("[Source 1;2/3]", ALL, [1, 2, 3]),
        ("[Source 1-3]", ALL, [1, 2, 3]),
        ("[Sources 1 – 3]", ALL, [1, 2, 3]),
        ("[Source 3 to 1]", ALL, [1, 2, 3]),
        ("[Source 1 through 999999999999]", ALL, [1, 2, 3]),
        ("[Source 2, p. 4]", "[Source 2, p. 4]", [2]),
        ("[Source 2: a title]", "[Source 2: a title]", [2]),
        ("[Source 1, see Source 9]", "[Source 1]", [1]),
    ],
)
def test_what_was_given_stays_in_one_form(text, shown, cited):
    assert passed([text]) == (shown, cited)
    assert passed(text) == (shown, cited)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("It is so [Source 9].", "It is so."),
        ("It is so [Source 0] and so.", "It is so and so."),
        ("It is so[Source 9]; then", "It is so; then"),
        ("It is so [Source 8] [Source 9].", "It is so."),
        ("It is so [Source 8], [Source 9].", "It is so."),
        ("It is so [Sources 8 and 9]!", "It is so!"),
        ("It is so ([Source 9]).", "It is so."),
        ("It is so [[Source 9]].", "It is so."),
        ("It is so [Source 9]\nNext line", "It is so\nNext line"),
        ("[Source 9] It is so", "It is so"),
        ("- one [Source 9]\n- two [Source 10]\n", "- one\n- two\n"),
        ("It is so [Source 9: the title].", "It is so."),
        ("It is so [Source 99999999999999999999999999].", "It is so."),
        ("It is so [Source 1] [Source 9].", "It is so [Source 1]."),
        ("It is so [Source 1], [Source 9].", "It is so [Source 1]."),
        ("It is so [Source 9], [Source 1].", "It is so [Source 1]."),
        ("It is so [Source 9] and [Source 2] say.", "It is so [Source 2] say."),
        ("It is so [Source 1], [Source 9], [Source 2].", "It is so [Source 1], [Source 2]."),
        ("It is so [Source 1][Source 9].", "It is so [Source 1]."),
        ("It is so [Source 9", "It is so"),
        ("It is so [Sources 1, 9", "It is so [Source 1]"),
        ("[Source[Source 9] 9]", ""),
        ("[Source 9[[Source 9]]]", ""),
    ],
)
def test_what_was_not_given_goes_and_leaves_no_trace(text, shown):
    assert passed([text])[0] == shown
    assert passed(text)[0] == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[Sour",
        "[",
        "It is so [Source 1",
        "x = source[9], [1], [link](url), a[i][9] and [Sources] of [Source]",
        "[Source code] and [Source: Wikipedia] and [Resource 9] and [Source N]",
        "[Source 9 of the Nile]",
        "[source\n\nof 9]",
        "(Source 9) Source 9] {Source 9}",
        "two  spaces, \ta tab ( and a parenthesis [ \n    indented\n",
        "日本語 [ソース 9]。",
    ],
)
def test_other_text_passes_unchanged(text):
    assert passed([text]) == (text, [])
    assert passed(text) == (text, [])


def test_an_endless_list_is_cut_and_not_held_for_ever():
    citations = Citations(GIVEN)
    shown = "".join(citations.feed(piece) for piece in ["[Sources 1", *[", 9"] * LONGEST])
    assert shown.startswith("[Source 1]")
    assert "[Source 9" not in shown + citations.close()


def test_only_what_may_become_a_citation_is_held_back():
    citations = Citations(GIVEN)
    steps = [
        ("The cat", "The cat"),
        (" sat", " sat"),
        (" [", ""),
        ("So", ""),
        ("ng]", " [Song]"),
        (" [Source", ""),
        (" code", " [Source code"),
        ("] [", "]"),
        ("Source 2", ""),
        ("]", " [Source 2]"),
        (".", "."),
        (" [Source 9]", ""),
        (" on", " on"),
    ]
    assert [(piece, citations.feed(piece)) for piece, _ in steps] == steps
    assert citations.close() == ""


SIGNS = "[ ] ( ) 【 】 [[ ]] 1 2 3 9 12 , ; : . - – / # and or to through an th so s p. word Source source Sources"
BITS = ["[Source ", "[source", "[Source 9]", "[Source 1]", "[Sources 1, 9]", " ", "  ", "\t", "\n", ", ", " and "]
PIECES = st.sampled_from([*SIGNS.split(), *BITS])
TEXTS = st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=30)
UNKNOWN = re.compile(
    r"[\[【]\s*sources?\s*[:#]?\s*(\d+(?:(?:\s|,|/|-|–|and|or|to|through|source|sources)+\d+)*)\s*[.:,]?\s*[\]】]",
    re.IGNORECASE,
)


@settings(max_examples=400 * THOROUGH, deadline=None)
@given(TEXTS, st.data())
def test_any_split_gives_the_same_and_no_unknown_number(text, data):
    whole = passed([text])
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert passed(pieces) == whole
    assert passed(text) == whole
    for citation in UNKNOWN.finditer(whole[0]):
        assert all(1 <= int(number) <= GIVEN for number in re.findall(r"\d+", citation[1])), whole[0]


@settings(max_examples=200 * THOROUGH, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="[【［"), max_size=60), st.integers(1, 7))
def test_text_without_brackets_is_never_touched(text, width):
    assert passed([text[i : i + width] for i in range(0, len(text), width)]) == (text, [])


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "[Source " * 5_000, " " * 50_000, "[Source 1(((, " * 3_000, "((" * 20_000]
)
@pytest.mark.timeout(60)
def test_hostile_text_takes_no_quadratic_time(text):
    assert passed([text])[0] == text


def test_source_text_is_disarmed():
    assert disarmed("see [Source 9], 【sources 1-3】, [ source\n2 and [Source code]") == (
        "see (Source 9), (sources 1-3), ( source\n2 and [Source code]"
    )
