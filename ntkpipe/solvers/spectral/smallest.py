"""Smallest eigenvalues and condition numbers, with bounds and what they rest on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import Budget, MemoryLimit, check_number
from ntkpipe.base.errors import ConfigError, IndefiniteError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.checkpoint import Get, Journal, Pieces, Stages, as_work
from ntkpipe.solvers.direct.cholesky import bytes_of_cholesky, cholesky
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.linear.preconditioner import preconditioner_once, randomly_pivoted_cholesky
from ntkpipe.solvers.memory import bytes_of_solve
from ntkpipe.solvers.probe_lanczos import explained_by_rounding
from ntkpipe.solvers.result import Monitor, Result, Status, Step, ignore, recorded
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.solvers.spectral.thick_restart import rayleigh_ritz
from ntkpipe.store.results import Checkpoint, as_integer

_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = 50 * _EPS  # of products in float64, relative to the Frobenius norm, which is near λ_1 for kernels
_TINY = 1e-300  # replaces limits of zero, as for a zero matrix
_SMALLEST_BLOCK = 16
_VECTORS_A_COLUMN = 30  # of a block: two bases of 12 blocks, and blocks on their way
_MOST_PROVED_UNASKED = 16384  # up to so many rows a proof by Cholesky takes minutes, and is made by default
_TOL_OF_LARGEST = 1e-6
_MOST_BLOCKS = 12
_KEPT_BLOCKS = 3  # by a restart: the wanted one and its neighbours
_NOTHING = 1e-10  # a direction is dropped if orthogonalisation leaves less of it

ApproximateInverse = Callable[[FloatArray], FloatArray]
DefiniteBound = Literal["cholesky", "residual"]


@dataclass(frozen=True, kw_only=True)
class Smallest(Result):
    """The smallest eigenvalues of a symmetric matrix."""

    # The smallest, ascending, shape (k,): Rayleigh quotients, so each is an upper bound of the one of its place
    eigenvalues: FloatArray = field(repr=False)
    eigenvectors: FloatArray = field(repr=False)  # orthonormal columns, shape (n, k)
    # Norms `|K v - λ v|` by a product with the vectors, shape (k,): an eigenvalue of K lies so near to λ
    residuals: FloatArray = field(repr=False)
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


@recorded()
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
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> Smallest:
    """The k smallest eigenvalues, with bounds of the smallest one and of the condition number.

    Block Davidson (Davidson, 1975): residuals are preconditioned with an approximate inverse of K, by default that of
    randomly pivoted Cholesky of its default rank. Kernels have no gap at this end: the vectors converge slowly, and
    the eigenvalues, whose error is about the square of the residual over the gap, much before them.

    That an eigenvalue is within the residual of λ is certain; that there is none below is not. The proof is Cholesky
    of ``K - σ I`` with σ below λ by the residual: if it runs through in floating point, no eigenvalue lies below
    ``σ - 2 (n + 1) eps tr(K)`` (Rump, "Verification of positive definiteness", BIT 46, 2006).

    Passes: about 5 for λ_max, those of the preconditioner, one for the diagonal, 50 to 100 steps on kernels of networks
    (10 with an exact inverse), one that checks, and about one for a proof, of n³/3 multiplications. Memory is
    ``24 block n`` float64 and the preconditioner; n²/2 for a proof without ``path``.

    Parameters
    ----------
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
    checkpoint
        Where λ_max, the default inverse and the space are saved, 16 block n bytes a pass. Another call goes on from the
        last pass, also with a higher ``max_passes``; a given ``inverse`` must be the same. The caller clears it.
    """
    operator: Operator = matrix
    budget, n, before = Budget.of(memory_limit), operator.num_rows, operator.work
    check_number("k", k, low=1, high=n)
    check_number("tol", tol, low=0.0, high=1.0)
    check_number("max_passes", max_passes, low=1)
    width = max(_SMALLEST_BLOCK, 2 * k) if block is None else int(check_number("block", block, low=k))
    if certify is None:
        certify = path is not None or (n <= _MOST_PROVED_UNASKED and budget.fits(bytes_of_cholesky(n)))
    options = {"inverse": "rpcholesky" if inverse is None else "given", "certify": certify, "block": min(width, n)}
    decides = {"function": "smallest", "matrix": operator.identity(), "k": k, "tol": tol, "seed": seed, **options}
    stages = Stages(checkpoint, {name: value for name, value in decides.items() if name != "certify"})
    # Work of earlier processes, here and below, is what was not done in this one.
    part: Any = {"seed": seed, "monitor": monitor, "checkpoint": stages.part("largest")}
    top = stages.result("largest", Eigenpairs, lambda: eigsh(operator, 1, tol=_TOL_OF_LARGEST, **part))
    earlier = top.work - (operator.work - before)
    with stages.journal.reading():
        largest, slack = float(top.eigenvalues[0]), float(top.residuals[0] * max(abs(top.eigenvalues[0]), top.floor))
    floor = operator.storage_floor()
    if inverse is None:
        start = operator.work
        made = preconditioner_once(stages, n, lambda: randomly_pivoted_cholesky(operator, seed=seed))
        inverse, earlier = made.solve, earlier + made.work - (operator.work - start)
    rounding = max(_ROUNDING * operator.frobenius(), _TINY)
    space = Davidson(n, min(width, n), inverse, seed)
    limits = _Limits(k, tol, floor, rounding, explained_by_rounding(operator, largest))
    journal, start, known = Journal(stages.part("space"), {}), operator.work, Work()
    if journal.earlier is not None:
        with journal.reading():
            known = as_work(journal.earlier["work"])
            space.restore(journal.get, journal.earlier["space"])
    earlier += known
    while not limits.are_met(space.values, space.norms) and space.passes < max_passes:
        space.advance(operator)
        journal.save({"space": space.state(), "work": known + (operator.work - start)}, space.arrays())
        monitor(Step(earlier + (operator.work - before), limits.worst(space.values, space.norms), tol))
    values, vectors, norms = rayleigh_ritz(operator, space.pairs(k), descending=False)
    is_converged = limits.are_met(values, norms)
    low, high, certificate = _bounds(operator, values, norms, rounding, path, budget, certify=certify)
    status, message = _judge(values, norms, low, limits, is_converged=is_converged)
    condition_low, condition_high = _condition(low, high, largest, slack, floor)
    return Smallest(
        status=status,
        message=message,
        work=earlier,
        options=options,
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


def bytes_of_smallest(num_rows: int, k: int = 1, *, block: int | None = None) -> int:
    """Memory that :func:`smallest` takes, without a proof: the vectors, and the default inverse while it is made."""
    width = max(_SMALLEST_BLOCK, 2 * k) if block is None else block
    return bytes_of_solve(num_rows, 0) + 8 * num_rows * _VECTORS_A_COLUMN * min(width, num_rows)


@dataclass(frozen=True)
class _Limits:
    """How small the residuals of the first k pairs must be."""

    k: int
    tol: float
    floor: float  # of storage
    rounding: float  # of products
    explained: float  # by rounding of entries and arithmetic

    def are_met(self, values: FloatArray, norms: FloatArray) -> bool:
        """Whether residuals are within ``tol`` of the eigenvalues, the storage floor, or rounding."""
        allowed = np.maximum(self.tol * np.maximum(np.abs(values[: self.k]), self.floor), self.rounding)
        return len(values) >= self.k and bool((norms[: self.k] <= allowed).all())

    def worst(self, values: FloatArray, norms: FloatArray) -> float:
        """The largest relative residual."""
        return float((norms / np.maximum(np.abs(values), max(self.floor, _TINY)))[: self.k].max())


def _bounds(
    operator: Operator,
    values: FloatArray,
    norms: FloatArray,
    rounding: float,
    path: str | Path | None,
    budget: Budget,
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
        cholesky(operator.shifted(-low), path=path, memory_limit=budget)
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
    values: FloatArray, norms: FloatArray, low: float | None, limits: _Limits, *, is_converged: bool
) -> tuple[Status, str]:
    least, k, floor, worst = float(values[0]), limits.k, limits.floor, limits.worst(values, norms)
    if low is None:
        return "not converged", (
            f"Cholesky met an eigenvalue below {least - float(norms[0]):.6g}, which the iteration has missed or not "
            "reached; lower tol, raise block or give another seed"
        )
    if not is_converged:
        return "step limit", f"residuals are {worst:.2g} of the eigenvalues; raise max_passes or give a better inverse"
    if -max(limits.explained, limits.rounding) <= least < 0:
        return "indefinite at storage precision", (
            f"λ_min is {least:.3g}, which rounding explains (storage floor {floor:.2g}): not known at storage precision"
        )
    note = ""
    if abs(least) < floor:
        note = f"; λ_min lies below the storage floor {floor:.2g}: not known at storage precision"
    elif least < 0:
        note = f"; the matrix is indefinite beyond what rounding explains (storage floor {floor:.2g})"
    return "converged", f"{k} residual{'s' * (k > 1)} within {limits.tol:g} of the eigenvalue{note}"


class Davidson:
    """Block Davidson for the smallest eigenpairs (Davidson, 1975), with thick restarts.

    The space V gets ``T R`` of the residuals R of the leading Ritz pairs, where T is about K^-1. K V is kept beside V,
    so residuals assume nothing. Memory is ``2 * 12 b n`` float64.
    """

    def __init__(self, num_rows: int, block: int, inverse: ApproximateInverse, seed: int) -> None:
        self._block, self._inverse = min(block, num_rows), inverse
        self._rng = np.random.default_rng(seed)
        most = min(num_rows, _MOST_BLOCKS * self._block)
        self._vectors = np.empty((num_rows, most), order="F")
        self._products = np.empty((num_rows, most), order="F")
        self._size, self.passes = 0, 0
        self._pieces = Pieces()
        self._ahead = self._precondition(self._rng.standard_normal((num_rows, self._block)))
        self.values = np.zeros(0)
        self.norms = np.zeros(0)
        self._coordinates = np.zeros((0, 0))

    @property
    def is_whole(self) -> bool:
        """Whether V spans everything."""
        return self._size == len(self._vectors)

    def advance(self, operator: Operator) -> None:
        """Take one pass, and update :attr:`values`, ascending, and :attr:`norms` of residuals."""
        if self._size + self._block > self._vectors.shape[1] and self._vectors.shape[1] < len(self._vectors):
            self._restart()
        joining = self._orthonormal(self._ahead)
        stop = self._size + joining.shape[1]
        self._vectors[:, self._size : stop] = joining
        self._products[:, self._size : stop] = operator.matmat(joining)
        self.passes += 1
        self._pieces.ends.append((f"block-{self.passes}", stop))
        self._look(stop)

    def _look(self, size: int) -> None:
        """Find the pairs of the first vectors, and what joins them next."""
        self._size = size
        vectors, products = self._vectors[:, :size], self._products[:, :size]
        projected = vectors.T @ products
        values, coordinates = np.linalg.eigh((projected + projected.T) / 2)
        self._coordinates = coordinates
        wanted = coordinates[:, : self._block]
        residuals = products @ wanted - (vectors @ wanted) * values[: self._block]
        self.values, self.norms = values[: self._block], np.linalg.norm(residuals, axis=0)
        self._ahead = self._precondition(residuals)

    def _precondition(self, block: FloatArray) -> FloatArray:
        found = np.asarray(self._inverse(block))
        if found.shape != block.shape or found.dtype.kind != "f":
            raise ConfigError(
                f"inverse returned shape {found.shape} and dtype {found.dtype} for a float64 block of {block.shape}"
            )
        return found.astype(np.float64, copy=False)

    def _orthonormal(self, block: FloatArray) -> FloatArray:
        """Orthonormal basis of what a block adds to V, filled up with random columns."""
        vectors, room = self._vectors[:, : self._size], self._vectors.shape[1] - self._size
        sizes = np.linalg.norm(block, axis=0)
        block = block / np.where(np.isfinite(sizes) & (sizes > 0), sizes, 1.0)
        block = np.where(np.isfinite(block), block, 0.0)
        for _ in range(2):
            block = block - vectors @ (vectors.T @ block)
            left, sizes, _right = np.linalg.svd(block, full_matrices=False)
            block = left[:, sizes > _NOTHING]
        missing = min(self._block, room) - block.shape[1]
        if missing > 0:
            fresh = self._rng.standard_normal((len(block), missing))
            for _ in range(2):
                fresh -= vectors @ (vectors.T @ fresh)
                fresh -= block @ (block.T @ fresh)
                fresh = np.linalg.qr(fresh)[0]
            block = np.concatenate([block, fresh], axis=1)
        block = block[:, :room] - vectors @ (vectors.T @ block[:, :room])
        return np.asarray(np.linalg.qr(block)[0])

    def _restart(self) -> None:
        kept = np.asfortranarray(self._coordinates[:, : _KEPT_BLOCKS * self._block])
        for basis in (self._vectors, self._products):
            basis[:, : kept.shape[1]] = basis[:, : self._size] @ kept
        self._size = kept.shape[1]
        self._pieces.ends = [(f"basis-{self.passes}", self._size)]

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside :meth:`arrays`."""
        return {"passes": self.passes, "pieces": self._pieces.ends}

    def arrays(self) -> dict[str, FloatArray]:
        """Vectors and products, in the pieces in which they came."""
        return self._pieces.arrays(self._vectors, "-vectors") | self._pieces.arrays(self._products, "-products")

    def restore(self, get: Get, state: Mapping[str, Any]) -> None:
        """Go on from what both were; later random columns are others."""
        self.passes = as_integer(state["passes"])
        bases = {"-vectors": self._vectors, "-products": self._products}
        if size := self._pieces.restore(state["pieces"], get, bases):
            self._look(size)

    def pairs(self, k: int) -> FloatArray:
        """The first k Ritz vectors, shape (n, k)."""
        return np.ascontiguousarray(self._vectors[:, : self._size] @ self._coordinates[:, :k])
