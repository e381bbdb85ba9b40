"""Systems of many columns in memory that holds a few: conjugate gradients, by runs of columns."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.operator import Operator, Work
from ntkpipe.learning.regression.sources import runs
from ntkpipe.solvers.linear.preconditioner import default_rank, preconditioner_of
from ntkpipe.solvers.linear.solve import solve
from ntkpipe.solvers.linear.systems import bytes_of_solve
from ntkpipe.solvers.result import Monitor, Status, Step
from ntkpipe.solvers.spectral.slq_logdet import slq_logdet

# Blocks of the shape of the right-hand sides, and of the preconditioner, that a solve has in memory at a time.
BLOCKS, FACTORS = bytes_of_solve(1, 1, 0) // 8, bytes_of_solve(1, 0, 1) // 8
# Share of the free memory, so that there is room for what else the process does.
_SHARE = 0.9
_MOST_COLUMNS = 256
# Vectors of n float64 that are taken where the limit has no room for them, since fewer would be no use: a tenth of a
# float32 kernel, but not more than 768.
_LEAST_VECTORS, _ENOUGH_VECTORS, _ROWS_PER_VECTOR = 64, 768, 20
# Probes of the log determinant, and Lanczos vectors of each that there is room for.
_PROBES, _STEPS = 16, 24
# Beside all eigenpairs panels of 1,024 rows, and beside a factor some of its panels.
_BYTES_A_ROW, _PANEL_COLUMNS = 2 * 8 * 1024, 3 * 1024


def vectors_that_fit(num_rows: int, budget: Budget) -> int:
    """How many vectors of float64 a solve may have; whatever the limit, n/20 of them, 64 at least and 768 at most."""
    least = min(max(num_rows // _ROWS_PER_VECTOR, _LEAST_VECTORS), _ENOUGH_VECTORS)
    return max(least, int(_SHARE * budget.room()) // (8 * num_rows))


def rank_beside(num_columns: int, num_rows: int, budget: Budget) -> int:
    """Rank of a preconditioner beside so many columns, at least one."""
    rank = (vectors_that_fit(num_rows, budget) - BLOCKS * num_columns) // FACTORS
    return max(1, min(rank, default_rank(num_rows)))


def eigenpairs_fit(num_rows: int, budget: Budget) -> bool:
    """Whether memory holds K and all of its eigenvectors, ``16 n²`` bytes."""
    return budget.fits(16 * num_rows**2 + _BYTES_A_ROW * num_rows)


def factor_fits(num_rows: int, budget: Budget) -> bool:
    """Whether memory holds a Cholesky factor, ``4 n²`` bytes, and a few panels."""
    return budget.fits(4 * num_rows**2 + 8 * num_rows * min(num_rows, _PANEL_COLUMNS))


@dataclass
class Convergence:
    """How far the solutions of several systems can be trusted, all together."""

    status: Status = "converged"  # that of the first solve that did not converge
    worst: float = 0.0  # the largest relative residual
    messages: list[str] = field(default_factory=list)  # those of solves that did not converge

    def add(self, status: Status, residual: float, message: str) -> None:
        """Take one more solve into account."""
        self.worst = max(self.worst, residual)
        if status != "converged":
            if self.status == "converged":
                self.status = status
            self.messages.append(message)


class StreamedInverse:
    """``(K + λI)^-1`` applied to blocks of columns by passes over K, for any number of columns and ridges.

    Memory is ``8 n (3 rank + 11 c)`` bytes for c columns at a time; both are chosen to fit. Where the limit has no room
    a tenth of a float32 kernel is taken, or 6 kB a row if that is less.
    """

    def __init__(self, operator: Operator, *, tol: float, seed: int, budget: Budget, monitor: Monitor) -> None:
        self._operator = operator
        self._tol, self._seed, self._monitor = tol, seed, monitor
        self._budget = budget
        self._vectors = vectors = vectors_that_fit(operator.num_rows, budget)
        rank = max(1, min(default_rank(operator.num_rows), vectors // 2 // FACTORS))
        self.columns_at_once = max(1, min(_MOST_COLUMNS, (vectors - FACTORS * rank) // BLOCKS))
        self._before = operator.work
        self._preconditioner = preconditioner_of(operator, "rpcholesky", rank, ridge=0.0, seed=seed)

    @property
    def words(self) -> str:
        """Describe the method."""
        rank = self._preconditioner.rank
        return f"conjugate gradients, rank {rank:,}, up to {self.columns_at_once} columns at a time"

    def times(
        self,
        block: FloatArray,
        ridge: float,
        convergence: Convergence,
        initial: FloatArray | None = None,
        tol: float | None = None,
    ) -> FloatArray:
        """``(K + λI)^-1 B``, shape (n, c), from an initial guess if there is one."""
        found = np.empty_like(block)
        for columns in runs(block.shape[1], self.columns_at_once):
            before = self._operator.work - self._before
            one = solve(
                self._operator,
                block[:, columns],
                ridge=ridge,
                method="pcg" if columns.stop - columns.start == 1 else "block_cg",
                task="regression",
                tol=self._tol if tol is None else tol,
                preconditioner=self._preconditioner,
                initial=None if initial is None else initial[:, columns],
                seed=self._seed,
                monitor=partial(self._tell, before),
            )
            convergence.add(one.status, float(one.residuals.max(initial=0.0)), f"λ = {ridge:.3g}: {one.message}")
            found[:, columns] = one.coefficients
        return found

    def _tell(self, before: Work, step: Step) -> None:
        self._monitor(Step(before + step.work, step.residual, step.target))

    def quadratic(
        self, block: FloatArray, ridge: float, width: int, convergence: Convergence, tol: float | None = None
    ) -> FloatArray:
        """``B_i' (K + λI)^-1 B_i`` for each run of ``width`` columns, shape (c / width, width, width).

        Of an approximate solution X with residual R the form ``B'X + X'B - X'(K + λI) X`` is taken, which is below the
        true one by ``R'(K + λI)^-1 R``: an error of second order in the residual, for one more pass.
        """
        solution = self.times(block, ridge, convergence, tol=tol)
        residual = block - self._operator.shifted(ridge).matmat(solution)
        found = _by_runs(block, solution, width) + _by_runs(solution, residual, width)
        return (found + found.transpose(0, 2, 1)) / 2

    def logdet(self, ridge: float, convergence: Convergence) -> tuple[float, float]:
        """``log det(K + λI)`` and its error, Monte-Carlo and truncation together.

        Sixteen probes, in rounds of as many as have room for 24 Lanczos vectors each.
        """
        spare = self._vectors - FACTORS * self._preconditioner.rank
        probes = max(2, min(_PROBES, spare // _STEPS))
        room = 8 * self._operator.num_rows * probes * _STEPS
        found = [
            slq_logdet(
                self._operator,
                ridge=ridge,
                preconditioner=self._preconditioner.for_ridge(ridge),
                num_probes=probes,
                memory_limit=self._budget.at_least(room),
                seed=self._seed + number,
                monitor=self._monitor,
            )
            for number in range(-(-_PROBES // probes))
        ]
        for one in found:
            # Errors of estimates are in their error bars; what has no logarithm is a finding.
            if one.status == "indefinite at storage precision":
                convergence.add(one.status, 0.0, f"log determinant: {one.message}")
        samples = np.concatenate([one.samples for one in found])
        standard_error = float(samples.std(ddof=1)) / len(samples) ** 0.5
        return float(samples.mean()), standard_error + max(one.truncation_error for one in found)


def _by_runs(left: FloatArray, right: FloatArray, width: int) -> FloatArray:
    """``left_i' right_i`` for each run of columns."""
    shape = (len(left), -1, width)
    return np.asarray(np.einsum("nia,nib->iab", left.reshape(shape), right.reshape(shape)), np.float64)
