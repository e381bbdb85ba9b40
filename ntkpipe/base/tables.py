"""Tables on the terminal. Names in a store are untrusted, so markup and control characters in them have no effect."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_NAME_WIDTH = 36  # names of rows are shorter; longer texts there are reasons, which are folded

TableRows = list[tuple[str, str]]  # (quantity, value) pairs


def as_table(rows: Sequence[tuple[str, str]]) -> str:
    """(quantity, value) pairs as aligned text, for ``print``."""
    width = max((len(name) for name, _ in rows), default=0)
    return printable("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print (quantity, value) pairs below a title."""
    columns = [Column(style="cyan", max_width=_NAME_WIDTH), Column(overflow="fold")]
    _print(title, columns, rows, show_header=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int) -> None:
    """Print rows below headers; the first column is folded if needed, those from ``num_texts`` on hold numbers."""
    texts = [Column(Text(name), no_wrap=True) for name in columns[1:num_texts]]
    numbers = [Column(Text(name), justify="right", no_wrap=True) for name in columns[num_texts:]]
    first = Column(_text(columns[0]), style="cyan", overflow="fold")
    _print(title, [first, *texts, *numbers], rows, header_style="", collapse_padding=True)


def _print(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], **style: Any) -> None:
    common: Any = {"title_justify": "left", "title_style": "bold", "box": None, "padding": (0, 2)}
    table = Table(*columns, title=_text(title), **common, **style)
    for row in rows:
        table.add_row(*map(_text, row))
    # A pipe or a file has no width; do not wrap what a program may read.
    Console(width=None if Console().is_terminal else 160).print(table)


def _text(text: str) -> Text:
    return Text(printable(text))


def printable(text: str) -> str:
    """Spell out control characters, such as those in untrusted names of a store."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
