"""Conjugate gradients for many right-hand sides together: one pass per iteration, whatever their number."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.linear.preconditioner import Preconditioner
from ntkpipe.solvers.linear.residual_replacement import Recurrence

_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = 4 * _EPS  # curvature of a direction of length one, relative to the norm of the matrix, that may be nothing


class _Preconditioned(Recurrence):
    def __init__(self, operator: Operator, preconditioner: Preconditioner | None, *start: FloatArray) -> None:
        super().__init__(*start)
        self._operator, self._preconditioner = operator, preconditioner
        if preconditioner is not None:
            self.largest = float(preconditioner.values.max(initial=0.0)) + preconditioner.ridge


class _Independent(_Preconditioned):
    """Preconditioned conjugate gradients: each right-hand side has its own scalars, all share the passes.

    Columns that are done leave the products. Hestenes and Stiefel, 1952; preconditioned as in Saad, Iterative Methods
    for Sparse Linear Systems, 2nd ed., algorithm 9.1.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._directions = np.zeros_like(self.residual)
        # r' P^-1 r of the previous step; infinite where a column begins anew.
        self._products = np.full(self.residual.shape[1], np.inf)

    def restart(self, columns: NDArray[np.bool_]) -> None:
        self._products[columns] = np.inf

    def step(self, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
        residual = self.residual[:, columns]
        whitened = residual if self._preconditioner is None else self._preconditioner.solve(residual)
        products = np.einsum("ij,ij->j", residual, whitened)
        directions = whitened + products / self._products[columns] * self._directions[:, columns]
        image = self._operator.matmat(directions)
        curvature = np.einsum("ij,ij->j", directions, image)
        squared = np.einsum("ij,ij->j", directions, directions)
        self.largest = max(self.largest, float((curvature / squared).max(initial=0.0)))
        is_positive = curvature > _ROUNDING * self.largest * squared
        length = np.divide(products, curvature, out=np.zeros_like(products), where=is_positive)
        self.solution[:, columns] += length * directions
        self.residual[:, columns] -= length * image
        self._directions[:, columns] = directions
        self._products[columns] = products
        broken = np.zeros_like(columns)
        broken[columns] = ~is_positive
        return broken


class _Block(_Preconditioned):
    """Block conjugate gradients: every right-hand side profits from the search directions of all.

    O'Leary, 1980, in the form of Dubrulle ("Retooling the method of block conjugate gradients", ETNA 12, 2001), with an
    orthonormal basis of the residuals, P^-1/2 R = Q C, so they may be linearly dependent. We depart in three points:
    the preconditioner is split; the first basis is as large as the rank of the residuals, so right-hand sides may be
    equal, or more than rows; and directions without curvature, to float64 rounding, are left out.
    """

    shares_directions = True
    _whitened = 0.0  # the largest curvature of a direction so far, about the norm of the preconditioned matrix

    def _whiten(self, block: FloatArray) -> FloatArray:
        return block if self._preconditioner is None else self._preconditioner.inverse_sqrt(block)

    def restart(self, columns: NDArray[np.bool_]) -> None:
        del columns
        basis, sizes, mixing = np.linalg.svd(self._whiten(self.residual), full_matrices=False)
        kept = sizes > max(self.residual.shape) * _EPS * sizes.max(initial=0.0)
        self._basis = np.ascontiguousarray(basis[:, kept])
        self._mixing = sizes[kept, None] * mixing[kept]
        self._directions = self._basis

    def step(self, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
        directions = self._whiten(self._directions)
        image = self._operator.matmat(directions)
        whitened = self._whiten(image)
        projected = self._directions.T @ whitened
        curvature, axes = np.linalg.eigh((projected + projected.T) / 2)
        self._whitened = max(self._whitened, float(curvature.max(initial=0.0)))
        if self._preconditioner is None:
            self.largest = self._whitened
        rounding = len(curvature) * _ROUNDING * self._whitened
        if not curvature.size or curvature[0] < -rounding or curvature[-1] <= rounding:
            return columns.copy()
        kept = curvature > rounding
        lengths = (axes[:, kept] / curvature[kept]) @ axes[:, kept].T
        steps = lengths @ self._mixing
        self.solution += directions @ steps
        self.residual -= image @ steps
        self._basis, upper = np.linalg.qr(self._basis - whitened @ lengths)
        self._directions = self._basis + self._directions @ upper.T
        self._mixing = upper @ self._mixing
        return np.zeros_like(columns)


RECURRENCES: dict[Literal["pcg", "block_cg"], type[_Preconditioned]] = {"pcg": _Independent, "block_cg": _Block}
