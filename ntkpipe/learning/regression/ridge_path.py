"""Kernel ridge regression at many ridges: training, cross-validated and test losses, and which ridge is best.

With G = (K + λI)^-1, A = G Y and H = K G, so I - H = λG, generalised cross-validation is ``V = (1/n) |(I - H) Y|² /
((1/n) tr(I - H))²`` (Golub, Heath, Wahba 1979, Technometrics 21, p. 215, whose ridge is nλ there), at λ = 0 its limit.
Cost: ``eigh`` 9 n³ and ``n² (2 c + S)`` a ridge; ``cholesky`` n³ a ridge; ``streamed`` some tens of passes a ridge for
each run of columns that fits memory. The test kernel is read once for as many ridges as a tenth of it holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import Targets, Task, as_samples
from ntkpipe.learning.regression.sources import (
    CountedStages,
    HeldOut,
    TrainTargets,
    ridges_for,
    train_targets,
    with_error,
)
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.inverse.choice import find_inverse
from ntkpipe.solvers.inverse.contract import UNKNOWN, Fit, InverseMethod, Question, as_fields
from ntkpipe.solvers.result import Monitor, OfTargets, Status, ignore, recorded
from ntkpipe.store.results import Checkpoint

PathMethod = Literal["auto"] | InverseMethod
Criterion = Literal[
    "leave_one_out_loss", "leave_one_out_accuracy", "generalised_cross_validation", "test_loss", "test_accuracy"
]
# Multiples of the mean diagonal.
DEFAULT_RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Share of the memory for coefficients that wait for the test kernel.
_SHARE_OF_COEFFICIENTS = 0.1
_NUM_PROBES = 16  # of traces, where they are estimated


@dataclass(frozen=True, kw_only=True)
class Best:
    """One ridge of a path."""

    criterion: str  # by which it is best
    index: int  # position in the arrays of the path
    ridge: float  # λ, absolute
    value: float  # value of the criterion


@dataclass(frozen=True, kw_only=True)
class RidgePath(OfTargets):
    """Kernel ridge regression at R ridges. Arrays have an entry a ridge, in the order of ``ridges``.

    Losses are mean squared errors over samples and outputs. An ``_error`` is one standard error of a number that was
    estimated from some of the samples, zero where it is exact.
    """

    ridges: FloatArray  # λ, absolute
    mean_diagonal: float  # mean of the diagonal of K; ridges are also printed as multiples of it
    method: str  # method, why: `eigh`, `cholesky` or `streamed`, and why
    why: str
    train_loss: FloatArray  # on the training set
    train_accuracy: FloatArray  # accuracies are NaN if targets are no classes
    effective_dimension: FloatArray  # `tr K (K + λI)^-1`, the degrees of freedom of the fit
    effective_dimension_error: FloatArray
    generalised_cross_validation: FloatArray  # V(λ) of Golub, Heath and Wahba
    generalised_cross_validation_error: FloatArray
    leave_one_out_loss: FloatArray  # each sample, with all of its rows, predicted from all others
    leave_one_out_loss_error: FloatArray
    leave_one_out_accuracy: FloatArray
    leave_one_out_accuracy_error: FloatArray
    num_left_out: int  # samples that this was done for; all N where it is exact
    test_loss: FloatArray  # test_loss, test_accuracy: on the test set; NaN without one
    test_accuracy: FloatArray
    norm: FloatArray  # `tr A'K A`, the squared norm of the fit in the space of the kernel
    residuals: FloatArray  # largest relative true residual of the systems; zero for `eigh`
    statuses: tuple[str, ...]  # status of each ridge
    is_classification: bool  # whether targets are labels of classes
    floor: float = field(repr=False)  # what rounding to the storage dtype did to K; ridges below it say nothing

    @property
    def best(self) -> Best:
        """The best ridge by ``leave_one_out_loss``, which uses no test data; see :meth:`best_by`."""
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

    def _rows(self) -> TableRows:
        tested = ["test"] if np.isfinite(self.test_loss).any() else []
        losses = ["train", "generalised cross-validation", "leave-one-out", *tested]
        accuracies = f"; accuracy: {', '.join(['leave-one-out', *tested])}" if self.is_classification else ""
        rows = [
            ("method", f"{self.method}: {self.why}"),
            ("mean diagonal", f"{self.mean_diagonal:.4g}; storage floor {self.floor:.2g}"),
            ("ridge λ", f"λ / mean diagonal; loss: {', '.join(losses)}{accuracies}"),
        ]
        rows += [(f"  {ridge:.4g}", self._row(index)) for index, ridge in enumerate(self.ridges)]
        if np.isfinite(self.leave_one_out_loss).any():
            best = self.best
            said = f"λ = {best.ridge:.4g}, by leave-one-out loss"
            if np.isfinite(self.test_accuracy[best.index]):
                said += f"; {self.test_accuracy[best.index]:.1%} of test samples right"
            elif tested:
                said += f"; test loss {self.test_loss[best.index]:.4g}"
            rows.append(("best", said))
        return rows

    def _row(self, index: int) -> str:
        relative = self.ridges[index] / self.mean_diagonal if self.mean_diagonal else np.nan

        def said(name: str) -> str:
            return with_error(getattr(self, name)[index], getattr(self, f"{name}_error")[index], ".4g")

        losses = f"{said('generalised_cross_validation')}, {said('leave_one_out_loss')}"
        row = f"{relative:.2g}; {self.train_loss[index]:.4g}, {losses}"
        is_tested = np.isfinite(self.test_loss[index])
        if is_tested:
            row += f", {self.test_loss[index]:.4g}"
        if self.is_classification:
            row += f"; {said('leave_one_out_accuracy')}"
            row += f", {self.test_accuracy[index]:.4g}" if is_tested else ""
        return row + (f"; {self.statuses[index]}" if self.statuses[index] != "converged" else "")


@recorded()
def ridge_path(
    kernel: Any,
    targets: ArrayLike,
    *,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    test_kernel: Any = None,
    test_targets: ArrayLike | None = None,
    initial_outputs: ArrayLike | None = None,
    test_initial_outputs: ArrayLike | None = None,
    eigenpairs: Eigenpairs | None = None,
    method: PathMethod = "auto",
    task: Task = "auto",
    tol: float = 1e-8,
    num_left_out: int = 64,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    monitor: Monitor = ignore,
) -> RidgePath:
    """Kernel ridge regression at many ridges, with leave-one-out, generalised cross-validation, and test losses.

    Leave-one-out is exact from one fit; for a full NTK all O rows of a sample go together. The formula of generalised
    cross-validation (GCV), and costs, are in :mod:`ntkpipe.learning.regression.ridge_path`. All is exact by eigenpairs,
    or by a factor for each ridge. Streamed, where neither fits memory, coefficients, train and test losses are those of
    solved systems; leave-one-out is estimated from ``num_left_out`` random samples, by systems with unit vectors, and
    GCV and effective dimension from 16 vectors of random signs: error bars are one standard error of these choices,
    beside which that of the systems is small. At λ = 0 only ``eigh`` solves with a singular kernel, for the minimum
    norm; the others say so.

    Parameters
    ----------
    ridges
        Ridges λ ≥ 0. Default 0 and 10^-6 to 10 mean diagonals.
    eigenpairs
        All eigenpairs of K, such as :func:`ntkpipe.eigh` returns, if known.
    method
        How it is computed. ``auto``: of ``eigh``, if ``16 n²`` bytes fit, and ``cholesky``, if ``4 n²`` fit, the one
        with fewer operations for so many ridges; else ``streamed``, which takes a tenth of a float32 kernel, or 6 kB a
        row if that is less.
    tol
        Largest relative true residual of a converged system.
    num_left_out
        Number of samples that are left out where not all are, at least two. Each is one column (O of a full NTK) of a
        solve.

    Raises
    ------
    ResourceError, TileError
        If the method that was asked for does not fit memory; if a tile is missing or damaged.
    """
    operator: Operator = kernel
    budget = Budget.of(memory_limit)
    check_number("tol", tol, low=0.0)
    check_number("num_left_out", num_left_out, low=2)
    train = train_targets(operator, targets, initial_outputs, task)
    values, options = ridges_for(DEFAULT_RIDGES, ridges, ridge_scale, operator)
    test = HeldOut.of(test_kernel, test_targets, train, test_initial_outputs)
    how: dict[str, Any] = {"ridges": values.tolist(), "tol": tol, "seed": seed}
    known: dict[str, Any] = {"eigenpairs": eigenpairs, "monitor": monitor}
    inverse = find_inverse(operator, budget, method=method, allowed=("eigh", "cholesky"), **known, **how)
    # Number of ridges whose coefficients may wait for the test kernel.
    most = max(1, int(_SHARE_OF_COEFFICIENTS * max(0, budget.room())) // max(1, 2 * train.rhs.nbytes))
    name, is_estimated = inverse.method, inverse.method == "streamed"
    question = Question(train.rhs, train.width, num_left_out, _NUM_PROBES if is_estimated else 0, seed)
    how |= {"method": name, "num_left_out": num_left_out}
    stages = CountedStages(None if name == "eigh" else checkpoint, operator, train, function="ridge_path", **how)
    fits = stages.fits(inverse, question, values, partial(_measures, train))
    found, statuses = _losses(fits, len(values), test, most)
    status, message = _judge(statuses, values, name)
    return RidgePath(
        status=status,
        message=message if test is None else message + test.targets.note,
        work=stages.work,
        seconds=stages.seconds,
        options={**options, "centred": train.is_centred},
        ridges=values,
        mean_diagonal=float(operator.diagonal().mean()),
        method=name,
        why=inverse.why,
        statuses=tuple(one for one, _ in statuses),
        is_classification=train.targets.classes is not None,
        **train.targets.fields,
        floor=operator.storage_floor(),
        **found,
    )


def _losses(
    fits: Iterable[tuple[int, Mapping[str, Any]]], num_ridges: int, test: HeldOut | None, most: int
) -> tuple[dict[str, Any], list[tuple[Status, str]]]:
    """Numbers by the names of the result, and statuses; ``most`` fits wait for the test kernel."""
    found = [{"test_loss": np.nan, "test_accuracy": np.nan} for _ in range(num_ridges)]
    statuses: list[tuple[Status, str]] = [("converged", "")] * num_ridges
    waiting: dict[int, FloatArray] = {}
    num_left = 0
    for number, (index, fit) in enumerate(fits):
        found[index] |= {**fit["measures"], "residuals": fit["residual"]}
        statuses[index], num_left = (fit["status"], fit["message"]), fit["num_left_out"]
        if test is None:
            continue
        waiting[index] = fit["coefficients"]
        if len(waiting) == most or number == num_ridges - 1:
            for place, outputs in zip(waiting, test.predict(list(waiting.values())), strict=True):
                accuracy = _accuracy(test.targets, outputs)
                found[place] |= {"test_loss": test.targets.loss(outputs), "test_accuracy": accuracy}
            waiting.clear()
    arrays = {name: np.array([one[name] for one in found]) for name in found[0]}
    return {"num_left_out": num_left, **arrays}, statuses


def _measures(train: TrainTargets, fit: Fit) -> dict[str, float]:
    """Numbers of one ridge, by the names of the result."""
    targets = train.targets
    fitted = targets.matrix - as_samples(fit.train_residuals, train.width)

    def hits(residuals: FloatArray, samples: NDArray[np.int64]) -> FloatArray:
        assert targets.codes is not None
        predicted = targets.matrix[samples] - residuals.reshape(len(samples), -1)
        return np.asarray(targets.predicted(predicted) == targets.codes[samples], np.float64)

    estimates = {
        "effective_dimension": fit.effective_dimension,
        "generalised_cross_validation": fit.generalised_cross_validation,
        "leave_one_out_loss": fit.leave_one_out_loss,
        "leave_one_out_accuracy": UNKNOWN if targets.codes is None else fit.mean_left_out(hits),
    }
    return {
        "train_loss": fit.train_loss,
        "train_accuracy": _accuracy(targets, fitted),
        **as_fields(estimates),
        "norm": float(np.sum(fit.coefficients * (train.rhs - fit.train_residuals))),
    }


def _accuracy(targets: Targets, outputs: FloatArray) -> float:
    accuracy = targets.accuracy(outputs)
    return np.nan if accuracy is None else accuracy


def _judge(statuses: Sequence[tuple[Status, str]], ridges: FloatArray, method: str) -> tuple[Status, str]:
    failed = [(ridge, *one) for ridge, one in zip(ridges, statuses, strict=True) if one[0] != "converged"]
    if not failed:
        how = "estimates have error bars" if method == "streamed" else "exact"
        return "converged", f"{len(ridges)} ridge{'s'[: len(ridges) != 1]}, {how}"
    ridge, status, why = failed[0]
    return status, f"{len(failed)} of {len(ridges)} ridges, the first λ = {ridge:.4g}: {why}"
