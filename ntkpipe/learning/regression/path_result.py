"""What a path of ridges has found: losses, cross-validation, and which ridge is best."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError
from ntkpipe.solvers.result import Result, Rows

Criterion = Literal[
    "leave_one_out_loss", "leave_one_out_accuracy", "generalised_cross_validation", "test_loss", "test_accuracy"
]


@dataclass(frozen=True, kw_only=True)
class Best:
    """One ridge of a path."""

    criterion: str  # by which it is best
    index: int  # in the arrays of the path
    ridge: float  # λ, absolute
    value: float  # of the criterion


@dataclass(frozen=True, kw_only=True)
class RidgePath(Result):
    """Kernel ridge regression at R ridges. Arrays have an entry a ridge, in the order of ``ridges``.

    Losses are mean squared errors over samples and outputs. An ``_error`` is one standard error of a number that was
    estimated from some of the samples, zero where it is exact.

    Attributes
    ----------
    ridges
        λ, absolute.
    mean_diagonal
        Of K: ridges are also printed in these.
    method, why
        ``eigh``, ``cholesky`` or ``streamed``, and why.
    train_loss, train_accuracy
        On the training set; accuracies are NaN if targets are no classes.
    effective_dimension, effective_dimension_error
        ``tr K (K + λI)^-1``, the degrees of freedom of the fit.
    generalised_cross_validation, generalised_cross_validation_error
        V(λ) of Golub, Heath and Wahba.
    leave_one_out_loss, leave_one_out_loss_error, leave_one_out_accuracy, leave_one_out_accuracy_error
        Each sample, with all of its rows, predicted from all others.
    num_left_out
        Samples that this was done for; all N where it is exact.
    test_loss, test_accuracy
        On the test set; NaN without one.
    norm
        ``tr A'K A``, the squared norm of the fit in the space of the kernel.
    residuals
        Largest relative true residual of the systems; zero for ``eigh``.
    statuses
        Of each ridge.
    is_classification
        Whether targets are labels of classes.
    floor
        Size of what rounding to the storage dtype did to K. Nothing is known of ridges below it.
    """

    ridges: FloatArray
    mean_diagonal: float
    method: str
    why: str
    train_loss: FloatArray
    train_accuracy: FloatArray
    effective_dimension: FloatArray
    effective_dimension_error: FloatArray
    generalised_cross_validation: FloatArray
    generalised_cross_validation_error: FloatArray
    leave_one_out_loss: FloatArray
    leave_one_out_loss_error: FloatArray
    leave_one_out_accuracy: FloatArray
    leave_one_out_accuracy_error: FloatArray
    num_left_out: int
    test_loss: FloatArray
    test_accuracy: FloatArray
    norm: FloatArray
    residuals: FloatArray
    statuses: tuple[str, ...]
    is_classification: bool
    floor: float = field(repr=False)

    @property
    def best(self) -> Best:
        """By ``leave_one_out_loss``, which uses no test data; see :meth:`best_by`."""
        return self.best_by("leave_one_out_loss")

    def best_by(self, criterion: Criterion) -> Best:
        """The ridge with the smallest loss or largest accuracy; of equal ones the largest ridge.

        Ridges whose systems were not solved do not take part, unless none was.
        """
        if criterion not in get_args(Criterion):
            raise ConfigError(f"criterion={criterion!r}; needed one of {', '.join(get_args(Criterion))}")
        values = np.asarray(getattr(self, criterion), np.float64)
        known = np.isfinite(values)
        if not known.any():
            raise ConfigError(f"{criterion} is not known: it takes classes, or test_kernel and test_targets")
        solved = known & np.array([status == "converged" for status in self.statuses])
        allowed = solved if solved.any() else known
        sign = -1.0 if criterion.endswith("accuracy") else 1.0
        keys = [(sign * values[i] if allowed[i] else np.inf, -self.ridges[i], i) for i in range(len(values))]
        index = min(keys)[2]
        return Best(criterion=criterion, index=index, ridge=float(self.ridges[index]), value=float(values[index]))

    def _rows(self) -> Rows:
        tested = ["test"] if np.isfinite(self.test_loss).any() else []
        losses = ["train", "generalised cross-validation", "leave-one-out", *tested]
        accuracies = f"; accuracy: {', '.join(['leave-one-out', *tested])}" if self.is_classification else ""
        rows = [
            ("method", f"{self.method}: {self.why}"),
            ("mean diagonal", f"{self.mean_diagonal:.4g}; storage floor {self.floor:.2g}"),
            ("ridge λ", f"λ / mean diagonal; loss: {', '.join(losses)}{accuracies}"),
        ]
        for index, ridge in enumerate(self.ridges):
            rows.append((f"  {ridge:.4g}", self._row(index)))
        if np.isfinite(self.leave_one_out_loss).any():
            best = self.best
            rows.append(("best", f"λ = {best.ridge:.4g}, by leave-one-out loss" + self._at(best.index)))
        return rows

    def _row(self, index: int) -> str:
        relative = self.ridges[index] / self.mean_diagonal if self.mean_diagonal else np.nan
        crossed = _with_error(self.generalised_cross_validation, self.generalised_cross_validation_error, index)
        left = _with_error(self.leave_one_out_loss, self.leave_one_out_loss_error, index)
        row = f"{relative:.2g}; {self.train_loss[index]:.4g}, {crossed}, {left}"
        is_tested = np.isfinite(self.test_loss[index])
        if is_tested:
            row += f", {self.test_loss[index]:.4g}"
        if self.is_classification:
            row += f"; {_with_error(self.leave_one_out_accuracy, self.leave_one_out_accuracy_error, index)}"
            row += f", {self.test_accuracy[index]:.4g}" if is_tested else ""
        return row + (f"; {self.statuses[index]}" if self.statuses[index] != "converged" else "")

    def _at(self, index: int) -> str:
        if np.isfinite(self.test_accuracy[index]):
            return f"; {self.test_accuracy[index]:.1%} of test samples right"
        if np.isfinite(self.test_loss[index]):
            return f"; test loss {self.test_loss[index]:.4g}"
        return ""


def _with_error(values: FloatArray, errors: FloatArray, index: int) -> str:
    return f"{values[index]:.4g}" + (f" ± {errors[index]:.1g}" if errors[index] else "")
