"""Block Davidson: preconditioned residuals for the end of the spectrum where Krylov spaces are slow."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.checkpoint import Get, Pieces
from ntkpipe.store.results import as_integer

ApproximateInverse = Callable[[FloatArray], FloatArray]

_MOST_BLOCKS = 12
_KEPT_BLOCKS = 3  # by a restart: the wanted one and its neighbours
_NOTHING = 1e-10  # a direction is dropped if orthogonalisation leaves less of it


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
        self._ahead = inverse(self._rng.standard_normal((num_rows, self._block)))
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
        self._ahead = self._inverse(residuals)

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
