"""Numbers in words, the same everywhere on a page."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ntkpipe.report.findings import Findings, Missing


def number(value: float, digits: int = 4) -> str:
    """A number of any size; a dash where it is not known."""
    return f"{value:,.{digits}g}" if math.isfinite(value) else "–"


def with_error(value: float, error: float) -> str:
    """A number and its standard error, if it has any."""
    return f"{number(value)} ± {number(error, 2)}" if math.isfinite(error) and error > 0 else number(value)


def share(value: float, digits: int = 1) -> str:
    """A part of one in percent."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "–"


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:,.3g} s"


def ridges_in_words(ridges: NDArray[np.float64]) -> tuple[str, ...]:
    """λ, short enough for a table."""
    return tuple(f"{ridge:.3g}" for ridge in ridges)


def why_missing(*findings: Findings | Missing) -> str | None:
    """The reason of the first that is missing."""
    return next((finding.why for finding in findings if isinstance(finding, Missing)), None)


def warnings(*findings: Findings | Missing) -> tuple[str, ...]:
    """What is to be said of results that did not converge."""
    return tuple(
        f"This is not as exact as was asked for ({finding.words('status')}): {finding.words('message')}."
        for finding in findings
        if isinstance(finding, Findings) and not finding.is_converged
    )


def method_in_words(found: Findings) -> str:
    """How an analysis was done, and why."""
    if found.words("method") == "streamed":
        return f"streamed, since {found.words('why')}"
    return "exactly, in memory"


def ranges(values: Sequence[float], flags: Sequence[bool]) -> str:
    """Where flags are set along ascending values, in words."""
    order = np.argsort(values)
    runs: list[list[float]] = []
    was_set = False
    for place in order:
        if flags[place]:
            if was_set:
                runs[-1][1] = values[place]
            else:
                runs.append([values[place], values[place]])
        was_set = bool(flags[place])
    said = [f"λ = {low:.3g}" if low == high else f"λ from {low:.3g} to {high:.3g}" for low, high in runs]
    return " and ".join(said)
