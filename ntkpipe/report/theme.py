"""How figures look: colours that colour-blind readers tell apart, for light and dark, for wide screens and phones."""

import base64
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# What is drawn in a figure, from whole quantities to their bounds; the same everywhere in a report.
Quantity = Literal["test", "train", "leave-one-out", "gcv", "eigenlearning", "unscaled", "kernel", "reference"]

# Okabe and Ito (2008): of their eight colours those that have a contrast of 3 against the background.
_LIGHT = {"blue": "#0072b2", "red": "#d55e00", "green": "#007f5f", "purple": "#a8527f", "grey": "#5c6370"}
_DARK = {"blue": "#56b4e9", "red": "#e69f00", "green": "#2ec49a", "purple": "#dd94bb", "grey": "#a0a7b4"}
# Colour, marker, line: any one of the three tells them apart.
_STYLES: dict[Quantity, tuple[str, str, str]] = {
    "test": ("red", "o", "-"),
    "train": ("blue", "s", "--"),
    "leave-one-out": ("green", "^", "-."),
    "gcv": ("purple", "D", ":"),
    "eigenlearning": ("blue", "v", "--"),
    "unscaled": ("blue", "v", ":"),
    "kernel": ("blue", "s", "-"),
    "reference": ("grey", "", "--"),
}


@dataclass(frozen=True)
class Look:
    """One way to draw a figure."""

    is_dark: bool  # light lines on a dark background
    is_narrow: bool  # for a phone

    @property
    def ink(self) -> str:
        """Colour of text and axes."""
        return "#e4e7ec" if self.is_dark else "#1d2129"

    @property
    def background(self) -> str:
        """Colour behind everything, that of the page's figures."""
        return "#171a20" if self.is_dark else "#ffffff"

    @property
    def faint(self) -> str:
        """Colour of grids."""
        return "#3a404b" if self.is_dark else "#d9dde3"

    def colour(self, name: str) -> str:
        """One of blue, red, green, purple, grey."""
        return (_DARK if self.is_dark else _LIGHT)[name]

    def line(self, quantity: Quantity, points: int = 0) -> dict[str, Any]:
        """Colour, marker and dashes of a quantity, for ``Axes.plot``; markers at most at about a dozen points."""
        colour, marker, dashes = _STYLES[quantity]
        # What estimates something has hollow marks, so that lines on top of each other are seen.
        is_hollow = quantity not in {"test", "train", "kernel"}
        return {
            "color": self.colour(colour),
            "marker": marker,
            "linestyle": dashes,
            "markevery": max(1, points // 12),
            "markersize": 6.5 if is_hollow else 4,
            "markerfacecolor": "none" if is_hollow else self.colour(colour),
            "linewidth": 1.6,
        }

    def settings(self) -> dict[str, Any]:
        """Settings of matplotlib; text becomes outlines, since readers' fonts differ in width."""
        inked: tuple[str, ...] = ("axes.edgecolor", "axes.labelcolor", "text.color")
        inked += ("xtick.color", "xtick.labelcolor", "ytick.color", "ytick.labelcolor")
        return {
            **dict.fromkeys(inked, self.ink),
            "axes.axisbelow": True,
            "axes.facecolor": self.background,
            "axes.grid": True,
            "axes.labelsize": 9,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 9.5,
            "figure.facecolor": self.background,
            "font.family": "DejaVu Sans",
            "font.size": 8.5,
            "grid.color": self.faint,
            "grid.linewidth": 0.6,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "mathtext.fontset": "dejavusans",
            "path.simplify_threshold": 0.4,
            "svg.fonttype": "path",
            "svg.hashsalt": "ntkpipe",
        }

    def in_use(self) -> AbstractContextManager[None]:
        """Draw by these settings, and leave those of the session alone."""
        return mpl.rc_context(cast("Any", self.settings()))

    def size(self, height: float) -> tuple[float, float]:
        """Inches of a figure; ``height`` is that of the wide one as a part of its width."""
        return (3.66, 3.66 * (height + 0.46)) if self.is_narrow else (7.4, 7.4 * height)


# Pairs of a narrow and a wide one, as the page takes them.
LOOKS = tuple(Look(is_dark, is_narrow) for is_dark in (False, True) for is_narrow in (True, False))
Draw = Callable[[Axes, Look], None]  # draws into the empty axes of a figure


@dataclass(frozen=True)
class Drawn:
    """A figure as one image of a page."""

    look: Look  # how it was drawn
    uri: str  # the SVG as a data URI
    width: int  # width, height: CSS pixels
    height: int


def draw_figure(draw: Draw, look: Look, *, height: float) -> Figure:
    """A figure, laid out so that nothing overlaps; call it inside of the look's settings."""
    figure = Figure(figsize=look.size(height), layout="constrained")
    draw(figure.add_subplot(), look)
    return figure


def render(draw: Draw, *, height: float = 0.52) -> tuple[Drawn, ...]:
    """A figure in every look, as SVG; the same input gives the same bytes."""
    return tuple(_render(draw, look, height) for look in LOOKS)


def _render(draw: Draw, look: Look, height: float) -> Drawn:
    buffer = io.BytesIO()
    with look.in_use():
        figure = draw_figure(draw, look, height=height)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width, tall = (round(96 * inches) for inches in figure.get_size_inches())
    return Drawn(look, data_uri("image/svg+xml", buffer.getvalue()), width, tall)


def data_uri(media_type: str, data: bytes) -> str:
    """Bytes as the address of an image that needs no network."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
