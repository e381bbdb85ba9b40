"""What figures have in common: scales, legends beside the data, colour bars."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from ntkpipe.report.theme import COLOURS

_FEW_DECADES = 2.0  # of which labels at powers of ten are enough
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(value: float, _: float = 0.0) -> str:
    """A label: 10⁻³. Formulas of matplotlib would take most of the time of a figure."""
    return "10" + str(round(math.log10(value))).translate(_RAISED)


def plain(value: float, _: float = 0.0) -> str:
    """A label: 1,500."""
    return f"{value:,.4g}"


def logarithmic(axes: Axes, which: str) -> None:
    """Decades along ``"x"``, ``"y"`` or both, as many labels as there is room for; call it when all is drawn."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        axis = axes.xaxis if name == "x" else axes.yaxis
        low, high = axis.get_view_interval()
        decades = float(np.log10(high / low))
        axis.set_minor_formatter(NullFormatter())
        if decades >= _FEW_DECADES:
            axis.set_major_locator(LogLocator(numticks=6))
            axis.set_major_formatter(power_of_ten)
        else:
            # Powers of ten alone would be one label, or none.
            is_short = decades < _FEW_DECADES / 4
            axis.set_major_locator(MaxNLocator(4) if is_short else LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(plain)
            axis.set_minor_locator(NullLocator())


def linear(axes: Axes, which: str, *, whole: bool = False) -> None:
    """Few round numbers along ``"x"``, ``"y"`` or both."""
    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(MaxNLocator(5, integer=whole))
        axis.set_major_formatter(plain)


def percent(axes: Axes, which: str) -> None:
    """From 0 to 100 along ``"x"``, ``"y"`` or both."""
    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(MultipleLocator(20))
        getattr(axes, f"set_{name}lim")(-2, 102)


def label(axes: Axes, x: str, y: str) -> None:
    """Labels of both axes, that of y above them, and below what lines are, where they hide nothing."""
    axes.set_xlabel(x)
    axes.set_title(y, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels)) > 20 else 2
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def colour_bar(axes: Axes, image: Any, label: str) -> None:
    """Which colour is which number."""
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.9)
    bar.set_label(label)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")  # else lines are seen between the shades
    bar.outline.set_edgecolor(COLOURS["ink"])
    bar.locator = MaxNLocator(4)
    bar.formatter = FuncFormatter(plain)
    bar.update_ticks()


def thinned(count: int, most: int = 400) -> NDArray[np.int64]:
    """At most about ``most`` of the positions 0 to count - 1, evenly in the logarithm, with the first and the last."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.geomspace(1, count, most).round().astype(np.int64) - 1)
