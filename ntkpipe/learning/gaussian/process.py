"""Gaussian processes with a stored kernel as covariance: posterior, marginal likelihood, exact or streamed."""

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.base.ridge import RidgeScale, absolute_ridge
from ntkpipe.base.targets import Task, as_rows, as_samples
from ntkpipe.learning.gaussian.posterior import Posterior
from ntkpipe.learning.regression.columns import Verdict
from ntkpipe.learning.regression.cross import CrossKernel
from ntkpipe.learning.regression.opening import open_for_analysis
from ntkpipe.learning.regression.sources import initial_matrix, train_targets
from ntkpipe.learning.regression.streamed import StreamedInverse, factor_fits
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.direct.factor import CholeskyFactor
from ntkpipe.solvers.result import Monitor, ignore

Method = Literal["auto", "cholesky", "streamed"]
_METHODS = ("auto", "cholesky", "streamed")


def gaussian_process(
    kernel: Any,
    targets: ArrayLike,
    *,
    ridge: float,
    ridge_scale: RidgeScale = None,
    test_kernel: Any = None,
    test_diagonal: ArrayLike | None = None,
    initial_outputs: ArrayLike | None = None,
    test_initial_outputs: ArrayLike | None = None,
    method: Method = "auto",
    path: str | Path | None = None,
    task: Task = "auto",
    tol: float = 1e-8,
    memory_limit: int | None = None,
    seed: int = 0,
    monitor: Monitor = ignore,
) -> Posterior:
    """Condition a Gaussian process of covariance K on targets with Gaussian noise of variance λ.

    With G = (K + λI)^-1, following Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: the posterior
    mean ``K_* G Y`` (Eq. 2.25), the covariance ``K_** - K_* G K_*'`` of the function without noise (Eq. 2.26), and the
    log marginal likelihood ``-½ y'G y - ½ log det(K + λI) - ½ n log 2π`` (Eq. 2.30), by a Cholesky factor as in
    their Algorithm 2.1. Columns of Y are independent processes with the same covariance, and likelihoods multiply. A
    full NTK is one process over all pairs of a sample and an output. The mean is that of
    :class:`ntkpipe.KernelRegression` with the same ridge.

    For labels of classes the targets are one-hot, as in regression: a Gaussian likelihood, not a classifier's.

    Parameters
    ----------
    kernel
        K: what :func:`ntkpipe.as_operator` takes.
    targets
        Labels of classes (N,), or real targets (N,) or (N, O).
    ridge, ridge_scale
        λ, the variance of the noise, absolute; with ``"mean_diagonal"`` times the mean of the diagonal.
    test_kernel, test_diagonal
        Test × train (M·S, N·S), array or stored, and the blocks of test samples with themselves, (M, S, S), or (M,)
        with one row a sample; both or none.
    initial_outputs, test_initial_outputs
        The prior mean at train and test samples, (N, O) and (M, O), as a network's outputs f₀; default zero.
    method
        ``cholesky``: exact, by a factor in memory, ``4 n²`` bytes, or in ``path``. ``streamed``: every test row is a
        column of a system, solved by passes, and the log determinant is estimated with its error. ``auto``: the factor
        if it fits or there is a path.
    path
        A folder or URL for a factor that does not fit in memory; see :func:`ntkpipe.cholesky`.
    task
        As of :class:`ntkpipe.KernelRegression`.
    tol
        Largest relative true residual of a system that is called converged; errors of variances are of second order
        in it.
    memory_limit
        Bytes that this process may have; default what it has and half of what is free. It decides which method fits;
        streaming takes a tenth of a float32 kernel, or 6 kB a row if that is less, in any case.
    seed
        Of preconditioners and probes.
    monitor
        Called after each pass.

    Raises
    ------
    ConfigError
        If shapes do not fit, or an option is out of range.
    IndefiniteError
        If K + λI is not positive definite, by ``cholesky``; the message says which ridge helps.
    NonFiniteError
        If the kernel or targets hold NaN or infinity.
    ResourceError
        If a factor was asked for and does not fit.
    TileError
        If a tile is missing or damaged; the message names it.

    Notes
    -----
    Cost: n³/3 and ``n² M S`` multiplications and additions; streamed, some tens of passes for each run of test rows
    that fits memory, 256 at most.
    """
    begin = perf_counter()
    _check(method, path, test_kernel, test_diagonal, tol)
    operator, share = open_for_analysis(kernel, memory_limit)
    before = operator.work
    labels, width = train_targets(kernel, operator, targets, initial_outputs, task)
    goal = labels.matrix
    if initial_outputs is not None:
        goal = goal - initial_matrix(initial_outputs, goal.shape)
    rhs = as_rows(goal, width)
    noise = absolute_ridge(ridge, ridge_scale, operator.diagonal)
    test = _Test.of(test_kernel, test_diagonal, operator.num_rows, width)
    offset: FloatArray = np.zeros(1)
    if test_initial_outputs is not None and test is not None:
        offset = initial_matrix(test_initial_outputs, (test.cross.num_samples, goal.shape[1]))
    if test is not None and (test_initial_outputs is None) != (initial_outputs is None):
        raise ConfigError("initial_outputs of one of train and test samples; needed both or none")
    by: _Conditioned
    if method == "cholesky" or (method == "auto" and (path is not None or factor_fits(operator.num_rows, share))):
        by = _ByFactor(operator, rhs, noise, path=path, tol=tol, memory_limit=share, monitor=monitor)
    else:
        by = _ByPasses(operator, rhs, noise, tol=tol, seed=seed, memory_limit=share, monitor=monitor)
    mean, covariance = np.zeros((0, goal.shape[1])), np.zeros((0, width, width))
    if test is not None:
        mean = as_samples(test.cross.times(by.coefficients), width) + offset
        covariance = test.diagonal - by.explained(test.cross, width)
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    clipped = variance < 0.0
    if clipped.any():
        covariance = covariance.copy()
        places = np.arange(width)
        covariance[:, places, places] = np.maximum(variance, 0.0)
    logdet, logdet_error = by.logdet()
    verdict, (n, columns) = by.verdict, rhs.shape
    data_fit, complexity = -0.5 * by.form, -0.5 * columns * logdet
    return Posterior(
        status=verdict.status,
        message=verdict.messages[0] if verdict.messages else by.message,
        work=operator.work - before,
        seconds=perf_counter() - begin,
        options={
            "ridge": ridge,
            "ridge_scale": ridge_scale,
            "method": method,
            "path": None if path is None else str(path),
            "task": task,
            "tol": tol,
            "memory_limit": memory_limit,
            "seed": seed,
            "centred": initial_outputs is not None,
        },
        matrix=operator.identity(),
        mean=mean,
        covariance=covariance,
        variance=np.maximum(variance, 0.0),
        noise=noise,
        log_marginal_likelihood=data_fit + complexity - 0.5 * n * columns * math.log(2 * math.pi),
        log_marginal_likelihood_error=0.5 * columns * logdet_error,
        data_fit=data_fit,
        complexity=complexity,
        scale=by.form / (n * columns),
        mean_diagonal=float(operator.diagonal().mean()),
        num_rows=n,
        num_columns=columns,
        method=by.name,
        why=by.why if method == "auto" else f"asked for; {by.why}",
        residual=verdict.worst,
        num_clipped=int(clipped.sum()),
        floor=operator.storage_floor(),
    )


def _check(method: str, path: Any, test_kernel: Any, test_diagonal: Any, tol: float) -> None:
    """Options."""
    if method not in _METHODS:
        raise ConfigError(f"method={method!r}; needed one of {', '.join(_METHODS)}")
    if method == "streamed" and path is not None:
        raise ConfigError("path is an option of method='cholesky'")
    if (test_kernel is None) != (test_diagonal is None):
        raise ConfigError("a test kernel without the diagonal of test samples, or this without it; needed both or none")
    check_number("tol", tol, low=0.0)


@dataclass(frozen=True)
class _Test:
    """Test samples."""

    cross: CrossKernel
    diagonal: FloatArray

    @classmethod
    def of(cls, kernel: Any, diagonal: Any, num_columns: int, width: int) -> "_Test | None":
        """If there are any."""
        if kernel is None:
            return None
        cross = CrossKernel(kernel, num_columns, width)
        blocks = np.asarray(diagonal, np.float64)
        needed = (cross.num_samples, width, width)
        if blocks.shape != needed and not (width == 1 and blocks.shape == needed[:1]):
            raise ConfigError(f"test_diagonal of shape {blocks.shape}; needed {needed}, as store.test_diagonal")
        if not np.isfinite(blocks).all():
            raise NonFiniteError("test_diagonal holds NaN or infinity")
        return cls(cross, blocks.reshape(needed))


class _Conditioned(Protocol):
    """``G = (K + λI)^-1``, as far as it is needed."""

    name: str
    why: str
    message: str
    coefficients: FloatArray
    verdict: Verdict
    form: float  # tr Y'G Y

    def explained(self, cross: CrossKernel, width: int) -> FloatArray:
        """``K_* G K_*'`` of each test sample, shape (M, S, S)."""

    def logdet(self) -> tuple[float, float]:
        """``log det(K + λI)``, and its error."""


class _ByFactor:
    """Exact, by a Cholesky factor."""

    name = "cholesky"

    def __init__(
        self,
        operator: Operator,
        rhs: FloatArray,
        noise: float,
        *,
        path: str | Path | None,
        tol: float,
        memory_limit: int | None,
        monitor: Monitor,
    ) -> None:
        self._factor: CholeskyFactor = cholesky(
            operator, ridge=noise, path=path, memory_limit=memory_limit, monitor=monitor
        )
        found = self._factor.solve(rhs, tol=tol)
        self.coefficients = np.asarray(found.coefficients)
        self.verdict = Verdict()
        self.verdict.add(found.status, float(found.residuals.max(initial=0.0)), found.message)
        self.form = float(np.sum(rhs * self.coefficients))
        self.why = "a factor in memory" if path is None else f"a factor in {self._factor.path}"
        self.message = "exact, by a Cholesky factor in float64"

    def explained(self, cross: CrossKernel, width: int) -> FloatArray:
        """See :class:`_Conditioned`."""
        found = np.empty((cross.num_samples, width, width))
        for samples, rows in cross.sample_blocks():
            half = self._factor.half_solve(rows.T).T.reshape(-1, width, rows.shape[1])
            found[samples] = half @ half.transpose(0, 2, 1)
        return found

    def logdet(self) -> tuple[float, float]:
        """See :class:`_Conditioned`."""
        return self._factor.logdet, 0.0


class _ByPasses:
    """By conjugate gradients, and stochastic quadrature for the determinant."""

    name = "streamed"

    def __init__(
        self,
        operator: Operator,
        rhs: FloatArray,
        noise: float,
        *,
        tol: float,
        seed: int,
        memory_limit: int | None,
        monitor: Monitor,
    ) -> None:
        self._noise = noise
        self._inverse = StreamedInverse(operator, tol=tol, seed=seed, memory_limit=memory_limit, monitor=monitor)
        self.verdict = Verdict()
        self.coefficients = self._inverse.times(rhs, noise, self.verdict)
        # To second order in the residual, as in StreamedInverse.quadratic, also where directions began anew.
        residual = rhs - operator.shifted(noise).matmat(self.coefficients)
        self.form = float(np.sum(rhs * self.coefficients) + np.sum(self.coefficients * residual))
        self.why = f"a factor does not fit; {self._inverse.words}"
        self.message = "systems are solved; the log determinant is an estimate with its error"

    def explained(self, cross: CrossKernel, width: int) -> FloatArray:
        """See :class:`_Conditioned`."""
        found = np.empty((cross.num_samples, width, width))
        for samples, rows in cross.sample_blocks(max(1, self._inverse.columns_at_once // width)):
            found[samples] = self._inverse.quadratic(np.ascontiguousarray(rows.T), self._noise, width, self.verdict)
        return found

    def logdet(self) -> tuple[float, float]:
        """See :class:`_Conditioned`."""
        return self._inverse.logdet(self._noise, self.verdict)
