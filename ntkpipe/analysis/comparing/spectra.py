"""Both ends of a kernel's spectrum, with bounds: in memory where the kernel fits, by passes over tiles where not."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget
from ntkpipe.base.errors import IndefiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.direct.eigh import eigvalsh
from ntkpipe.solvers.result import Monitor, Status
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.solvers.spectral.smallest import Smallest, smallest
from ntkpipe.store.results import Checkpoint

Way = Literal["lapack", "factor", "passes"]

_EPS = float(np.finfo(np.float64).eps)
# Tolerance of leading eigenpairs: angles between eigenspaces are known to the residual over the gap.
_TOL = 1e-10
# Relative tolerance of the smallest eigenvalue: steps with a factor are cheap, steps without one are many.
_TOL_BY_FACTOR, _TOL_BY_PASSES = 1e-6, 1e-4
# Rows up to which all eigenvalues, 4/3 n³ flops at a low rate, are a matter of seconds; and up to which three Cholesky
# factors, n³ flops at a high one, are a matter of minutes.
_MOST_ROWS_OF_LAPACK = 2048
_MOST_ROWS_IN_MEMORY = 16384
# Bytes for the kernel in float64 and copies or factors of it.
_BYTES_PER_ENTRY = 24


@dataclass(frozen=True)
class How:
    """How spectrum and predictions of one kernel are found."""

    way: Way
    ridge: float  # absolute
    budget: Budget
    seed: int
    monitor: Monitor


@dataclass(frozen=True)
class Ends:
    """The ends of a spectrum."""

    eigenvalues: FloatArray  # the largest, descending, shape (k,)
    eigenvectors: FloatArray  # theirs, shape (n, k)
    residual: float  # norm of `K V - V Λ`, absolute
    next_eigenvalue: float | None  # the largest that is not among them; none if there is none
    smallest: float | None  # λ_min of the stored kernel; none if it was not asked for
    low: float | None  # low, high: bounds of λ_min; `low` is None if there is no lower one
    high: float | None
    floor: float  # error of eigenvalues by rounding of entries; below it they are not known
    log_determinant: float | None  # of `K + λ I`; none if that is indefinite, or the kernel does not fit in memory
    status: Status  # status, message: those of the worse of both ends
    message: str

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Bounds of λ_min before entries were rounded, which may be off by the floor; none if zero is between them."""
        if self.low is None or self.high is None or self.low - self.floor <= 0:
            return None
        return self.low - self.floor, self.high + self.floor

    @property
    def condition(self) -> float | None:
        """λ_max / λ_min, where that is known from zero."""
        return float(self.eigenvalues[0]) / self.smallest if self.smallest and self.bounds else None


def way_for(num_rows: int, budget: Budget) -> Way:
    """How spectra and predictions of a kernel of so many rows are found.

    In memory where the kernel and its copies or factors, 24 n² bytes, fit what this process may still allocate, by
    default half of what is free: by LAPACK up to 2,048 rows, by Cholesky factors up to 16,384. Otherwise by passes over
    the tiles.
    """
    if num_rows > _MOST_ROWS_IN_MEMORY or not budget.fits(_BYTES_PER_ENTRY * num_rows**2):
        return "passes"
    return "lapack" if num_rows <= _MOST_ROWS_OF_LAPACK else "factor"


def find_ends(
    operator: Operator, how: How, checkpoint: Checkpoint | None, *, k: int, with_smallest: bool, given: Any
) -> dict[str, Any]:
    """Fields of :class:`Ends`: k leading eigenpairs, λ_min, and where K is in memory the log-determinant."""
    n = operator.num_rows
    wanted = min(k + 1, n)
    status: Status = "converged"
    message, every = "", None
    if given is not None and len(given.eigenvalues) >= wanted:
        known = np.asarray(given.eigenvalues, np.float64)
        values, vectors = known[:wanted], np.asarray(given.eigenvectors, np.float64)[:, :wanted]
        residual = float(np.linalg.norm(operator.matmat(vectors) - vectors * values))
        every = known if len(known) == n else None
    else:
        pairs = eigsh(operator, wanted, tol=_TOL, seed=how.seed, monitor=how.monitor)
        values, vectors = pairs.eigenvalues, pairs.vectors
        residual = float(np.linalg.norm(pairs.residuals * np.maximum(np.abs(values), pairs.floor)))
        status, message = pairs.status, pairs.message
    if every is None and with_smallest and how.way == "lapack":
        every = eigvalsh(operator).eigenvalues
    least = low = high = None
    if with_smallest and every is not None:
        unsure = n * _EPS * float(np.abs(every).max())  # of LAPACK
        least = float(every[-1])
        low, high = least - unsure, least + unsure
    elif with_smallest:
        found = _smallest(operator, how, checkpoint)
        least, low, high = float(found.eigenvalues[0]), found.low, found.high
        # That it is not known at storage precision is a finding; bounds hold all the same.
        if status == "converged" and found.status in {"step limit", "not converged"}:
            status, message = found.status, f"smallest eigenvalue: {found.message}"
    return {
        "eigenvalues": values[:k].copy(),
        "eigenvectors": np.ascontiguousarray(vectors[:, :k]),
        "residual": residual,
        "next_eigenvalue": float(values[k]) if wanted > k else None,
        "smallest": least,
        "low": low,
        "high": high,
        "floor": operator.storage_floor(),
        "log_determinant": _log_determinant(operator, every, how),
        "status": status,
        "message": message,
    }


def _smallest(operator: Operator, how: How, checkpoint: Checkpoint | None) -> Smallest:
    """The smallest eigenvalue by block Davidson, with a proved bound where there is a factor."""
    find = partial(smallest, operator, seed=how.seed, monitor=how.monitor)
    by_passes = partial(find, tol=_TOL_BY_PASSES, certify=False)
    if how.way == "passes":
        return by_passes(checkpoint=checkpoint)
    try:
        factor = cholesky(operator, jitter="auto")
    except IndefiniteError:  # beyond what rounding explains
        return by_passes()
    return find(tol=_TOL_BY_FACTOR, inverse=lambda block: factor.solve(block, refine=0).coefficients, certify=True)


def _log_determinant(operator: Operator, every: FloatArray | None, how: How) -> float | None:
    if every is not None:
        shifted = every + how.ridge
        return float(np.log(shifted).sum()) if shifted[-1] > 0 else None
    if how.way == "passes":
        return None
    try:
        return cholesky(operator, ridge=how.ridge).logdet
    except IndefiniteError:
        return None


def outer_ends(ends: Ends, num_outputs: int) -> Ends:
    """The ends of ``K ⊗ I_O`` from those of K: each eigenvector v stands for the O vectors ``v ⊗ e``."""
    if num_outputs == 1:
        return ends
    determinant = ends.log_determinant
    return replace(
        ends,
        eigenvalues=np.repeat(ends.eigenvalues, num_outputs),
        eigenvectors=np.asarray(np.kron(ends.eigenvectors, np.eye(num_outputs)), np.float64),
        residual=ends.residual * math.sqrt(num_outputs),
        log_determinant=None if determinant is None else determinant * num_outputs,
    )


def angle_error(a: Ends, b: Ends) -> float:
    """How far the largest angle can be off, in radians: for each space the residual over its gap, and added up.

    That is the sin Θ theorem (Davis, Kahan 1970, SIAM J. Numer. Anal. 7) with the gap of the values found; infinite
    where there is none.
    """
    errors = []
    for ends in (a, b):
        gap = math.inf if ends.next_eigenvalue is None else float(ends.eigenvalues[-1]) - ends.next_eigenvalue
        errors.append(0.0 if ends.residual == 0 else ends.residual / gap if gap > 0 else math.inf)
    return float(min(sum(math.asin(min(1.0, error)) for error in errors), math.pi / 2))


def ratios_of(a: Ends, b: Ends) -> dict[str, Any]:
    """Ratios of λ_min and λ_max / λ_min of A over those of B, by the fields of the comparison.

    Values are of the stored kernels. Bounds are for the kernels before they were rounded to be stored: each λ_min may
    be off by its error and its storage floor.
    """
    if a.smallest is None or b.smallest is None:
        return {"smallest_eigenvalue_note": "not asked for"}
    found: dict[str, Any] = {"condition_number_a": a.condition, "condition_number_b": b.condition}
    if a.bounds is None or b.bounds is None or a.condition is None or b.condition is None:
        reasons = (_why(name, ends) for name, ends in (("A", a), ("B", b)) if ends.bounds is None)
        return found | {"smallest_eigenvalue_note": "; ".join(reasons)}
    ratio, top = a.smallest / b.smallest, float(a.eigenvalues[0]) / float(b.eigenvalues[0])
    low, high = a.bounds[0] / b.bounds[1], a.bounds[1] / b.bounds[0]
    words = f"{a.smallest:.6g} / {b.smallest:.6g} = {ratio:.6g}, in [{low:.6g}, {high:.6g}]"
    return found | {
        "smallest_eigenvalue_ratio": ratio,
        "smallest_eigenvalue_ratio_bounds": (low, high),
        "smallest_eigenvalue_note": words,
        "condition_number_ratio": a.condition / b.condition,
        "condition_number_ratio_bounds": (top / high, top / low),
    }


def _why(name: str, ends: Ends) -> str:
    assert ends.smallest is not None
    value, floor = f"{ends.smallest:.3g}", f"storage floor {ends.floor:.2g}"
    if abs(ends.smallest) < ends.floor:
        return f"λ_min of {name}, {value}, is below its {floor}: noise"
    if ends.high is not None and ends.high < 0:
        return f"λ_min of {name} is {value}: not positive definite"
    least = "?" if ends.low is None else f"{ends.low:.3g}"
    return f"λ_min of {name} is {value}, at least {least}, {floor}: not known from zero"
