"""The Lanczos process of each of several vectors, with full reorthogonalisation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.solvers.checkpoint import Get
from ntkpipe.store.results import as_integer, as_numbers

_EPS = float(np.finfo(np.float64).eps)
_NOTHING = 10 * _EPS  # a direction this small, relative to the norm of the matrix, is rounding


class ProbeLanczos:
    """The Lanczos process of each column of a block by itself; all columns share a pass.

    Every new vector is orthogonalised twice against all older ones of its column: without it copies ("ghosts") of
    converged eigenvalues appear, which spoil counts. Memory is ``(max_steps + 1) p n`` float64, touched as needed.
    """

    def __init__(self, probes: FloatArray, max_steps: int, deflate: FloatArray | None = None) -> None:
        num_rows, num_probes = probes.shape
        self.max_steps = max_steps
        self._deflate = deflate
        self._dimension = num_rows - (0 if deflate is None else deflate.shape[1])
        self._basis = np.empty((num_probes, max_steps + 1, num_rows))
        self._alphas = np.zeros((num_probes, max_steps))
        self._betas = np.zeros((num_probes, max_steps))
        self._scales = np.zeros(num_probes)
        self.num_steps = 0
        start = self._project(np.array(probes.T, order="C"))
        sizes = np.linalg.norm(start, axis=1)
        # Only rounding is left of a probe in the span of the deflated vectors.
        alive = (sizes > _NOTHING * np.linalg.norm(probes, axis=0)) & (self._dimension > 0)
        self.squared_norms = np.where(alive, sizes**2, 0.0)
        self._lengths = np.where(alive, self._dimension, 0)
        self._basis[:, 0] = start / np.where(alive, sizes, np.inf)[:, None]

    @property
    def ended(self) -> NDArray[np.bool_]:
        """Whether the space of a column is invariant, so that more steps add nothing; shape (p,)."""
        return np.asarray(self._lengths <= self.num_steps)

    @property
    def block(self) -> FloatArray:
        """What to multiply next, shape (n, p); zero in columns that have ended."""
        return np.ascontiguousarray(self._basis[:, self.num_steps].T)

    def absorb(self, product: FloatArray) -> None:
        """Take ``K @ block``: one step of all columns."""
        step = self.num_steps
        found = np.array(product.T, order="C")
        self._alphas[:, step] = np.einsum("pn,pn->p", found, self._basis[:, step])
        older = self._basis[:, : step + 1]
        for _ in range(2):
            found = self._project(found)
            found -= np.matmul(np.matmul(older, found[:, :, None]).transpose(0, 2, 1), older)[:, 0]
        sizes = np.linalg.norm(found, axis=1)
        self._scales = np.maximum(self._scales, np.abs(self._alphas[:, step]) + sizes)
        alive = (self._lengths > step + 1) & (sizes > _NOTHING * self._scales)
        self._lengths = np.where(alive, self._lengths, np.minimum(self._lengths, step + 1))
        self._betas[:, step] = np.where(alive, sizes, 0.0)
        self._basis[:, step + 1] = found / np.where(alive, sizes, np.inf)[:, None]
        self.num_steps = step + 1

    def coefficients(self, num_steps: int) -> tuple[FloatArray, FloatArray]:
        """Diagonals and couplings of the tridiagonal matrices after ``num_steps`` steps, both of shape (p, num_steps).

        The last coupling leads out of the space. Where a column ended, couplings are zero, and its diagonal goes on
        with its first entry: eigenvalues inside of the spectrum that have no weight.
        """
        alphas, betas = self._alphas[:, :num_steps].copy(), self._betas[:, :num_steps].copy()
        beyond = np.arange(num_steps) >= self._lengths[:, None]
        return np.where(beyond, alphas[:, :1], alphas), np.where(beyond, 0.0, betas)

    def ritz(self) -> tuple[FloatArray, FloatArray]:
        """Ritz values of the first column, ascending, and the norms of their residuals, after one step or more."""
        alphas, betas = (found[0] for found in self.coefficients(self.num_steps))
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
        return values, betas[-1] * np.abs(vectors[-1])

    def state(self) -> dict[str, Any]:
        """State of the steps taken, beside their arrays."""
        coefficients = {"alphas": self._alphas[:, : self.num_steps], "betas": self._betas[:, : self.num_steps]}
        return {"num_steps": self.num_steps, **coefficients, "scales": self._scales, "lengths": self._lengths}

    def arrays(self) -> dict[str, FloatArray]:
        """Arrays of the steps taken; those of earlier steps never change."""
        return {str(step): self._basis[:, step] for step in range(1, self.num_steps + 1)}

    def restore(self, get: Get, state: Mapping[str, Any]) -> None:
        """Go on from what both were; ``get`` reads an array of this name and shape."""
        step, num_probes = as_integer(state["num_steps"]), len(self._basis)
        for index in range(1, step + 1):
            self._basis[:, index] = get(str(index), self._basis[:, index].shape)
        self._alphas[:, :step] = as_numbers(state["alphas"], (num_probes, step))
        self._betas[:, :step] = as_numbers(state["betas"], (num_probes, step))
        self._scales = as_numbers(state["scales"], (num_probes,))
        self._lengths = as_numbers(state["lengths"], (num_probes,)).astype(np.int64)
        self.num_steps = step

    def _project(self, rows: FloatArray) -> FloatArray:
        return rows if self._deflate is None else rows - (rows @ self._deflate) @ self._deflate.T
