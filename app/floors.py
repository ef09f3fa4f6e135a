"""Least values of figures, for pipelines: `--fail-under recall@10=0.8`, or `hybrid:recall@10=0.8` for one mode."""

import math
from argparse import ArgumentTypeError
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

from app.errors import BadInput


class Floor(NamedTuple):
    """A figure's least value, in one mode or (None) in each that is evaluated and has the figure."""

    mode: str | None
    name: str
    least: float

    def applies(self, mode: str, figures: Container[str]) -> bool:
        """Whether a mode with these figures is held to it."""
        return self.mode in {None, mode} and self.name in figures


def floor(text: str) -> Floor:
    """An argument as a Floor. Raises ArgumentTypeError."""
    name, _, value = text.partition("=")
    mode, colon, rest = name.partition(":")
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if not -1 <= least <= 1:
        raise ArgumentTypeError(
            f"{text!r} is not allowed; allowed: METRIC=VALUE with a value from -1 to 1, or MODE:METRIC=VALUE"
        )
    return Floor(mode, rest, least) if colon else Floor(None, name, least)


def check(floors: Sequence[Floor], names: Mapping[str, Sequence[str]], k: int) -> None:
    """Raise BadInput for a floor under a figure there is not; `names` of the figures of each mode."""
    for each in floors:
        if not any(each.applies(mode, known) for mode, known in names.items()):
            wanted = each.name if each.mode is None else f"{each.mode}:{each.name}"
            figures = ", ".join(dict.fromkeys(name for known in names.values() for name in known))
            modes = ", ".join(f"{mode}:" for mode in names if mode)
            raise BadInput(
                "--fail-under",
                f"there is no {wanted!r} with -k {k}; allowed: {figures}" + (f", also after {modes}" if modes else ""),
            )


def under(metrics: Mapping[str, Mapping[str, float]], floors: Sequence[Floor]) -> Iterator[str]:
    """A sentence for each figure under its floor, with the mode where there are several. `metrics` by mode."""
    for mode, figures in metrics.items():
        for each in floors:
            if each.applies(mode, figures) and figures[each.name] < each.least:
                named = f"{mode}:{each.name}" if len(metrics) > 1 else each.name
                yield f"{named} is {figures[each.name]:.6f}, under {each.least:g}"
