"""The section on ridge regression: which ridge, how good, and whether the test set was needed to know."""

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.figures.regression import Curve, over_ridges
from ntkpipe.report.findings import Chosen, Findings, Missing, choose
from ntkpipe.report.parts import PageTable, Part, Plot, Section
from ntkpipe.report.sections.words import number, ridges_in_words, share, warnings, with_errors
from ntkpipe.report.theme import Quantity, render

_TITLE = "Ridge regression"
_INTRO = (
    "Kernel ridge regression of the stored targets, classes as one-hot columns: f(x) = K(x, X) (K + λI)⁻¹ Y. For "
    "λ → 0 that is where gradient flow of a network in its linear regime ends if its outputs begin at zero; a ridge "
    "does about what stopping early does. Leave-one-out predicts each training sample from all others; generalised "
    "cross-validation (GCV) is its cheap approximation.",
)


def regression_section(found: Findings | Missing) -> Section:
    """Losses and accuracies across ridges."""
    if isinstance(found, Missing):
        return Section("regression", _TITLE, _INTRO, (), found.why)
    chosen, ridges = choose(found), found.array("ridges")
    parts: list[Part] = [_losses(found, ridges, chosen)]
    if np.isfinite(found.array("leave_one_out_accuracy")).any():
        parts.append(_accuracies(found, ridges, chosen))
    parts += warnings(found)
    parts.append(_table(found, ridges))
    missing = (
        "The store has no test set with targets, so there is no test loss; compute the kernel with test_inputs and "
        "test_targets (`ntkpipe run FILE --grow` adds them)."
    )
    is_measured = np.isfinite(found.array("test_loss")).any()
    return Section("regression", _TITLE, _INTRO, tuple(parts), None if is_measured else missing)


def _curves(found: Findings, names: dict[Quantity, tuple[str, str, str | None]]) -> dict[Quantity, Curve]:
    """Those that are known."""
    curves = {}
    for quantity, (label, name, error) in names.items():
        values = found.array(name)
        if np.isfinite(values).any():
            curves[quantity] = Curve(label, values, None if error is None else found.array(error))
    return curves


def _losses(found: Findings, ridges: FloatArray, chosen: Chosen) -> Plot:
    curves = _curves(
        found,
        {
            "test": ("test", "test_loss", None),
            "train": ("training", "train_loss", None),
            "leave-one-out": ("leave-one-out", "leave_one_out_loss", "leave_one_out_loss_error"),
            "gcv": ("GCV", "generalised_cross_validation", "generalised_cross_validation_error"),
        },
    )
    # At λ = 0 it is rounding, which would stretch the axis over decades of nothing.
    if "train" in curves:
        values = curves["train"].values
        curves["train"] = Curve("training", np.where(values > 1e-3 * np.nanmax(values), values, np.nan))
    return Plot(
        "losses",
        "Loss across ridges",
        render(over_ridges(ridges, curves, unit="mean squared error [target units²]", best=chosen.ridge)),
        "Lines of training, leave-one-out, cross-validation and test loss over the ridge; the best ridge by "
        f"{chosen.criterion} is {chosen.ridge:.3g}.",
        (
            "From left to right the fit gets smoother. To the left of the minimum the ridge is too small and noise is "
            "fitted, to the right too much is given up; where the left part is flat, interpolation does no harm. "
            "Training losses below a thousandth of the largest are not drawn.",
            f"The vertical line is the best ridge by {chosen.criterion}, λ = {chosen.ridge:.3g} "
            f"({chosen.ridge / found.number('mean_diagonal'):.2g} of the mean diagonal), chosen without test data. "
            + (f"The test loss there is {number(chosen.test_loss)}." if np.isfinite(chosen.test_loss) else ""),
        ),
    )


def _accuracies(found: Findings, ridges: FloatArray, chosen: Chosen) -> Plot:
    curves = _curves(
        found,
        {
            "test": ("test", "test_accuracy", None),
            "leave-one-out": ("leave-one-out", "leave_one_out_accuracy", "leave_one_out_accuracy_error"),
        },
    )
    left = float(found.array("leave_one_out_accuracy")[chosen.index])
    said = f"At the best ridge {share(left)} of the training samples are right when left out"
    said += f", and {share(chosen.test_accuracy)} of the test samples." if np.isfinite(chosen.test_accuracy) else "."
    return Plot(
        "accuracies",
        "Accuracy across ridges",
        render(over_ridges(ridges, curves, unit="samples right [%]", best=chosen.ridge, is_share=True), height=0.46),
        f"Lines of accuracy over the ridge. {said}",
        (
            "A sample is right if the largest of its predicted outputs is its class.",
            said,
            "Accuracy depends on the ridge less than the loss does: shrinking all outputs alike changes no decision.",
        ),
    )


def _table(found: Findings, ridges: FloatArray) -> PageTable:
    mean = found.number("mean_diagonal")
    losses = {
        "training loss": ("train_loss", None),
        "leave-one-out loss": ("leave_one_out_loss", "leave_one_out_loss_error"),
        "GCV": ("generalised_cross_validation", "generalised_cross_validation_error"),
        "test loss": ("test_loss", None),
        "effective dimension": ("effective_dimension", "effective_dimension_error"),
    }
    cells = [[f"{ridge / mean:.2g}" for ridge in ridges]]
    cells += [with_errors(found, *names) for names in losses.values()]
    columns = ["λ", "λ / mean diagonal", *losses]
    for title, name in (("leave-one-out accuracy", "leave_one_out_accuracy"), ("test accuracy", "test_accuracy")):
        values = found.array(name)
        if np.isfinite(values).any():
            columns.append(title)
            cells.append([share(value) for value in values])
    rows = tuple(zip(ridges_in_words(ridges), *cells, strict=True))
    return PageTable("Regression in numbers", tuple(columns), rows)
