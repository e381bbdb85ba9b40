"""The figure of where time went."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ntkpipe.report.figures.axes import linear
from ntkpipe.report.theme import Draw, Look


def bars(parts: Sequence[tuple[str, float]]) -> Draw:
    """Seconds of each part, from above."""

    def draw(figure: Figure, look: Look) -> None:
        axes = figure.add_subplot()
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

    return draw
