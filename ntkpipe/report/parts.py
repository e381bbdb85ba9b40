"""What a page consists of: sections of tables, figures and galleries. Nothing is drawn or written here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntkpipe.report.look import Drawn


@dataclass(frozen=True)
class Table:
    """Rows below a caption.

    Attributes
    ----------
    caption
        What the table holds.
    columns
        Names; the first one is of the rows. None where rows are pairs of a name and a value.
    rows
        As many cells each.
    is_folded
        Whether readers open it first.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes
    ----------
    name
        For its anchor: letters and hyphens.
    title
        What is drawn.
    drawn
        The images, one for each look in their order; a browser shows one.
    alt
        What is to be seen, for who does not see it.
    reading
        How to read it, in sentences.
    """

    name: str
    title: str
    drawn: "tuple[Drawn, ...]"
    alt: str
    reading: tuple[str, ...]
    kind: str = "plot"


@dataclass(frozen=True)
class Thumbnail:
    """A small image of a sample, or none, and what is to be said of it.

    Attributes
    ----------
    uri
        The image, or none.
    alt
        What it shows.
    lines
        Below it.
    """

    uri: str | None
    alt: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """Rows of thumbnails: one sample each, and others that belong to it.

    Attributes
    ----------
    title
        What the rows are.
    reading
        How to read them, in sentences.
    rows
        (The sample, the others).
    """

    title: str
    reading: tuple[str, ...]
    rows: tuple[tuple[Thumbnail, tuple[Thumbnail, ...]], ...]
    kind: str = "gallery"


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str
    kind: str = "note"


Part = Table | Plot | Gallery | Note


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes
    ----------
    name
        For its anchor.
    title
        Its heading.
    intro
        Paragraphs below it.
    parts
        What follows.
    missing
        One sentence for what is not there, and how to get it.
    """

    name: str
    title: str
    intro: tuple[str, ...] = ()
    parts: Sequence[Part] = field(default=())
    missing: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The header's line.

    Attributes
    ----------
    is_good
        Whether the store was verified and nothing is wrong; none if it was not verified.
    lead, rest
        The line, in two parts of which the first is the verdict on the store.
    """

    is_good: bool | None
    lead: str
    rest: str


@dataclass(frozen=True)
class Page:
    """Everything on a page.

    Attributes
    ----------
    title, subtitle
        Of the page.
    verdict
        In one line.
    numbers
        (Name, value) of what readers look for first.
    sections
        In order.
    footer
        What wrote it, and when.
    """

    title: str
    subtitle: str
    verdict: Verdict
    numbers: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    footer: str
