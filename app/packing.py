"""Columns of many rows as PostgreSQL's binary arrays, made without a call for each vector.

psycopg writes the elements of a list one by one and vectors in a list as text, half a millisecond each. What is packed
here is an array_send by hand: a head, then each element behind its length.
"""

import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import psycopg
from psycopg.adapt import Buffer, Dumper
from psycopg.pq import Format

BYTEA, TEXT, TIMESTAMPTZ, JSONB = 17, 25, 1184, 3802
"""Types of elements, which are the same in every database."""

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NULL = struct.pack(">i", -1)
_length = struct.Struct(">i").pack


class Packed(bytes):
    """A binary array. A statement has to cast its parameter, as in `cast(:ids as text[])`: only the cast says the type."""

    __slots__ = ()


class _PackedDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Packed) -> Buffer:
        return obj


psycopg.adapters.register_dumper(Packed, _PackedDumper)


def _head(count: int, element: int) -> bytes:
    # Dimensions, whether there may be nulls, type of the elements, length and lower bound of the dimension.
    return struct.pack(">iiIii", 1, 1, element, count, 1) if count else struct.pack(">iiI", 0, 0, element)


def _packed(element: int, values: Sequence[bytes | None]) -> Packed:
    parts = [_head(len(values), element)]
    for value in values:
        if value is None:
            parts.append(_NULL)
        else:
            parts += (_length(len(value)), value)
    return Packed(b"".join(parts))


def texts(values: Iterable[str | None]) -> Packed:
    """A text[]."""
    return _packed(TEXT, [None if value is None else value.encode() for value in values])


def blobs(values: Iterable[bytes | None]) -> Packed:
    """A bytea[]."""
    return _packed(BYTEA, list(values))


def objects(values: Iterable[Any]) -> Packed:
    """A jsonb[]."""
    return _packed(JSONB, [b"\x01" + msgspec.json.encode(value) for value in values])


def moments(values: Iterable[datetime | None]) -> Packed:
    """A timestamptz[]."""
    packed = [None if value is None else struct.pack(">q", (value - _EPOCH) // _MICROSECOND) for value in values]
    return _packed(TIMESTAMPTZ, packed)


def vectors(values: Sequence[npt.NDArray[np.float32]], element: int) -> Packed:
    """A vector[] of vectors that are equally long; `element` is the type's number in this database."""
    if not values:
        return Packed(_head(0, element))
    stacked = np.stack(values)
    dimensions = stacked.shape[1]
    rows = np.empty(
        len(stacked), dtype=[("length", ">i4"), ("dimensions", ">i2"), ("unused", ">i2"), ("values", ">f4", dimensions)]
    )
    rows["length"], rows["dimensions"], rows["unused"], rows["values"] = 4 + 4 * dimensions, dimensions, 0, stacked
    return Packed(_head(len(stacked), element) + rows.tobytes())
