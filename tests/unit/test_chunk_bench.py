"""What bench/chunks.py counts."""

import pytest

from bench.chunks import Place, characters, located, precision, whole, within


def place(start: int, end: int, text: str = "a") -> Place:
    return Place(text, start, end)


def test_a_span_counts_when_one_chunk_of_its_text_holds_all_of_it() -> None:
    chunks = [place(0, 50), place(50, 100), place(0, 100, "b")]
    assert whole([place(0, 50), place(10, 20), place(40, 60), place(90, 101), place(40, 60, "b")], chunks) == 3


def test_characters_in_two_chunks_count_once() -> None:
    assert characters([place(0, 100), place(80, 180), place(180, 190), place(0, 10, "b")]) == 200


def test_precision_is_the_share_of_different_characters_that_answers() -> None:
    spans = [place(90, 110), place(100, 120), place(500, 600)]
    assert precision(spans, [place(0, 100), place(80, 180)]) == pytest.approx(30 / 180)
    assert precision(spans, [place(0, 100, "b")]) == 0
    assert precision(spans, [place(510, 520)]) == 1


def test_within_takes_the_best_chunks_until_the_next_is_too_much() -> None:
    ranked = [place(0, 1), place(1, 2), place(2, 3)]
    assert within(ranked, [300, 300, 1], 600) == ranked[:2]
    assert within(ranked, [601, 1, 1], 600) == []


def test_repeated_parts_are_found_one_after_the_other() -> None:
    assert located("ab. ab. ab. cd.", ["ab.", "ab. ab.", "ab. cd."]) == [(0, 3), (4, 11), (8, 15)]
