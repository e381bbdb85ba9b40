"""What two kernels predict of the same test samples, by ridge regression with each, and how far that is apart."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.analysis.comparing.inputs import KernelInput, has_same_test_samples, targets_of
from ntkpipe.analysis.comparing.spectra import Way
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator, digest_of
from ntkpipe.base.targets import Targets, Task, as_samples, encode, encode_test, note_on_unknown
from ntkpipe.learning.regression.sources import CrossKernel
from ntkpipe.solvers.inverse.passes import recurrence_for
from ntkpipe.solvers.inverse.solve import solve
from ntkpipe.solvers.memory import bytes_of_solve
from ntkpipe.solvers.result import Monitor
from ntkpipe.store.results import Checkpoint

_TOL = 1e-10


@dataclass(frozen=True)
class Goal:
    """What is predicted."""

    targets: Targets  # of train samples
    test_targets: Targets | None  # of test samples, if there are any

    def digests(self) -> dict[str, str]:
        """Digests of targets, by name."""
        known = {"targets": self.targets, "test_targets": self.test_targets}
        return {name: digest_of(one.matrix) for name, one in known.items() if one is not None}


def goal_of(
    inputs: tuple[KernelInput, KernelInput],
    targets: ArrayLike | None,
    test_targets: ArrayLike | None,
    *,
    task: Task,
    are_kernels_given: bool,
) -> tuple[Goal | None, str]:
    """What two kernels can both predict; and why there is no such thing, or what is to be known of it."""
    if any(one.test_kernel is None for one in inputs):
        return None, "no test kernels"
    targets = targets_of(*inputs, "train") if targets is None else targets
    if targets is None:
        return None, "no targets"
    if not are_kernels_given and not has_same_test_samples(*inputs):
        return None, "test samples of the stores are not the same"
    test_targets = targets_of(*inputs, "test") if test_targets is None else test_targets
    width, num_samples = max(one.width for one in inputs), inputs[0].num_samples
    train = encode(targets, task=task, num_outputs=width if width > 1 else None)
    if len(train.matrix) != num_samples:
        raise ConfigError(f"{len(train.matrix)} targets for {num_samples} train samples")
    train.rows(width)
    if test_targets is None:
        return Goal(train, None), ""
    test = encode_test(test_targets, train)
    return Goal(train, test), note_on_unknown(test).removeprefix("; ")


def predict(
    operator: Operator,
    test_kernel: Any,
    width: int,
    goal: Goal,
    *,
    ridge: float,
    way: Way,
    budget: Budget,
    seed: int,
    checkpoint: Checkpoint | None,
    monitor: Monitor,
) -> dict[str, Any]:
    """Predictions ``K_test (K + λ I)⁺ Y`` of kernel ridge regression, (M, c), with status and message of the solver."""
    cross = CrossKernel(test_kernel, operator.num_rows, width)
    rows = goal.targets.rows(width)
    solution = solve(
        operator,
        rows,
        ridge=ridge,
        method="auto" if way != "passes" else recurrence_for(rows.shape[1]),
        task="regression",
        tol=_TOL,
        seed=seed,
        memory_limit=budget.at_least(bytes_of_solve(operator.num_rows, rows.shape[1])),
        checkpoint=checkpoint if way == "passes" else None,
        monitor=monitor,
    )
    values = as_samples(cross.times(solution.coefficients), width)
    return {"values": np.ascontiguousarray(values), "status": solution.status, "message": solution.message}


def compare_predictions(a: FloatArray, b: FloatArray, goal: Goal) -> dict[str, Any]:
    """How far predictions of two kernels are apart, shape (M, c) each, by the fields of the comparison."""
    wanted = goal.test_targets
    if len(a) != len(b) or (wanted is not None and len(wanted.matrix) != len(a)):
        targets = "" if wanted is None else f", and {len(wanted.matrix)} test targets"
        raise ConfigError(f"test kernels of {len(a)} and {len(b)} samples{targets}; needed the same test samples")
    norm = float(np.linalg.norm(b))
    differs = None
    if a.shape[1] > 1 or goal.targets.is_binary:
        differs = float(np.mean(goal.targets.predicted(a) != goal.targets.predicted(b)))
    found: dict[str, Any] = {
        "prediction_difference": float(np.linalg.norm(a - b)) / norm if norm else None,
        "disagreement": differs,
    }
    for name, values in (("a", a), ("b", b)):
        found[f"predictions_{name}"] = values
        found[f"test_loss_{name}"] = None if wanted is None else wanted.loss(values)
        found[f"test_accuracy_{name}"] = None if wanted is None else wanted.accuracy(values)
    return found
