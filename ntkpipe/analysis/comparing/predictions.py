"""What two kernels predict of the same test samples, by ridge regression with each, and how far that is apart."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.analysis.comparing.inputs import KernelInput, has_same_test_samples, targets_of
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


def goal_of(
    inputs: tuple[KernelInput, KernelInput],
    targets: ArrayLike | None,
    test_targets: ArrayLike | None,
    *,
    are_kernels_given: bool,
) -> tuple[Goal | None, str]:
    """What two kernels can both predict, or why there is no such thing."""
    if any(one.test_kernel is None for one in inputs):
        return None, "no test kernels"
    targets = targets_of(*inputs, "train") if targets is None else targets
    if targets is None:
        return None, "no targets"
    if not are_kernels_given and not has_same_test_samples(*inputs):
        return None, "test samples of the stores are not the same"
    test_targets = targets_of(*inputs, "test") if test_targets is None else test_targets
    width, num_samples = max(one.width for one in inputs), inputs[0].num_samples
    labels = encode(targets, num_outputs=width if width > 1 else None)
    if len(labels.matrix) != num_samples:
        raise ConfigError(f"{len(labels.matrix)} targets for {num_samples} train samples")
    labels.rows(width)
    if test_targets is None:
        return Goal(labels, None), ""
    test = encode(test_targets, classes=labels.classes, task="regression")
    if test.matrix.shape[1] != labels.matrix.shape[1]:
        raise ConfigError(f"test targets of {test.matrix.shape[1]} columns and targets of {labels.matrix.shape[1]}")
    return Goal(labels, test), ""


@dataclass(frozen=True)
class Predictions:
    """Predictions with one kernel."""

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
    rows = goal.labels.rows(width)
    if way == "passes":
        vectors = _A_COLUMN * rows.shape[1] + _A_RANK * default_rank(operator.num_rows)
        solution = solve(
            operator,
            rows,
            ridge=ridge,
            method="pcg" if rows.shape[1] == 1 else "block_cg",
            tol=_TOL,
            seed=seed,
            memory_limit=at_least(memory_limit, 8 * operator.num_rows * vectors),
            monitor=monitor,
        )
    else:
        solution = _solve_in_memory(operator, rows, ridge, largest, seed)
    values = as_samples(cross.times(solution.coefficients), width)
    return Predictions(np.ascontiguousarray(values), solution.status, solution.message)


def _solve_in_memory(operator: Operator, rows: FloatArray, ridge: float, largest: float, seed: int) -> Solution:
    """Solve by a factor, or for smallest norm where there is no ridge and the kernel is singular to its storage."""
    try:
        factor = cholesky(operator, ridge=ridge)
        if ridge > 0 or smallest_by_factor(factor, seed) > cut_off(operator, largest):
            return by_factor(operator, factor, rows, tol=_TOL, options={}, why="it fits in memory")
    except IndefiniteError:
        pass
    return minimum_norm(operator, rows, ridge, tol=_TOL, options={}, why="singular", memory_limit=None)


def compare_predictions(a: FloatArray, b: FloatArray, goal: Goal) -> dict[str, Any]:
    """How far predictions of two kernels are apart, shape (M, c) each, by the fields of the comparison."""
    wanted = goal.test_labels
    if len(a) != len(b) or (wanted is not None and len(wanted.matrix) != len(a)):
        targets = "" if wanted is None else f", and {len(wanted.matrix)} test targets"
        raise ConfigError(f"test kernels of {len(a)} and {len(b)} samples{targets}; needed the same test samples")
    norm = float(np.linalg.norm(b))
    return {
        "predictions_a": a,
        "predictions_b": b,
        "prediction_difference": float(np.linalg.norm(a - b)) / norm if norm else None,
        "disagreement": float(np.mean(a.argmax(axis=1) != b.argmax(axis=1))) if a.shape[1] > 1 else None,
        "test_loss_a": None if wanted is None else wanted.loss(a),
        "test_loss_b": None if wanted is None else wanted.loss(b),
        "test_accuracy_a": None if wanted is None else wanted.accuracy(a),
        "test_accuracy_b": None if wanted is None else wanted.accuracy(b),
    }
