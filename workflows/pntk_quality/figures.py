"""The figures of the study: quantities against the width, a column for each network."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import claims
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers tell apart; markers say the same.
STYLES = {
    "init": {"color": "#0072B2", "marker": "o", "label": "at initialisation"},
    "trained": {"color": "#D55E00", "marker": "s", "label": "trained"},
}
NAMES = {
    "mlp": ("fully connected, 3 hidden layers", "width [units]"),
    "convnet": ("ConvNet, 3 layers", "width [channels]"),
}
_SIZE = (4.4, 2.9)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write every figure as SVG and PNG."""
    made = {"frobenius": _frobenius(rows), "spectrum": _spectrum(rows), "regression": _regression(rows)}
    paths = []
    for name, figure in made.items():
        for ending in ("svg", "png"):
            paths.append(folder / f"{name}.{ending}")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _panels(rows: Sequence[Row], count: int) -> tuple[Figure, list[tuple[str, list[Axes]]]]:
    """A figure with ``count`` panels for each network, one below the other."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "pntk"})
    figure = Figure(figsize=(_SIZE[0] * len(networks), _SIZE[1] * count + 0.4), layout="constrained")
    axes = np.asarray(figure.subplots(count, len(networks), squeeze=False, sharex="col", sharey="row"))
    for column, network in enumerate(networks):
        title, label = NAMES[network]
        axes[0, column].set_title(title)
        axes[-1, column].set_xlabel(label)
        widths = sorted({row["width"] for row in rows if row["network"] == network})
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(widths, [str(width) for width in widths])
            axis.minorticks_off()
    return figure, [(network, list(axes[:, column])) for column, network in enumerate(networks)]


def _lines(axis: Axes, rows: Sequence[Row], network: str, quantity: claims.Quantity) -> None:
    """Means over seeds as lines, and each seed as a point."""
    for state, style in STYLES.items():
        curve = claims.curve_of(rows, network, state, quantity)
        if len(curve.widths):
            axis.plot(curve.widths, curve.means, **style)
            points = np.repeat(curve.widths, curve.values.shape[1])
            axis.plot(points, curve.values.ravel(), ".", color=style["color"], alpha=0.4, markersize=4)


def _frobenius(rows: Sequence[Row]) -> Figure:
    figure, columns = _panels(rows, 1)
    for network, (axis,) in columns:
        quantity = claims.plain("relative_difference")
        _lines(axis, rows, network, quantity)
        curve = claims.curve_of(rows, network, "init", quantity)
        if len(curve.widths):
            guide = curve.means[0] * np.sqrt(curve.widths[0] / curve.widths)
            axis.plot(curve.widths, guide, "--", color="0.4", label="∝ width$^{-1/2}$")
    _log_of_few_decades([axes[0] for _, axes in columns])
    columns[0][1][0].set_ylabel("‖P ⊗ I − Θ‖$_F$ / ‖Θ‖$_F$")
    return _legend(figure, columns[0][1][0])


def _spectrum(rows: Sequence[Row]) -> Figure:
    names = {
        "largest_eigenvalue_ratio": "λ$_{max}$ of P / λ$_{max}$ of Θ",
        "smallest_eigenvalue_ratio": "λ$_{min}$ of P / λ$_{min}$ of Θ",
        "condition_number_ratio": "κ of P / κ of Θ",
    }
    figure, columns = _panels(rows, len(names))
    for network, axes in columns:
        for axis, name in zip(axes, names, strict=True):
            _lines(axis, rows, network, claims.plain(name))
            axis.axhline(1.0, color="0.4", linestyle=":", linewidth=1)
            axis.set_yscale("log")
    _label_rows(columns, list(names.values()))
    return _legend(figure, columns[0][1][0])


def _regression(rows: Sequence[Row]) -> Figure:
    figure, columns = _panels(rows, 4)
    difference = "‖F$_P$ − F$_Θ$‖ / ‖F$_Θ$‖"
    for network, axes in columns:
        for axis, suffix in zip(axes[:2], ("", "_ridge"), strict=True):
            _lines(axis, rows, network, claims.plain(f"prediction_difference{suffix}"))
        for axis, suffix in zip(axes[2:], ("", "_ridge"), strict=True):
            _accuracies(axis, rows, network, suffix)
    for row in range(2):
        _log_of_few_decades([axes[row] for _, axes in columns])
    ridge = "λ = 10$^{-3}$ mean K$_{ii}$"
    labels = [
        f"{difference}\nλ = 0",
        f"{difference}\n{ridge}",
        "test accuracy [%]\nλ = 0",
        f"test accuracy [%]\n{ridge}",
    ]
    _label_rows(columns, labels)
    return _legend(figure, columns[0][1][2])


def _accuracies(axis: Axes, rows: Sequence[Row], network: str, suffix: str) -> None:
    for state, style in STYLES.items():
        for kernel, line, name in (("pntk", "-", "pNTK"), ("ntk", "--", "full NTK")):
            curve = claims.curve_of(rows, network, state, _percent(f"test_accuracy_{kernel}{suffix}"))
            if len(curve.widths):
                filling = style["color"] if kernel == "pntk" else "white"
                label = f"{name}, {style['label']}"
                axis.plot(
                    curve.widths, curve.means, **{**style, "label": label}, linestyle=line, markerfacecolor=filling
                )


def _log_of_few_decades(axes: Sequence[Axes]) -> None:
    """Logarithmic axes of one row of panels, whose few ticks are written out."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for axis in axes for line in axis.lines])
    for axis in axes:
        axis.set_yscale("log")
        axis.set_yticks([digit * 10.0**power for power in range(-3, 1) for digit in (1, 2, 5)])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(0.8 * values.min(), 1.25 * values.max())


def _percent(name: str) -> Callable[[Row], float]:
    return lambda row: 100 * row[name]


def _label_rows(columns: Sequence[tuple[str, list[Axes]]], labels: Sequence[str]) -> None:
    for axis, label in zip(columns[0][1], labels, strict=True):
        axis.set_ylabel(label)


def _legend(figure: Figure, axis: Axes) -> Figure:
    """One legend below the panels, from the lines of one of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure
