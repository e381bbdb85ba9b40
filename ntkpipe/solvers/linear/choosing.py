"""How a regression system should be solved: what each method is expected to take, and when to change one's mind."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import memory_room, num_cores
from ntkpipe.operators.blas import single_threaded_blas

# Iterations to a residual of 1e-6 that kernels need at ranks of n/10 to n/4: 30 to 60 were measured.
_ITERATIONS = 50
# Of the rate of large matrix products: of thin ones, whose columns are few, and of a factorisation in panels.
_THIN = 0.3
_PANELS = 0.4
_SAMPLE = 1024
# A matrix in memory, where no read has been timed.
_BYTES_PER_SECOND = 5e9
_DISK_BYTES_PER_SECOND = 1e9
_PANEL_COLUMNS = 3 * 1024
# Below it nothing is worth a measurement.
_SMALL = 1000
_LEAST_HISTORY = 10


@dataclass(frozen=True)
class Forecast:
    """Seconds that a system is expected to take."""

    iterating: float  # by conjugate gradients, for one ridge, with its part of the preconditioner
    factoring: float | None  # by a Cholesky factor, in memory or in files; none if it does not fit

    @property
    def words(self) -> str:
        """Both numbers."""
        if self.factoring is None:
            return "a Cholesky factor does not fit memory, and path= names no folder for it"
        return f"about {self.factoring:.2g} s by Cholesky, {self.iterating:.2g} s by conjugate gradients"


def forecast(
    operator: Operator,
    *,
    num_columns: int,
    rank: int,
    num_ridges: int,
    memory_limit: int | None,
    in_files: bool = False,
) -> Forecast:
    """Estimate both ways from n, the rate of a matrix product, and the time of a pass.

    The pass that finds diagonal and Frobenius norm, which both ways need, is timed if it is not done yet; otherwise
    entries are taken to be in memory.
    """
    n, room = operator.num_rows, memory_room(memory_limit)
    fits = in_files or 4 * n * n + 8 * n * min(n, _PANEL_COLUMNS) <= room
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


def hopeless_after(seconds: float, tol: float) -> Callable[[NDArray[np.float64]], bool]:
    """Whether to stop iterating, given what the alternative takes: asked with the history after each iteration.

    Yes, once half of those seconds are spent and what is left, extrapolated from the second half of the history, takes
    more than all of them: so the total is at most 1.5 times the alternative, where the forecast of it is right, but for
    what making the preconditioner took.
    """
    start = perf_counter()

    def is_hopeless(history: NDArray[np.float64]) -> bool:
        spent, count = perf_counter() - start, len(history)
        if count < _LEAST_HISTORY or spent < seconds / 2:
            return False
        return iterations_left(history, tol) * spent / count > seconds

    return is_hopeless


def iterations_left(history: NDArray[np.float64], tol: float) -> float:
    """How many more a history of residuals, shape (m, c), needs until the largest is ``tol``; infinite if it rises."""
    worst = np.log(np.maximum(history.max(axis=1), np.finfo(np.float64).tiny))
    half = len(worst) // 2
    drop = (worst[half] - worst[-1]) / max(1, len(worst) - 1 - half)
    missing = float(worst[-1]) - math.log(max(tol, np.finfo(np.float64).tiny))
    if missing <= 0.0:
        return 0.0
    return missing / float(drop) if drop > 0.0 else math.inf


def _seconds_to_read(operator: Operator) -> float:
    """Of a pass with hardly any arithmetic."""
    before, start = operator.work.passes, perf_counter()
    operator.statistics()
    if operator.work.passes - before > 0.5:
        return perf_counter() - start
    return operator.num_rows**2 * operator.storage_dtype.itemsize / _BYTES_PER_SECOND


@lru_cache(maxsize=1)
def _flops_per_second() -> float:
    """Of float64 matrix products on all cores, from the best of a few on one; measured once."""
    block = np.ones((_SAMPLE, _SAMPLE))
    best = math.inf
    with single_threaded_blas():
        for _ in range(3):
            start = perf_counter()
            block @ block
            best = min(best, perf_counter() - start)
    return num_cores() * 2.0 * _SAMPLE**3 / best
