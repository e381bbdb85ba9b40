"""Figures of eigenvalues, and of targets along eigenvectors."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.figures.axes import label, linear, logarithmic, percent, thinned
from ntkpipe.report.theme import COLOURS, line


@dataclass(frozen=True)
class TailLine:
    """λ_k = amplitude · k^-exponent, fitted between two ranks."""

    exponent: float  # exponent, error: with its standard error
    error: float
    amplitude: float  # of the line
    first: int  # first, last: ranks, counted from 1
    last: int


def eigenvalues(axes: Axes, values: FloatArray, num_rows: int, floor: float, fit: TailLine | None) -> None:
    """Eigenvalues by rank, as known; the power law of their tail and the storage floor."""
    positive = np.flatnonzero(values > 0)
    shown = positive[thinned(len(positive))]
    axes.plot(shown + 1, values[shown], label="eigenvalues of K", **line("kernel", len(shown)))
    if fit is not None:
        ranks = np.array([fit.first, fit.last])
        style = {**line("reference"), "color": COLOURS["red"], "linewidth": 2.2}
        said = f"power law, exponent {fit.exponent:.2f} ± {fit.error:.2f}"
        axes.plot(ranks, fit.amplitude * ranks ** -float(fit.exponent), label=said, **style)
    if floor > 0:
        axes.axhline(floor, label="storage floor", **{**line("reference"), "linestyle": ":"})
    axes.set_xlim(0.9, num_rows * 1.1)
    logarithmic(axes, "xy")
    label(axes, "rank k of the eigenvalue [number]", "eigenvalue λₖ [kernel units]")


def density(axes: Axes, places: FloatArray, heights: FloatArray, floor: float, is_estimate: bool) -> None:
    """Eigenvalues per decade over λ."""
    said = "stochastic Lanczos quadrature" if is_estimate else "all eigenvalues"
    style = {**line("kernel"), "marker": ""}
    axes.plot(places, heights, label=said, **style)
    axes.fill_between(places, heights, color=style["color"], alpha=0.25, linewidth=0)
    logarithmic(axes, "x")
    if floor > 0:
        axes.axvline(floor, label="storage floor", **{**line("reference"), "linestyle": ":"})
    linear(axes, "y")
    axes.set_ylim(bottom=0)
    label(axes, "eigenvalue λ [kernel units]", "density [eigenvalues per decade]")


def cumulative(axes: Axes, power: FloatArray, share: FloatArray | None) -> None:
    """Power of the targets along the k leading eigenvectors, and what of the trace these hold."""
    shown = thinned(len(power))
    axes.plot(shown + 1, 100 * power[shown], label="power of the targets", **line("test", len(shown)))
    if share is not None:
        shown = thinned(len(share))
        axes.plot(shown + 1, 100 * share[shown], label="trace of K", **line("kernel", len(shown)))
    for level in (0.5, 0.9):
        axes.axhline(100 * level, **{**line("reference"), "linewidth": 0.9})
    logarithmic(axes, "x")
    percent(axes, "y")
    label(axes, "leading eigenvectors k [number]", "cumulative share [%]")
