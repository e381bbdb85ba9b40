"""Kernel ridge regression at one ridge after another: by all eigenpairs, by factors, or by passes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.errors import IndefiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.learning.regression import leave_one_out
from ntkpipe.learning.regression.eigensystem import KnownEigenpairs
from ntkpipe.learning.regression.minimum_norm import cut_off, pseudo_inverse, require_all
from ntkpipe.learning.regression.sources import WithError, rows_of
from ntkpipe.learning.regression.streamed import Convergence, StreamedInverse
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.result import Status

_INDEFINITE: Status = "indefinite at storage precision"


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


# The fit at a ridge λ, where iterations begin with the coefficients of another ridge.
Finder = Callable[[float, FloatArray | None], Point]


def by_eigenpairs(operator: Operator, pairs: KnownEigenpairs, rhs: FloatArray, width: int) -> Finder:
    """Exact, ``n² (2 c + S)`` multiplications a ridge once all eigenpairs are known.

    At λ = 0 eigenvalues up to the cut-off count as zero, and the fit is the minimum-norm solution, as the limit of
    ridges above the cut-off; see :mod:`ntkpipe.learning.regression.minimum_norm`.
    """
    vectors, values = require_all(pairs, operator.num_rows), np.asarray(pairs.eigenvalues, np.float64)
    cut = cut_off(operator, float(np.abs(values).max()))
    inside = vectors.T @ rhs

    def at(ridge: float, guess: FloatArray | None) -> Point:
        weights, kept, smallest = pseudo_inverse(values, ridge, cut)
        coefficients = vectors @ (weights[:, None] * inside)
        blocks = leave_one_out.weighted_blocks(vectors, weights, width)
        found: dict[str, Any] = {}
        if smallest <= 0.0:
            found = {"status": _INDEFINITE, "message": f"an eigenvalue of K + λI is {smallest:.3g}"}
        if kept.all():
            return _point(ridge, coefficients, blocks, **found)
        null = (~kept).astype(np.float64)
        outside = vectors @ (null[:, None] * inside)
        null_blocks = leave_one_out.weighted_blocks(vectors, null, width)
        rest = float(null.sum()) / len(null)
        return Point(
            coefficients=coefficients,
            train_residuals=outside,
            effective_dimension=WithError(float(kept.sum()), 0.0),
            generalised_cross_validation=WithError(float(np.mean(outside**2)) / rest**2, 0.0),
            left_out_samples=np.arange(len(blocks)),
            left_out_residuals=leave_one_out.limit_residuals(null_blocks, outside, blocks, coefficients),
            proxy_residuals=None,
            **found,
        )

    return at


def by_factors(operator: Operator, rhs: FloatArray, width: int, *, tol: float, budget: Budget) -> Finder:
    """Exact, a Cholesky factor in memory and ``2 n³ / 3`` multiplications and additions for each ridge.

    Numbers are NaN where K + λI is not positive definite.
    """

    def at(ridge: float, guess: FloatArray | None) -> Point:
        try:
            factor = cholesky(operator, ridge=ridge, memory_limit=budget)
        except IndefiniteError as error:
            blocks = np.full((len(rhs) // width, width, width), np.nan)
            return _point(ridge, np.full_like(rhs, np.nan), blocks, status=_INDEFINITE, message=str(error))
        found = factor.solve(rhs, tol=tol)
        return _point(
            ridge,
            np.asarray(found.coefficients),
            leave_one_out.inverse_blocks(factor, width),
            residual=float(found.residuals.max(initial=0.0)),
            status=found.status,
            message="" if found.is_converged else found.message,
        )

    return at


def by_passes(
    inverse: StreamedInverse, rhs: FloatArray, width: int, *, num_left_out: int, tol: float, seed: int
) -> Finder:
    """Conjugate gradients; leave-one-out and the trace of the inverse from some samples, each of which is exact."""
    count = len(rhs) // width
    samples = np.sort(np.random.default_rng(seed).permutation(count)[: min(num_left_out, count)])

    def at(ridge: float, guess: FloatArray | None) -> Point:
        convergence = Convergence()
        coefficients = inverse.times(rhs, ridge, convergence, guess)

        def quadratic(columns: FloatArray) -> FloatArray:
            return inverse.quadratic(columns, ridge, width, convergence, tol**0.5)

        blocks = leave_one_out.blocks_at(samples, len(rhs), width, inverse.columns_at_once, quadratic)
        if not (np.trace(blocks, axis1=1, axis2=2) > 0.0).all():  # of a matrix that is not positive definite
            blocks = np.full_like(blocks, np.nan)
        said = {"status": convergence.status, "message": "; ".join(convergence.messages[:1])}
        return _point(ridge, coefficients, blocks, samples, residual=convergence.worst, **said)

    return at


def _point(
    ridge: float, coefficients: FloatArray, blocks: FloatArray, samples: NDArray[np.int64] | None = None, **found: Any
) -> Point:
    """The fit from coefficients and diagonal blocks of the inverse, of all samples or of some."""
    n, width, taken = len(coefficients), blocks.shape[1], len(blocks)
    count = n // width
    samples = np.arange(count) if samples is None else samples
    traces = np.trace(blocks, axis1=1, axis2=2)
    trace, error, proxies = float(traces.sum()), 0.0, None
    if taken < count:
        finite = (1.0 - taken / count) ** 0.5
        trace, error = count * float(traces.mean()), count * finite * float(traces.std(ddof=1)) / taken**0.5
        mean_block = np.broadcast_to(blocks.mean(axis=0), (count, width, width))
        proxies = leave_one_out.residuals(mean_block, coefficients)
    crossed = float(np.mean(coefficients**2)) / (trace / n) ** 2
    return Point(
        coefficients=coefficients,
        train_residuals=ridge * coefficients,
        effective_dimension=WithError(n - ridge * trace, ridge * error),
        generalised_cross_validation=WithError(crossed, 2.0 * crossed * error / trace if error else 0.0),
        left_out_samples=samples,
        left_out_residuals=leave_one_out.residuals(blocks, coefficients[rows_of(samples, width)]),
        proxy_residuals=proxies,
        **found,
    )
