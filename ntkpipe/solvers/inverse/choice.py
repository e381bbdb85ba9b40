"""Which inverse a problem gets: by sizes, memory and counted operations, so that equal problems get equal bits."""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget
from ntkpipe.base.errors import ResourceError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import format_bytes
from ntkpipe.solvers.direct.cholesky import bytes_of_cholesky
from ntkpipe.solvers.direct.eigh import eigh
from ntkpipe.solvers.eigenpairs import Eigenpairs, check_eigenpairs
from ntkpipe.solvers.inverse.contract import Inverse, InverseMethod
from ntkpipe.solvers.inverse.exact import ByEigenpairs, ByFactors, eigenpairs_fit
from ntkpipe.solvers.inverse.passes import ByPasses
from ntkpipe.solvers.memory import sizes_of_eigsh
from ntkpipe.solvers.result import Monitor, ignore

# `exact` has all eigenvalues in memory, `streamed` makes passes of the operator, `auto` is the former where it fits.
AnalysisMethod = Literal["auto", "exact", "streamed"]

# Costs are counted in operations, additions and multiplications, of large matrix products. Those below are other than
# by textbook counts since they run at other rates; measured with OpenBLAS for 2,000 to 8,000 rows, where they change
# little. They need not fit a machine: the choice is only ever between costs that differ by factors.
_OF_EIGENPAIRS = 7.5  # all eigenpairs, n³
_OF_FACTOR = 1.0  # a Cholesky factor in panels, n³
_OF_BLOCKS = 1.5  # diagonal blocks of the inverse by a factor, n³
_THIN = 0.3  # rate of thin matrix products, relative to large ones
_OF_BYTE = 20.0  # a byte of a matrix that is read, from memory or a cached file
_OF_FILE_BYTE = 100.0  # a byte of a factor in files, written or read
_ITERATIONS = 50  # kernels need 30 to 60 to a residual of 1e-6, as measured at ranks of n/10 to n/4
_PASSES_OF_EIGSH = 16
_LEAST_HISTORY = 10


def cost_of_pass(operator: Operator, num_columns: int) -> float:
    """Of a product with a block of columns."""
    n = operator.num_rows
    return max(_OF_BYTE * n * n * operator.storage_dtype.itemsize, 2.0 * n * n * num_columns / _THIN)


def cost_of_factor(operator: Operator, budget: Budget, *, in_files: bool = False) -> float:
    """Of a Cholesky factor, in memory or in files."""
    n = operator.num_rows
    cost = _OF_FACTOR * n**3 + 2.0 * cost_of_pass(operator, 1)
    if in_files:
        # Every panel reads those before it, and the factor is written and read twice more.
        panels = math.ceil(8.0 * n * n / max(budget.room(), 8 * n))
        cost += (3 + panels / 3) * 4.0 * n * n * _OF_FILE_BYTE
    return cost


def cost_of_iteration(operator: Operator, num_columns: int, rank: int) -> float:
    """Of a step of conjugate gradients with a preconditioner."""
    return cost_of_pass(operator, num_columns) + 8.0 * operator.num_rows * rank * num_columns / _THIN


def cost_of_iterating(operator: Operator, num_columns: int, rank: int, made: int, num_ridges: int) -> float:
    """Of conjugate gradients at one ridge, with its share of a preconditioner of which a rank ``made`` is not there."""
    of_rank = (6.0 * operator.num_rows * made**2 + (cost_of_pass(operator, 1) if made else 0.0)) / num_ridges
    return of_rank + _ITERATIONS * cost_of_iteration(operator, num_columns, rank)


def are_all_cheaper(operator: Operator, k: int) -> bool:
    """Whether all eigenpairs cost less than the k leading ones."""
    n = operator.num_rows
    width, basis = sizes_of_eigsh(n, k, None, None)
    streamed = _PASSES_OF_EIGSH * (cost_of_pass(operator, width) + 4.0 * n * width * basis / _THIN)
    return _OF_EIGENPAIRS * n**3 <= streamed


def hopeless_after(iteration: float, alternative: float, tol: float) -> Callable[[FloatArray], bool]:
    """Make a test of the history that says whether to stop iterating, given the costs of a step and of something else.

    It says yes once half of that is spent and the remaining iterations, extrapolated from the second half of the
    history, need more than all. So the total is at most 1.5 times the alternative, and the preconditioner.
    """

    def is_hopeless(history: FloatArray) -> bool:
        if len(history) < _LEAST_HISTORY or len(history) * iteration < alternative / 2:
            return False
        return iterations_left(history, tol) * iteration > alternative

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


def find_inverse(
    operator: Operator,
    budget: Budget,
    *,
    method: Literal["auto"] | InverseMethod,
    allowed: Collection[str],
    ridges: Collection[float],
    with_blocks: bool = True,
    eigenpairs: Eigenpairs | None = None,
    path: str | Path | None = None,
    tol: float,
    seed: int,
    monitor: Monitor = ignore,
) -> Inverse:
    """The inverse that was asked for; ``auto`` is the cheaper of the exact ones that fit memory, else that by passes.

    A path, which is that of a factor, decides for it, and all eigenpairs that are known for them.
    """
    n = operator.num_rows
    if eigenpairs is not None and method in {"auto", "eigh"}:
        return ByEigenpairs(operator, check_eigenpairs(operator, eigenpairs), "all eigenpairs were given", tol)
    fits = {"eigh": eigenpairs_fit(n, budget), "cholesky": path is not None or budget.fits(bytes_of_cholesky(n))}
    costs = {"eigh": _OF_EIGENPAIRS, "cholesky": len(ridges) * (_OF_FACTOR + (_OF_BLOCKS if with_blocks else 0.0))}
    if 0.0 in ridges:  # only eigenpairs solve with a singular matrix
        costs["cholesky"] += costs["eigh"]
    chosen: str = method
    why = "asked for"
    if method == "auto":
        exact = [name for name in costs if name in allowed and fits[name]]
        chosen = min(exact, key=costs.__getitem__, default="streamed")
        neither = "neither eigenpairs nor a factor fit" if "eigh" in allowed else "a factor does not fit"
        why = {"eigh": "all eigenpairs fit", "cholesky": "a factor fits"}.get(chosen, neither)
        why += f": {n:,} rows, {format_bytes(max(0, budget.room()))} of memory"
        if path is not None:
            why = f"a factor in {path}"
    if chosen == "eigh":
        return ByEigenpairs.of(operator, budget, monitor, why, tol)
    if chosen == "cholesky":
        return ByFactors(operator, tol, budget, monitor, why, path)
    return ByPasses(operator, tol=tol, seed=seed, budget=budget, monitor=monitor, why=why)


def all_eigenpairs(
    operator: Operator,
    given: Eigenpairs | None,
    budget: Budget,
    method: AnalysisMethod,
    monitor: Monitor,
    compute: Callable[..., Eigenpairs] | None = None,
) -> tuple[Eigenpairs | None, str]:
    """All of them, given or by LAPACK unless streamed was asked for or they do not fit; and why, in words.

    Given ones that are not all are returned where those are not to be had.
    """
    known = None if given is None else check_eigenpairs(operator, given)
    if known is not None and (known.is_whole or method == "streamed"):
        return known, known.why if known.is_whole else f"{known.why}, and streamed was asked for"
    if method == "streamed":
        return None, "streamed was asked for"
    try:
        return (compute or eigh)(operator, memory_limit=budget, monitor=monitor), "they fit in memory"
    except ResourceError:
        if method == "exact":
            raise
        room = format_bytes(max(0, budget.room(share=1.0)))
        return known, f"all eigenvalues of {operator.num_rows:,} rows do not fit the {room} that are left"
