"""What a file holds, by format: bytes in, a page out. Converters come with the extra `files`; text and Markdown need none.

HTML becomes Markdown, because chunks are cut at headings, list items and table rows, which Markdown shows.
"""

import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import yaml
import yaml.events

EXTRA = "pip install 'pgrecall[files]'"
MAX_FRONT_MATTER = 64_000
LIKELY = [
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r"),
    *("cp932", "euc_jp", "gb18030", "big5", "euc_kr"),
]
"""What a text that is not UTF-8 is taken for; among all encodings there are, short texts look like the oddest."""

_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?([\w-]{2,40})", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)(?:^|\n)(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", re.DOTALL)


class Damaged(Exception):
    """This is not what its name says, or cannot be read; the message says why."""


@dataclass(slots=True)
class Page:
    """What a file says: its text, and what it says of itself. `guessed` is the encoding it was taken for."""

    content: str
    title: str | None = None
    doc_type: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None
    guessed: str | None = None


def decoded(data: bytes, encoding: str | None = None) -> tuple[str, str | None]:
    """The text, and the encoding it was taken for where that is a guess. Raises Damaged."""
    named = encoding or next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    try:
        return data.decode(named or "utf-8"), None
    except UnicodeDecodeError as error:
        if named:
            raise Damaged(f"is not {named.removesuffix('-sig').upper()} at byte {error.start}") from None
        return _guess(data, error.start)


def _guess(data: bytes, at: int) -> tuple[str, str]:
    try:
        from charset_normalizer import from_bytes  # noqa: PLC0415  the extra `files`
    except ImportError:
        raise Damaged(f"is not UTF-8 at byte {at}; to have the encoding guessed: {EXTRA}, or give --encoding") from None
    found = [
        (match.chaos, -match.coherence, LIKELY.index(name), str(match))
        for match in from_bytes(data, cp_isolation=LIKELY)
        for name in match.could_be_from_charset
        if name in LIKELY
    ]
    if not found:
        raise Damaged(f"is not UTF-8 at byte {at}, nor in any encoding that is likely; give --encoding")
    _, _, place, content = min(found)  # of several that look alike the one that is used most
    return content, LIKELY[place]


def sniffed(sample: bytes, encoding: str | None = None) -> tuple[str, str | None]:
    """The encoding of a text by its beginning, and again where it is a guess. Raises Damaged."""
    if encoding:
        return encoding, None
    named = next((name for mark, name in _MARKS.items() if sample.startswith(mark)), "utf-8")
    try:
        sample.decode(named)
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 4:  # not only a character that the sample's end cuts in two
            _, guessed = _guess(sample, error.start)
            return guessed, guessed
    return named, None


def text(data: bytes, encoding: str | None = None) -> Page:
    """Plain text as it stands."""
    content, guessed = decoded(data, encoding)
    return Page(content, guessed=guessed)


def markdown(data: bytes, encoding: str | None = None) -> Page:
    """Markdown as it stands, without its YAML front matter, which names title, type, date and metadata."""
    content, guessed = decoded(data, encoding)
    found = _FRONT_MATTER.match(content)
    values: Any = None
    if found and len(found[1]) <= MAX_FRONT_MATTER:
        try:
            values = yaml.load(found[1], _Plain)  # noqa: S506  a SafeLoader
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            said = str(error).splitlines()
            raise Damaged(f"its front matter is not YAML: {said[0] if said else 'unreadable'}") from None
    if not found or not isinstance(values, dict):
        return Page(content, guessed=guessed)  # a rule between paragraphs looks the same
    page = Page(content[found.end() :], guessed=guessed)
    _label(page, values)
    return page


class _Plain(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML without aliases: a few lines of them make gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)


def _label(page: Page, values: Mapping[Any, Any]) -> None:
    """Title, type and date by the names that are in use for them; what else there is becomes metadata."""
    for name, value in values.items():
        key = str(name)
        match key.lower():
            case "title" if isinstance(value, str | int | float):
                page.title = str(value)
            case "doc_type" | "type" if isinstance(value, str):
                page.doc_type = value
            case "created_at" | "date" if (moment := moment_of(value)) is not None:
                page.created_at = moment
            case "metadata" if isinstance(value, dict):
                page.metadata |= {str(inner): plain(each) for inner, each in value.items()}
            case _:
                page.metadata[key] = plain(value)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: moments and what else YAML knows as text."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, date):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def moment_of(value: Any) -> datetime | None:
    """A moment from what files write: ISO 8601, a day, seconds since 1970; UTC where no time zone is named. Else None."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day, tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)


_META_NAMES = {"author": "author", "description": "description", "keywords": "keywords"}
_META_DATES = ("date", "article:published_time", "dcterms.created", "dc.date", "dcterms.date")


def html(data: bytes, encoding: str | None = None) -> Page:
    """The body as Markdown without links and pictures; title, date, language, author, … from the head."""
    try:
        from bs4 import BeautifulSoup  # noqa: PLC0415  the extra `files`
        from markdownify import MarkdownConverter  # noqa: PLC0415
    except ImportError as error:
        raise Damaged(f"reading HTML needs the package {error.name}: {EXTRA}") from None
    said = _META_CHARSET.search(data[:4096])
    try:
        content, guessed = decoded(data, encoding)
        if guessed and said:
            content, guessed = data.decode(said[1].decode()), None
    except (LookupError, UnicodeDecodeError):
        pass  # what it says of itself is not so
    with _damage("HTML"):
        soup = BeautifulSoup(content, "lxml")
        page = Page("", guessed=guessed)
        _head(page, soup)
        for tag in soup(["script", "style", "template", "noscript", "head"]):
            tag.decompose()
        made = MarkdownConverter(
            heading_style="ATX",
            strip=["a", "img"],
            escape_asterisks=False,
            escape_underscores=False,
            escape_misc=False,
        ).convert_soup(soup.body or soup)
        page.content = re.sub(r"\n{3,}", "\n\n", made).strip() + "\n"
    return page


def _head(page: Page, soup: Any) -> None:
    if soup.title and (title := " ".join(soup.title.get_text().split())):
        page.title = title
    if soup.html and soup.html.get("lang"):
        page.metadata["lang"] = str(soup.html["lang"])
    for tag in soup("meta"):
        name = str(tag.get("name") or tag.get("property") or "").lower()
        value = str(tag.get("content") or "").strip()
        if not value:
            continue
        if name in _META_NAMES:
            page.metadata[_META_NAMES[name]] = value
        elif name in _META_DATES and page.created_at is None:
            page.created_at = moment_of(value)


def pdf(data: bytes, encoding: str | None = None) -> Page:  # noqa: ARG001  a PDF says its own
    """The text of its pages, an empty line between two; its title where it has one."""
    try:
        import pypdf  # noqa: PLC0415  the extra `files`
    except ImportError as error:
        raise Damaged(f"reading PDF needs the package {error.name}: {EXTRA}") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it mends is no news
    with _damage("PDF"):
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Damaged("is encrypted: it opens with a password only")
        content = "\n\n".join(filter(None, (page.extract_text().strip() for page in reader.pages)))
        title = str((reader.metadata.title if reader.metadata else None) or "").strip()
    if not content.strip():
        raise Damaged("has no text: its pages are pictures, or empty")
    # What fonts have no letter for comes as NUL or as half a surrogate pair, which PostgreSQL cannot hold.
    clean = content.replace("\0", "").encode("utf-8", "ignore").decode() + "\n"
    return Page(clean, title=title.replace("\0", "")[:200] or None)


@contextmanager
def _damage(kind: str) -> Iterator[None]:
    """Whatever a converter stumbles over is the file's fault: it must not end a run over a million of them."""
    try:
        yield
    except Damaged:
        raise
    except RecursionError:
        raise Damaged(f"is nested too deeply to be read as {kind}") from None
    except Exception as error:
        raise Damaged(f"cannot be read as {kind}: {type(error).__name__}: {str(error)[:200]}") from error


Reader = Callable[[bytes, str | None], Page]

READERS: Mapping[str, Reader] = {"text": text, "markdown": markdown, "html": html, "pdf": pdf}
"""Formats of one document a file."""

RECORDS = ("csv", "tsv", "jsonl")
"""Formats of one document a record."""

FORMATS = (*READERS, *RECORDS)

SUFFIXES: Mapping[str, str] = {
    ".txt": "text",
    ".text": "text",
    ".rst": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
"""Which format a file is in, by the end of its name."""
