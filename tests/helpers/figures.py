"""Every figure of a report with numbers that are awkward to draw, and the texts that it shows with their places."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ntkpipe.report.gather import Arrangement
from ntkpipe.report.parts import Draw
from ntkpipe.report.provenance import bars
from ntkpipe.report.sections import gaussian, kernel, regression, spectrum
from ntkpipe.report.theme import SETTINGS, draw_figure

RIDGES = np.concatenate([[0.0], np.geomspace(1e-9, 1e5, 15)])


def _curve(label: str, low: float, high: float) -> regression.Curve:
    return regression.Curve(label, np.geomspace(low, high, 16), np.full(16, low / 3))


def _four(low: float, high: float) -> dict[str, regression.Curve]:
    names = {"test": "test loss, measured", "train": "training", "leave-one-out": "leave-one-out", "gcv": "KARE = GCV"}
    return {quantity: _curve(label, low, high) for quantity, label in names.items()}


def _over_ridges(low: float, high: float, ridge: float, unit: regression.Unit = "loss") -> Draw:
    marked = ("best ridge", ridge)
    return partial(regression.over_ridges, ridges=RIDGES, curves=_four(low, high), marked=marked, unit=unit)


def _coverage() -> Draw:
    nominal, scaled, plain = (np.linspace(low, 1, 11) for low in (0.1, 0.01, 0.9))
    return partial(gaussian.coverage, nominal=nominal, scaled=scaled, plain=plain)


def _reliability() -> Draw:
    places, shares = np.linspace(0.05, 0.95, 10), np.linspace(0, 1, 10)
    return partial(gaussian.reliability, confidence=places, accuracy=shares, counts=np.arange(10.0))


def _spectrum(count: int, low: float) -> Draw:
    values = np.geomspace(2e4, low, count)
    tail = {"tail_exponent": 1.234, "tail_exponent_error": 0.0123, "tail_prefactor": 1e4}
    ranks = {"tail_first_rank": 10, "tail_last_rank": max(11, count // 4)}
    found = SimpleNamespace(eigenvalues=values, num_rows=count, floor=low, **tail, **ranks)
    return partial(spectrum.eigenvalues, found=found)


def _density(scale: float, low: float, high: float) -> Draw:
    places = np.geomspace(low, high, 200)
    heights = scale * np.exp(-(np.linspace(-3, 3, 200) ** 2))
    found = SimpleNamespace(density_grid=places, density=heights, floor=low / 10, method="streamed")
    return partial(spectrum.density, found=found)


def _power(count: int, share: np.ndarray | None) -> Draw:
    return partial(spectrum.cumulative, power=np.linspace(0.1, 1, count), share=share)


def _picture(names: list[str], num_samples: int, scale: float) -> Draw:
    means = scale * np.random.default_rng(0).random((30, 30))
    bounds = tuple(np.linspace(0, num_samples, len(names) + 1).astype(int)[1:-1])
    bins = np.zeros(num_samples, np.int64)
    arrangement = Arrangement(bins, None, tuple(names), bounds, "sorted by class")
    return partial(kernel.picture, means=means, arrangement=arrangement)


def _class_means(count: int, scale: float, name: str = "") -> Draw:
    means = scale * np.random.default_rng(0).random((count, count))
    return partial(kernel.class_means, means=means, names=[f"{name}{i}" for i in range(count)])


_BARS = ["kernel, all runs", "self-checks before", "all eigenpairs", "gaussian process", "generalisation", "regression"]

FIGURES: dict[str, tuple[Callable[[], Draw], float]] = {
    "spectrum of thousands": (lambda: _spectrum(4000, 1e-5), 0.8),
    "spectrum of a few": (lambda: _spectrum(5, 1.0), 0.8),
    "spectrum over many decades": (lambda: _spectrum(100_000, 1e-30), 0.8),
    "density": (lambda: _density(4000.0, 1e-8, 1e6), 0.8),
    "density of millions": (lambda: _density(3e6, 0.1, 0.2), 0.8),
    "power": (lambda: _power(4000, np.linspace(0.5, 1, 4000)), 0.8),
    "power of a few": (lambda: _power(3, None), 0.8),
    "losses": (lambda: _over_ridges(1e-7, 1.0, 1.0), 0.8),
    "losses within a decade": (lambda: _over_ridges(0.011, 0.019, 0.0), 0.8),
    "accuracies": (lambda: _over_ridges(0.951, 0.957, 1.0, "share"), 0.8),
    "ratios": (lambda: _over_ridges(0.01, 1.3, 9.0, "ratio"), 0.92),
    "coverage": (_coverage, 0.8),
    "reliability": (_reliability, 0.8),
    "picture by class": (lambda: _picture([str(i) for i in range(10)], 4000, 5.0), 1.16),
    "picture of many classes": (lambda: _picture([str(i) for i in range(100)], 60_000, 5e7), 1.16),
    "picture of small entries": (lambda: _picture([], 7, 1e-9), 1.16),
    "class means": (lambda: _class_means(10, 1e4), 1.16),
    "means of classes with long names": (lambda: _class_means(12, 1.0, "a very long name of class "), 1.16),
    "means of classes with names": (lambda: _class_means(4, 1.0, "aircraft"), 1.16),
    "means of many classes": (lambda: _class_means(100, 1e-6), 1.16),
    "means of two classes": (lambda: _class_means(2, 1.0), 1.16),
    "time": (lambda: partial(bars, parts=[(name, 10.0**place) for place, name in enumerate(_BARS)]), 0.65),
    "time of one part": (lambda: partial(bars, parts=[("kernel, all runs", 0.0)]), 0.275),
}


def drawn(name: str) -> Figure:
    """A figure, laid out."""
    make, height = FIGURES[name]
    with mpl.rc_context(SETTINGS):
        figure = draw_figure(make(), height)
        FigureCanvasAgg(figure).draw()
    return figure


def texts(figure: Figure) -> Iterator[tuple[str, Bbox]]:
    """Every text that is seen, with its place in pixels."""
    found: list[Text] = []
    for axes in figure.axes:
        found += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        found += [label for axis in (axes.xaxis, axes.yaxis) for label in tick_labels(axis)]
        found += [axis.get_offset_text() for axis in (axes.xaxis, axes.yaxis)]
    found += [text for legend in figure.legends for text in legend.get_texts()]
    for text in found:
        if text.get_visible() and text.get_text():
            yield text.get_text(), text.get_window_extent()


def tick_labels(axis: Axis) -> Iterator[Text]:
    low, high = sorted(axis.get_view_interval())
    for tick in axis.get_major_ticks():
        if low - 1e-12 <= tick.get_loc() <= high + 1e-12:
            yield tick.label1
