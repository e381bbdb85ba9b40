"""Kernel ridge regression at one ridge after another: by all eigenpairs, by factors, or by passes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.errors import IndefiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.learning.regression import leave_one_out
from ntkpipe.learning.regression.eigensystem import KnownEigenpairs
from ntkpipe.learning.regression.minimum_norm import cut_off, require_all
from ntkpipe.learning.regression.streamed import Convergence, StreamedInverse, runs
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.result import Status

_INDEFINITE: Status = "indefinite at storage precision"


class WithError(NamedTuple):
    """A number and its standard error, zero where it is exact."""

    value: float
    error: float


@dataclass(frozen=True)
class Point:
    """The fit at one ridge, in the rows of the kernel."""

    coefficients: FloatArray  # a, shape (n, c)
    train_residuals: FloatArray  # Y - K A
    effective_dimension: WithError  # effective_dimension, generalised_cross_validation: with their errors
    generalised_cross_validation: WithError
    left_out_samples: NDArray[np.int64]  # samples with leave-one-out residuals: all or some
    left_out_residuals: FloatArray  # residuals of these samples, rows as in the kernel
    proxy_residuals: FloatArray | None  # of all samples, by the mean block of the inverse, where only some are left out
    residual: float = 0.0  # largest relative true residual
    status: Status = "converged"  # whether it can be trusted
    message: str = ""  # why it cannot be trusted

    def mean_left_out(self, value: Callable[[FloatArray, NDArray[np.int64]], FloatArray]) -> WithError:
        """The mean over all samples of a function of residuals and samples, one value a sample.

        Where only some samples were left out this is the difference estimator of sampling theory: the mean over all of
        the values for proxies, and the mean over the sample of what these are off by, with its standard error for a
        simple random sample without replacement (Cochran 1977, Sampling Techniques, sections 2.6 and 7.1).
        """
        exact = value(self.left_out_residuals, self.left_out_samples)
        if self.proxy_residuals is None:
            return WithError(float(exact.mean()), 0.0)
        total, count = len(self.proxy_residuals) * len(exact) // len(self.left_out_residuals), len(exact)
        proxies = value(self.proxy_residuals, np.arange(total))
        gaps = exact - proxies[self.left_out_samples]
        finite = (1.0 - count / total) ** 0.5
        # Gaps that are all the same, such as those of accuracies, do not say that there are no others.
        spread = max(float(gaps.std(ddof=1)), float(np.abs(gaps).max(initial=0.0)) / count)
        return WithError(float(proxies.mean() + gaps.mean()), finite * spread / count**0.5)


class ByEigenpairs:
    """Exact, ``n² (2 c + S)`` multiplications a ridge once all eigenpairs are known.

    At λ = 0 eigenvalues up to the cut-off count as zero, and the fit is the minimum-norm solution, as the limit of
    ridges above the cut-off; see :mod:`ntkpipe.learning.regression.minimum_norm`.
    """

    def __init__(self, operator: Operator, pairs: KnownEigenpairs, rhs: FloatArray, width: int, why: str) -> None:
        self._vectors = require_all(pairs, operator.num_rows)
        self._values = np.asarray(pairs.eigenvalues, np.float64)
        self._cut = cut_off(operator, float(np.abs(self._values).max()))
        self._rhs, self._width, self.why = rhs, width, why
        self._inside = self._vectors.T @ rhs

    def at(self, ridge: float, guess: FloatArray | None) -> Point:
        """The fit at λ."""
        kept = np.ones(len(self._values), bool) if ridge else np.abs(self._values) > self._cut
        shifted = self._values + ridge
        weights = np.divide(1.0, shifted, out=np.zeros_like(shifted), where=kept & (shifted != 0.0))
        coefficients = self._vectors @ (weights[:, None] * self._inside)
        blocks = leave_one_out.weighted_blocks(self._vectors, weights, self._width)
        smallest = float(shifted[kept].min(initial=np.inf))
        status: Status = "converged" if smallest > 0.0 else _INDEFINITE
        message = "" if smallest > 0.0 else f"an eigenvalue of K + λI is {smallest:.3g}"
        if kept.all():
            return _exact_point(ridge, coefficients, blocks, status=status, message=message)
        null = (~kept).astype(np.float64)
        outside = self._vectors @ (null[:, None] * self._inside)
        null_blocks = leave_one_out.weighted_blocks(self._vectors, null, self._width)
        rest = float(null.sum()) / len(null)
        return Point(
            coefficients=coefficients,
            train_residuals=outside,
            effective_dimension=WithError(float(kept.sum()), 0.0),
            generalised_cross_validation=WithError(float(np.mean(outside**2)) / rest**2, 0.0),
            left_out_samples=np.arange(len(blocks)),
            left_out_residuals=leave_one_out.limit_residuals(null_blocks, outside, blocks, coefficients),
            proxy_residuals=None,
            status=status,
            message=message,
        )


class ByFactors:
    """Exact, a Cholesky factor in memory and ``2 n³ / 3`` multiplications and additions for each ridge."""

    def __init__(
        self, operator: Operator, rhs: FloatArray, width: int, *, tol: float, budget: Budget, why: str
    ) -> None:
        self._operator, self._rhs, self._width = operator, rhs, width
        self._tol, self._budget, self.why = tol, budget, why

    def at(self, ridge: float, guess: FloatArray | None) -> Point:
        """The fit at λ; numbers are NaN where K + λI is not positive definite."""
        try:
            factor = cholesky(self._operator, ridge=ridge, memory_limit=self._budget)
        except IndefiniteError as error:
            blocks = np.full((len(self._rhs) // self._width, self._width, self._width), np.nan)
            unknown = np.full_like(self._rhs, np.nan)
            return _exact_point(ridge, unknown, blocks, status=_INDEFINITE, message=str(error))
        found = factor.solve(self._rhs, tol=self._tol)
        return _exact_point(
            ridge,
            np.asarray(found.coefficients),
            leave_one_out.inverse_blocks(factor, self._width),
            residual=float(found.residuals.max(initial=0.0)),
            status=found.status,
            message="" if found.is_converged else found.message,
        )


class ByPasses:
    """Conjugate gradients; leave-one-out and the trace of the inverse from some samples, each of which is exact."""

    def __init__(
        self,
        inverse: StreamedInverse,
        rhs: FloatArray,
        width: int,
        *,
        num_left_out: int,
        tol: float,
        seed: int,
        why: str,
    ) -> None:
        self._inverse, self._rhs, self._width, self._tol, self.why = inverse, rhs, width, tol, why
        count = len(rhs) // width
        self._samples = np.sort(np.random.default_rng(seed).permutation(count)[: min(num_left_out, count)])

    def at(self, ridge: float, guess: FloatArray | None) -> Point:
        """The fit at λ, from the coefficients of another ridge."""
        convergence = Convergence()
        coefficients = self._inverse.times(self._rhs, ridge, convergence, guess)
        blocks = self._blocks(ridge, convergence)
        n, count, taken = len(self._rhs), len(self._rhs) // self._width, len(self._samples)
        traces = np.trace(blocks, axis1=1, axis2=2)
        finite = max(0.0, 1.0 - taken / count) ** 0.5
        trace, error = count * float(traces.mean()), count * finite * float(traces.std(ddof=1)) / taken**0.5
        crossed = float(np.mean(coefficients**2)) / (trace / n) ** 2
        rows = (self._samples[:, None] * self._width + np.arange(self._width)).ravel()
        mean_block = np.broadcast_to(blocks.mean(axis=0), (count, self._width, self._width))
        return Point(
            coefficients=coefficients,
            train_residuals=ridge * coefficients,
            effective_dimension=WithError(n - ridge * trace, ridge * error),
            generalised_cross_validation=WithError(crossed, 2.0 * crossed * error / trace),
            left_out_samples=self._samples,
            left_out_residuals=leave_one_out.residuals(blocks, coefficients[rows]),
            proxy_residuals=None if taken == count else leave_one_out.residuals(mean_block, coefficients),
            residual=convergence.worst,
            status=convergence.status,
            message="; ".join(convergence.messages[:1]),
        )

    def _blocks(self, ridge: float, convergence: Convergence) -> FloatArray:
        """Diagonal blocks of the inverse for the samples that are left out."""
        n, width = len(self._rhs), self._width
        found = np.empty((len(self._samples), width, width))
        for some in runs(len(self._samples), max(1, self._inverse.columns_at_once // width)):
            rows = (self._samples[some, None] * width + np.arange(width)).ravel()
            unit = np.zeros((n, len(rows)))
            unit[rows, np.arange(len(rows))] = 1.0
            found[some] = self._inverse.quadratic(unit, ridge, width, convergence, self._tol**0.5)
        return found


Points = ByEigenpairs | ByFactors | ByPasses


def _exact_point(
    ridge: float,
    coefficients: FloatArray,
    blocks: FloatArray,
    *,
    residual: float = 0.0,
    status: Status = "converged",
    message: str = "",
) -> Point:
    """The fit from coefficients and all diagonal blocks of the inverse."""
    n = len(coefficients)
    trace = float(np.trace(blocks, axis1=1, axis2=2).sum())
    return Point(
        coefficients=coefficients,
        train_residuals=ridge * coefficients,
        effective_dimension=WithError(n - ridge * trace, 0.0),
        generalised_cross_validation=WithError(float(np.mean(coefficients**2)) / (trace / n) ** 2, 0.0),
        left_out_samples=np.arange(len(blocks)),
        left_out_residuals=leave_one_out.residuals(blocks, coefficients),
        proxy_residuals=None,
        residual=residual,
        status=status,
        message=message,
    )
