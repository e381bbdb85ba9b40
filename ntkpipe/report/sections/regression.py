"""The section on ridge regression: which ridge, how good, and whether the test set was needed to know."""

from collections.abc import Iterable
from functools import partial

import numpy as np

from ntkpipe.learning.regression.ridge_path import Best, RidgePath
from ntkpipe.report.figures.regression import Curve, known, over_ridges
from ntkpipe.report.gather import CRITERIA, HOW_TO_TEST, Chapter, Gathered, choose
from ntkpipe.report.parts import PageTable, Part, Plot
from ntkpipe.report.sections.words import number, ridges_in_words, share, with_errors

_INTRO = (
    "Kernel ridge regression of the stored targets: f(x) = K(x, X) (K + λI)⁻¹ Y. For λ → 0 that is where gradient flow "
    "of a network in its linear regime ends if its outputs begin at zero; a ridge does about what stopping early does. "
    "Leave-one-out predicts each training sample from all others; generalised cross-validation (GCV) is its cheap "
    "approximation.",
)


def _show(found: RidgePath, _: Gathered) -> tuple[list[Part], str | None]:
    """Losses and accuracies across ridges."""
    best = choose(found)
    parts: list[Part] = [_losses(found, best)]
    if np.isfinite(found.leave_one_out_accuracy).any():
        parts.append(_accuracies(found, best))
    missing = f"The store has no test set with targets, so there is no test loss; {HOW_TO_TEST}"
    return [*parts, _table(found)], None if np.isfinite(found.test_loss).any() else missing


REGRESSION = Chapter("regression", "Ridge regression", _INTRO, _show)


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


def _table(found: RidgePath) -> PageTable:
    cross, error = found.generalised_cross_validation, found.generalised_cross_validation_error
    columns: dict[str, Iterable[str]] = {
        "λ": ridges_in_words(found.ridges),
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
