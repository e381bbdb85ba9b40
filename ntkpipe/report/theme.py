"""How figures look: colours that are variables of the page, text that has the page's font, scales, legends."""

import io
import math
import re
import warnings
from typing import Any, Literal, cast

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from ntkpipe.base.tables import printable
from ntkpipe.report.parts import Draw, Plot

# What is drawn in a figure, from whole quantities to their bounds; the same everywhere in a report.
Quantity = Literal["test", "train", "leave-one-out", "gcv", "eigenlearning", "unscaled", "kernel", "reference"]

# Colours of the page by name, whose values for light, dark and paper are in style.css; and what matplotlib takes for
# them, which is nothing that it draws otherwise.
COLOURS = {name: f"#fe00{n:02x}" for n, name in enumerate(("ink", "line", "blue", "red", "green", "purple", "grey"))}
# Colour, marker, line: any one of the three tells them apart.
STYLES: dict[Quantity, tuple[str, str, str]] = {
    "test": ("red", "o", "-"),
    "train": ("blue", "s", "--"),
    "leave-one-out": ("green", "^", "-."),
    "gcv": ("purple", "D", ":"),
    "eigenlearning": ("blue", "v", "--"),
    "unscaled": ("blue", "v", ":"),
    "kernel": ("blue", "s", "-"),
    "reference": ("grey", "", "--"),
}
# Ten points on this width are 11 pixels on a phone of 390, and the size of the captions on a wide screen.
INCHES = 4.5
_INKED = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
# Laid out for a font that is wider than those of pages, so that these have room.
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(_INKED, COLOURS["ink"]),
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    **dict.fromkeys(("axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 10),
    "figure.frameon": False,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "path.simplify_threshold": 0.4,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of classes are text
}
_FEW_DECADES = 2.0  # of which labels at powers of ten are enough
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def line(quantity: Quantity, points: int = 0, **changes: Any) -> dict[str, Any]:
    """Colour, marker and dashes of a quantity, for ``Axes.plot``; markers at most at about a dozen points."""
    colour, marker, dashes = STYLES[quantity]
    # What estimates something has hollow marks, so that lines on top of each other are seen.
    is_hollow = quantity not in {"test", "train", "kernel"}
    return {
        "color": COLOURS[colour],
        "marker": marker,
        "linestyle": dashes,
        "markevery": max(1, points // 12),
        "markersize": 6.5 if is_hollow else 4,
        "markerfacecolor": "none" if is_hollow else COLOURS[colour],
        "linewidth": 1.6,
        **changes,
    }


def draw_figure(draw: Draw, height: float) -> Figure:
    """A figure, laid out so that nothing overlaps; call it inside of the settings."""
    figure = Figure(figsize=(INCHES, INCHES * height), layout="constrained")
    draw(figure.add_subplot())
    return figure


def render(plot: Plot) -> Markup:
    """A figure as an element of the page. Equal plots give equal text, and plots of other names have other ids."""
    buffer = io.StringIO()
    with mpl.rc_context(cast("Any", {**SETTINGS, "svg.hashsalt": plot.name})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font of the page may have it
        figure = draw_figure(plot.draw, plot.height)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # The style would be one of the whole page, and groups have the same names in every figure. The font is overridden.
    shapes = re.sub(r"(?s)^.*?<svg[^>]*>|<style.*?</style>|</svg>", "", buffer.getvalue())
    shapes = re.sub(r'<g id="[^"]*"', "<g", shapes)
    for colour, drawn in COLOURS.items():
        shapes = shapes.replace(f": {drawn}", f": var(--{colour})")
    size = "{:g} {:g}".format(*(72 * figure.get_size_inches()))
    element = Markup('<svg role="img" viewBox="0 0 {}"><title>{}</title>{}</svg>')
    return element.format(size, printable(plot.alt), Markup(printable(shapes)))


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
