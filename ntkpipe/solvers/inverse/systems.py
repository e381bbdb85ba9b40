"""Choice of a method: conjugate gradients or Cholesky, by forecasts of their time, and changes between them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.errors import ConfigError, IndefiniteError, ResourceError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.base.resources import num_cores
from ntkpipe.operators.blas import single_threaded_blas
from ntkpipe.solvers.checkpoint import Stages
from ntkpipe.solvers.direct.cholesky import bytes_of_cholesky, cholesky
from ntkpipe.solvers.direct.factor import DirectSolution
from ntkpipe.solvers.linear.cg import RECURRENCES
from ntkpipe.solvers.linear.checkpoint import Stage, SystemCheckpoint, preconditioner_once
from ntkpipe.solvers.linear.preconditioner import Preconditioner, checked_rank, default_rank, preconditioner_of
from ntkpipe.solvers.linear.residual_replacement import Iterate, Iteration, IterationState
from ntkpipe.solvers.linear.solution import Solution
from ntkpipe.solvers.result import Monitor, Step

_BLOCKS = 11  # blocks of the shape of the right-hand sides in memory at a time
_FACTORS = 3  # blocks of the shape of the preconditioner in memory at a time
_ITERATIONS = 50  # kernels need 30 to 60 to a residual of 1e-6, as measured at ranks of n/10 to n/4
_THIN = 0.3  # rate of thin matrix products, relative to large ones
_PANELS = 0.4  # rate of a factorisation in panels, relative to large products
_SAMPLE = 1024
_BYTES_PER_SECOND = 5e9  # for a matrix in memory, where no read has been timed
_DISK_BYTES_PER_SECOND = 1e9
_SMALL = 1000  # up to so many rows nothing is worth a measurement
_LEAST_HISTORY = 10


@dataclass(frozen=True)
class SolveOptions:
    """Options that all ridges share."""

    method: str
    tol: float
    rank: int | None
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner
    max_passes: int
    seed: int
    budget: Budget
    monitor: Monitor
    path: str | Path | None = None

    def resolved(self, operator: Operator) -> dict[str, Any]:
        """Options whose defaults depend on others, and names in place of objects."""
        kind = self.preconditioner if isinstance(self.preconditioner, str) else self.preconditioner.method
        return {"rank": self.rank_of(operator), "preconditioner": kind, "max_passes": self.max_passes}

    def rank_of(self, operator: Operator) -> int:
        """Rank of the preconditioner."""
        if isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner.rank
        return checked_rank(self.rank, operator.num_rows)


class Systems:
    """Systems with one matrix and one block of right-hand sides, solved in turn.

    With ``stages`` the preconditioner is one of them; otherwise it is saved in the checkpoint of the system, ``kept``.
    """

    def __init__(
        self,
        operator: Operator,
        rhs: FloatArray,
        options: SolveOptions,
        num_ridges: int,
        kept: SystemCheckpoint,
        stages: Stages | None = None,
    ) -> None:
        self._operator, self._rhs, self._options, self._kept, self._stages = operator, rhs, options, kept, stages
        self._given = options.preconditioner
        if isinstance(self._given, Preconditioner) and self._given.num_rows != operator.num_rows:
            raise ConfigError(
                f"a preconditioner of {self._given.num_rows:,} rows for a matrix of {operator.num_rows:,} rows"
            )
        self._preconditioner = self._given if isinstance(self._given, Preconditioner) else kept.preconditioner
        if self._preconditioner is None and stages is not None and "preconditioner" in stages:
            self._preconditioner = self._make()
        self._start, self._before = perf_counter(), operator.work
        self._alternative: float | None = None
        self._cg: Literal["pcg", "block_cg"] = "pcg" if rhs.shape[1] == 1 else "block_cg"
        self._direct, self._why = options.method == "cholesky", "asked for"
        if options.method == "auto":
            rank = 0 if self._preconditioner else options.rank_of(operator)
            in_files = options.path is not None
            expected = forecast(operator, rhs.shape[1], rank, num_ridges, options.budget, in_files=in_files)
            self._alternative = expected.factoring
            self._direct = expected.factoring is not None and expected.factoring <= expected.iterating
            small = f"{operator.num_rows:,} rows are few"
            self._why = expected.words if math.isfinite(expected.iterating) else small
        elif options.method in {"pcg", "block_cg"}:
            self._cg = cast(Literal["pcg", "block_cg"], options.method)
        self._go_on(kept)

    def _go_on(self, kept: SystemCheckpoint) -> None:
        self._kept = kept
        if kept.stage is not None:
            # An earlier decision stays: another timing must not throw away what is there.
            self._direct, self._why = False, kept.why
            self._alternative = None if kept.stage == "no factor" else self._alternative

    def _spent(self) -> tuple[Work, float]:
        """Cost of the current solution, including earlier processes."""
        work = self._kept.work + (self._operator.work - self._before)
        return work, self._kept.seconds + perf_counter() - self._start

    def _save(self, progress: IterationState | None = None) -> None:
        stage: Stage = "iterating" if self._alternative is not None or self._options.method != "auto" else "no factor"
        self._kept.save(stage, self._why, *self._spent(), progress)

    def _make(self) -> Preconditioner:
        options, kept, before = self._options, self._kept, self._operator.work
        kind, seed = str(self._given), options.seed
        make = partial(preconditioner_of, self._operator, kind, options.rank, ridge=0.0, seed=seed)
        if self._stages is not None:
            made = preconditioner_once(self._stages, self._operator.num_rows, make)
        else:
            made = kept.preconditioner = make()
        kept.made += self._operator.work - before
        return made

    def _monitor(self) -> Monitor:
        spent = self._spent()[0]
        return lambda step: self._options.monitor(Step(spent + step.work, step.residual, step.target))

    def solve(self, ridge: float, initial: FloatArray | None, kept: SystemCheckpoint | None = None) -> Solution:
        """Solve one system; ``kept`` is its own checkpoint, where there are several."""
        if kept is not None:
            self._go_on(kept)
        if self._direct:
            try:
                factored = self._factor(ridge)
            except (IndefiniteError, ResourceError) as error:
                if self._options.method != "auto":
                    raise
                self._without_factor(_failure(error))
            else:
                if factored.is_converged or self._options.method != "auto":
                    return factored
                return self._better(factored, ridge, initial)
        if self._kept.stage == "given up" and self._kept.progress is not None and self._alternative is not None:
            return self._factor_instead(ridge, self._kept.progress)
        return self._iterate(ridge, initial)

    def _better(self, factored: Solution, ridge: float, initial: FloatArray | None) -> Solution:
        """Iterate, too, where a factor missed the tolerance: a singular matrix may have passed for a definite one."""
        worst = float(factored.residuals.max())
        self._without_factor(f"left a residual of {worst:.2g}")
        iterated = self._iterate(ridge, initial)
        best = iterated if iterated.is_converged or iterated.residuals.max() < worst else factored
        return replace(
            best,
            work=factored.work + iterated.work,
            seconds=factored.seconds + iterated.seconds,
            preconditioner_work=iterated.preconditioner_work,
        )

    def _factor_instead(self, ridge: float, progress: IterationState) -> Solution:
        """Factor after conjugate gradients were given up; go on with them if a factor is impossible."""
        self._kept.save("given up", self._why, *self._spent())
        try:
            return self._factor(ridge, progress)
        except (IndefiniteError, ResourceError) as error:
            self._without_factor(_failure(error))
            self._save()
            return self._iterate(ridge, None, progress)

    def _without_factor(self, why: str) -> None:
        self._direct, self._alternative, self._why = False, None, f"Cholesky {why}"

    def _factor(self, ridge: float, after: IterationState | None = None) -> Solution:
        options, budget = self._options, self._options.budget
        factor = cholesky(self._operator, ridge=ridge, path=options.path, memory_limit=budget, monitor=self._monitor())
        found = factor.solve(self._rhs, refine=1, tol=options.tol)
        return self._solution(ridge, "cholesky", found, found.coefficients, after)

    def _iterate(self, ridge: float, initial: FloatArray | None, earlier: IterationState | None = None) -> Solution:
        options, kept = self._options, self._kept
        (n, columns), rank = self._rhs.shape, options.rank_of(self._operator)
        what = f"a solve of {columns:,} columns of {n:,} rows at rank {rank:,}"
        advice = "give a smaller rank, or fewer columns at a time"
        options.budget.require(bytes_of_solve(n, columns, rank), what, advice)
        if self._preconditioner is None:
            self._preconditioner = self._make()
            self._save()
        shifted = self._operator.shifted(ridge)
        iteration = Iteration(
            shifted,
            self._rhs,
            initial=initial,
            tol=options.tol,
            max_passes=options.max_passes,
            monitor=self._monitor(),
            give_up=None if self._alternative is None else hopeless_after(self._alternative, options.tol),
            earlier=earlier or kept.progress,
            keep=self._save,
        )
        end = iteration.run(partial(RECURRENCES[self._cg], shifted, self._preconditioner.for_ridge(ridge)))
        if end.gave_up and end.status != "converged":
            return self._factor_instead(ridge, end)
        return self._solution(ridge, self._cg, end, end.solution, end)

    def _solution(
        self,
        ridge: float,
        method: str,
        found: DirectSolution | Iterate,
        coefficients: FloatArray,
        state: IterationState | None,
    ) -> Solution:
        operator, kept, used = self._operator, self._kept, self._preconditioner if state else None
        why, (work, seconds) = self._why, self._spent()
        if state and method == "cholesky":
            why = f"conjugate gradients were given up after {state.iterations} iterations, as too slow"
        columns = self._rhs.shape[1]
        solution = Solution(
            status=found.status,
            message=found.message,
            work=work,
            seconds=seconds,
            options={"ridge": ridge, **self._options.resolved(operator)},
            coefficients=coefficients,
            residuals=np.array(found.residuals),
            ridge=ridge,
            method=method,
            why=why,
            iterations=state.iterations if state else 0,
            history=state.history if state else np.zeros((0, columns)),
            checks=state.checks if state else np.zeros(0, np.int64),
            check_residuals=state.check_residuals if state else np.zeros((0, columns)),
            replacements=state.replacements if state else 0,
            rank=used.rank if used else 0,
            mu=used.for_ridge(ridge).mu if used else 1.0,
            preconditioner_work=kept.made,
        )
        self._start, self._before = perf_counter(), operator.work
        kept.work, kept.seconds, kept.made, kept.progress = Work(), 0.0, Work(), None
        return solution


def _failure(error: Exception) -> str:
    return "met a pivot that is not positive" if isinstance(error, IndefiniteError) else "has no room"


def bytes_of_solve(num_rows: int, num_columns: int, rank: int | None = None) -> int:
    """Memory of conjugate gradients for so many right-hand sides, the making of their preconditioner included."""
    rank = default_rank(num_rows) if rank is None else min(rank, num_rows)
    return 8 * num_rows * (_FACTORS * rank + _BLOCKS * num_columns)


@dataclass(frozen=True)
class Forecast:
    """Seconds that a system is expected to take."""

    iterating: float  # by conjugate gradients, for one ridge, with its share of the preconditioner
    factoring: float | None  # by a Cholesky factor, in memory or in files; None if it does not fit

    @property
    def words(self) -> str:
        """Both times in words."""
        if self.factoring is None:
            return "a Cholesky factor does not fit memory, and path= names no folder for it"
        return f"about {self.factoring:.2g} s by Cholesky, {self.iterating:.2g} s by conjugate gradients"


def forecast(
    operator: Operator, num_columns: int, rank: int, num_ridges: int, budget: Budget, *, in_files: bool = False
) -> Forecast:
    """Estimate both methods from n, the rate of a matrix product, and the time of a pass."""
    n, room = operator.num_rows, budget.room()
    fits = in_files or bytes_of_cholesky(n) <= room
    if n <= _SMALL:
        return Forecast(math.inf, 0.0 if fits else None)
    rate, read = _flops_per_second(), _seconds_to_read(operator)
    product = max(read, 2.0 * n * n * num_columns / (_THIN * rate))
    applied = 8.0 * n * rank * num_columns / (_THIN * rate)
    made = (6.0 * n * rank**2 / rate + read) / num_ridges
    factoring = n**3 / 3.0 / (_PANELS * rate) + 2 * read if fits else None
    if in_files and factoring is not None:
        # Every panel reads those before it, and the factor is written and read twice more.
        panels = math.ceil(8.0 * n * n / max(room, 8 * n))
        factoring += (3 + panels / 3) * 4.0 * n * n / _DISK_BYTES_PER_SECOND
    return Forecast(made + _ITERATIONS * (product + applied), factoring)


def hopeless_after(seconds: float, tol: float) -> Callable[[FloatArray], bool]:
    """Make a test of the history that says whether to stop iterating, given the seconds of the alternative.

    It says yes once half of those are spent and the remaining iterations, extrapolated from the second half of the
    history, need more than all. So the total is at most 1.5 times the alternative, and the time for the preconditioner.
    """
    start = perf_counter()

    def is_hopeless(history: FloatArray) -> bool:
        spent, count = perf_counter() - start, len(history)
        if count < _LEAST_HISTORY or spent < seconds / 2:
            return False
        return iterations_left(history, tol) * spent / count > seconds

    return is_hopeless


def iterations_left(history: FloatArray, tol: float) -> float:
    """Iterations until the largest residual is ``tol``, extrapolated from a history of shape (m, c)."""
    worst = np.log(np.maximum(history.max(axis=1), np.finfo(np.float64).tiny))
    half = len(worst) // 2
    drop = (worst[half] - worst[-1]) / max(1, len(worst) - 1 - half)
    missing = float(worst[-1]) - math.log(max(tol, np.finfo(np.float64).tiny))
    if missing <= 0.0:
        return 0.0
    return missing / float(drop) if drop > 0.0 else math.inf


def _seconds_to_read(operator: Operator) -> float:
    """Time of the pass for diagonal and Frobenius norm, which all methods need; a guess if it is done already."""
    before, start = operator.work.passes, perf_counter()
    operator.statistics()
    if operator.work.passes - before > 0.5:
        return perf_counter() - start
    return operator.num_rows**2 * operator.storage_dtype.itemsize / _BYTES_PER_SECOND


@cache
def _flops_per_second() -> float:
    """Rate of float64 matrix products on all cores, from the best of a few on one core; measured once."""
    block = np.ones((_SAMPLE, _SAMPLE))
    best = math.inf
    with single_threaded_blas():
        for _ in range(3):
            start = perf_counter()
            block @ block
            best = min(best, perf_counter() - start)
    return num_cores() * 2.0 * _SAMPLE**3 / best
