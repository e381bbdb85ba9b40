"""The section on ridge regression: which ridge, how good, and whether the test set was needed to know."""

from collections.abc import Iterable
from functools import partial

import numpy as np

from ntkpipe.learning.regression.ridge_path import RidgePath
from ntkpipe.report.figures.regression import Curve, known, over_ridges
from ntkpipe.report.findings import HOW_TO_TEST, Chosen, Missing, choose
from ntkpipe.report.parts import PageTable, Part, Plot, Section
from ntkpipe.report.sections.words import number, ridges_in_words, share, taken_as, warnings, with_errors
from ntkpipe.report.theme import render

_TITLE = "Ridge regression"
_INTRO = (
    "Kernel ridge regression of the stored targets: f(x) = K(x, X) (K + λI)⁻¹ Y. For λ → 0 that is where gradient flow "
    "of a network in its linear regime ends if its outputs begin at zero; a ridge does about what stopping early does. "
    "Leave-one-out predicts each training sample from all others; generalised cross-validation (GCV) is its cheap "
    "approximation.",
)


def regression_section(found: RidgePath | Missing) -> Section:
    """Losses and accuracies across ridges."""
    if isinstance(found, Missing):
        return Section("regression", _TITLE, _INTRO, (), found.why)
    chosen = choose(found)
    parts: list[Part] = [_losses(found, chosen)]
    if np.isfinite(found.leave_one_out_accuracy).any():
        parts.append(_accuracies(found, chosen))
    parts += warnings(found)
    parts.append(_table(found))
    missing = f"The store has no test set with targets, so there is no test loss; {HOW_TO_TEST}"
    is_measured, intro = np.isfinite(found.test_loss).any(), _INTRO + taken_as(found.targets)
    return Section("regression", _TITLE, intro, tuple(parts), None if is_measured else missing)


def _losses(found: RidgePath, chosen: Chosen) -> Plot:
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
    return Plot(
        "losses",
        "Loss across ridges",
        render(partial(over_ridges, ridges=found.ridges, curves=curves, marked={"best ridge": chosen.ridge})),
        "Lines of training, leave-one-out, cross-validation and test loss over the ridge; the best ridge by "
        f"{chosen.criterion} is {chosen.ridge:.3g}.",
        (
            "From left to right the fit gets smoother. To the left of the minimum the ridge is too small and noise is "
            "fitted, to the right too much is given up; where the left part is flat, interpolation does no harm. "
            "Training losses below a thousandth of the largest are not drawn.",
            f"The vertical line is the best ridge by {chosen.criterion}, λ = {chosen.ridge:.3g} "
            f"({chosen.ridge / found.mean_diagonal:.2g} of the mean diagonal), chosen without test data. "
            + (f"The test loss there is {number(chosen.test_loss)}." if np.isfinite(chosen.test_loss) else ""),
        ),
    )


def _accuracies(found: RidgePath, chosen: Chosen) -> Plot:
    left_out = Curve("leave-one-out", found.leave_one_out_accuracy, found.leave_one_out_accuracy_error)
    curves = known({"test": Curve("test", found.test_accuracy), "leave-one-out": left_out})
    left = float(found.leave_one_out_accuracy[chosen.index])
    marked = {"best ridge": chosen.ridge}
    draw = partial(over_ridges, ridges=found.ridges, curves=curves, marked=marked, is_share=True)
    said = f"At the best ridge {share(left)} of the training samples are right when left out"
    said += f", and {share(chosen.test_accuracy)} of the test samples." if np.isfinite(chosen.test_accuracy) else "."
    return Plot(
        "accuracies",
        "Accuracy across ridges",
        render(draw, height=0.46),
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
