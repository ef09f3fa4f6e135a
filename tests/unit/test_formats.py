"""Files as pages: what each format says of itself, and what is done with damage."""

import io
import sys
from datetime import UTC, datetime

import pypdf
import pytest
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from app import formats
from app.formats import Damaged


def pdf(*pages: str, title: str | None = None, password: str | None = None) -> bytes:
    """A PDF with a line of text on each page."""
    writer = pypdf.PdfWriter()
    for text in pages:
        page = writer.add_blank_page(300, 300)
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if title:
        writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    made = io.BytesIO()
    writer.write(made)
    return made.getvalue()


HTML = b"""<!doctype html><html lang=en><head><title> Otters
  at home </title><meta name="author" content="M. Mink"><meta property="article:published_time" content="2024-05-01">
<style>p { color: red }</style></head><body><script>alert(1)</script>
<h1>Otters</h1><p>They <a href="/eat">eat</a> fish.<p>They_sleep in *rafts*.<ul><li>river<li>sea</ul>
<table><tr><th>kind<th>length<tr><td>giant<td>1.7 m</table></body></html>"""


def test_html_becomes_markdown_that_shows_where_to_cut():
    page = formats.html(HTML)
    assert page.content == (
        "# Otters\n\nThey eat fish.\n\nThey_sleep in *rafts*.\n\n* river\n* sea\n\n"
        "| kind | length |\n| --- | --- |\n| giant | 1.7 m |\n"
    )
    assert (page.title, page.metadata) == ("Otters at home", {"lang": "en", "author": "M. Mink"})
    assert page.created_at == datetime(2024, 5, 1, tzinfo=UTC)


def test_html_in_another_encoding_is_read_as_it_says():
    said = '<html><head><meta charset="windows-1251"></head><body><p>Выдра плывёт</p></body></html>'
    page = formats.html(said.encode("cp1251"))
    assert (page.content, page.guessed) == ("Выдра плывёт\n", None)


def test_a_pdf_gives_the_text_of_its_pages_and_its_title():
    page = formats.pdf(pdf("Otters eat fish.", "Badgers dig.", title="Animals"))
    assert page.content == "Otters eat fish.\n\nBadgers dig.\n"
    assert page.title == "Animals"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"%PDF-1.7\nnothing more", "cannot be read as PDF"),
        (b"", "cannot be read as PDF"),
        (pdf("secret", password="p"), "is encrypted"),
        (pdf(""), "has no text"),
    ],
)
def test_a_damaged_encrypted_or_scanned_pdf_says_so(data, words):
    with pytest.raises(Damaged, match=words):
        formats.pdf(data)


def test_front_matter_names_title_type_date_and_metadata():
    page = formats.markdown(
        b"---\ntitle: Otters\ntype: guide\ndate: 2024-05-01\ntags: [river, sea]\nmetadata: {lang: en}\nreviewed: 2024-06-01\n---\n# Otters\n"
    )
    assert page.content == "# Otters\n"
    assert (page.title, page.doc_type, page.created_at) == ("Otters", "guide", datetime(2024, 5, 1, tzinfo=UTC))
    assert page.metadata == {"tags": ["river", "sea"], "lang": "en", "reviewed": "2024-06-01"}


@pytest.mark.parametrize(
    "text", ["---\n\nA rule above.\n\n---\n", "---\nno end", "text\n---\na: b\n---\n", "---\n- a\n---\n"]
)
def test_what_is_no_front_matter_stays_in_the_text(text):
    page = formats.markdown(text.encode())
    assert (page.content, page.metadata) == (text, {})


@pytest.mark.parametrize("matter", [b"a: [", b"a: &x 1\nb: *x", b"a: !!python/object/apply:os.system [ls]"])
def test_front_matter_that_is_broken_or_dangerous_is_refused(matter):
    with pytest.raises(Damaged, match="front matter"):
        formats.markdown(b"---\n" + matter + b"\n---\ntext")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_with_or_without_a_mark_is_no_guess(encoding):
    assert formats.decoded("Übergröße".encode(encoding)) == ("Übergröße", None)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Une réponse en français est donnée à l'élève.", "cp1252"),
        ("Русский текст о выдрах и реках, который читают люди.", "cp1251"),
        ("日本語の文章です。川と獺の話。日本語の文章です。", "cp932"),
    ],
)
def test_another_encoding_is_guessed_and_told(text, encoding):
    assert formats.decoded(text.encode(encoding)) == (text, encoding)


def test_an_encoding_that_is_named_is_taken_at_its_word():
    assert formats.decoded("Łódź".encode("cp1250"), "cp1250") == ("Łódź", None)
    with pytest.raises(Damaged, match="is not ASCII at byte 0"):
        formats.decoded("Łódź".encode(), "ascii")


@pytest.mark.parametrize(
    ("read", "data", "package"),
    [(formats.html, HTML, "bs4"), (formats.pdf, b"", "pypdf"), (formats.text, b"caf\xe9", "charset_normalizer")],
)
def test_without_the_extra_it_says_what_to_install(monkeypatch, read, data, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Damaged, match=r"pip install 'pgrecall\[files\]'"):
        read(data)


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("2024-05-01", datetime(2024, 5, 1, tzinfo=UTC)),
        ("2024-05-01T12:00:00", datetime(2024, 5, 1, 12, tzinfo=UTC)),
        ("2024-05-01T12:00:00+02:00", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        (86_400, datetime(1970, 1, 2, tzinfo=UTC)),
        ("yesterday", None),
        (1e30, None),
        (True, None),
        ([], None),
    ],
)
def test_moments_as_files_write_them(value, moment):
    assert formats.moment_of(value) == moment
