"""The inverse by passes over the matrix: conjugate gradients, by runs of columns, in memory that holds a few."""

from functools import partial
from typing import Any, Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import Budget
from ntkpipe.base.operator import Operator, Work
from ntkpipe.solvers.inverse.contract import INDEFINITE, UNKNOWN, Fit, Inverse, Question, Verdict, WithError
from ntkpipe.solvers.linear.cg import RECURRENCES, Iterate, Iteration
from ntkpipe.solvers.linear.preconditioner import Preconditioner, default_rank, preconditioner_of
from ntkpipe.solvers.memory import BLOCKS, FACTORS
from ntkpipe.solvers.result import Monitor, Step
from ntkpipe.solvers.spectral.logdet import slq_logdet

# Share of the free memory, so that there is room for what else the process does.
_SHARE = 0.9
_MOST_COLUMNS = 256
# Vectors of n float64 that are taken where the limit has no room for them, since fewer would be no use: a tenth of a
# float32 kernel, but not more than 768.
_LEAST_VECTORS, _ENOUGH_VECTORS, _ROWS_PER_VECTOR = 64, 768, 20
# Probes of the log determinant, and Lanczos vectors of each that there is room for.
_PROBES, _STEPS = 16, 24

Recurrence = Literal["pcg", "block_cg"]


def least_bytes(num_rows: int) -> int:
    """What iterations take whatever the limit: n/20 vectors of float64, 64 at least and 768 at most."""
    return 8 * num_rows * min(max(num_rows // _ROWS_PER_VECTOR, _LEAST_VECTORS), _ENOUGH_VECTORS)


def vectors_that_fit(num_rows: int, budget: Budget) -> int:
    """How many vectors of float64 a solve may have."""
    return max(least_bytes(num_rows), int(_SHARE * budget.room())) // (8 * num_rows)


def recurrence_for(num_columns: int) -> Recurrence:
    """Columns share directions, unless there is only one."""
    return "pcg" if num_columns == 1 else "block_cg"


@single_threaded_blas()
def iterate(
    operator: Operator,
    rhs: FloatArray,
    ridge: float,
    preconditioner: Preconditioner,
    recurrence: Recurrence | None = None,
    **options: Any,
) -> Iterate:
    """Conjugate gradients for one system; options are those of :class:`Iteration`."""
    shifted = operator.shifted(ridge)
    kind = RECURRENCES[recurrence or recurrence_for(rhs.shape[1])]
    return Iteration(shifted, rhs, **options).run(partial(kind, shifted, preconditioner.for_ridge(ridge)))


class ByPasses(Inverse):
    """Solved systems, and estimates with their errors, in some tens of passes for each run of columns.

    Memory is ``8 n (3 rank + 11 c)`` bytes for c columns at a time; both are chosen to fit. Where the limit has no room
    a tenth of a float32 kernel is taken, or 6 kB a row if that is less.
    """

    method = "streamed"

    def __init__(
        self, operator: Operator, *, tol: float, seed: int, budget: Budget, monitor: Monitor, why: str = ""
    ) -> None:
        super().__init__(operator)
        self._tol, self._seed, self._monitor, self._budget = tol, seed, monitor, budget
        self._vectors = vectors = vectors_that_fit(operator.num_rows, budget)
        rank = max(1, min(default_rank(operator.num_rows), vectors // 2 // FACTORS))
        self.columns_at_once = max(1, min(_MOST_COLUMNS, (vectors - FACTORS * rank) // BLOCKS))
        self._before = operator.work
        self._preconditioner = preconditioner_of(operator, "rpcholesky", rank, seed)
        words = f"conjugate gradients, rank {rank:,}, up to {self.columns_at_once} columns at a time"
        self.why = f"{why}; {words}" if why else words

    def times(
        self,
        block: FloatArray,
        ridge: float,
        verdict: Verdict,
        tol: float | None = None,
        start: FloatArray | None = None,
    ) -> FloatArray:
        """See :class:`Inverse`; iterations begin with ``start``."""
        found, tol = np.empty_like(block), self._tol if tol is None else tol
        for columns in runs(block.shape[1], self.columns_at_once):
            part, initial = np.ascontiguousarray(block[:, columns]), None if start is None else start[:, columns]
            monitor = partial(self._tell, self.operator.work - self._before)
            one = iterate(self.operator, part, ridge, self._preconditioner, tol=tol, initial=initial, monitor=monitor)
            verdict.add(one.status, float(one.residuals.max(initial=0.0)), f"λ = {ridge:.3g}: {one.message}")
            found[:, columns] = one.solution
        return found

    def _tell(self, before: Work, step: Step) -> None:
        self._monitor(Step(before + step.work, step.residual, step.target))

    def forms(
        self, block: FloatArray, ridge: float, width: int, verdict: Verdict, tol: float | None = None
    ) -> FloatArray:
        """See :class:`Inverse`.

        Of an approximate solution X with residual R the form ``B'X + X'B - X'(K + λI) X`` is taken, which is below the
        true one by ``R'(K + λI)^-1 R``: an error of second order in the residual, for one more pass.
        """
        solution = self.times(block, ridge, verdict, tol)
        residual = self._residual(block, solution, ridge)
        found = _by_runs(block, solution, width) + _by_runs(solution, residual, width)
        return (found + found.transpose(0, 2, 1)) / 2

    def data_fit(self, block: FloatArray, solution: FloatArray, ridge: float) -> float:
        """See :class:`Inverse`; of second order in the residual, as forms are."""
        residual = self._residual(block, solution, ridge)
        return super().data_fit(block, solution, ridge) + float(np.sum(solution * residual))

    def _residual(self, block: FloatArray, solution: FloatArray, ridge: float) -> FloatArray:
        return block - self.operator.shifted(ridge).matmat(solution)

    def fit(self, question: Question, ridge: float, start: FloatArray | None = None) -> Fit:
        """See :class:`Inverse`; some samples are left out, and traces are estimated from probes."""
        verdict, width, columns = Verdict(), question.width, question.rhs.shape[1]
        samples, rhs = question.some_samples(), question.rhs
        if question.num_probes:
            rhs = np.concatenate([rhs, question.signs()], axis=1)
        solution = self.times(rhs, ridge, verdict, start=start)
        of_units = Verdict()  # whose residuals count by their squares
        form = partial(self.forms, ridge=ridge, width=width, verdict=of_units, tol=self._tol**0.5)
        blocks = self.blocks(samples, width, self.columns_at_once, form)
        verdict.add(of_units.status, of_units.worst**2, of_units.message)
        if not (np.trace(blocks, axis1=1, axis2=2) > 0.0).all():  # of a matrix that is not positive definite
            blocks = np.full_like(blocks, np.nan)
            if verdict.status == "converged":
                verdict.add(INDEFINITE, 0.0, f"λ = {ridge:.3g}: a block of the inverse is not positive")
        trace, squares = question.traces(solution[:, columns:]) if question.num_probes else (UNKNOWN, UNKNOWN)
        is_exact = len(samples) == question.num_samples  # by the blocks
        how: dict[str, Any] = {"trace": None if is_exact else trace, "squared_trace": squares}
        return question.fit(ridge, solution, blocks, verdict, samples=samples, **how)

    def logdet(self, ridge: float, verdict: Verdict) -> WithError:
        """See :class:`Inverse`; the error is Monte-Carlo and truncation together.

        Sixteen probes, in rounds of as many as have room for 24 Lanczos vectors each.
        """
        spare = self._vectors - FACTORS * self._preconditioner.rank
        probes = max(2, min(_PROBES, spare // _STEPS))
        room = self._budget.at_least(8 * self.operator.num_rows * probes * _STEPS)
        how: dict[str, Any] = {"preconditioner": self._preconditioner.for_ridge(ridge), "monitor": self._monitor}
        how |= {"ridge": ridge, "num_probes": probes, "memory_limit": room}
        rounds = range(-(-_PROBES // probes))
        found = [slq_logdet(self.operator, seed=self._seed + number, **how) for number in rounds]
        for one in found:
            # Errors of estimates are in their error bars; what has no logarithm is a finding.
            if one.status == INDEFINITE:
                verdict.add(one.status, 0.0, f"log determinant: {one.message}")
        samples = np.concatenate([one.samples for one in found])
        standard_error = float(samples.std(ddof=1)) / len(samples) ** 0.5
        return WithError(float(samples.mean()), standard_error + max(one.truncation_error for one in found))


def _by_runs(left: FloatArray, right: FloatArray, width: int) -> FloatArray:
    """``left_i' right_i`` for each run of columns."""
    shape = (len(left), -1, width)
    return np.asarray(np.einsum("nia,nib->iab", left.reshape(shape), right.reshape(shape)), np.float64)
