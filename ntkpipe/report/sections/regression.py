"""The sections on ridge regression: which ridge, how good, and whether the test set was needed to know."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from ntkpipe.analysis.generalisation import Generalisation
from ntkpipe.base.arrays import FloatArray
from ntkpipe.learning.regression.ridge_path import Best, RidgePath
from ntkpipe.report.gather import CRITERIA, HOW_TO_TEST, Chapter, Gathered, choose
from ntkpipe.report.parts import PageTable, Part, Plot, number, ranges, share, with_errors
from ntkpipe.report.theme import COLOURS, Quantity, label, line, linear, logarithmic

_OF_REGRESSION = (
    "Kernel ridge regression of the stored targets: f(x) = K(x, X) (K + λI)⁻¹ Y. For λ → 0 that is where gradient flow "
    "of a network in its linear regime ends if its outputs begin at zero; a ridge does about what stopping early does. "
    "Leave-one-out predicts each training sample from all others; generalised cross-validation (GCV) is its cheap "
    "approximation.",
)


def _show_regression(found: RidgePath, _: Gathered) -> tuple[list[Part], str | None]:
    """Losses and accuracies across ridges."""
    best = choose(found)
    parts: list[Part] = [_losses(found, best)]
    if np.isfinite(found.leave_one_out_accuracy).any():
        parts.append(_accuracies(found, best))
    missing = f"The store has no test set with targets, so there is no test loss; {HOW_TO_TEST}"
    return [*parts, _regression_table(found)], None if np.isfinite(found.test_loss).any() else missing


REGRESSION = Chapter("regression", "Ridge regression", _OF_REGRESSION, _show_regression)


def _losses(found: RidgePath, best: Best) -> Plot:
    train = found.train_loss
    # At λ = 0 it is rounding, which would stretch the axis over decades of nothing.
    if np.isfinite(train).any():
        train = np.where(train > 1e-3 * np.nanmax(train), train, np.nan)
    cross = found.generalised_cross_validation
    curves = known(
        {
            "test": Curve("test", found.test_loss),
            "train": Curve("training", train),
            "leave-one-out": Curve("leave-one-out", found.leave_one_out_loss, found.leave_one_out_loss_error),
            "gcv": Curve("GCV", cross, found.generalised_cross_validation_error),
        }
    )
    criterion, test_loss = CRITERIA[best.criterion], found.test_loss[best.index]
    return Plot(
        "losses",
        "Loss across ridges",
        partial(over_ridges, ridges=found.ridges, curves=curves, marked=("best ridge", best.ridge)),
        "Lines of training, leave-one-out, cross-validation and test loss over the ridge; the best ridge by "
        f"{criterion} is {best.ridge:.3g}.",
        (
            "From left to right the fit gets smoother. To the left of the minimum the ridge is too small and noise is "
            "fitted, to the right too much is given up; where the left part is flat, interpolation does no harm. "
            "Training losses below a thousandth of the largest are not drawn.",
            f"The vertical line is the best ridge by {criterion}, λ = {best.ridge:.3g} "
            f"({best.ridge / found.mean_diagonal:.2g} of the mean diagonal), chosen without test data. "
            + (f"The test loss there is {number(test_loss)}." if np.isfinite(test_loss) else ""),
        ),
    )


def _accuracies(found: RidgePath, best: Best) -> Plot:
    left_out = Curve("leave-one-out", found.leave_one_out_accuracy, found.leave_one_out_accuracy_error)
    curves = known({"test": Curve("test", found.test_accuracy), "leave-one-out": left_out})
    left, right = found.leave_one_out_accuracy[best.index], found.test_accuracy[best.index]
    marked = ("best ridge", best.ridge)
    said = f"At the best ridge {share(left)} of the training samples are right when left out"
    said += f", and {share(right)} of the test samples." if np.isfinite(right) else "."
    return Plot(
        "accuracies",
        "Accuracy across ridges",
        partial(over_ridges, ridges=found.ridges, curves=curves, marked=marked, unit="share"),
        f"Lines of accuracy over the ridge. {said}",
        (
            "A sample is right if the class that its outputs predict is its own.",
            said,
            "Accuracy depends on the ridge less than the loss does: shrinking all outputs alike changes no decision.",
        ),
    )


def _regression_table(found: RidgePath) -> PageTable:
    cross, error = found.generalised_cross_validation, found.generalised_cross_validation_error
    columns: dict[str, Iterable[str]] = {
        "λ": (f"{ridge:.3g}" for ridge in found.ridges),
        "λ / mean diagonal": (f"{ridge / found.mean_diagonal:.2g}" for ridge in found.ridges),
        "training loss": map(number, found.train_loss),
        "leave-one-out loss": with_errors(found.leave_one_out_loss, found.leave_one_out_loss_error),
        "GCV": with_errors(cross, error),
        "test loss": map(number, found.test_loss),
        "effective dimension": with_errors(found.effective_dimension, found.effective_dimension_error),
    }
    accuracies = {"leave-one-out accuracy": found.leave_one_out_accuracy, "test accuracy": found.test_accuracy}
    columns |= {title: map(share, values) for title, values in accuracies.items() if np.isfinite(values).any()}
    return PageTable("Regression in numbers", tuple(columns), tuple(zip(*columns.values(), strict=True)))


@dataclass(frozen=True)
class Curve:
    """A quantity over ridges."""

    label: str  # in the legend
    values: FloatArray  # one a ridge; NaN where there is none
    errors: FloatArray | None = None  # standard errors, where values are estimates


Curves = Mapping[Quantity, Curve]
Unit = Literal["loss", "share", "ratio"]
_UNITS: dict[Unit, str] = {
    "loss": "mean squared error [target units²]",
    "share": "samples right [%]",
    "ratio": "estimate / measured [ratio]",
}


def known(curves: Curves) -> dict[Quantity, Curve]:
    """Curves that have values."""
    return {quantity: curve for quantity, curve in curves.items() if np.isfinite(curve.values).any()}


def over_ridges(axes: Axes, ridges: FloatArray, curves: Curves, marked: tuple[str, float], unit: Unit = "loss") -> None:
    """Losses, shares in percent, or ratios to what was measured, over ridges; a vertical line marks one of these."""
    places = _drawn(ridges)
    factor = 100 if unit == "share" else 1
    if unit == "ratio":
        axes.axhspan(0.8, 1.25, color=COLOURS["line"], alpha=0.6, linewidth=0, label="within a factor of 1.25")
        axes.axhline(1.0, **line("reference"))
    for quantity, curve in curves.items():
        (drawn,) = axes.plot(places, factor * curve.values, label=curve.label, **line(quantity, len(places)))
        if curve.errors is not None and np.isfinite(curve.errors).any():
            low, high = curve.values - curve.errors, curve.values + curve.errors
            low = np.maximum(low, curve.values / 1e3) if unit == "loss" else low
            axes.fill_between(places, factor * low, factor * high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    name, ridge = marked
    place = _drawn(np.append(ridges, ridge))[-1]
    axes.axvline(place, label=name, **line("reference", linestyle=":", linewidth=1.2))
    logarithmic(axes, "xy" if unit == "loss" else "x")
    if unit != "loss":
        linear(axes, "y")
    label(axes, "ridge λ [kernel units]" + ("; leftmost: λ = 0" if (ridges == 0).any() else ""), _UNITS[unit])


def _drawn(ridges: FloatArray) -> FloatArray:
    """Where ridges are on a logarithmic axis: zero one decade below the others."""
    positive = ridges[ridges > 0]
    return np.where(ridges > 0, ridges, positive.min() / 10 if len(positive) else 1.0)


_OF_GENERALISATION = (
    "Can the test loss be known from the training samples alone? KARE (Jacot et al. 2020, arXiv 2006.09796) and "
    "generalised cross-validation need the training kernel and targets; for λ > 0 they are the same number. "
    "Eigenlearning (Simon et al., arXiv 2110.03922) and Canatar et al. (arXiv 2006.13198) predict the loss from the "
    "spectrum and the targets along eigenvectors; here these are the training kernel's own, which is biased where many "
    "modes are learnt. Leave-one-out is exact for these samples, and so judges the others without test data; only a "
    "kernel that was itself trained on these samples makes it too optimistic.",
)

_MARK = "mean diagonal of K"
_HEIGHT = 0.92  # of figures with long legends


def _show_generalisation(found: Generalisation, gathered: Gathered) -> tuple[list[Part], str | None]:
    """Estimates across ridges, and what they are worth."""
    mean_diagonal = float(gathered.kernel.diagonal().astype(np.float64).mean())
    curves = known(
        {
            "test": Curve("test loss, measured", found.test_loss, found.test_loss_error),
            "leave-one-out": Curve("leave-one-out", found.leave_one_out_loss, found.leave_one_out_loss_error),
            "gcv": Curve("KARE = cross-validation (GCV)", found.kare, found.kare_error),
            "eigenlearning": Curve("eigenlearning, Canatar et al.", found.eigenlearning),
        }
    )
    is_measured = "test" in curves
    parts: list[Part] = [_estimates(found, curves, mean_diagonal)]
    if is_measured:
        compared: Curves = {
            name: Curve(curve.label, curve.values / found.test_loss) for name, curve in curves.items() if name != "test"
        }
        parts.append(_ratios(found, compared, mean_diagonal))
    missing = f"The store has no test set with targets, so nothing is measured here; {HOW_TO_TEST}"
    return [*parts, _estimates_table(found)], None if is_measured else missing


GENERALISATION = Chapter("generalisation", "Predicted against measured risk", _OF_GENERALISATION, _show_generalisation)


def _estimates(found: Generalisation, curves: Curves, mean_diagonal: float) -> Plot:
    ridges = found.ridges
    flags = (found.kare_is_trusted, found.eigenlearning_is_trusted)
    trusted, also = (ranges(ridges.tolist(), one) or "none of these ridges" for one in flags)
    how = f"streamed, since {found.why}" if found.method == "streamed" else "exactly, in memory"
    return Plot(
        "estimates",
        "Loss across ridges, predicted and measured",
        partial(over_ridges, ridges=ridges, curves=curves, marked=(_MARK, mean_diagonal)),
        f"Lines of the loss over the ridge: {_in_words(curves)}.",
        (
            "Each line is one way to say what the loss on new samples is. Lines that lie on the measured one (circles) "
            "can replace a test set; one that falls below it for small λ promises too much there.",
            "Judged by leave-one-out, the measured loss where there is one, and the storage floor, KARE can be trusted "
            f"for {trusted}, eigenlearning for {also}.",
            f"Shaded: one standard error. Computed: {how}.",
        ),
        _HEIGHT,
    )


def _ratios(found: Generalisation, curves: Curves, mean_diagonal: float) -> Plot:
    ridges, kare = found.ridges, found.kare / found.test_loss
    # In logarithms; zero is far from everything.
    distances = np.abs(np.log(np.maximum(ridges, 1e-300) / max(mean_diagonal, 1e-300)))
    smallest, nearest = int(np.argmin(ridges)), int(np.argmin(distances))
    return Plot(
        "ratios",
        "Estimate over measured test loss",
        partial(over_ridges, ridges=ridges, curves=curves, marked=(_MARK, mean_diagonal), unit="ratio"),
        f"Lines of the ratio of each estimate to the measured test loss over the ridge: {_in_words(curves)}.",
        (
            "One is right; below it an estimate is too optimistic. Inside of the grey band it is right within a factor "
            "of 1.25.",
            f"KARE is {number(kare[smallest], 3)} of the measured loss at λ = {ridges[smallest]:.3g}, and "
            f"{number(kare[nearest], 3)} at λ = {ridges[nearest]:.3g}, the nearest to the mean diagonal of K.",
            "KARE rests on features that look Gaussian to the kernel. Real samples are unlike each other, which shows "
            "most where nothing smooths, at λ → 0.",
        ),
        _HEIGHT,
    )


def _in_words(curves: Curves) -> str:
    """Each curve with its first and its last value."""
    finite = {curve.label: curve.values[np.isfinite(curve.values)] for curve in curves.values()}
    ends = {name: f"{number(v[0], 3)} to {number(v[-1], 3)}" if len(v) else "nothing" for name, v in finite.items()}
    return "; ".join(f"{name} from {said}" for name, said in ends.items())


def _estimates_table(found: Generalisation) -> PageTable:
    columns: dict[str, Iterable[str]] = {
        "λ": (f"{ridge:.3g}" for ridge in found.ridges),
        "test loss": with_errors(found.test_loss, found.test_loss_error),
        "KARE": with_errors(found.kare, found.kare_error),
        "GCV": map(number, found.generalised_cross_validation),
        "leave-one-out": with_errors(found.leave_one_out_loss, found.leave_one_out_loss_error),
        "eigenlearning": map(number, found.eigenlearning),
        "Canatar et al.": map(number, found.canatar),
        "effective dimension": with_errors(found.effective_dimension, found.effective_dimension_error),
        "trust": found.reasons,
    }
    rows = tuple(zip(*columns.values(), strict=True))
    return PageTable("Numbers behind these figures", tuple(columns), rows, is_folded=True)
