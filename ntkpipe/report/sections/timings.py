"""The section on where time went, and its figure."""

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from ntkpipe.report.figures.axes import linear
from ntkpipe.report.parts import PageTable, Plot, Section
from ntkpipe.report.theme import COLOURS


def timings_section(runs: PageTable | None, parts: Sequence[tuple[str, float]]) -> Section:
    """Runs of the kernel, and seconds of every part."""
    longest = max(parts, key=lambda part: part[1])
    plot = Plot(
        "time",
        "Wall time of each part",
        partial(bars, parts=parts),
        "Bars of wall time: " + "; ".join(f"{name} {seconds:.3g} s" for name, seconds in parts) + ".",
        (
            f"Wall time of the kernel itself and of each analysis on this page; {longest[0]} took longest. What an "
            "earlier step had saved is shown with the time that it took then.",
        ),
        0.2 + 0.075 * len(parts),
    )
    missing = "No run is recorded in this store (it was derived, or results were deleted); ntkpipe run records each."
    return Section("timings", "Timings", (), (plot, runs) if runs else (plot,), None if runs else missing)


def bars(axes: Axes, parts: Sequence[tuple[str, float]]) -> None:
    """Seconds of each part, from above."""
    names, seconds = [name for name, _ in parts], [value for _, value in parts]
    drawn = axes.barh(range(len(parts)), seconds, color=COLOURS["blue"], height=0.62)
    axes.bar_label(drawn, [f"{value:.3g} s" for value in seconds], padding=4, color=COLOURS["ink"])
    axes.set_yticks(range(len(parts)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    linear(axes, "x")
    axes.set_xlim(0, 1.18 * max(max(seconds), 1e-9))
    axes.set_xlabel("wall time [s]")
