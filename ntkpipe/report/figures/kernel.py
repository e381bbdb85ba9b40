"""Figures of a kernel's entries."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.figures.axes import colour_bar, linear

MOST_NAMES = 12
_MOST_LETTERS, _MOST_IN_A_ROW = 16, 30  # of a name, and of all names side by side
_SHADES = mpl.colormaps["cividis"].resampled(48)  # more are not told apart, and make the page larger


def picture(
    axes: Axes, means: FloatArray, num_samples: int, bounds: Sequence[int], names: Sequence[str], order: str
) -> None:
    """Means of blocks of the kernel, in an order of the samples."""
    low, high = _range(means)
    extent = (0, num_samples, num_samples, 0)
    image = axes.imshow(means, cmap=_SHADES, vmin=low, vmax=high, extent=extent, interpolation="none")
    for bound in bounds:
        for line in (axes.axhline, axes.axvline):
            line(bound, color="#ffffff", linewidth=0.5, alpha=0.8)
    edges = np.array([0, *bounds, num_samples])
    _squares(axes, image, (edges[:-1] + edges[1:]) / 2, names, "kernel entry K(x, x′) [kernel units]")
    if not 0 < len(names) <= MOST_NAMES:
        axes.set_xlabel(f"training sample x′, {order} [number]")
        axes.set_ylabel("training sample x [number]")


def class_means(axes: Axes, means: FloatArray, names: Sequence[str]) -> None:
    """Mean entry of each pair of classes, the diagonal of the kernel left out."""
    image = axes.imshow(means, cmap=_SHADES, interpolation="none")
    _squares(axes, image, np.arange(len(names), dtype=float), names, "mean of K(x, x′) [kernel units]")


def _squares(axes: Axes, image: Any, places: FloatArray, names: Sequence[str], unit: str) -> None:
    """Lay out a matrix with names of classes at their places, where they are few, else with numbers."""
    assert isinstance(axes.figure, Figure)
    axes.figure.set_layout_engine("compressed")  # squares are laid out right by this one only
    axes.grid(visible=False)
    if 0 < len(names) <= MOST_NAMES:
        short = [name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…" for name in names]
        upright: dict[str, Any] = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        axes.set_xticks(places, short, **(upright if max(map(len, short)) * len(short) > _MOST_IN_A_ROW else {}))
        axes.set_yticks(places, short)
        axes.tick_params(length=0)
    else:
        linear(axes, "xy", whole=True)
    axes.set_xlabel("class of training sample x′")
    axes.set_ylabel("class of training sample x")
    colour_bar(axes, image, unit)


def _range(means: FloatArray) -> tuple[float, float]:
    """Colours from nearly the smallest to nearly the largest entry off the diagonal, which alone would be seen."""
    off = means[~np.eye(len(means), dtype=bool)] if len(means) > 1 else means.reshape(-1)
    low, high = (float(value) for value in np.nanpercentile(off, [0.5, 99.5]))
    return (low, high) if low < high else (low - 0.5, high + 0.5)
