"""Systems of many columns in memory that holds a few: conjugate gradients, by runs of columns."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ntkpipe.errors import ResourceError
from ntkpipe.operators.operator import Operator, Work
from ntkpipe.resources import format_bytes, memory_room
from ntkpipe.solvers.preconditioner import default_rank, preconditioner_of
from ntkpipe.solvers.result import Monitor, Status, Step
from ntkpipe.solvers.solve import solve

# Blocks of the shape of the right-hand sides, and of the preconditioner, that a solve has in memory at a time.
_BLOCKS, _FACTORS = 11, 3
# Of the memory that is free, so that what else a process does in between has room.
_SHARE = 0.9
_MOST_COLUMNS = 256


def rank_that_fits(num_rows: int, num_columns: int, memory_limit: int | None) -> int | None:
    """Rank of a preconditioner beside so many columns; none if the default fits, or nothing does."""
    columns = int(_SHARE * max(0, memory_room(memory_limit))) // (8 * num_rows)
    rank = (columns - _BLOCKS * num_columns) // _FACTORS
    return None if rank >= default_rank(num_rows) or rank < 1 else rank


@dataclass
class Verdict:
    """How far solutions can be trusted, all together."""

    status: Status = "converged"
    worst: float = 0.0
    messages: list[str] = field(default_factory=list)

    def add(self, status: Status, residual: float, message: str) -> None:
        """Of one more."""
        self.worst = max(self.worst, residual)
        if status != "converged":
            if self.status == "converged":
                self.status = status
            self.messages.append(message)

    def joined(self, other: "Verdict") -> "Verdict":
        """Both together."""
        status = self.status if self.status != "converged" else other.status
        return Verdict(status, max(self.worst, other.worst), [*self.messages, *other.messages])


class StreamedInverse:
    """``(K + λI)^-1`` applied to blocks of columns by passes over K, for any number of columns and ridges.

    Memory is ``8 n (3 rank + 11 c)`` bytes for c columns at a time; both are chosen to fit, rank first, up to half.

    Parameters
    ----------
    operator
        K.
    tol
        Largest relative true residual of a column that is called converged.
    seed
        Of the preconditioner.
    memory_limit
        Bytes that this process may have; default what it has and half of what is free.
    monitor
        Called after each pass.

    Raises
    ------
    ResourceError
        If not even one column fits.
    """

    def __init__(
        self, operator: Operator, *, tol: float, seed: int, memory_limit: int | None, monitor: Monitor
    ) -> None:
        self.operator = operator
        self.verdict = Verdict()
        self._tol, self._seed, self._monitor = tol, seed, monitor
        room = int(_SHARE * max(0, memory_room(memory_limit)))
        columns = room // (8 * operator.num_rows)
        if columns < _BLOCKS + _FACTORS:
            raise ResourceError(
                f"one column of {operator.num_rows:,} rows and a preconditioner need "
                f"{format_bytes(8 * operator.num_rows * (_BLOCKS + _FACTORS))}; {format_bytes(room)} may be used. Give "
                "more memory"
            )
        rank = min(default_rank(operator.num_rows), max(1, min(columns // 2, columns - _BLOCKS) // _FACTORS))
        self.columns_at_once = max(1, min(_MOST_COLUMNS, (columns - _FACTORS * rank) // _BLOCKS))
        self._before = operator.work
        self._preconditioner = preconditioner_of(operator, "rpcholesky", rank, ridge=0.0, seed=seed)

    @property
    def words(self) -> str:
        """What it is."""
        return (
            f"conjugate gradients, rank {self._preconditioner.rank:,}, up to {self.columns_at_once} columns at a time"
        )

    def times(
        self, block: NDArray[np.float64], ridge: float, initial: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """``(K + λI)^-1 B``, shape (n, c)."""
        found = np.empty_like(block)
        for columns in runs(block.shape[1], self.columns_at_once):
            found[:, columns] = self._solve(block[:, columns], ridge, None if initial is None else initial[:, columns])
        return found

    def quadratic(self, block: NDArray[np.float64], ridge: float, width: int) -> NDArray[np.float64]:
        """``B_i' (K + λI)^-1 B_i`` for each run of ``width`` columns, shape (c / width, width, width).

        Of an approximate solution X with residual R the form ``B'X + X'B - X'(K + λI) X`` is taken, which is below the
        true one by ``R'(K + λI)^-1 R``: an error of second order in the residual, for one more pass.
        """
        solution = self.times(block, ridge)
        residual = block - self.operator.shifted(ridge).matmat(solution)
        first, third = (_by_runs(block, solution, width), _by_runs(solution, residual, width))
        found = first + third
        return (found + found.transpose(0, 2, 1)) / 2

    def _solve(
        self, block: NDArray[np.float64], ridge: float, initial: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        before = self.operator.work - self._before

        def tell(step: Step) -> None:
            self._monitor(Step(before + step.work, step.residual, step.target))

        found = solve(
            self.operator,
            block,
            ridge=ridge,
            method="pcg" if block.shape[1] == 1 else "block_cg",
            tol=self._tol,
            preconditioner=self._preconditioner,
            initial=initial,
            seed=self._seed,
            monitor=tell,
        )
        self.verdict.add(found.status, float(found.residuals.max(initial=0.0)), f"λ = {ridge:.3g}: {found.message}")
        return np.asarray(found.coefficients)

    def start_verdict(self) -> Verdict:
        """Begin to judge anew, and return what was said before."""
        before, self.verdict = self.verdict, Verdict()
        return before

    @property
    def work(self) -> Work:
        """What it has cost."""
        return self.operator.work - self._before


def runs(count: int, most: int) -> Iterator[slice]:
    """Runs of at most so many of ``count``."""
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))


def _by_runs(left: NDArray[np.float64], right: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """``left_i' right_i`` for each run of columns."""
    shape = (len(left), -1, width)
    return np.asarray(np.einsum("nia,nib->iab", left.reshape(shape), right.reshape(shape)), np.float64)
