"""Numbers in words, the same everywhere on a page."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ntkpipe.report.findings import Findings
from ntkpipe.report.parts import Note


def number(value: float, digits: int = 4) -> str:
    """A number of any size; a dash where it is not known."""
    return f"{value:,.{digits}g}" if math.isfinite(value) else "–"


def with_error(value: float, error: float) -> str:
    """A number and its standard error, if it has any."""
    return f"{number(value)} ± {number(error, 2)}" if math.isfinite(error) and error > 0 else number(value)


def share(value: float, digits: int = 1) -> str:
    """A part of one in percent."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "–"


def ridges_in_words(ridges: NDArray[np.float64]) -> tuple[str, ...]:
    """λ, short enough for a table."""
    return tuple(f"{ridge:.3g}" for ridge in ridges)


def warnings(found: Findings) -> tuple[Note, ...]:
    """A note on a result that did not converge."""
    if found.is_converged:
        return ()
    return (Note(f"This is not as exact as was asked for ({found.words('status')}): {found.words('message')}."),)


def with_errors(found: Findings, name: str, error: str | None) -> list[str]:
    """Numbers of a result, with their standard errors if there are any."""
    errors = np.zeros(len(found.array(name))) if error is None else found.array(error)
    return [with_error(value, wrong) for value, wrong in zip(found.array(name), errors, strict=True)]


def method_in_words(found: Findings) -> str:
    """How an analysis was done, and why."""
    return f"streamed, since {found.words('why')}" if found.words("method") == "streamed" else "exactly, in memory"


def ranges(values: Sequence[float], flags: Sequence[bool]) -> str:
    """Where flags are set along ascending values, in words."""
    runs: list[list[float]] = []
    was_set = False
    for place in np.argsort(values):
        if flags[place] and was_set:
            runs[-1][1] = values[place]
        elif flags[place]:
            runs.append([values[place], values[place]])
        was_set = bool(flags[place])
    said = [f"λ = {low:.3g}" if low == high else f"λ from {low:.3g} to {high:.3g}" for low, high in runs]
    return " and ".join(said)
