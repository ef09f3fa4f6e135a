"""Lines and rows as documents, by their mapping."""

import csv
import io
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import records
from app.drafts import Draft
from app.errors import BadInput
from app.formats import Damaged
from app.records import Mapped, mapping


def lines(text, mapped=None):
    return [place.made for place in records.jsonl(io.BytesIO(text.encode()), mapped or Mapped())]


def rows(text, mapped=None, **given):
    data = text if isinstance(text, bytes) else text.encode()
    return list(records.table(io.BytesIO(data), mapped or Mapped(), **given))


def test_fields_are_mapped_joined_and_taken_out_of_nested_objects():
    mapped = mapping(
        ["id=key", "content=q", "content=a.text", "metadata.lang=a.lang", "created_at=when", "title=t"], "ignore"
    )
    values = {"key": 7, "q": "Why?", "a": {"text": "Because.", "lang": "en"}, "when": "2024-05-01", "t": "", "x": 1}
    assert records.draft(values, mapped) == Draft(
        "7", "Why?\n\nBecause.", metadata={"lang": "en"}, created_at=datetime(2024, 5, 1, tzinfo=UTC)
    )


@pytest.mark.parametrize(
    ("others", "metadata"), [("metadata", {"lang": "en", "size": 3}), ("ignore", {"lang": "en"}), ("refuse", None)]
)
def test_fields_that_nobody_named_are_refused_left_out_or_metadata(others, metadata):
    values = {"id": "a", "content": "text", "metadata": {"lang": "en"}, "size": 3}
    if metadata is None:
        with pytest.raises(BadInput, match="--other-fields"):
            records.draft(values, mapping([], others))
    else:
        assert records.draft(values, mapping([], others)).metadata == metadata


@pytest.mark.parametrize("option", ["id", "id=", "=x", "body=content", "metadata.=x"])
def test_a_mapping_that_is_none_is_refused(option):
    with pytest.raises(BadInput, match="--field"):
        mapping([option])


def test_only_content_may_be_made_of_two_fields():
    with pytest.raises(BadInput, match="named twice"):
        mapping(["id=a", "id=b"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"content": "x"}', "--field id=FIELD"),
        ('{"id": "", "content": "x"}', "--field id=FIELD"),
        ('{"id": "a"}', "--field content=FIELD"),
        ('{"id": "a", "content": 5}', "Expected `str`"),
        ('{"id": true, "content": "x"}', "Expected `str`"),
        ('{"id": "a", "content": "x", "created_at": "soon"}', "created_at"),
        ('{"id": "a", "content": "x", "embedding": ["y"]}', "embedding"),
        ("[1]", "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"a":' * 100_000, "is not JSON"),
    ],
)
def test_a_line_at_fault_says_why_and_the_next_one_is_read(line, words):
    fault, good = lines(line + '\n{"id": "b", "content": "fine"}\n')
    assert isinstance(fault, BadInput)
    assert words in str(fault)
    assert good == Draft("b", "fine")


def test_a_line_without_end_is_not_read_whole(monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1_000)
    fault, good = lines('{"id": "a", "content": "' + "x" * 5_000 + '"}\n{"id": "b", "content": "fine"}\n')
    assert "longer than 1,000 bytes" in str(fault)
    assert good == Draft("b", "fine")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_table_is_read_whatever_stands_between_its_cells(separator):
    text = (
        separator.join(["id", "content", "metadata"]) + "\r\n" + separator.join(["1", '"two\nlines"', '"{""a"": 1}"'])
    )
    (place,) = rows(text)
    assert place.made == Draft("1", "two\nlines", metadata={"a": 1})
    assert place.line == 2


def test_a_table_of_another_encoding_is_guessed_and_told():
    text = "id,content\n1,Une réponse en français est donnée à l'élève après l'été\n"
    guess, place = rows(text.encode("cp1252"))
    assert (guess, place.made.content[-5:]) == ("cp1252", "l'été")


def test_rows_at_fault_and_tables_that_are_none():
    fault, good = rows("id,content\n1\n2,fine\n")
    assert "has 1 cells" in str(fault.made)
    assert good.made == Draft("2", "fine")
    for text, words in (("", "is empty"), ("a,a\n1,2\n", "twice")):
        with pytest.raises(Damaged, match=words):
            rows(text)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@given(st.lists(st.tuples(st.integers(0, 9), cells.filter(str.strip), cells), max_size=6))
def test_csv_and_jsonl_of_the_same_records_give_the_same_documents(table):
    made = io.StringIO()
    writer = csv.writer(made)
    writer.writerow(["key", "text", "note"])
    writer.writerows(table)
    mapped = mapping(["id=key", "content=text", "metadata.note=note"])
    text = "".join(
        json.dumps({"key": str(key), "text": text} | ({"note": note} if note else {})) + "\n"
        for key, text, note in table
    )
    found = [place.made for place in rows(made.getvalue(), mapped, separator=",")]
    assert found == lines(text, mapped)


def test_every_byte_of_a_file_of_lines_is_counted():
    text = '\n{"id": "a", "content": "é"}\nbad\n{"id": "b", "content": "x"}'
    places = list(records.jsonl(io.BytesIO(text.encode()), Mapped()))
    assert sum(place.size for place in places) == len(text.encode()) - 1  # the blank line stands for no document
    assert [place.line for place in places] == [2, 3, 4]
