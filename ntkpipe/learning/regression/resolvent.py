"""What regression theory needs of G = (K + λI)^-1 at several ridges: G Y, its traces and its diagonal.

Exact from all eigenpairs; from systems with random right-hand sides, with errors, where these do not fit in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.operator import Operator
from ntkpipe.learning.regression.eigensystem import Eigensystem
from ntkpipe.learning.regression.leave_one_out import residuals, weighted_blocks
from ntkpipe.solvers.checkpoint import Stages
from ntkpipe.solvers.linear.preconditioner import default_rank, preconditioner_of
from ntkpipe.solvers.linear.solve import solve
from ntkpipe.solvers.linear.systems import bytes_of_solve
from ntkpipe.solvers.result import Monitor


@dataclass(frozen=True)
class Resolvent:
    """What is needed of G = (K + λI)^-1 at one ridge. Errors are zero where numbers are exact."""

    ridge: float  # λ
    coefficients: FloatArray  # A = G Y, shape (n, c)
    trace: float  # tr G
    squared_trace: float  # tr G²
    left_out_loss: float  # mean squared error of rows of a sample predicted from all others; NaN without an estimate
    is_definite: bool  # whether K + λI is positive definite, as far as was seen
    left_out_spread: float = 0.0  # standard error of that loss as a mean over samples
    trace_error: float = 0.0  # errors of estimates are one standard deviation
    squared_trace_error: float = 0.0
    left_out_loss_error: float = 0.0
    residual: float = 0.0  # the largest relative residual of a system


def resolvents_of_pairs(
    system: Eigensystem, rows: FloatArray, ridges: Sequence[float], width: int
) -> Iterator[Resolvent]:
    """Exact, from all eigenpairs: ``n² (c + width²)`` multiplications a ridge."""
    values, vectors = system.eigenvalues, system.eigenvectors
    inner = vectors.T @ rows
    for ridge in ridges:
        shifted = values + ridge
        if (shifted == 0).any():
            unknown = np.full(rows.shape, np.nan)
            yield Resolvent(ridge, unknown, np.nan, np.nan, np.nan, is_definite=False)
            continue
        inverse = 1 / shifted
        coefficients = vectors @ (inverse[:, None] * inner)
        errors = residuals(weighted_blocks(vectors, inverse, width), coefficients)
        losses = (errors**2).reshape(len(rows) // width, -1).mean(axis=1)
        yield Resolvent(
            ridge=ridge,
            coefficients=coefficients,
            trace=float(inverse.sum()),
            squared_trace=float((inverse**2).sum()),
            left_out_loss=float(losses.mean()),
            left_out_spread=_standard_error(losses),
            is_definite=bool(shifted.min() > 0),
        )


def resolvents_of_operator(
    operator: Operator,
    rows: FloatArray,
    ridges: Sequence[float],
    width: int,
    *,
    num_probes: int,
    tol: float,
    budget: Budget,
    seed: int,
    stages: Stages,
    monitor: Monitor,
) -> Iterator[Resolvent]:
    """Estimated, by block conjugate gradients for the targets and random signs, from the first ridge to the last.

    Traces are Hutchinson's (1990), ``E z'Gz = tr G`` for independent signs z, and ``E |Gz|² = tr G²``; their errors
    are the scatter of the probes. The diagonal is that of Bekas, Kokiopoulou, Saad (2007), ``E z * Gz``; the mean
    square of left-out errors divides by it, which is corrected for the scatter to second order, and that correction is
    part of the error. Memory beside the preconditioner is ``11 n (c + p)`` float64.
    """
    n, columns = rows.shape
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (n, num_probes))
    block = np.concatenate([rows, signs], axis=1)
    # The default rank where that fits, but not below a tenth of it.
    room, most = budget.room() - bytes_of_solve(n, block.shape[1], 0), default_rank(n)
    rank = int(max(1, most // 10, min(most, room // bytes_of_solve(n, 0, 1))))
    preconditioner = preconditioner_of(operator, "rpcholesky", rank, ridge=0.0, seed=seed)
    budget = budget.at_least(bytes_of_solve(n, block.shape[1], rank))

    def solved_at(ridge: float, guess: FloatArray | None) -> dict[str, Any]:
        found = solve(
            operator,
            block,
            ridge=ridge,
            method="block_cg",
            task="regression",
            tol=tol,
            preconditioner=preconditioner,
            initial=guess,
            memory_limit=budget,
            seed=seed,
            monitor=monitor,
        )
        return {"solution": found.coefficients, "residual": float(found.residuals.max()), "status": found.status}

    guess = None
    for number, ridge in enumerate(ridges):
        found = stages.once(f"ridge-{number}", partial(solved_at, ridge, guess))
        guess = np.asarray(found["solution"])
        solved, probed = guess[:, :columns], guess[:, columns:]
        samples = signs * probed
        traces, squares = samples.sum(axis=0), (probed**2).sum(axis=0)
        loss, error, spread = _estimated_left_out_loss(samples, solved) if width == 1 else (np.nan, 0.0, 0.0)
        yield Resolvent(
            ridge=ridge,
            coefficients=solved,
            trace=float(traces.mean()),
            trace_error=_standard_error(traces),
            squared_trace=float(squares.mean()),
            squared_trace_error=_standard_error(squares),
            left_out_loss=loss,
            left_out_loss_error=error,
            left_out_spread=spread,
            residual=found["residual"],
            is_definite=found["status"] != "indefinite at storage precision" and bool(traces.min() > 0),
        )


def _estimated_left_out_loss(samples: FloatArray, coefficients: FloatArray) -> tuple[float, float, float]:
    """The mean square of ``A_i / G_ii`` where G_ii is the mean of a row of samples, its error, and its spread."""
    diagonal = samples.mean(axis=1)
    variances = samples.var(axis=1, ddof=1) / samples.shape[1]
    if diagonal.min() <= 0:
        return np.nan, 0.0, 0.0
    squares = (coefficients**2).mean(axis=1) / diagonal**2
    # E (G + e)^-2 = G^-2 (1 + 3 var e / G² + …)
    bias = 3 * variances / diagonal**2
    terms = squares * (1 - bias)
    scatter = np.sqrt(float((4 * squares**2 * variances / diagonal**2).sum())) / len(squares)
    return float(terms.mean()), float(np.hypot(scatter, (squares * bias).mean())), _standard_error(terms)


def _standard_error(samples: FloatArray) -> float:
    return float(samples.std(ddof=1) / len(samples) ** 0.5)
