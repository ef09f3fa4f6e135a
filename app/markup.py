"""HTML of what the page is made of: texts, which are always escaped, and tables."""

from collections.abc import Iterable, Sequence
from html import escape
from unicodedata import category

SHORT = 220
"""Characters shown of a text."""


def text(plain: str) -> str:
    """Escaped, with a space for every control character."""
    return escape("".join(" " if category(letter) == "Cc" else letter for letter in plain))


def short(plain: str, length: int = SHORT) -> str:
    """The beginning, on one line, set apart so that its writing direction stays inside."""
    line = " ".join(plain.split())
    return f"<bdi>{text(line if len(line) <= length else line[: length - 1].rstrip() + '…')}</bdi>"


def table(caption: str, headings: Sequence[tuple[str, str]], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """A table of (HTML, class) cells; class `th` heads the row."""
    head = "".join(f'<th scope="col" class="{kind}">{text(name)}</th>' for name, kind in headings)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{cell}</th>' if kind == "th" else f'<td class="{kind}">{cell}</td>' for cell, kind in row
        )
        + "</tr>"
        for row in rows
    )
    described = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{described}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
