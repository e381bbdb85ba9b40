"""A page as HTML. What stores say is text and nothing else: escaped, control characters spelled out."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ntkpipe.base.tables import printable
from ntkpipe.report.parts import Page

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(page: Page) -> str:
    """The page as one HTML document that needs nothing else."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_as_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(page=page).lstrip()


def _as_text(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
