"""Systems with one matrix and one block of right-hand sides, by the method that was asked for or is fastest."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, IndefiniteError, ResourceError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.base.resources import format_bytes, memory_room
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.linear.cg import block_cg, pcg
from ntkpipe.solvers.linear.checkpoint import Kept, Stage
from ntkpipe.solvers.linear.choosing import forecast, hopeless_after
from ntkpipe.solvers.linear.preconditioner import Preconditioner, default_rank, preconditioner_of
from ntkpipe.solvers.linear.replacement import Progress
from ntkpipe.solvers.linear.solution import Solution
from ntkpipe.solvers.result import Monitor, Status, Step

# Blocks of the shape of the right-hand sides, and of the preconditioner, that are in memory at a time.
_BLOCKS = 11
_FACTORS = 3


@dataclass(frozen=True)
class Options:
    """What is the same for all ridges."""

    method: str
    tol: float
    rank: int | None
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner
    max_passes: int
    seed: int
    memory_limit: int | None
    monitor: Monitor
    path: str | Path | None = None

    def to_json(self, operator: Operator) -> dict[str, Any]:
        """As data, defaults filled in."""
        given = self.preconditioner
        return {
            "method": self.method,
            "tol": self.tol,
            "rank": self.rank_of(operator),
            "preconditioner": given if isinstance(given, str) else given.method,
            "max_passes": self.max_passes,
            "seed": self.seed,
            "memory_limit": self.memory_limit,
            "path": None if self.path is None else str(self.path),
        }

    def rank_of(self, operator: Operator) -> int:
        """Of the preconditioner."""
        if isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner.rank
        return default_rank(operator.num_rows) if self.rank is None else min(self.rank, operator.num_rows)


class Systems:
    """Systems with one matrix and one block of right-hand sides, solved one after another; or one that is kept."""

    def __init__(
        self, operator: Operator, rhs: NDArray[np.float64], options: Options, num_ridges: int, kept: Kept
    ) -> None:
        self._operator, self._rhs, self._options, self._kept = operator, rhs, options, kept
        self._given = options.preconditioner
        if isinstance(self._given, Preconditioner) and self._given.num_rows != operator.num_rows:
            raise ConfigError(
                f"a preconditioner of {self._given.num_rows:,} rows for a matrix of {operator.num_rows:,} rows"
            )
        self._preconditioner = self._given if isinstance(self._given, Preconditioner) else kept.preconditioner
        self._start, self._before = perf_counter(), operator.work
        self._alternative: float | None = None
        self._cg: Literal["pcg", "block_cg"] = "pcg" if rhs.shape[1] == 1 else "block_cg"
        self._direct, self._why = options.method == "cholesky", "asked for"
        if options.method == "auto":
            self._choose(num_ridges)
        elif options.method in {"pcg", "block_cg"}:
            self._cg = cast(Literal["pcg", "block_cg"], options.method)
        if kept.stage is not None:
            # What was decided stays: other clocks would throw away what is there.
            self._direct, self._why = False, kept.why
            self._alternative = None if kept.stage == "no factor" else self._alternative

    def _choose(self, num_ridges: int) -> None:
        """Take what is expected to be faster."""
        expected = forecast(
            self._operator,
            num_columns=self._rhs.shape[1],
            rank=0 if self._preconditioner else self._options.rank_of(self._operator),
            num_ridges=num_ridges,
            memory_limit=self._options.memory_limit,
            in_files=self._options.path is not None,
        )
        self._alternative = expected.factoring
        self._direct = expected.factoring is not None and expected.factoring <= expected.iterating
        small = f"{self._operator.num_rows:,} rows are few"
        self._why = expected.words if math.isfinite(expected.iterating) else small

    def _spent(self) -> tuple[Work, float]:
        """What the solution under way has cost, in earlier processes too."""
        work = self._kept.work + (self._operator.work - self._before)
        return work, self._kept.seconds + perf_counter() - self._start

    def _save(self) -> None:
        stage: Stage = "iterating" if self._alternative is not None or self._options.method != "auto" else "no factor"
        self._kept.save(stage, self._why, *self._spent())

    def _save_progress(self, progress: Progress) -> None:
        self._kept.save_progress(progress)
        self._save()

    def _tell(self, spent: Work) -> Monitor:
        """The caller's monitor, told of this besides what a part has cost."""
        return lambda step: self._options.monitor(Step(spent + step.work, step.residual, step.target))

    def solve(self, ridge: float, initial: NDArray[np.float64] | None) -> Solution:
        """One system.

        Raises
        ------
        IndefiniteError
            If Cholesky was asked for and met a pivot that is not positive.
        ResourceError
            If memory does not suffice.
        """
        if self._direct:
            try:
                factored = self._factor(ridge)
            except (IndefiniteError, ResourceError) as error:
                if self._options.method != "auto":
                    raise
                self._without_factor("met a pivot that is not positive" if _is_indefinite(error) else "has no room")
            else:
                if factored.is_converged or self._options.method != "auto":
                    return factored
                return self._better(factored, ridge, initial)
        if self._kept.stage == "given up" and self._kept.progress is not None and self._alternative is not None:
            return self._factor_instead(ridge, self._kept.progress)
        return self._iterate(ridge, initial)

    def _better(self, factored: Solution, ridge: float, initial: NDArray[np.float64] | None) -> Solution:
        """Iterate, too, where a factor is no help: a singular matrix may have passed for a definite one."""
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

    def _factor_instead(self, ridge: float, progress: Progress) -> Solution:
        """Conjugate gradients were given up; go on with them if a factor is impossible."""
        self._kept.save("given up", self._why, *self._spent())
        try:
            return self._factor(ridge, progress)
        except (IndefiniteError, ResourceError) as error:
            self._without_factor("met a pivot that is not positive" if _is_indefinite(error) else "has no room")
            self._save()
            return self._iterate(ridge, None, progress)

    def _without_factor(self, why: str) -> None:
        """From now on by conjugate gradients alone."""
        self._direct, self._alternative, self._why = False, None, f"Cholesky {why}"

    def _factor(self, ridge: float, after: Progress | None = None) -> Solution:
        """By Cholesky; after conjugate gradients, if they were given up."""
        options, monitor = self._options, self._tell(self._spent()[0])
        limit = options.memory_limit
        factor = cholesky(self._operator, ridge=ridge, path=options.path, memory_limit=limit, monitor=monitor)
        found = factor.solve(self._rhs, refine=1, tol=options.tol)
        residuals = np.array(found.residuals)
        return self._solution(ridge, "cholesky", found.status, found.message, found.coefficients, residuals, after)

    def _iterate(self, ridge: float, initial: NDArray[np.float64] | None, earlier: Progress | None = None) -> Solution:
        """By conjugate gradients, from where they were."""
        options, kept = self._options, self._kept
        _require_room(self._rhs, options.rank_of(self._operator), options.memory_limit)
        if self._preconditioner is None:
            before = self._operator.work
            assert isinstance(self._given, str)
            self._preconditioner = preconditioner_of(
                self._operator, self._given, options.rank, ridge=0.0, seed=options.seed
            )
            kept.made = self._operator.work - before
            kept.save_preconditioner(self._preconditioner)
            self._save()
        run = block_cg if self._cg == "block_cg" else pcg
        end = run(
            self._operator.shifted(ridge),
            self._rhs,
            preconditioner=self._preconditioner.for_ridge(ridge),
            initial=initial,
            tol=options.tol,
            max_passes=options.max_passes,
            monitor=self._tell(self._spent()[0]),
            give_up=None if self._alternative is None else hopeless_after(self._alternative, options.tol),
            earlier=earlier or kept.progress,
            keep=self._save_progress,
        )
        if end.gave_up and end.status != "converged":
            return self._factor_instead(ridge, end)
        return self._solution(ridge, self._cg, end.status, end.message, end.solution, end.residuals, end)

    def _solution(
        self,
        ridge: float,
        method: str,
        status: Status,
        message: str,
        coefficients: NDArray[np.float64],
        residuals: NDArray[np.float64],
        iterate: Progress | None,
    ) -> Solution:
        """The result, with what was spent since the one before."""
        operator, kept, used = self._operator, self._kept, self._preconditioner if iterate else None
        why, (work, seconds) = self._why, self._spent()
        if iterate and method == "cholesky":
            why = f"conjugate gradients were given up after {iterate.iterations} iterations, as too slow"
        columns = self._rhs.shape[1]
        solution = Solution(
            status=status,
            message=message,
            work=work,
            seconds=seconds,
            options={"ridge": ridge, **self._options.to_json(operator)},
            matrix=operator.identity(),
            coefficients=coefficients,
            residuals=residuals,
            ridge=ridge,
            method=method,
            why=why,
            iterations=iterate.iterations if iterate else 0,
            history=iterate.history if iterate else np.zeros((0, columns)),
            checks=iterate.checks if iterate else np.zeros(0, np.int64),
            check_residuals=iterate.check_residuals if iterate else np.zeros((0, columns)),
            replacements=iterate.replacements if iterate else 0,
            rank=used.rank if used else 0,
            mu=used.for_ridge(ridge).mu if used else 1.0,
            preconditioner_work=kept.made,
        )
        self._start, self._before = perf_counter(), operator.work
        kept.work, kept.seconds, kept.made, kept.progress = Work(), 0.0, Work(), None
        return solution


def _is_indefinite(error: Exception) -> bool:
    return isinstance(error, IndefiniteError)


def _require_room(block: NDArray[np.float64], rank: int, memory_limit: int | None) -> None:
    """Refuse before anything is read."""
    needed = 8 * block.shape[0] * (_FACTORS * min(rank, block.shape[0]) + _BLOCKS * block.shape[1])
    room = memory_room(memory_limit, share=1.0)
    if needed > room:
        raise ResourceError(
            f"rank {rank:,} and {block.shape[1]:,} columns of {block.shape[0]:,} rows need {format_bytes(needed)} of "
            f"memory; {format_bytes(room)} may be used. Give a smaller rank, or fewer columns at a time"
        )
