"""One system after another with one matrix: by what was asked for, or by what is expected to cost least."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget
from ntkpipe.base.errors import ConfigError, IndefiniteError, ResourceError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.checkpoint import Journal, Stages, as_work
from ntkpipe.solvers.direct.cholesky import bytes_of_cholesky, cholesky
from ntkpipe.solvers.inverse.choice import cost_of_factor, cost_of_iterating, cost_of_iteration, hopeless_after
from ntkpipe.solvers.inverse.contract import Verdict
from ntkpipe.solvers.inverse.exact import ByEigenpairs, doubt_of, eigenpairs_fit
from ntkpipe.solvers.inverse.passes import Recurrence, iterate, recurrence_for
from ntkpipe.solvers.linear.cg import IterationState
from ntkpipe.solvers.linear.preconditioner import (
    Preconditioner,
    checked_rank,
    preconditioner_from,
    preconditioner_of,
    preconditioner_once,
    saved_of,
)
from ntkpipe.solvers.memory import bytes_of_solve
from ntkpipe.solvers.result import Monitor, OfTargets, Status, Step
from ntkpipe.store.results import Checkpoint, as_integer, as_number

SolveMethod = Literal["auto", "eigh", "cholesky", "pcg", "block_cg"]
# Conjugate gradients are running; were given up for a factor; or run since a factor was of no use.
Stage = Literal["iterating", "given up", "no factor"]
_PROGRESS = ("solution", "history", "checks", "check_residuals")
_FAILURES = {IndefiniteError: "Cholesky met a pivot that is not positive", ResourceError: "Cholesky has no room"}
_WORDS = {"eigh": "the minimum norm", "cholesky": "Cholesky"}


@dataclass(frozen=True, kw_only=True)
class SolutionPath(OfTargets):
    """Coefficients at r ridges; as a sequence, a :class:`Solution` for each, unless it was read from a store."""

    ridges: FloatArray  # λ, in the order given, shape (r,)
    coefficients: FloatArray = field(repr=False)  # shape (r, *shape of Y)
    residuals: FloatArray = field(repr=False)  # as of :class:`Solution`, shape (r, c)
    statuses: tuple[Status, ...]
    methods: tuple[str, ...]
    iterations: NDArray[np.int64]
    _solutions: "tuple[Solution, ...]" = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self._solutions)

    def __getitem__(self, number: int) -> "Solution":
        return self._solutions[number]

    def _rows(self) -> TableRows:
        found = zip(self.ridges, self.methods, self.iterations, self.residuals, self.statuses, strict=True)
        return [
            (f"λ = {ridge:.4g}", f"{method}, {count} iterations, residual {residual.max(initial=0.0):.2g}; {status}")
            for ridge, method, count, residual, status in found
        ]


@dataclass(frozen=True, kw_only=True)
class Solution(OfTargets):
    """Coefficients A with ``(K + ridge I) A = Y``."""

    coefficients: FloatArray  # A, float64, of the shape of Y
    # |Y - (K + ridge I) A| / |Y| of each column, shape (c,), computed in float64 with the matrix for these
    # coefficients. Zero for a column of zeros, whose coefficients are zero.
    residuals: FloatArray
    ridge: float  # λ
    method: str  # method, why: the method that found them, and why it was chosen
    why: str
    iterations: int  # steps of conjugate gradients, one pass each; each check of true residuals is one pass more
    history: FloatArray  # relative residuals of the recurrence, shape (iterations, c); true ones may be larger
    # checks, check_residuals: after how many iterations true residuals were computed, shape (m,), and their relative
    # size, shape (m, c)
    checks: NDArray[np.int64]
    check_residuals: FloatArray
    replacements: int  # how often residuals were replaced by the true ones and directions began anew
    rank: int  # rank, mu: rank and μ of the preconditioner F F' + μ I; 0 and 1 without one
    mu: float
    preconditioner_work: Work  # the part of `work` that made the preconditioner; zero if it was given

    def _rows(self) -> TableRows:
        count = len(self.residuals)
        rows = [
            ("method", f"{self.method}: {self.why}"),
            ("ridge", f"{self.ridge:.4g}"),
            ("residual", f"{self.residuals.max(initial=0.0):.2g}, the largest of {count} column{'s'[: count != 1]}"),
        ]
        if self.iterations:
            rows.append(("iterations", f"{self.iterations}, and {len(self.checks)} checks of true residuals"))
        if self.rank:
            made = f"{self.preconditioner_work.passes:.3g} passes to make it"
            rows.append(("preconditioner", f"rank {self.rank:,}, mu {self.mu:.3g}, {made}"))
        return rows


@dataclass(frozen=True)
class SolveOptions:
    """Options that all ridges share."""

    method: SolveMethod
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
        """Rank of the preconditioner, in memory without end."""
        if isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner.rank
        return checked_rank(self.rank, operator.num_rows)


class SystemCheckpoint:
    """The state of one system and its checkpoint, if there is one; an earlier state is read at once."""

    def __init__(self, checkpoint: Checkpoint | None, decides: Mapping[str, Any], shape: tuple[int, int]) -> None:
        self._journal = Journal(checkpoint, decides)
        self._number = 0
        self.preconditioner: Preconditioner | None = None  # made here, not given
        self.progress: IterationState | None = None
        self.stage: Stage | None = None
        self.why = ""
        self.work, self.seconds, self.made = Work(), 0.0, Work()
        if self._journal.earlier is not None:
            with self._journal.reading():
                self._read(self._journal.earlier, shape)

    def _read(self, state: Mapping[str, Any], shape: tuple[int, int]) -> None:
        if state["stage"] not in get_args(Stage) or not isinstance(state["why"], str):
            raise ValueError(f"its stage is {str(state['stage'])[:40]!r}")
        self.stage, self.why = cast(Stage, state["stage"]), state["why"]
        self.work, self.seconds, self.made = as_work(state["work"]), as_number(state["seconds"]), as_work(state["made"])
        if (made := state["preconditioner"]) is not None:
            get, rank = self._journal.getter("preconditioner-"), as_integer(made["rank"])
            arrays = {"vectors": get("vectors", (shape[0], rank)), "values": get("values", (rank,))}
            self.preconditioner = preconditioner_from({**made, **arrays})
        if (at := state["progress"]) is not None:
            self._number, columns = as_integer(at["number"]), shape[1]
            iterations, num_checks = as_integer(at["iterations"]), as_integer(at["num_checks"])
            get, prefix = self._journal.get, f"progress-{self._number}"
            self.progress = IterationState(
                solution=get(f"{prefix}-solution", shape),
                # NaN in columns that have overflowed.
                history=get(f"{prefix}-history", (iterations, columns), allow_nan=True),
                checks=get(f"{prefix}-checks", (num_checks,), dtype=np.int64),
                check_residuals=get(f"{prefix}-check_residuals", (num_checks, columns)),
                replacements=as_integer(at["replacements"]),
                passes=as_integer(at["passes"]),
            )

    def save(self, stage: Stage, why: str, work: Work, seconds: float, progress: IterationState | None = None) -> None:
        """Replace the state, and that of the iteration if one is given."""
        self.stage, self.why = stage, why
        if progress is not None:
            # With new names, since arrays of the committed state must stay until the next state is committed.
            self.progress, self._number = progress, self._number + 1
        state: dict[str, Any] = {"stage": stage, "why": why, "work": work, "seconds": seconds, "made": self.made}
        state |= {"preconditioner": None, "progress": None}
        arrays: dict[str, Any] = {}
        if (made := self.preconditioner) is not None:
            saved = saved_of(made)
            arrays |= {f"preconditioner-{name}": saved.pop(name) for name in ("vectors", "values")}
            state["preconditioner"] = saved
        if (at := self.progress) is not None:
            sizes = {"number": self._number, "iterations": at.iterations, "num_checks": len(at.checks)}
            state["progress"] = {**sizes, "replacements": at.replacements, "passes": at.passes}
            arrays |= {f"progress-{self._number}-{name}": getattr(at, name) for name in _PROGRESS}
        self._journal.save(state, arrays)


class _UnfitError(Exception):
    """A method is of no use for a system; it says why."""


@dataclass(frozen=True)
class _Found:
    """A solution by one method."""

    method: str
    coefficients: FloatArray
    residuals: FloatArray
    status: Status
    message: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return float(self.residuals.max(initial=0.0))


class Systems:
    """Systems with one matrix and one block of right-hand sides, solved in turn.

    With ``stages`` the preconditioner is one of them; otherwise it is saved in the checkpoint of the system.
    """

    def __init__(
        self, operator: Operator, rhs: FloatArray, options: SolveOptions, num_ridges: int, stages: Stages | None = None
    ) -> None:
        self._operator, self._rhs, self._options, self._stages = operator, rhs, options, stages
        given, (n, columns), budget = options.preconditioner, rhs.shape, options.budget
        self._preconditioner = given if isinstance(given, Preconditioner) else None
        if self._preconditioner is not None and self._preconditioner.num_rows != n:
            raise ConfigError(f"a preconditioner of {self._preconditioner.num_rows:,} rows for a matrix of {n:,} rows")
        self._rank = options.rank_of(operator)
        # Halved where there is no room, so that few limits change bits.
        while options.rank is None and self._rank > 1 and not budget.fits(bytes_of_solve(n, columns, self._rank), 1.0):
            self._rank //= 2
        if self._preconditioner is None and stages is not None and "preconditioner" in stages:
            self._preconditioner = self._make()
        in_files = options.path is not None
        fits = in_files or budget.fits(bytes_of_cholesky(n))
        self._factoring = cost_of_factor(operator, budget, in_files=in_files) if fits else math.inf
        made = 0 if self._preconditioner else self._rank
        self._iterating = cost_of_iterating(operator, columns, self._rank, made, num_ridges)

    def solve(self, ridge: float, initial: FloatArray | None, kept: SystemCheckpoint) -> Solution:
        """Solve one system, with its own checkpoint."""
        self._start, self._before, self._kept, self._state = perf_counter(), self._operator.work, kept, kept.progress
        self._preconditioner = self._preconditioner or kept.preconditioner
        best: tuple[_Found, str] | None = None
        attempts = self._attempts(ridge, initial)
        for number, attempt in enumerate(attempts):
            try:
                found = attempt()
            except (_UnfitError, IndefiniteError, ResourceError) as error:
                if number == len(attempts) - 1:
                    raise
                self._why = _FAILURES.get(type(error), str(error))
                continue
            if best is None or found.status == "converged" or found.worst < best[0].worst:
                best = found, self._why
            if found.status in {"converged", "step limit"}:
                break
            self._why = f"{_WORDS.get(found.method, 'conjugate gradients')} left a residual of {found.worst:.2g}"
        assert best is not None
        return self._solution(ridge, *best)

    def _attempts(self, ridge: float, initial: FloatArray | None) -> list[Callable[[], _Found]]:
        """Methods in the order in which they are tried, each where those before are of no use."""
        iterate = partial(self._iterate, ridge, initial)
        factor, minimum_norm = partial(self._factor, ridge), partial(self._minimum_norm, ridge)
        if self._options.method != "auto":
            self._why = "asked for"
            return [{"cholesky": factor, "eigh": minimum_norm}.get(self._options.method, iterate)]
        can_factor, stage = math.isfinite(self._factoring), self._kept.stage
        self._why = "a Cholesky factor does not fit memory, and path= names no folder for it"
        if can_factor:
            costs = self._factoring, self._iterating
            self._why = "about {:.2g} operations by Cholesky, {:.2g} by conjugate gradients".format(*costs)
        if stage is not None:  # what is there is used
            self._why = _given_up(self._state) if stage == "given up" else self._kept.why
            can_factor = can_factor and stage != "no factor"
        last = iterate
        if ridge == 0.0 and stage is None and eigenpairs_fit(self._operator.num_rows, self._options.budget):
            last = minimum_norm
        if not can_factor:
            return [iterate] if last is iterate else [iterate, last]
        is_first = self._factoring <= self._iterating if stage is None else stage == "given up"
        return [factor, last] if is_first else [partial(iterate, alternative=self._factoring), factor, last]

    def _factor(self, ridge: float) -> _Found:
        options, operator = self._options, self._operator
        how: dict[str, Any] = {"memory_limit": options.budget, "monitor": self._monitor()}
        factor = cholesky(operator, ridge=ridge, path=options.path, **how)
        is_checked = ridge == 0.0 and options.method == "auto" and options.path is None
        if is_checked and (doubt := doubt_of(factor, operator, options.seed)):
            raise _UnfitError(doubt)
        found = factor.solve(self._rhs, refine=1, tol=options.tol)
        return _Found("cholesky", found.coefficients, found.residuals, found.status, found.message)

    def _minimum_norm(self, ridge: float) -> _Found:
        """``(K + λI)⁺ Y``: the least-squares solution of smallest norm, where eigenvalues up to a cut-off are zero."""
        options, rhs, verdict = self._options, self._rhs, Verdict()
        inverse = ByEigenpairs.of(self._operator, options.budget, self._monitor(), "")
        coefficients = inverse.times(rhs, ridge, verdict)
        sizes = np.linalg.norm(rhs, axis=0)
        residual = rhs - self._operator.shifted(ridge).matmat(coefficients)
        relative = _relative(np.linalg.norm(residual, axis=0), sizes)
        rank, (values, cut) = int(inverse.weights(ridge)[1].sum()), (inverse.values, inverse.cut)
        message = f"all eigenpairs; {rank:,} of {len(values):,} eigenvalues are above the cut-off {cut:.2g}"
        if ridge:
            message = f"all eigenpairs, {values[-1] + ridge:.3g} to {values[0] + ridge:.3g} with the ridge"
        if rank < len(values):
            residual = residual - inverse.outside(rhs)
            left = float(relative.max(initial=0.0))
            smallest = "the solution is the one of smallest norm"
            message += f", {smallest}, and leaves {left:.2g} of Y that is outside of the range"
        beside = float(_relative(np.linalg.norm(residual, axis=0), sizes).max(initial=0.0))
        if beside > options.tol:
            said = f"the residual inside of the range is {beside:.2g}, more than tol={options.tol:.2g}"
            verdict.add("stagnated", beside, f"{message}; {said}")
        found = {"cut_off": cut if ridge == 0.0 else 0.0, "rank": rank}
        return _Found("eigh", coefficients, relative, verdict.status, verdict.message or message, found)

    def _iterate(self, ridge: float, initial: FloatArray | None, alternative: float | None = None) -> _Found:
        options, kept, (n, columns) = self._options, self._kept, self._rhs.shape
        what = f"a solve of {columns:,} columns of {n:,} rows at rank {self._rank:,}"
        options.budget.require(bytes_of_solve(n, columns, self._rank), what, "give a smaller rank, or fewer columns")
        is_last = alternative is None and options.method == "auto"
        stage: Stage = "no factor" if is_last else "iterating"

        def save(state: IterationState | None = None) -> None:
            kept.save(stage, self._why, *self._spent(), state)

        if self._preconditioner is None:
            before = self._operator.work
            self._preconditioner = self._make()
            kept.made += self._operator.work - before
            if self._stages is None:
                kept.preconditioner = self._preconditioner
            save()
        step = cost_of_iteration(self._operator, columns, self._rank)
        method = recurrence_for(columns) if options.method == "auto" else cast(Recurrence, options.method)
        give_up = None if alternative is None else hopeless_after(step, alternative, options.tol)
        how: dict[str, Any] = {"tol": options.tol, "max_passes": options.max_passes, "monitor": self._monitor()}
        how |= {"initial": initial, "give_up": give_up, "earlier": self._state, "keep": save}
        self._state = end = iterate(self._operator, self._rhs, ridge, self._preconditioner, method, **how)
        if end.gave_up and end.status != "converged":
            kept.save("given up", self._why, *self._spent(), end)
            raise _UnfitError(_given_up(end))
        return _Found(method, end.solution, end.residuals, end.status, end.message)

    def _make(self) -> Preconditioner:
        kind, seed = str(self._options.preconditioner), self._options.seed
        make = partial(preconditioner_of, self._operator, kind, self._rank, seed)
        return make() if self._stages is None else preconditioner_once(self._stages, self._operator.num_rows, make)

    def _spent(self) -> tuple[Work, float]:
        """Cost of the current solution, including earlier processes."""
        work = self._kept.work + (self._operator.work - self._before)
        return work, self._kept.seconds + perf_counter() - self._start

    def _monitor(self) -> Monitor:
        spent = self._spent()[0]
        return lambda step: self._options.monitor(Step(spent + step.work, step.residual, step.target))

    def _solution(self, ridge: float, found: _Found, why: str) -> Solution:
        state, columns, (work, seconds) = self._state, self._rhs.shape[1], self._spent()
        used = self._preconditioner if state else None
        return Solution(
            status=found.status,
            message=found.message,
            work=work,
            seconds=seconds,
            options={"ridge": ridge, **self._options.resolved(self._operator), "rank": self._rank, **found.options},
            coefficients=found.coefficients,
            residuals=np.array(found.residuals),
            ridge=ridge,
            method=found.method,
            why=why,
            iterations=state.iterations if state else 0,
            history=state.history if state else np.zeros((0, columns)),
            checks=state.checks if state else np.zeros(0, np.int64),
            check_residuals=state.check_residuals if state else np.zeros((0, columns)),
            replacements=state.replacements if state else 0,
            rank=used.rank if used else 0,
            mu=used.for_ridge(ridge).mu if used else 1.0,
            preconditioner_work=self._kept.made,
        )


def _given_up(state: IterationState | None) -> str:
    return f"conjugate gradients were given up after {state.iterations if state else 0} iterations, as too slow"


def _relative(norms: FloatArray, sizes: FloatArray) -> FloatArray:
    return np.divide(norms, sizes, out=np.zeros_like(norms), where=sizes > 0)
