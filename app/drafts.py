"""A document as a caller wants it stored, and the limits it must keep (DESIGN §1)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from app.errors import BadInput, TooLarge

MAX_TEXT_BYTES = 10_000_000
MAX_OWN_TEXT_BYTES = 32_000
MAX_METADATA_BYTES = 64_000
MAX_METADATA_DEPTH = 8
MAX_DOC_TYPE_BYTES = 128
MAX_TITLE_BYTES = 1_000
MAX_ID_BYTES = 512
SHORTEST, LONGEST = 1e-9, 1e9
LENGTHS = f"its length (norm) {SHORTEST:g} to {LONGEST:g}"
# A year from either end of what Python holds: no time zone moves such a moment out of it.
EARLIEST = datetime(2, 1, 1, tzinfo=UTC)
LATEST = datetime(9999, 1, 1, tzinfo=UTC)
YEARS = f"{EARLIEST.year:04} to {LATEST.year - 1}"
MAX_DOC_TYPES = 1_000
"""Types that a filter may ask for."""
MAX_QUERY_BYTES = 32_000
"""A question's text in UTF-8."""

SEEN = r"[^\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]"
"""A character that is neither white space nor of zero width."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A document as a caller wants it stored. `embedding` of its own makes it one chunk. Omitted means empty.

    `embedding_model`: name of the model `embedding` is of; None stands for the one that is searched.
    """

    id: str
    content: str
    title: str | None = None
    doc_type: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None
    embedding: Sequence[float] | npt.NDArray[np.float32] | None = None
    embedding_model: str | None = None


def check_model(name: str | None, embedding: object, searched: str) -> None:
    """Raise BadInput unless a vector that says of which model it is is of the one that is searched."""
    if name is None:
        return
    if embedding is None:
        raise BadInput("embedding_model", "is given without an embedding; allowed: both, or neither")
    if name != searched:
        raise BadInput("embedding_model", f"is {name[:80]!r}; allowed: {searched}, whose vectors are searched")


def check(draft: Draft, dimensions: int) -> npt.NDArray[np.float32] | None:
    """The draft's own vector, if it brings one. Raises BadInput, naming the field, for what is over the limits."""
    check_text("id", draft.id, 1, MAX_ID_BYTES)
    check_text("content", draft.content, 1, MAX_TEXT_BYTES if draft.embedding is None else MAX_OWN_TEXT_BYTES)
    if is_blank(draft.content):
        raise BadInput("content", "is empty or white space only; allowed: a text with something to find")
    if draft.doc_type is not None:
        check_text("doc_type", draft.doc_type, 1, MAX_DOC_TYPE_BYTES)
    if draft.title is not None:
        check_text("title", draft.title, 1, MAX_TITLE_BYTES)
    _check_json("metadata", draft.metadata, 1)
    size = len(msgspec.json.encode(draft.metadata))
    if size > MAX_METADATA_BYTES:
        raise TooLarge("metadata", f"is {size:,} bytes as JSON; allowed: {MAX_METADATA_BYTES:,}")
    check_moment("created_at", draft.created_at)
    return None if draft.embedding is None else check_vector(draft.embedding, dimensions)


def is_blank(text: str) -> bool:
    """Whether there is nothing in it to read: white space and characters of zero width only."""
    return not re.search(SEEN, text)


def check_moment(name: str, moment: datetime | None) -> None:
    """Raise BadInput unless the moment has a time zone and can be shown in every other one."""
    if moment is None:
        return
    if moment.tzinfo is None:
        raise BadInput(name, "has no time zone; allowed: an ISO 8601 moment such as 2026-01-31T12:00:00Z")
    if not EARLIEST <= moment < LATEST:
        raise BadInput(name, f"is {moment.isoformat()}; allowed: years {YEARS}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise BadInput unless `low` <= `value` <= `high`."""
    if not low <= value <= high:
        raise BadInput(name, f"is {value}; allowed: {low:,} to {high:,}")


def check_text(name: str, text: str, least: int, most: int) -> None:
    """Raise BadInput unless the text is `least` to `most` bytes of valid Unicode without NUL."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadInput(name, f"has a lone surrogate at character {error.start}; allowed: valid Unicode") from None
    if size > most:
        raise TooLarge(name, f"is {size:,} bytes; allowed: {least} to {most:,} bytes in UTF-8")
    if size < least:
        raise BadInput(name, f"is empty; allowed: {least} to {most:,} bytes in UTF-8")
    if "\0" in text:
        raise BadInput(name, f"has a NUL at character {text.index(chr(0))}; PostgreSQL cannot store NUL")


def _check_json(path: str, value: Any, depth: int) -> None:
    if depth > MAX_METADATA_DEPTH + 1 or (depth > MAX_METADATA_DEPTH and isinstance(value, (dict, list))):
        raise BadInput("metadata", f"is nested too deeply at {path}; allowed: {MAX_METADATA_DEPTH} levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_text(f"{path}.{key[:40]}" if key.isprintable() else path, key, 0, MAX_METADATA_BYTES)
            _check_json(f"{path}.{key[:40]}", inner, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_json(f"{path}[{index}]", inner, depth + 1)
    elif isinstance(value, str):
        check_text(path, value, 0, MAX_METADATA_BYTES)
    elif isinstance(value, float) and not np.isfinite(value):
        raise BadInput(path, f"is {value}; allowed: finite numbers")


def check_vector(
    embedding: Sequence[float] | npt.NDArray[np.float32], dimensions: int, name: str = "embedding"
) -> npt.NDArray[np.float32]:
    """The vector as float32, shape (dimensions,). Raises BadInput for another length, NaN, infinity or zero length."""
    with np.errstate(over="ignore"):
        vector = np.asarray(embedding, dtype=np.float32)
    if vector.shape != (dimensions,):
        raise BadInput(name, f"has {vector.size} dimensions; allowed: {dimensions}, as this database's model")
    exact = vector.astype(np.float64)
    length = math.sqrt(exact @ exact)
    if SHORTEST <= length <= LONGEST:
        return vector
    if not np.isfinite(length):
        at = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise BadInput(f"{name}[{at}]", "is not a finite single-precision number")
    if not vector.any():
        raise BadInput(name, "is zero, which has no direction; allowed: any other vector")
    raise BadInput(
        name, f"has length {length:.3g}; allowed: {SHORTEST:g} to {LONGEST:g}, or its cosine is lost to rounding"
    )
