"""What a person sees: tables, progress bars and problems, on a terminal or piped."""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from app.search import Hit

SNIPPET = 160
"""Characters of a hit's text that are shown."""

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys rather than shows: escape sequences, and marks that turn the order of a line around."""


def visible(text: str) -> str:
    """The text with a replacement for each control character but tab and line feed: documents do not steer terminals."""
    return spelt(_UNSEEN.sub("\ufffd", text))


def spelt(text: str) -> str:
    """The text with the bytes of a file's name that are not UTF-8, which no output takes, as Python spells them."""
    return text.encode(errors="backslashreplace").decode()


def json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(msgspec.json.encode(value, enc_hook=str).decode() + "\n")


def say(text: str) -> None:
    """A sentence for the person, on standard error: standard output is for results."""
    err.print(escape(visible(text)), soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def table(title: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]) -> None:
    """A table; each column is (heading, `left` or `right`)."""
    made = Table(title=escape(visible(title)), title_justify="left", expand=False)
    for heading, justify in columns:
        # A key's prefix that is broken over lines cannot be copied.
        made.add_column(
            heading, justify="right" if justify == "right" else "left", overflow="fold", no_wrap=heading == "prefix"
        )
    for row in rows:
        made.add_row(*(escape(visible(str(cell))) for cell in row))
    out.print(made)


def hits(title: str, found: Sequence[Hit]) -> None:
    """Search results: rank, score, document, snippet."""
    rows = [(rank, f"{hit.rank_score:.3f}", hit.id, snippet(hit.content)) for rank, hit in enumerate(found, 1)]
    table(title, [("rank", "right"), ("score", "right"), ("document", "left"), ("snippet", "left")], rows)


def snippet(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= SNIPPET else line[: SNIPPET - 1].rsplit(" ", 1)[0] + " …"


def progress(unit: str) -> Progress:
    """A bar with share, count and remaining time; prints nothing where standard error is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TimeRemainingColumn(),
        console=err,
    )


def transfer() -> Progress:
    """A bar of bytes with share, rate and remaining time; the total may come later."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
    )
