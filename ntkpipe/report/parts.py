"""What a page consists of: sections of tables, figures and galleries, and numbers in words. Nothing is drawn here."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ntkpipe.solvers.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes"], None]  # draws into the empty axes of a figure


@dataclass(frozen=True)
class PageTable:
    """Rows below a caption."""

    caption: str  # what the table holds
    columns: tuple[str, ...]  # names; the first one is of the rows. None where rows are pairs of a name and a value.
    rows: tuple[tuple[str, ...], ...]  # as many cells each
    is_folded: bool = False  # whether readers open it first
    kind: str = "table"


@dataclass(frozen=True)
class Plot:
    """A figure."""

    name: str  # for its anchor: letters and hyphens
    title: str  # what is drawn
    draw: Draw  # how
    alt: str  # what is to be seen, for who does not see it
    reading: tuple[str, ...]  # how to read it, in sentences
    height: float = 0.8  # as a part of its width
    kind: str = "plot"


@dataclass(frozen=True)
class Thumbnail:
    """A small image of a sample, or none, and what is to be said of it."""

    uri: str | None  # the image, or none
    alt: str  # what it shows
    lines: tuple[str, ...]  # below it


@dataclass(frozen=True)
class Gallery:
    """Rows of thumbnails: one sample each, and others that belong to it."""

    title: str  # what the rows are
    reading: tuple[str, ...]  # how to read them, in sentences
    rows: tuple[tuple[Thumbnail, tuple[Thumbnail, ...]], ...]  # (The sample, the others)
    kind: str = "gallery"


Part = PageTable | Plot | Gallery | str  # text is a paragraph


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    name: str  # for its anchor
    title: str  # its heading
    intro: tuple[str, ...] = ()  # paragraphs below it
    parts: Sequence[Part] = ()  # what follows
    missing: str | None = None  # one sentence for what is not there, and how to get it


@dataclass(frozen=True)
class Page:
    """Everything on a page."""

    title: str  # title, subtitle: of the page
    subtitle: str
    is_good: bool | None  # whether the store was verified and nothing is wrong; none if it was not verified
    verdict: str  # on the store, in a few words
    worth: str  # what the kernel is good for; the rest of the line
    numbers: tuple[tuple[str, str], ...]  # (Name, value) of what readers look for first
    sections: tuple[Section, ...]  # in order
    footer: str  # what wrote it, and when


def number(value: float | None, digits: int = 4) -> str:
    """A number of any size; a dash where it is not known."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}g}"


def with_errors(values: Iterable[float], errors: Iterable[float]) -> list[str]:
    """Numbers with their standard errors, if there are any."""
    return [
        number(value) + (f" ± {number(error, 2)}" if 0 < error < math.inf else "")
        for value, error in zip(values, errors, strict=True)
    ]


def share(value: float, digits: int = 1) -> str:
    """A part of one in percent."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "–"


def in_numbers(title: str, found: Result) -> PageTable:
    """What a result prints, but its cost, which is among the timings."""
    return PageTable(f"{title} in numbers", (), tuple(row for row in found.rows() if row[0] != "cost"))


def ranges(values: Sequence[float], flags: Sequence[bool]) -> str:
    """Where flags are set along ascending values, in words."""
    places = groupby(np.argsort(values), key=lambda place: bool(flags[place]))
    runs = [[values[place] for place in run] for is_set, run in places if is_set]
    said = (f"λ = {run[0]:.3g}" if run[0] == run[-1] else f"λ from {run[0]:.3g} to {run[-1]:.3g}" for run in runs)
    return " and ".join(said)
