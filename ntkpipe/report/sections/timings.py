"""The section on where time went, and its figure."""

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from ntkpipe.report.figures.axes import linear
from ntkpipe.report.parts import PageTable, Plot, Section
from ntkpipe.report.theme import Look, render


def timings_section(runs: PageTable | None, parts: Sequence[tuple[str, float]]) -> Section:
    """Runs of the kernel, and seconds of every part."""
    longest = max(parts, key=lambda part: part[1])
    plot = Plot(
        "time",
        "Wall time of each part",
        render(partial(bars, parts=parts), height=max(0.22, 0.12 + 0.05 * len(parts))),
        "Bars of wall time: " + "; ".join(f"{name} {seconds:.3g} s" for name, seconds in parts) + ".",
        (
            f"Wall time of the kernel itself and of each analysis on this page; {longest[0]} took longest. What an "
            "earlier step had saved is shown with the time that it took then.",
        ),
    )
    missing = "No run is recorded in this store (it was derived, or results were deleted); ntkpipe run records each."
    return Section("timings", "Timings", (), (plot, runs) if runs else (plot,), None if runs else missing)


def bars(axes: Axes, look: Look, parts: Sequence[tuple[str, float]]) -> None:
    """Seconds of each part, from above."""
    names, seconds = [name for name, _ in parts], [value for _, value in parts]
    drawn = axes.barh(range(len(parts)), seconds, color=look.colour("blue"), height=0.62)
    axes.bar_label(drawn, [f"{value:.3g} s" for value in seconds], padding=4, color=look.ink, fontsize=8)
    axes.set_yticks(range(len(parts)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    linear(axes, look, "x")
    axes.set_xlim(0, 1.18 * max(max(seconds), 1e-9))
    axes.set_xlabel("wall time [s]")
