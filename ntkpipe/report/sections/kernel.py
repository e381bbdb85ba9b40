"""The section that shows the kernel."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.gather import Arrangement
from ntkpipe.report.parts import PageTable, Part, Plot, Section
from ntkpipe.report.theme import colour_bar, linear

_MOST_NAMES = 12
_MOST_LETTERS, _MOST_IN_A_ROW = 16, 30  # of a name, and of all names side by side
_SHADES = mpl.colormaps["cividis"].resampled(48)  # more are not told apart, and make the page larger
_SQUARE = 1.16  # height of a matrix with its colour bar


def kernel_section(means: list[FloatArray], arrangement: Arrangement) -> Section:
    """The kernel as a picture, and means over pairs of classes where there are classes."""
    num_samples, order, is_by_class = len(arrangement.bins), arrangement.order, arrangement.classes is not None
    each = num_samples / len(means[0])
    pixel = "a pair of samples" if each <= 1 else f"the mean over about {each:.0f} × {each:.0f} pairs of samples"
    reading = [
        f"Both axes are the {num_samples:,} training samples, {order}; each pixel is {pixel}, entries of a "
        "sample with itself left out. Yellow is large, blue is small; the colours leave out the most extreme 0.5% at "
        "either end.",
    ]
    if is_by_class:
        reading.append(
            "Bright squares along the diagonal mean that the kernel knows the classes: samples of one class have "
            "gradients that point the same way. Bright or dark stripes are samples whose gradients are long or short "
            "altogether; such a common factor helps no classification."
        )
    name = "Kernel, samples sorted by class" if is_by_class else f"Kernel, samples {order}"
    draw = partial(picture, means=means[0], arrangement=arrangement)
    alt = f"Heat map of the kernel of {num_samples:,} samples."
    whole = Plot("picture", name, draw, alt, tuple(reading), _SQUARE)
    no_classes = "The targets are no labels of classes, so there is no picture by class."
    by_class = _by_class(means[1], arrangement.names) if is_by_class else (no_classes,)
    return Section("kernel", "The kernel", (), (whole, *by_class))


def _by_class(means: FloatArray, names: tuple[str, ...]) -> tuple[Part, ...]:
    same = float(np.mean(means.diagonal()))
    off = means[~np.eye(len(means), dtype=bool)]
    other = float(off.mean()) if off.size else float("nan")
    ratio = f", a ratio of {same / other:.3g}" if off.size and other > 0 else ""
    said = f"On average it is {same:.4g} within a class and {other:.4g} between classes{ratio}."
    title = "Mean kernel entry of each pair of classes"
    plot = Plot(
        "class-means",
        title,
        partial(class_means, means=means, names=names),
        f"Heat map of {len(means)} × {len(means)} class means. {said}",
        (
            f"The mean of K(x, x′) over x of one class and x′ of another, a sample with itself left out. {said}",
            "A square off the diagonal that is as bright as those of its two classes on the diagonal is a pair that "
            "the kernel hardly tells apart.",
        ),
        _SQUARE,
    )
    if len(names) > _MOST_NAMES:
        return (plot,)
    rows = tuple((name, *(f"{mean:.3g}" for mean in row)) for name, row in zip(names, means, strict=True))
    return plot, PageTable(f"{title}, in numbers", ("class", *names), rows, is_folded=True)


def picture(axes: Axes, means: FloatArray, arrangement: Arrangement) -> None:
    """Means of blocks of the kernel, in an order of the samples."""
    num_samples, bounds, names = len(arrangement.bins), arrangement.bounds, arrangement.names
    # Colours from nearly the smallest to nearly the largest entry off the diagonal, which alone would be seen.
    off = means[~np.eye(len(means), dtype=bool)] if len(means) > 1 else means
    low, high = np.nanpercentile(off, [0.5, 99.5])
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    extent = (0, num_samples, num_samples, 0)
    image = axes.imshow(means, cmap=_SHADES, vmin=low, vmax=high, extent=extent, interpolation="none")
    for bound in bounds:
        for line in (axes.axhline, axes.axvline):
            line(bound, color="#ffffff", linewidth=0.5, alpha=0.8)
    edges = np.array([0, *bounds, num_samples])
    _squares(axes, image, (edges[:-1] + edges[1:]) / 2, names, "kernel entry K(x, x′) [kernel units]")
    if not 0 < len(names) <= _MOST_NAMES:
        axes.set_xlabel(f"training sample x′, {arrangement.order} [number]")
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
    if 0 < len(names) <= _MOST_NAMES:
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
