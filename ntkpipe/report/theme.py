"""How figures look: each is drawn once, in colours that are variables of the page and text that has the page's font."""

import io
import re
import warnings
from typing import Any, Literal, cast

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

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


def line(quantity: Quantity, points: int = 0) -> dict[str, Any]:
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
