"""Numbers in words, the same everywhere on a page."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from ntkpipe.report.parts import PageTable
from ntkpipe.solvers.result import Result


def number(value: float | None, digits: int = 4) -> str:
    """A number of any size; a dash where it is not known."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}g}"


def with_errors(values: Iterable[float], errors: Iterable[float]) -> list[str]:
    """Numbers with their standard errors, if there are any."""
    return [
        number(value) + (f" ± {number(error, 2)}" if 0 < error < math.inf else "")
        for value, error in zip(values, errors, strict=True)
    ]


def share(value: float, digits: int = 1) -> str:
    """A part of one in percent."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "–"


def in_numbers(title: str, found: Result) -> PageTable:
    """What a result prints, but its cost, which is among the timings."""
    return PageTable(f"{title} in numbers", (), tuple(row for row in found.rows() if row[0] != "cost"))


def ranges(values: Sequence[float], flags: Sequence[bool]) -> str:
    """Where flags are set along ascending values, in words."""
    places = groupby(np.argsort(values), key=lambda place: bool(flags[place]))
    runs = [[values[place] for place in run] for is_set, run in places if is_set]
    said = (f"λ = {run[0]:.3g}" if run[0] == run[-1] else f"λ from {run[0]:.3g} to {run[-1]:.3g}" for run in runs)
    return " and ".join(said)
