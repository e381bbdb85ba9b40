"""Smallest eigenvalues and condition numbers, with bounds and what they rest on."""

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError, IndefiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import memory_room
from ntkpipe.base.tables import TableRows
from ntkpipe.operators.blas import single_threaded_blas
from ntkpipe.operators.opening import open_for_solver
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.linear.preconditioner import randomly_pivoted_cholesky
from ntkpipe.solvers.result import Monitor, Result, Status, Step, ignore
from ntkpipe.solvers.spectral.davidson import ApproximateInverse, Davidson
from ntkpipe.solvers.spectral.lanczos import eigsh

_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = 50 * _EPS  # of products in float64, relative to the Frobenius norm, which is near λ_1 for kernels
_TINY = 1e-300  # replaces limits of zero, as for a zero matrix
_SMALLEST_BLOCK = 16
_MOST_PROVED_UNASKED = 16384  # up to so many rows a proof by Cholesky takes minutes, and is made by default
_TOL_OF_LARGEST = 1e-6
_FLOORS = 10.0  # rounding of entries can make a small positive eigenvalue negative, by up to so many floors

DefiniteBound = Literal["cholesky", "residual"]


@dataclass(frozen=True, kw_only=True)
class Smallest(Result):
    """The smallest eigenvalues of a symmetric matrix."""

    # The smallest, ascending, shape (k,): Rayleigh quotients, so each is an upper bound of the one of its place
    eigenvalues: NDArray[np.float64] = field(repr=False)
    eigenvectors: NDArray[np.float64] = field(repr=False)  # orthonormal columns, shape (n, k)
    # Norms `|K v - λ v|` by a product with the vectors, shape (k,): an eigenvalue of K lies so near to λ
    residuals: NDArray[np.float64] = field(repr=False)
    # low, high: `low <= λ_min <= high` for the stored K, rounding of float64 included. `high` always holds, `low` as
    # `certificate` says; None if a proof failed.
    low: float | None
    high: float
    # `cholesky`: K - low I was proved positive definite. `residual`: some eigenvalue lies between the bounds; that it
    # is the smallest relies on the random start not having missed a smaller one.
    certificate: DefiniteBound | None
    largest: float  # λ_max
    # condition_low, condition_high: bounds of λ_max / λ_min from `low` and `high`; no upper one where λ_min is not
    # known from zero, by its bound or by storage
    condition_low: float | None
    condition_high: float | None
    # What rounding to the storage dtype did to K in the spectral norm. The matrix before that has its smallest
    # eigenvalue within `floor` of these bounds; below it λ_min is not known at all.
    floor: float

    def _rows(self) -> TableRows:
        words = {
            "cholesky": "proved by Cholesky",
            "residual": "below by residual: if none was missed",
            None: "no lower bound",
        }
        low = "?" if self.low is None else f"{self.low:.6g}"
        least = "?" if self.condition_low is None else f"{self.condition_low:.4g}"
        most = "not known" if self.condition_high is None else f"{self.condition_high:.4g}"
        return [
            ("smallest eigenvalue", f"{low} to {self.high:.6g}, {words[self.certificate]}"),
            ("condition number", f"{least} to {most}, largest eigenvalue {self.largest:.6g}"),
            ("storage floor", f"{self.floor:.2g}"),
        ]


@single_threaded_blas()
def smallest(
    matrix: Any,
    k: int = 1,
    *,
    tol: float = 1e-2,
    inverse: ApproximateInverse | None = None,
    certify: bool | None = None,
    path: str | Path | None = None,
    block: int | None = None,
    max_passes: int = 200,
    memory_limit: int | None = None,
    seed: int = 0,
    monitor: Monitor = ignore,
) -> Smallest:
    """The k smallest eigenvalues, with bounds of the smallest one and of the condition number.

    Block Davidson (Davidson, 1975): residuals are preconditioned with an approximate inverse of K, by default that of
    randomly pivoted Cholesky of its default rank. Kernels have no gap at this end: the vectors converge slowly, and
    the eigenvalues, whose error is about the square of the residual over the gap, much before them.

    That an eigenvalue is within the residual of λ is certain; that there is none below is not. The proof is Cholesky
    of ``K - σ I`` with σ below λ by the residual: if it runs through in floating point, no eigenvalue lies below
    ``σ - 2 (n + 1) eps tr(K)`` (Rump, "Verification of positive definiteness", BIT 46, 2006).

    Passes: about 5 for λ_max, those of the preconditioner, one for the diagonal, then one a step: 50 to 100 on kernels
    of networks with the default inverse, 10 with an exact one, and one that checks. A proof is n³/3 multiplications,
    about a pass more. Memory is ``24 block n`` float64 and the preconditioner; n²/2 for a proof without ``path``.

    Parameters
    ----------
    matrix
        K: what :func:`ntkpipe.as_operator` takes.
    k
        Number of eigenvalues.
    tol
        ``|K v - λ v| <= tol max(|λ|, floor)`` for all k pairs, or the rounding of float64 products.
    inverse
        Maps a block of shape (n, c) to about ``K^-1 @ block``: ``Preconditioner.solve``, or
        ``lambda block: factor.solve(block).coefficients`` of :func:`ntkpipe.cholesky`.
    certify
        Whether to prove the lower bound; default up to 16,384 rows, where ``memory_limit`` holds the factor.
    path
        Folder for the factor of the proof; default in memory. See :func:`ntkpipe.cholesky`.
    block
        Columns of a pass; default 2 k, at least 16.
    max_passes
        Most steps.
    memory_limit
        Bytes that this process may use, without the vectors; default what it uses already and half of what is free.
    seed
        Seed of the first block, and of the default inverse.
    monitor
        Called after each pass: first of the iteration for λ_max, then of that for the smallest.

    Raises
    ------
    ConfigError
        If a number is out of range, or the inverse returns something else than such a block.
    NonFiniteError
        If the matrix holds NaN or infinity.
    ResourceError
        If a proof was asked for and its factor does not fit.
    TileError
        If a tile of a stored kernel is missing or damaged.
    """
    started = perf_counter()
    operator, room = open_for_solver(matrix, memory_limit)
    before, n = operator.work, operator.num_rows
    check_number("k", k, low=1, high=n)
    check_number("tol", tol, low=0.0, high=1.0)
    check_number("max_passes", max_passes, low=1)
    width = max(_SMALLEST_BLOCK, 2 * k) if block is None else int(check_number("block", block, low=k))
    if certify is None:
        certify = path is not None or (n <= _MOST_PROVED_UNASKED and 8 * n * (n // 2 + 4096) <= memory_room(room))
    options: dict[str, Any] = {"k": int(k), "tol": float(tol), "inverse": "rpcholesky" if inverse is None else "given"}
    options |= {"certify": bool(certify), "path": None if path is None else str(path), "block": min(width, n)}
    options |= {"max_passes": int(max_passes), "memory_limit": memory_limit, "seed": int(seed)}
    top = eigsh(operator, 1, tol=_TOL_OF_LARGEST, seed=seed, monitor=monitor)
    largest, slack = float(top.eigenvalues[0]), float(top.residuals[0] * max(abs(top.eigenvalues[0]), top.floor))
    floor = operator.storage_floor()
    given = randomly_pivoted_cholesky(operator, seed=seed).solve if inverse is None else _checked(inverse)
    rounding = max(_ROUNDING * operator.frobenius(), _TINY)
    space = Davidson(n, options["block"], given, seed)
    for _ in range(max_passes):
        space.advance(operator)
        relative = space.norms / np.maximum(np.abs(space.values), max(floor, _TINY))
        monitor(Step(operator.work - before, float(relative[:k].max()), tol))
        if len(space.values) >= k and _are_small(space.values[:k], space.norms[:k], tol, floor, rounding):
            break
    values, vectors, norms = _by_product(operator, space.pairs(k))
    is_converged = _are_small(values, norms, tol, floor, rounding)
    low, high, certificate = _bounds(operator, values, norms, rounding, path, room, certify=certify)
    status, message = _judge(values, norms, low, floor, rounding, tol, is_converged=is_converged)
    condition_low, condition_high = _condition(low, high, largest, slack, floor)
    return Smallest(
        status=status,
        message=message,
        work=operator.work - before,
        seconds=perf_counter() - started,
        options=options,
        matrix=operator.identity(),
        eigenvalues=values,
        eigenvectors=vectors,
        residuals=norms,
        low=low,
        high=high,
        certificate=certificate,
        largest=largest,
        condition_low=condition_low,
        condition_high=condition_high,
        floor=floor,
    )


def _are_small(
    values: NDArray[np.float64], norms: NDArray[np.float64], tol: float, floor: float, rounding: float
) -> bool:
    """Whether residuals are within ``tol`` of the eigenvalues, the storage floor, or rounding."""
    return bool((norms <= np.maximum(tol * np.maximum(np.abs(values), floor), rounding)).all())


def _checked(inverse: ApproximateInverse) -> ApproximateInverse:
    """Wrap the inverse of a caller in a check of shape and dtype."""

    def apply(block: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.asarray(inverse(block))
        if found.shape != block.shape or found.dtype.kind != "f":
            raise ConfigError(
                f"inverse returned shape {found.shape} and dtype {found.dtype} for a float64 block of {block.shape}"
            )
        return found.astype(np.float64, copy=False)

    return apply


def _by_product(
    operator: Operator, vectors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Rayleigh-Ritz pairs of a few vectors and the norms of their residuals, by one pass."""
    products = operator.matmat(vectors)
    inner = vectors.T @ products
    values, turn = np.linalg.eigh((inner + inner.T) / 2)
    vectors = vectors @ turn
    residuals = products @ turn - vectors * values
    return values, vectors, np.asarray(np.linalg.norm(residuals, axis=0))


def _bounds(
    operator: Operator,
    values: NDArray[np.float64],
    norms: NDArray[np.float64],
    rounding: float,
    path: str | Path | None,
    memory_limit: int | None,
    *,
    certify: bool,
) -> tuple[float | None, float, DefiniteBound | None]:
    """Bounds of λ_min, and what the lower one rests on."""
    high = float(values[0]) + rounding
    low = float(values[0] - norms[0]) - rounding
    if not certify:
        return low, high, "residual"
    n = operator.num_rows
    # Rounding of Cholesky, of the shift on the diagonal, and of the diagonal itself.
    unsure = 2 * (n + 1) * _EPS * (operator.trace() + n * abs(low)) / (1 - 2 * (n + 1) * _EPS)
    try:
        cholesky(operator.shifted(-low), path=path, memory_limit=memory_limit)
    except IndefiniteError:
        # λ_min is below the Rayleigh quotient, and below the shift since Cholesky failed.
        return None, min(high, low + unsure), None
    return low - unsure, high, "cholesky"


def _condition(
    low: float | None, high: float, largest: float, slack: float, floor: float
) -> tuple[float | None, float | None]:
    """Bounds of λ_max / λ_min of the stored matrix; None where λ_min may be zero, or storage leaves it unknown."""
    if largest <= 0 or high <= 0:
        return None, None
    if high < floor:
        return (largest - slack) / (high + floor), None
    return (largest - slack) / high, None if low is None or low <= 0 else (largest + slack) / low


def _judge(
    values: NDArray[np.float64],
    norms: NDArray[np.float64],
    low: float | None,
    floor: float,
    rounding: float,
    tol: float,
    *,
    is_converged: bool,
) -> tuple[Status, str]:
    least, k = float(values[0]), len(values)
    worst = float((norms / np.maximum(np.abs(values), max(floor, _TINY))).max())
    if low is None:
        return "not converged", (
            f"Cholesky met an eigenvalue below {least - float(norms[0]):.6g}, which the iteration has missed or not "
            "reached; lower tol, raise block or give another seed"
        )
    if not is_converged:
        return "step limit", f"residuals are {worst:.2g} of the eigenvalues; raise max_passes or give a better inverse"
    if -max(_FLOORS * floor, rounding) <= least < 0:
        return "indefinite at storage precision", (
            f"λ_min is {least:.3g}, which the storage floor {floor:.2g} explains: not known at storage precision"
        )
    note = ""
    if abs(least) < floor:
        note = f"; λ_min lies below the storage floor {floor:.2g}: not known at storage precision"
    elif least < 0:
        note = f"; the matrix is indefinite beyond what the storage floor {floor:.2g} explains"
    return "converged", f"{k} residual{'s' * (k > 1)} within {tol:g} of the eigenvalue{note}"
