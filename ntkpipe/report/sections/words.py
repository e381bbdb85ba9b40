"""Numbers in words, the same everywhere on a page."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.parts import Note, PageTable
from ntkpipe.solvers.result import Result


def number(value: float | None, digits: int = 4) -> str:
    """A number of any size; a dash where it is not known."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}g}"


def with_error(value: float, error: float) -> str:
    """A number and its standard error, if it has any."""
    return f"{number(value)} ± {number(error, 2)}" if math.isfinite(error) and error > 0 else number(value)


def with_errors(values: Iterable[float], errors: Iterable[float]) -> list[str]:
    """Numbers with their standard errors, if there are any."""
    return [with_error(value, error) for value, error in zip(values, errors, strict=True)]


def share(value: float, digits: int = 1) -> str:
    """A part of one in percent."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "–"


def ridges_in_words(ridges: FloatArray) -> tuple[str, ...]:
    """λ, short enough for a table."""
    return tuple(f"{ridge:.3g}" for ridge in ridges)


def in_numbers(title: str, found: Result) -> PageTable:
    """What a result prints, but its cost, which is among the timings."""
    return PageTable(f"{title} in numbers", (), tuple(row for row in found.rows() if row[0] != "cost"))


def warnings(found: Result) -> tuple[Note, ...]:
    """A note on a result that did not converge."""
    if found.is_converged:
        return ()
    return (Note(f"This is not as exact as was asked for ({found.status}): {found.message}."),)


def method_in_words(method: str, why: str) -> str:
    """How an analysis was done, and why."""
    return f"streamed, since {why}" if method == "streamed" else "exactly, in memory"


def taken_as(targets: str) -> tuple[str, ...]:
    """A paragraph on what targets were taken as, which results of older versions do not say."""
    return (f"Targets were taken as {targets}.",) if targets else ()


def ranges(values: Sequence[float], flags: Sequence[bool]) -> str:
    """Where flags are set along ascending values, in words."""
    places = groupby(np.argsort(values), key=lambda place: bool(flags[place]))
    runs = [[values[place] for place in run] for is_set, run in places if is_set]
    said = [
        f"λ = {low:.3g}" if low == high else f"λ from {low:.3g} to {high:.3g}"
        for low, high in ((run[0], run[-1]) for run in runs)
    ]
    return " and ".join(said)
