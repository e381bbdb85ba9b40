"""Figures of what regression with a kernel predicts, and of what foretells it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.figures.axes import label, linear, logarithmic, percent
from ntkpipe.report.theme import COLOURS, Quantity, line


@dataclass(frozen=True)
class Curve:
    """A quantity over ridges."""

    label: str  # in the legend
    values: FloatArray  # one a ridge; NaN where there is none
    errors: FloatArray | None = None  # standard errors, where values are estimates


Curves = Mapping[Quantity, Curve]
Unit = Literal["loss", "share", "ratio"]
_UNITS: dict[Unit, str] = {
    "loss": "mean squared error [target units²]",
    "share": "samples right [%]",
    "ratio": "estimate / measured [ratio]",
}


def known(curves: Curves) -> dict[Quantity, Curve]:
    """Curves that have values."""
    return {quantity: curve for quantity, curve in curves.items() if np.isfinite(curve.values).any()}


def over_ridges(axes: Axes, ridges: FloatArray, curves: Curves, marked: tuple[str, float], unit: Unit = "loss") -> None:
    """Losses, shares in percent, or ratios to what was measured, over ridges; a vertical line marks one of these."""
    places = _drawn(ridges)
    factor = 100 if unit == "share" else 1
    if unit == "ratio":
        axes.axhspan(0.8, 1.25, color=COLOURS["line"], alpha=0.6, linewidth=0, label="within a factor of 1.25")
        axes.axhline(1.0, **line("reference"))
    for quantity, curve in curves.items():
        style = line(quantity, len(places))
        axes.plot(places, factor * curve.values, label=curve.label, **style)
        if curve.errors is not None and np.isfinite(curve.errors).any():
            low, high = curve.values - curve.errors, curve.values + curve.errors
            low = np.maximum(low, curve.values / 1e3) if unit == "loss" else low
            axes.fill_between(places, factor * low, factor * high, color=style["color"], alpha=0.2, linewidth=0)
    name, ridge = marked
    mark = {**line("reference"), "linestyle": ":", "linewidth": 1.2}
    axes.axvline(_drawn(np.append(ridges, ridge))[-1], label=name, **mark)
    logarithmic(axes, "xy" if unit == "loss" else "x")
    if unit != "loss":
        linear(axes, "y")
    label(axes, "ridge λ [kernel units]" + ("; leftmost: λ = 0" if (ridges == 0).any() else ""), _UNITS[unit])


def _drawn(ridges: FloatArray) -> FloatArray:
    """Where ridges are on a logarithmic axis: zero one decade below the others."""
    positive = ridges[ridges > 0]
    return np.where(ridges > 0, ridges, positive.min() / 10 if len(positive) else 1.0)


def coverage(axes: Axes, nominal: FloatArray, scaled: FloatArray, plain: FloatArray) -> None:
    """How many targets lie in intervals that should hold a given share of them; variances scaled, and as they are."""
    axes.plot([0, 100], [0, 100], label="calibrated", **line("reference"))
    axes.plot(100 * nominal, 100 * scaled, label="variances times s²", **line("test", len(nominal)))
    axes.plot(100 * nominal, 100 * plain, label="as they are", **line("unscaled", len(nominal)))
    percent(axes, "xy")
    label(axes, "probability of the interval [%]", "test targets inside [%]")


def reliability(axes: Axes, confidence: FloatArray, accuracy: FloatArray, counts: FloatArray) -> None:
    """How many of the samples are right that have a given confidence, in bins; empty ones are left out."""
    axes.plot([0, 100], [0, 100], label="calibrated", **line("reference"))
    kept = counts > 0
    # With a right and a wrong one added: bins of few samples are not sure because these agree.
    smoothed = (accuracy * counts + 1) / (counts + 2)
    errors = np.sqrt(np.maximum(smoothed * (1 - smoothed), 0) / (counts + 2))[kept]
    axes.errorbar(
        100 * confidence[kept],
        100 * accuracy[kept],
        yerr=100 * errors,
        label="test samples in bins",
        ecolor=COLOURS["grey"],
        capsize=3,
        **line("test"),
    )
    percent(axes, "xy")
    label(axes, "confidence in the predicted class [%]", "test samples right [%]")
