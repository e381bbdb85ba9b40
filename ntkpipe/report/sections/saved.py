"""Sections on results that steps have saved and that have no section of their own."""

from ntkpipe.report.parts import PageTable, Section
from ntkpipe.solvers.result import Result
from ntkpipe.steps.registry import REGISTRY


def saved_section(name: str, found: Result) -> Section:
    """What a result prints."""
    summary = REGISTRY[name].summary
    intro = f"{summary[:1].upper()}{summary[1:]}."
    rows = PageTable("As a step has saved it", (), tuple(found.rows()))
    return Section(f"saved-{name.replace('_', '-')}", f"Result of {name}", (intro,), (rows,))
