"""Kernel ridge regression at many ridges: training, cross-validated and test losses, and which ridge is best."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import format_bytes, memory_room
from ntkpipe.base.ridge import RidgeScale, absolute_ridge
from ntkpipe.base.targets import Labels, Task, as_rows, as_samples, encode
from ntkpipe.learning.regression.cross import CrossKernel
from ntkpipe.learning.regression.minimum_norm import Eigenpairs
from ntkpipe.learning.regression.opening import open_for_analysis
from ntkpipe.learning.regression.path_points import ByEigenpairs, ByFactors, ByPasses, Point, Points
from ntkpipe.learning.regression.path_result import RidgePath
from ntkpipe.learning.regression.sources import initial_matrix, train_targets
from ntkpipe.learning.regression.streamed import StreamedInverse, eigenpairs_fit, factor_fits
from ntkpipe.solvers.direct.eigh import eigh
from ntkpipe.solvers.result import Monitor, Status, ignore

Method = Literal["auto", "eigh", "cholesky", "streamed"]
_METHODS = ("auto", "eigh", "cholesky", "streamed")
# In mean diagonals.
DEFAULT_RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Of the memory, for coefficients that wait for the test kernel.
_SHARE_OF_COEFFICIENTS = 0.1


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
    method: Method = "auto",
    task: Task = "auto",
    tol: float = 1e-8,
    num_left_out: int = 64,
    memory_limit: int | None = None,
    seed: int = 0,
    monitor: Monitor = ignore,
) -> RidgePath:
    """Kernel ridge regression at many ridges, with leave-one-out, generalised cross-validation, and test losses.

    With G = (K + λI)^-1 and A = G Y:

    - generalised cross-validation ``V = (1/n) |(I - H) Y|² / ((1/n) tr(I - H))²`` with H = K G, so I - H = λG (Golub,
      Heath, Wahba 1979, Technometrics 21, p. 215, whose ridge is nλ there), a mean over columns. For λ = 0 its limit.
    - leave-one-out, exact from one fit. Of a full NTK all O rows of a sample go together.

    Exact by all eigenpairs, or by a factor for each ridge. Streamed, where neither fits memory, coefficients, train and
    test losses are those of solved systems, and leave-one-out, GCV and effective dimension are estimated from
    ``num_left_out`` random samples, whose blocks of G are found by systems with unit vectors: the error bar is
    one standard error of the choice of samples, beside which that of the systems is small.

    Parameters
    ----------
    kernel
        K: what :func:`ntkpipe.as_operator` takes.
    targets
        Labels of classes (N,), or real targets (N,) or (N, O); see ``task``.
    ridges
        λ ≥ 0, at least one; default ``DEFAULT_RIDGES``, which are counted in the mean diagonal.
    ridge_scale
        None: ridges are absolute. ``"mean_diagonal"``: multiples of the mean of the diagonal.
    test_kernel, test_targets
        Test × train (M·S, N·S), array or stored, and targets of the test samples; both or none.
    initial_outputs, test_initial_outputs
        f₀ (N, O) and (M, O): Y - f₀ is fitted, and f₀ added to predictions.
    eigenpairs
        All eigenpairs of K, as of :func:`ntkpipe.eigh`, if they are known.
    method
        ``auto``: ``eigh``, if ``16 n²`` bytes fit; else ``cholesky``, if ``4 n²`` fit; else ``streamed``.
    task
        As of :class:`ntkpipe.KernelRegression`.
    tol
        Largest relative true residual of a system that is called converged.
    num_left_out
        Samples that are left out where not all are, at least two. Each is one column (O of a full NTK) of a solve.
    memory_limit
        Bytes that this process may have; default what it has and half of what is free. It decides which method fits;
        streaming takes a tenth of a float32 kernel, or 6 kB a row if that is less, in any case.
    seed
        Of preconditioners, and the choice of samples.
    monitor
        Called after each pass.

    Raises
    ------
    ConfigError
        If shapes do not fit, or an option is out of range.
    NonFiniteError
        If the kernel or targets hold NaN or infinity.
    ResourceError
        If the method that was asked for does not fit memory.
    TileError
        If a tile is missing or damaged; the message names it.

    Notes
    -----
    Cost: ``eigh`` 9 n³ and ``n² (2 c + S)`` a ridge; ``cholesky`` 2/3 n³ a ridge; ``streamed`` some tens of passes a
    ridge for each run of columns that fits memory. The test kernel is read once for as many ridges as a tenth of the
    memory holds coefficients of. At λ = 0 ``eigh`` gives the minimum-norm solution of a singular kernel, the others
    say that they cannot.
    """
    begin = perf_counter()
    operator, share = open_for_analysis(kernel, memory_limit)
    before = operator.work
    _check(method, test_kernel, test_targets, tol, num_left_out)
    labels, width = train_targets(kernel, operator, targets, initial_outputs, task)
    goal = labels.matrix
    if initial_outputs is not None:
        goal = goal - initial_matrix(initial_outputs, goal.shape)
    rhs = as_rows(goal, width)
    scale: RidgeScale = ridge_scale if ridges is not None else "mean_diagonal"
    asked = [float(ridge) for ridge in (DEFAULT_RIDGES if ridges is None else ridges)]
    if not asked:
        raise ConfigError("no ridge is given; needed at least one")
    values = np.array([absolute_ridge(ridge, scale, operator.diagonal) for ridge in asked])
    test = _Test.of(test_kernel, test_targets, test_initial_outputs, labels, operator, width)
    if (test_initial_outputs is None) == (initial_outputs is not None) and test is not None:
        raise ConfigError("initial_outputs of one of train and test samples; needed both or none")
    points = _points(operator, rhs, width, eigenpairs, method, tol, num_left_out, share, seed, monitor)
    name, finder = points
    found: dict[int, dict[str, float]] = {}
    statuses: dict[int, tuple[Status, str]] = {}
    waiting: list[tuple[int, FloatArray]] = []
    most = _most_waiting(rhs, share)
    num_left = 0
    for index in sorted(range(len(values)), key=lambda i: -values[i]):
        point = finder.at(float(values[index]))
        found[index] = _measures(point, labels, rhs, width)
        statuses[index] = point.status, point.message
        num_left = len(point.left_out_samples)
        if test is not None:
            waiting.append((index, point.coefficients))
            if len(waiting) == most:
                test.measure(waiting, found)
                waiting = []
    if test is not None and waiting:
        test.measure(waiting, found)
    status, message = _judge([statuses[index] for index in range(len(values))], values, name)
    arrays = {key: np.array([found[index][key] for index in range(len(values))]) for key in found[0]}
    empty = np.full(len(values), np.nan)
    return RidgePath(
        status=status,
        message=message,
        work=operator.work - before,
        seconds=perf_counter() - begin,
        options={
            "ridges": asked,
            "ridge_scale": scale,
            "method": method,
            "task": task,
            "tol": tol,
            "num_left_out": num_left_out,
            "memory_limit": memory_limit,
            "seed": seed,
            "centred": initial_outputs is not None,
        },
        matrix=operator.identity(),
        ridges=values,
        mean_diagonal=float(operator.diagonal().mean()),
        method=name,
        why=finder.why,
        num_left_out=num_left,
        statuses=tuple(statuses[index][0] for index in range(len(values))),
        is_classification=labels.classes is not None,
        floor=operator.storage_floor(),
        **{"test_loss": empty, "test_accuracy": empty, **arrays},
    )


def _check(method: str, test_kernel: Any, test_targets: Any, tol: float, num_left_out: int) -> None:
    """Options."""
    if method not in _METHODS:
        raise ConfigError(f"method={method!r}; needed one of {', '.join(_METHODS)}")
    if (test_kernel is None) != (test_targets is None):
        raise ConfigError("a test kernel without test targets, or these without it; needed both or none")
    check_number("tol", tol, low=0.0)
    check_number("num_left_out", num_left_out, low=2)


@dataclass(frozen=True)
class _Test:
    """The test set."""

    cross: CrossKernel
    labels: Labels
    offset: FloatArray
    width: int

    @classmethod
    def of(
        cls, kernel: Any, targets: Any, initial: Any, train: Labels, operator: Operator, width: int
    ) -> "_Test | None":
        """If there is one."""
        if kernel is None:
            return None
        labels = encode(targets, classes=train.classes, task="regression")
        cross = CrossKernel(kernel, operator.num_rows, width)
        needed = cross.num_samples, train.matrix.shape[1]
        if labels.matrix.shape != needed:
            raise ConfigError(f"test targets of shape {np.shape(targets)}; needed {needed} by kernel and train targets")
        offset = np.zeros(1) if initial is None else initial_matrix(initial, needed)
        return cls(cross, labels, offset, width)

    def measure(self, waiting: Sequence[tuple[int, FloatArray]], found: dict[int, dict[str, float]]) -> None:
        """Losses and accuracies of several ridges in one read of the test kernel."""
        predicted = self.cross.times(np.concatenate([coefficients for _, coefficients in waiting], axis=1))
        for (index, _), columns in zip(waiting, np.split(predicted, len(waiting), axis=1), strict=True):
            outputs = as_samples(columns, self.width) + self.offset
            accuracy = self.labels.accuracy(outputs)
            found[index]["test_loss"] = self.labels.loss(outputs)
            found[index]["test_accuracy"] = np.nan if accuracy is None else accuracy


def _points(
    operator: Operator,
    rhs: FloatArray,
    width: int,
    eigenpairs: Eigenpairs | None,
    method: Method,
    tol: float,
    num_left_out: int,
    memory_limit: int | None,
    seed: int,
    monitor: Monitor,
) -> tuple[str, Points]:
    """By what fits."""
    n, room = operator.num_rows, memory_room(memory_limit)
    if eigenpairs is not None and method in {"auto", "eigh"}:
        return "eigh", ByEigenpairs(operator, eigenpairs, rhs, width, "all eigenpairs were given")
    needed = f"{n:,} rows, {format_bytes(max(0, room))} of memory"
    if method == "eigh" or (method == "auto" and eigenpairs_fit(n, memory_limit)):
        why = "asked for" if method == "eigh" else f"all eigenpairs fit: {needed}"
        pairs = eigh(operator, memory_limit=memory_limit, monitor=monitor)
        return "eigh", ByEigenpairs(operator, pairs, rhs, width, why)
    if method == "cholesky" or (method == "auto" and factor_fits(n, memory_limit)):
        why = "asked for" if method == "cholesky" else f"a factor fits, all eigenpairs do not: {needed}"
        return "cholesky", ByFactors(operator, rhs, width, tol=tol, memory_limit=memory_limit, why=why)
    why = "asked for" if method == "streamed" else f"neither eigenpairs nor a factor fit: {needed}"
    inverse = StreamedInverse(operator, tol=tol, seed=seed, memory_limit=memory_limit, monitor=monitor)
    why += f"; {inverse.words}"
    return "streamed", ByPasses(inverse, rhs, width, num_left_out=num_left_out, tol=tol, seed=seed, why=why)


def _most_waiting(rhs: FloatArray, memory_limit: int | None) -> int:
    """Ridges whose coefficients may wait for the test kernel."""
    return max(1, int(_SHARE_OF_COEFFICIENTS * max(0, memory_room(memory_limit))) // max(1, 2 * rhs.nbytes))


def _measures(point: Point, labels: Labels, rhs: FloatArray, width: int) -> dict[str, float]:
    """Numbers of one ridge, by the names of the result."""
    fitted = labels.matrix - as_samples(point.train_residuals, width)
    accuracy = labels.accuracy(fitted)

    def squares(residuals: FloatArray, samples: NDArray[np.int64]) -> FloatArray:
        return np.asarray(np.mean(residuals.reshape(len(samples), -1) ** 2, axis=1))

    def hits(residuals: FloatArray, samples: NDArray[np.int64]) -> FloatArray:
        assert labels.codes is not None
        predicted = labels.matrix[samples] - residuals.reshape(len(samples), -1)
        return np.asarray(predicted.argmax(axis=1) == labels.codes[samples], np.float64)

    loss = point.mean_left_out(squares)
    right = (np.nan, 0.0) if labels.codes is None else point.mean_left_out(hits)
    dimension, crossed = point.effective_dimension, point.generalised_cross_validation
    return {
        "train_loss": float(np.mean(point.train_residuals**2)),
        "train_accuracy": np.nan if accuracy is None else accuracy,
        "effective_dimension": dimension.value,
        "effective_dimension_error": dimension.error,
        "generalised_cross_validation": crossed.value,
        "generalised_cross_validation_error": crossed.error,
        "leave_one_out_loss": loss[0],
        "leave_one_out_loss_error": loss[1],
        "leave_one_out_accuracy": right[0],
        "leave_one_out_accuracy_error": right[1],
        "norm": float(np.sum(point.coefficients * (rhs - point.train_residuals))),
        "residuals": point.residual,
    }


def _judge(statuses: Sequence[tuple[Status, str]], ridges: FloatArray, method: str) -> tuple[Status, str]:
    """One status of all ridges: the worst, with the first reason."""
    failed = [(ridge, *one) for ridge, one in zip(ridges, statuses, strict=True) if one[0] != "converged"]
    if not failed:
        how = "estimates have error bars" if method == "streamed" else "exact"
        return "converged", f"{len(ridges)} ridge{'s'[: len(ridges) != 1]}, {how}"
    ridge, status, why = failed[0]
    return status, f"{len(failed)} of {len(ridges)} ridges, the first λ = {ridge:.4g}: {why}"
