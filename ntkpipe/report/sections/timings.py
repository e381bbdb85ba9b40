"""The section on where time went."""

from collections.abc import Sequence

from ntkpipe.report.figures.timings import bars
from ntkpipe.report.parts import PageTable, Plot, Section
from ntkpipe.report.theme import render


def timings_section(runs: PageTable | None, parts: Sequence[tuple[str, float]]) -> Section:
    """Runs of the kernel, and seconds of every part."""
    found: list[Plot | PageTable] = []
    if parts:
        longest = max(parts, key=lambda part: part[1])
        found.append(
            Plot(
                "time",
                "Wall time of each part",
                render(bars(parts), height=max(0.22, 0.12 + 0.05 * len(parts))),
                "Bars of wall time: " + "; ".join(f"{name} {seconds:.3g} s" for name, seconds in parts) + ".",
                (
                    f"Wall time of the kernel itself and of each analysis on this page; {longest[0]} took longest. "
                    "What an earlier step had saved is shown with the time that it took then.",
                ),
            )
        )
    if runs is not None:
        found.append(runs)
    missing = None
    if runs is None:
        missing = (
            "No run is recorded in this store (it was derived, or results were deleted); ntkpipe run records each."
        )
    return Section("timings", "Timings", (), tuple(found), missing)
