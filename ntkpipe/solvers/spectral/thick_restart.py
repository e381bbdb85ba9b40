"""Block Lanczos space with thick restarts, for leading eigenpairs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.checkpoint import Get, Pieces
from ntkpipe.store.results import as_integer, as_number

_EPS = float(np.finfo(np.float64).eps)
_NOTHING = 10 * _EPS  # a direction this small, relative to the norm of the matrix, is rounding
_DOUBTFUL = 1e-12  # one this small may be rounding of large matrices: used, but trusted no more than a random one
_PROBATION = 2  # passes without change, after random columns joined, until the space is believed to lack nothing
_MOST_REFINABLE = 0.5  # a refinement assumes that the next block is well below the pairs it corrects
_NEARLY_ORTHONORMAL = 0.5  # row sums of |I - Gram matrix| below which Cholesky of it is accurate
_ROWS_AT_ONCE = 4096

# Residuals that are small enough, for eigenvalues in descending order.
Limits = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs in a basis."""

    values: FloatArray  # shape (k,), descending
    coordinates: FloatArray  # in the basis V, shape (m, k); of refined vectors in [V, Q], shape (m + w, k)
    residuals: FloatArray  # norms of the residuals, shape (k,)


class ThickRestart:
    """Block Lanczos with full reorthogonalisation and thick restarts (Wu and Simon, 2000, here in blocks).

    After each pass ``K V = V H + Q B`` holds to rounding, with [V, Q] orthonormal. H holds all inner products, not only
    a band: a restart is no special case. Memory is ``(max_basis + 4 b) n`` float64.
    """

    def __init__(self, num_rows: int, block: int, max_basis: int, keep: int, seed: int) -> None:
        self._block, self._keep, self._seed = block, keep, seed
        # Columns are contiguous, so that BLAS can use leading columns without a copy.
        self._vectors = np.empty((num_rows, max_basis), order="F")
        start = np.random.default_rng(seed).standard_normal((num_rows, block))
        self._next = np.ascontiguousarray(np.linalg.qr(start)[0])
        self._projected = np.zeros((0, 0))
        self._coupling = np.zeros((block, 0))
        self._decomposed: tuple[FloatArray, FloatArray] | None = None
        self._extended: tuple[FloatArray, FloatArray] | None = None
        self.passes = 0  # blocks that were multiplied
        self._level = 0.0  # mean eigenvalue of K on the last block, used as an estimate for the next
        self._shrinkage: float | None = None
        # Passes since random columns joined in which no leading value changed; None if none joined.
        self._quiet: int | None = None
        self._pieces = Pieces()

    @property
    def size(self) -> int:
        """m, columns of V."""
        return len(self._projected)

    @property
    def is_whole(self) -> bool:
        """Whether V spans everything, so that its Ritz pairs are eigenpairs."""
        return self.size == len(self._vectors)

    @property
    def is_settled(self) -> bool:
        """Whether no columns are so new that they may still show an eigenvalue of which the space has nothing."""
        return self.is_whole or self._quiet is None or self._quiet >= _PROBATION

    def _decompose(self) -> tuple[FloatArray, FloatArray]:
        if self._decomposed is None:
            self._decomposed = _descending(self._projected)
        return self._decomposed

    def ritz(self, k: int) -> Ritz:
        """The leading k Ritz pairs of V, fewer if V is smaller; their residuals are exact and cost no pass."""
        values, coordinates = self._decompose()
        residuals = np.linalg.norm(self._coupling @ coordinates[:, :k], axis=0)
        return Ritz(values[:k], coordinates[:, :k], residuals)

    def refined(self, k: int) -> Ritz:
        """Leading pairs of [V, Q], where the block of H that is not known yet, QᵀKQ, is taken as τ I.

        Where K is far smaller on Q than the wanted eigenvalues that is a step of Davidson's method, which saves most of
        a pass. Residuals are those of V, times how much this would have shrunk the largest in the pass before.
        """
        plain = self.ritz(k)
        if self._shrinkage is None or not self._is_refinable(k):
            return plain
        values, coordinates = self._extend(k)
        return Ritz(values, coordinates, plain.residuals * min(1.0, self._shrinkage))

    def _is_refinable(self, k: int) -> bool:
        if self.size <= k or self.is_whole:
            return False
        return 0.0 < self._level <= _MOST_REFINABLE * float(self._decompose()[0][k - 1])

    def _extend(self, k: int) -> tuple[FloatArray, FloatArray]:
        """The leading k pairs of the matrix of [V, Q] with τ I for the unknown block."""
        if self._extended is not None and self._extended[0].size == k:
            return self._extended
        size, width = self.size, self._next.shape[1]
        extended = np.zeros((size + width, size + width))
        extended[:size, :size] = self._projected
        extended[size:, :size] = self._coupling
        extended[:size, size:] = self._coupling.T
        extended[size:, size:] = self._level * np.eye(width)
        values, coordinates = _descending(extended)
        self._extended = values[:k], coordinates[:, :k]
        return self._extended

    def advance(self, operator: Operator, k: int, limits: Limits) -> None:
        """One pass: the product with Q, which joins V; then the next Q. A full V is cut."""
        before = self.ritz(k)
        refined = self._extend(k)[1] if self._is_refinable(k) else None
        quiet = self._quiet
        self._multiply(operator)
        units = limits(before.values)
        self._shrinkage = None
        if refined is not None and before.residuals.any():
            exact = self._residuals(refined)
            self._shrinkage = float((exact / units).max() / (before.residuals / units).max())
        after = self._decompose()[0][:k]
        if quiet is not None:
            is_same = len(after) == len(before.values) and bool((np.abs(after - before.values) <= units).all())
            self._quiet = quiet + 1 if is_same else 0
        if self.size + self._next.shape[1] > self._vectors.shape[1]:
            self._restart()

    def _multiply(self, operator: Operator) -> None:
        product = operator.matmat(self._next)
        before, width = self.size, self._next.shape[1]
        size = before + width
        self._pieces.ends.append((f"block-{self.passes}", size))
        self.passes += 1
        self._vectors[:, before:size] = self._next
        basis = self._vectors[:, :size]
        columns = _remove(basis, product)
        projected = np.empty((size, size))
        projected[:before, :before] = self._projected
        projected[:, before:] = columns
        projected[before:, :before] = columns[:before].T
        projected[before:, before:] = (columns[before:] + columns[before:].T) / 2
        self._projected, self._decomposed, self._extended = projected, None, None
        self._level = float(np.trace(projected[before:, before:])) / width
        self._find_next(basis, product)

    def _find_next(self, basis: FloatArray, product: FloatArray) -> None:
        """Q and B of what a product has outside of V; random directions take the place of those that are nothing."""
        (num_rows, size), width = basis.shape, product.shape[1]
        count = min(self._block, num_rows - size)
        self._coupling, self._next = np.zeros((count, size)), np.zeros((num_rows, count))
        if not count:
            return
        directions, upper = np.linalg.qr(product)
        left, sizes, right = np.linalg.svd(upper)
        norm = max(float(np.abs(self._decompose()[0]).max()), float(sizes[0]))
        num_old = min(count, int((sizes > _NOTHING * norm).sum()))
        self._next[:, :num_old] = directions @ left[:, :num_old]
        if num_old < count:
            rng = np.random.default_rng([self._seed, self.passes])
            self._next[:, num_old:] = rng.standard_normal((num_rows, count - num_old))
        if len(sizes) < count or sizes[count - 1] <= _DOUBTFUL * norm:
            self._quiet = self._quiet or 0
        coefficients = sizes[:num_old, None] * right[:num_old]
        # A small remainder is not orthogonal to V, since rounding is large beside it.
        for _ in range(2):
            _remove(basis, self._next)
            self._next, upper = _orthonormal(self._next)
            coefficients = upper[:, : len(coefficients)] @ coefficients
        self._next = np.ascontiguousarray(self._next)
        self._coupling[:, size - width :] = coefficients

    def _residuals(self, coordinates: FloatArray) -> FloatArray:
        """Residual norms of any vectors of V."""
        inside = self._projected @ coordinates
        inside -= coordinates * np.einsum("ij,ij->j", coordinates, inside)
        outside = self._coupling @ coordinates
        return np.asarray(np.hypot(np.linalg.norm(inside, axis=0), np.linalg.norm(outside, axis=0)))

    def _restart(self) -> None:
        values, coordinates = self._decompose()
        kept = np.asfortranarray(coordinates[:, : self._keep])
        for rows in runs(len(self._vectors), _ROWS_AT_ONCE):
            self._vectors[rows, : self._keep] = self._vectors[rows, : self.size] @ kept
        self._coupling = self._coupling @ kept
        self._projected, self._decomposed, self._extended = np.diag(values[: self._keep]), None, None
        self._pieces.ends = [(f"basis-{self.passes}", self._keep)]

    def combine(self, coordinates: FloatArray) -> FloatArray:
        """The vectors of coordinates in V or [V, Q], shape (n, k), C-contiguous."""
        found = np.empty((len(self._vectors), coordinates.shape[1]))
        np.matmul(self._vectors[:, : self.size], coordinates[: self.size], out=found)
        if len(coordinates) > self.size:
            found += self._next @ coordinates[self.size :]
        return found

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs beside :meth:`arrays`."""
        state = {"passes": self.passes, "pieces": self._pieces.ends, "level": self._level}
        return {**state, "shrinkage": self._shrinkage, "quiet": self._quiet}

    def arrays(self) -> dict[str, FloatArray]:
        """Blocks of the basis since a restart, the basis after it, and small arrays of the last pass."""
        small = {"projected": self._projected, "coupling": self._coupling, "block": self._next}
        return self._pieces.arrays(self._vectors) | {f"{kind}-{self.passes}": values for kind, values in small.items()}

    def restore(self, get: Get, state: Mapping[str, Any]) -> None:
        """Go on, to the last bit, from what both were."""
        self.passes, self._level = as_integer(state["passes"]), as_number(state["level"])
        self._quiet = None if state["quiet"] is None else as_integer(state["quiet"])
        self._shrinkage = None if state["shrinkage"] is None else as_number(state["shrinkage"])
        size, num_rows = self._pieces.restore(state["pieces"], get, {"": self._vectors}), len(self._vectors)
        count = min(self._block, num_rows - size)
        self._decomposed = self._extended = None
        self._projected = get(f"projected-{self.passes}", (size, size))
        self._next = get(f"block-{self.passes}", (num_rows, count))
        self._coupling = get(f"coupling-{self.passes}", (count, size))


def rayleigh_ritz(
    operator: Operator, vectors: FloatArray, *, descending: bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Ritz pairs within the span of a few vectors, and the norms of their residuals, by one pass."""
    products = operator.matmat(vectors)
    inner = vectors.T @ products
    values, turn = (_descending if descending else np.linalg.eigh)((inner + inner.T) / 2)
    turn = np.ascontiguousarray(turn)
    vectors, products, values = vectors @ turn, products @ turn, values.copy()
    products -= vectors * values
    return values, vectors, np.linalg.norm(products, axis=0)


def _remove(basis: FloatArray, block: FloatArray) -> FloatArray:
    """Subtract from a block, in place, its part in the basis; return the coefficients."""
    coefficients = basis.T @ block
    block -= basis @ coefficients
    return np.asarray(coefficients)


def _orthonormal(block: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Q and R of a block; by Cholesky of its Gram matrix, in matrix products, if it is nearly orthonormal already."""
    sizes = np.linalg.norm(block, axis=0)
    if sizes.all():
        scaled = block / sizes
        gram = scaled.T @ scaled
        if np.abs(gram - np.eye(len(gram))).sum(axis=1).max() < _NEARLY_ORTHONORMAL:
            lower = np.linalg.cholesky(gram)
            return scaled @ np.linalg.inv(lower).T, lower.T * sizes
    directions, upper = np.linalg.qr(block)
    return directions, upper


def _descending(matrix: FloatArray) -> tuple[FloatArray, FloatArray]:
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1], vectors[:, ::-1]
