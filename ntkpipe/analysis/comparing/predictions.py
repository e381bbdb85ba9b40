"""What two kernels predict of the same test samples, by ridge regression with each, and how far that is apart."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.analysis.comparing.inputs import Side, has_same_test_samples, targets_of
from ntkpipe.analysis.comparing.spectra import Way
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, IndefiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.base.targets import Labels, as_samples, encode
from ntkpipe.learning.regression.cross import CrossKernel
from ntkpipe.learning.regression.minimum_norm import by_factor, cut_off, minimum_norm, smallest_by_factor
from ntkpipe.learning.regression.sources import at_least
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.linear.preconditioner import default_rank
from ntkpipe.solvers.linear.solution import Solution
from ntkpipe.solvers.linear.solve import solve
from ntkpipe.solvers.result import Monitor, Status

_TOL = 1e-10
# Vectors of conjugate gradients: for each column, and for each of the preconditioner's rank.
_A_COLUMN, _A_RANK = 11, 3


@dataclass(frozen=True)
class Goal:
    """What is predicted."""

    labels: Labels  # train targets
    test_labels: Labels | None  # test targets, if there are any


def goal_of(targets: ArrayLike, test_targets: ArrayLike | None, num_samples: int, width: int) -> Goal:
    """Targets as what is predicted."""
    labels = encode(targets, num_outputs=width if width > 1 else None)
    if len(labels.matrix) != num_samples:
        raise ConfigError(f"{len(labels.matrix)} targets for {num_samples} train samples")
    labels.rows(width)
    if test_targets is None:
        return Goal(labels, None)
    test = encode(test_targets, classes=labels.classes, task="auto" if labels.classes is not None else "regression")
    if test.matrix.shape[1] != labels.matrix.shape[1]:
        raise ConfigError(f"test targets of {test.matrix.shape[1]} columns and targets of {labels.matrix.shape[1]}")
    return Goal(labels, test)


def goal_of_sides(
    sides: tuple[Side, Side], targets: ArrayLike | None, test_targets: ArrayLike | None, *, is_given: bool
) -> tuple[Goal | None, str]:
    """What two kernels can both predict, or why there is no such thing."""
    if any(side.test_kernel is None for side in sides):
        return None, "no test kernels"
    known = targets_of(*sides, "train") if targets is None else targets
    if known is None:
        return None, "no targets"
    if not is_given and not has_same_test_samples(*sides):
        return None, "test samples of the stores are not the same"
    wanted = targets_of(*sides, "test") if test_targets is None else test_targets
    return goal_of(known, wanted, sides[0].num_samples, max(side.width for side in sides)), ""


@dataclass(frozen=True)
class Predictions:
    """Of one kernel."""

    values: FloatArray  # shape (M, c)
    status: Status  # status, message: of the solver
    message: str


def predict(
    operator: Operator,
    test_kernel: Any,
    width: int,
    goal: Goal,
    *,
    ridge: float,
    largest: float,
    way: Way,
    memory_limit: int | None,
    seed: int,
    monitor: Monitor,
) -> Predictions:
    """Predictions ``K_test (K + λ I)⁺ Y`` of kernel ridge regression."""
    cross = CrossKernel(test_kernel, operator.num_rows, width)
    solution = _solve(operator, goal.labels.rows(width), ridge, largest, way, memory_limit, seed, monitor)
    values = as_samples(cross.times(solution.coefficients), width)
    return Predictions(np.ascontiguousarray(values), solution.status, solution.message)


def _solve(
    operator: Operator,
    rows: FloatArray,
    ridge: float,
    largest: float,
    way: Way,
    memory_limit: int | None,
    seed: int,
    monitor: Monitor,
) -> Solution:
    if way != "passes":
        return _solve_in_memory(operator, rows, ridge, largest, seed)
    columns = _A_COLUMN * rows.shape[1] + _A_RANK * default_rank(operator.num_rows)
    limit = at_least(memory_limit, 8 * operator.num_rows * columns)
    method: Literal["pcg", "block_cg"] = "pcg" if rows.shape[1] == 1 else "block_cg"
    return solve(operator, rows, ridge=ridge, method=method, tol=_TOL, seed=seed, memory_limit=limit, monitor=monitor)


def _solve_in_memory(operator: Operator, rows: FloatArray, ridge: float, largest: float, seed: int) -> Solution:
    """By a factor; without a ridge and of a kernel that is singular to its storage the solution of smallest norm."""
    try:
        factor = cholesky(operator, ridge=ridge)
        if ridge > 0 or smallest_by_factor(factor, seed) > cut_off(operator, largest):
            return by_factor(operator, factor, rows, tol=_TOL, options={}, why="it fits in memory")
    except IndefiniteError:
        pass
    return minimum_norm(operator, rows, ridge, tol=_TOL, options={}, why="singular", memory_limit=None)


@dataclass(frozen=True)
class Disagreement:
    """How far predictions are apart."""

    difference: float | None  # `|F_a - F_b|_F / |F_b|_F`; none if the latter is zero
    columns: float | None  # share of samples whose largest prediction is of another column; none for a single column
    losses: tuple[float, float] | None  # mean squared error of each; none without test targets
    accuracies: tuple[float, float] | None  # share of samples whose class is predicted by each; none without classes


def disagreement(a: FloatArray, b: FloatArray, goal: Goal) -> Disagreement:
    """Compare predictions of two kernels, shape (M, c) each."""
    wanted = goal.test_labels
    if len(a) != len(b) or (wanted is not None and len(wanted.matrix) != len(a)):
        targets = "" if wanted is None else f", and {len(wanted.matrix)} test targets"
        raise ConfigError(f"test kernels of {len(a)} and {len(b)} samples{targets}; needed the same test samples")
    norm = float(np.linalg.norm(b))
    accuracies = None if wanted is None else (wanted.accuracy(a), wanted.accuracy(b))
    return Disagreement(
        difference=float(np.linalg.norm(a - b)) / norm if norm else None,
        columns=float(np.mean(a.argmax(axis=1) != b.argmax(axis=1))) if a.shape[1] > 1 else None,
        losses=None if wanted is None else (wanted.loss(a), wanted.loss(b)),
        accuracies=None if accuracies is None or None in accuracies else accuracies,  # type: ignore[arg-type]
    )
