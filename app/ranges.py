"""Numbers on a command line, each refused with what is allowed."""

import argparse
from collections.abc import Callable
from contextlib import suppress


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def convert(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a whole number from {low} to {high}")
        return int(text)

    return convert


def number(low: float, high: float) -> Callable[[str], float]:
    """A number from `low` to `high`, and so neither infinite nor none at all."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a number from {low:,} to {high:,}")

    return convert


def limit(text: str) -> int | None:
    """A limit of a tenant: a whole number, or `none`."""
    return None if text == "none" else whole(0, 10**12)(text)
