"""Figures of a kernel's entries."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.figures.axes import colour_bar, linear
from ntkpipe.report.theme import Draw, Look

_MOST_NUMBERS = 12
# More shades are not told apart, and make the page larger.
_SHADES = 64


def picture(means: FloatArray, *, num_samples: int, bounds: Sequence[int], names: Sequence[str], order: str) -> Draw:
    """Means of blocks of the kernel, in an order of the samples."""

    def draw(figure: Figure, look: Look) -> None:
        # Squares are laid out right by this one only.
        figure.set_layout_engine("compressed")
        axes = figure.add_subplot()
        low, high = _range(means)
        image = axes.imshow(
            means,
            cmap=mpl.colormaps["cividis"].resampled(_SHADES),
            vmin=low,
            vmax=high,
            extent=(0, num_samples, num_samples, 0),
            interpolation="nearest",
        )
        axes.grid(visible=False)
        for bound in bounds:
            for line in (axes.axhline, axes.axvline):
                line(bound, color="#ffffff", linewidth=0.5, alpha=0.8)
        if names and len(names) <= _MOST_NUMBERS:
            edges = np.array([0, *bounds, num_samples])
            for set_ticks in (axes.set_xticks, axes.set_yticks):
                set_ticks((edges[:-1] + edges[1:]) / 2, list(names))
            axes.tick_params(length=0)
            axes.set_xlabel("class of training sample x′")
            axes.set_ylabel("class of training sample x")
        else:
            linear(axes, look, "xy", whole=True)
            axes.set_xlabel(f"training sample x′, {order} [number]")
            axes.set_ylabel("training sample x [number]")
        colour_bar(figure, axes, image, "kernel entry K(x, x′) [kernel units]", look)

    return draw


def class_means(means: FloatArray, names: Sequence[str]) -> Draw:
    """Mean entry of each pair of classes, the diagonal of the kernel left out."""

    def draw(figure: Figure, look: Look) -> None:
        # Squares are laid out right by this one only.
        figure.set_layout_engine("compressed")
        axes = figure.add_subplot()
        image = axes.imshow(means, cmap="cividis")
        axes.grid(visible=False)
        count = len(names)
        if count <= _MOST_NUMBERS:
            for set_ticks in (axes.set_xticks, axes.set_yticks):
                set_ticks(range(count), list(names))
            axes.tick_params(length=0)
        else:
            linear(axes, look, "xy", whole=True)
        if count <= _MOST_NUMBERS and not look.is_narrow:
            middle = (np.nanmin(means) + np.nanmax(means)) / 2
            for i, j in np.ndindex(count, count):
                ink = "#000000" if means[i, j] > middle else "#ffffff"
                axes.text(j, i, f"{means[i, j]:.3g}", ha="center", va="center", color=ink, fontsize=6.5)
        axes.set_xlabel("class of training sample x′")
        axes.set_ylabel("class of training sample x")
        colour_bar(figure, axes, image, "mean of K(x, x′) [kernel units]", look)

    return draw


def _range(means: FloatArray) -> tuple[float, float]:
    """Colours from nearly the smallest to nearly the largest entry off the diagonal, which alone would be seen."""
    off = means[~np.eye(len(means), dtype=bool)] if len(means) > 1 else means.reshape(-1)
    low, high = (float(value) for value in np.nanpercentile(off, [0.5, 99.5]))
    return (low, high) if low < high else (low - 0.5, high + 0.5)
