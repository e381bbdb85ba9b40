"""Both ends of a kernel's spectrum, with bounds: in memory where the kernel fits, by passes over tiles where not."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import IndefiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import memory_room
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.direct.eigh import eigvalsh
from ntkpipe.solvers.result import Monitor, Status
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.solvers.spectral.smallest import Smallest, smallest

Way = Literal["lapack", "factor", "passes"]

_EPS = float(np.finfo(np.float64).eps)
# Of leading pairs: angles between eigenspaces are known to the residual over the gap.
_TOL = 1e-10
# Of the smallest eigenvalue, relative: steps with a factor are cheap, without they are many.
_TOL_BY_FACTOR, _TOL_BY_PASSES = 1e-6, 1e-4
# Rows up to which all eigenvalues, 4/3 n³ flops at a low rate, are a matter of seconds; and up to which three Cholesky
# factors, n³ flops at a high one, are a matter of minutes.
_MOST_ROWS_OF_LAPACK = 2048
_MOST_ROWS_IN_MEMORY = 16384
# The kernel in float64, and copies or factors of it.
_BYTES_PER_ENTRY = 24


@dataclass(frozen=True)
class Ends:
    """The ends of a spectrum."""

    eigenvalues: FloatArray  # the largest, descending, shape (k,)
    eigenvectors: FloatArray  # theirs, shape (n, k)
    residual: float  # norm of `K V - V Λ`, absolute
    next_eigenvalue: float | None  # the largest that is not among them; none if there is none
    smallest: float | None  # λ_min of the stored kernel; none if it was not asked for
    low: float | None  # low, high: its bounds; `low` none if there is no lower one
    high: float | None
    floor: float  # what rounding of entries did to eigenvalues; below it they are not known
    log_determinant: float | None  # of `K + λ I`; none if that is indefinite, or the kernel does not fit in memory
    status: Status  # status, message: of the worse of both ends
    message: str

    @property
    def gap(self) -> float:
        """Distance of the leading eigenvalues from the rest, which the sensitivity of their space depends on."""
        return math.inf if self.next_eigenvalue is None else float(self.eigenvalues[-1]) - self.next_eigenvalue


def way_for(num_rows: int, memory_limit: int | None) -> Way:
    """How spectra and predictions of a kernel of so many rows are found.

    In memory where the kernel and its copies or factors, 24 n² bytes, fit what this process may still allocate, by
    default half of what is free: by LAPACK up to 2,048 rows, by Cholesky factors up to 16,384. Otherwise by passes over
    the tiles.
    """
    room = memory_room(memory_limit)
    if num_rows > _MOST_ROWS_IN_MEMORY or _BYTES_PER_ENTRY * num_rows**2 > room:
        return "passes"
    return "lapack" if num_rows <= _MOST_ROWS_OF_LAPACK else "factor"


def in_memory(operator: Operator) -> DenseOperator:
    """The whole matrix, read once."""
    whole = slice(0, operator.num_rows)
    return DenseOperator(operator.block(whole, whole), storage_dtype=operator.storage_dtype)


def find_ends(
    operator: Operator, k: int, *, way: Way, ridge: float, with_smallest: bool, given: Any, seed: int, monitor: Monitor
) -> Ends:
    """The k leading eigenpairs, the smallest eigenvalue, and the log-determinant where the kernel is in memory."""
    wanted = min(k + 1, operator.num_rows)
    known = None if given is None or len(given.eigenvalues) < wanted else np.asarray(given.eigenvalues, np.float64)
    status: Status = "converged"
    message = ""
    if known is not None:
        values, vectors = known[:wanted], np.asarray(given.eigenvectors, np.float64)[:, :wanted]
        residual = float(np.linalg.norm(operator.matmat(vectors) - vectors * values))
    else:
        pairs = eigsh(operator, wanted, tol=_TOL, seed=seed, monitor=monitor)
        values, vectors = pairs.eigenvalues, pairs.eigenvectors
        residual = float(np.linalg.norm(pairs.residuals * np.maximum(np.abs(values), pairs.floor)))
        status, message = pairs.status, pairs.message
    every = known if known is not None and len(known) == operator.num_rows else None
    if every is None and with_smallest and way == "lapack":
        every = eigvalsh(operator).eigenvalues
    least, low, high = (None, None, None) if every is None else _of_all(every)
    if every is None and with_smallest:
        found = _smallest(operator, way, seed, monitor)
        least, low, high = float(found.eigenvalues[0]), found.low, found.high
        # That it is not known at storage precision is a finding; bounds hold all the same.
        if status == "converged" and found.status in {"step limit", "not converged"}:
            status, message = found.status, f"smallest eigenvalue: {found.message}"
    return Ends(
        eigenvalues=values[:k].copy(),
        eigenvectors=np.ascontiguousarray(vectors[:, :k]),
        residual=residual,
        next_eigenvalue=float(values[k]) if wanted > k else None,
        smallest=least if with_smallest else None,
        low=low if with_smallest else None,
        high=high if with_smallest else None,
        floor=operator.storage_floor(),
        log_determinant=_log_determinant(operator, every, way, ridge),
        status=status,
        message=message,
    )


def _of_all(every: FloatArray) -> tuple[float, float, float]:
    """The smallest eigenvalue, and bounds of LAPACK's error."""
    least, unsure = float(every[-1]), len(every) * _EPS * float(np.abs(every).max())
    return least, least - unsure, least + unsure


def _smallest(operator: Operator, way: Way, seed: int, monitor: Monitor) -> Smallest:
    """By block Davidson: with a factor few steps, and a bound that is proved; by passes one that residuals give."""
    if way == "passes":
        return smallest(operator, tol=_TOL_BY_PASSES, certify=False, seed=seed, monitor=monitor)
    try:
        factor = cholesky(operator, jitter="auto")
    except IndefiniteError:  # beyond what rounding explains
        return smallest(operator, tol=_TOL_BY_PASSES, certify=False, seed=seed, monitor=monitor)

    def inverse(block: FloatArray) -> FloatArray:
        return factor.solve(block, refine=0).coefficients

    return smallest(operator, tol=_TOL_BY_FACTOR, inverse=inverse, certify=True, seed=seed, monitor=monitor)


def _log_determinant(operator: Operator, every: FloatArray | None, way: Way, ridge: float) -> float | None:
    if every is not None:
        shifted = every + ridge
        return float(np.log(shifted).sum()) if shifted[-1] > 0 else None
    if way == "passes":
        return None
    try:
        return cholesky(operator, ridge=ridge).logdet
    except IndefiniteError:
        return None
