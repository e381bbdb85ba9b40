"""The Lanczos process of each of several vectors, Gauss rules by its coefficients, and the smallest eigenvalue."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.checkpoint import Get
from ntkpipe.store.results import as_integer, as_numbers

_EPS = float(np.finfo(np.float64).eps)
_SETTLED = 1e-2  # a node is an eigenvalue if its Ritz residual is this small against the distance that matters
_NOTHING = 10 * _EPS  # a direction this small, relative to the norm of the matrix, is rounding
_FEW_ROWS = 2048  # up to so many all eigenvalues take about a second
_MOST_STEPS = 40  # passes over larger matrices
_RESIDUALS = 3.0  # a Ritz value is above the eigenvalue by the square of its residual over a gap, here hardly by more
_OF_TOL, _LEAST_TOL = 10.0, 1e-12  # rounding that a ridge leaves, relative to `tol`, and the least that is sensible
_TWO_DIGITS = Context(prec=2, rounding=ROUND_CEILING)


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


@dataclass(frozen=True)
class QuadratureRule:
    """One rule for each of p measures."""

    nodes: FloatArray  # Ritz values, shape (p, m), ascending
    weights: FloatArray  # shape (p, m), not negative; their sum is the probe's squared norm
    residuals: FloatArray  # distances within which eigenvalues lie, rounding included, shape (p, m)

    def integrate(self, function: Callable[[FloatArray], FloatArray]) -> FloatArray:
        """Integral of a function of the nodes, shape (p,)."""
        return np.asarray((self.weights * function(self.nodes)).sum(axis=1))

    def mass_above(self, thresholds: FloatArray) -> FloatArray:
        """Weight of the nodes above each of L thresholds, shape (p, L)."""
        found = np.zeros((len(self.nodes), len(thresholds)))
        for row, nodes, weights in zip(found, self.nodes, self.weights, strict=True):
            tails = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
            row[:] = tails[np.searchsorted(nodes, thresholds, "right")]
        return found

    def unsettled(self, thresholds: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Weight of the nodes next to each of L thresholds that may lie on the other side: (above, below), each (p, L).

        By the separation theorem of Chebyshev, Markov and Stieltjes (Szegö, Orthogonal Polynomials, section 3.41) what
        a measure has above λ differs from its rule by no more than the weights of the two nodes around λ. Nodes that
        have converged to an eigenvalue are on their side, to 1e-4 of their weight.
        """
        above, below = np.zeros((2, len(self.nodes), len(thresholds)))
        for index in range(len(self.nodes)):
            kept = self.weights[index] > 0
            nodes, weights, residuals = self.nodes[index, kept], self.weights[index, kept], self.residuals[index, kept]
            places = np.searchsorted(nodes, thresholds, "right")
            for found, has, at in ((above, places < len(nodes), places), (below, places > 0, places - 1)):
                at = at[has]
                open_ = residuals[at] > _SETTLED * np.abs(nodes[at] - thresholds[has])
                found[index, has] = np.where(open_, weights[at], 0.0)
        return above, below


def gauss_rule(alphas: FloatArray, betas: FloatArray, masses: FloatArray) -> QuadratureRule:
    """The Gauss rules of p tridiagonal matrices (Golub and Welsch 1969)."""
    nodes, vectors = np.linalg.eigh(_tridiagonal(alphas, betas))
    rounding = 4 * _EPS * np.abs(nodes).max(axis=1, keepdims=True)
    weights = masses[:, None] * vectors[:, 0] ** 2
    return QuadratureRule(nodes, weights, np.abs(vectors[:, -1] * betas[:, -1:]) + rounding)


def radau_rule(alphas: FloatArray, betas: FloatArray, masses: FloatArray, end: float) -> QuadratureRule:
    """The Gauss-Radau rules, of m + 1 nodes, with one node at ``end``, below all eigenvalues (Golub 1973)."""
    num_steps = alphas.shape[1]
    shifted = _tridiagonal(alphas, betas) - end * np.eye(num_steps)
    right = np.zeros((*alphas.shape, 1))
    right[:, -1, 0] = betas[:, -1] ** 2
    last = end + np.linalg.solve(shifted, right)[:, -1, 0]
    # A space that has ended is not coupled: any node within the spectrum will do, since it gets no weight.
    last = np.where(betas[:, -1] > 0, last, alphas[:, 0])
    longer = np.concatenate([betas, np.zeros_like(last)[:, None]], axis=1)
    return gauss_rule(np.concatenate([alphas, last[:, None]], axis=1), longer, masses)


def _tridiagonal(alphas: FloatArray, betas: FloatArray) -> FloatArray:
    num_probes, size = alphas.shape
    found = np.zeros((num_probes, size, size))
    index = np.arange(size)
    found[:, index, index] = alphas
    found[:, index[1:], index[:-1]] = found[:, index[:-1], index[1:]] = betas[:, : size - 1]
    return found


@dataclass(frozen=True)
class Lowest:
    """The smallest eigenvalue of a matrix, as far as some tens of passes show it."""

    most: float  # λ_min is at most this: a Ritz value
    least: float  # and hardly less than this
    floor: float  # the storage floor
    explained: float  # what rounding of entries to the storage dtype and of arithmetic does to eigenvalues
    rounding: float  # what a factorisation in float64 needs
    dtype: str  # of stored entries

    def ridge(self, least: float = 0.0) -> float:
        """What makes the matrix definite, by as much as it is not now, and at least this; rounded up to two digits."""
        return rounded_up(max(-2.0 * self.least, self.explained, self.rounding, least)) or 1.0

    @property
    def words(self) -> str:
        """What rounding explains of it."""
        moved = (
            f"rounding to {self.dtype} and in float64 moves eigenvalues by up to about {self.explained:.2g} "
            f"(storage floor {self.floor:.2g})"
        )
        if self.most < -self.explained:
            return f"an eigenvalue is at most {self.most:.3g}, and {moved}: the matrix is not positive semi-definite"
        if self.most <= self.explained:
            return f"the smallest eigenvalue is at most {self.most:.3g}, and {moved}: indefinite at storage precision"
        return f"the smallest eigenvalue is at most {self.most:.3g}, and {moved}"


def rounded_up(value: float) -> float:
    """The next number of two digits."""
    return float(_TWO_DIGITS.create_decimal(value))


def explained_by_rounding(operator: Operator, size: float) -> float:
    """How negative eigenvalues of a positive semi-definite matrix of this norm may become by rounding.

    Of entries: the storage floor, or more where few rows are much larger than the rest. Errors of entries are
    independent, so their norm is about that of the row with the largest ones, which is at most ``sqrt(|K|_F max K_ii)``
    as ``(K²)_ii <= λ_1 K_ii``; those of denormal numbers do not become smaller. Of arithmetic: ``n eps |K|``.
    """
    largest, n, info = float(np.abs(operator.diagonal()).max()), operator.num_rows, np.finfo(operator.storage_dtype)
    of_row = float(info.eps) / 4 * ((operator.frobenius() * largest) ** 0.5 + largest)
    of_denormals = float(info.smallest_subnormal) * n**0.5 if size else 0.0
    return float(max(operator.storage_floor(), of_row, of_denormals) + n * _EPS * size)


def ridge_of_solves(operator: Operator, tol: float) -> float:
    """What makes systems well enough conditioned for residuals of ``tol``; rounded up to two digits."""
    # Rounding of products leaves a residual of the condition number times its own size.
    return rounded_up(_OF_TOL * _EPS * operator.frobenius() / max(tol, _LEAST_TOL))


@single_threaded_blas()
def lowest_eigenvalue(operator: Operator, known: FloatArray | None = None) -> Lowest:
    """Estimate the smallest eigenvalue unless all are known, once for a matrix and all ``K + shift I``."""
    base, shift = operator.unshifted
    if known is not None:
        base.lowest = _ends(known - shift)
    if base.lowest is None:
        every = slice(0, base.num_rows)
        is_small = base.num_rows <= _FEW_ROWS
        base.lowest = _ends(np.linalg.eigvalsh(base.block(every, every))) if is_small else _by_lanczos(base)
    most, least, size = base.lowest
    rounding = 4 * base.num_rows * _EPS * (base.frobenius() + abs(shift))
    explained = explained_by_rounding(base, size + abs(shift))
    return Lowest(most + shift, least + shift, base.storage_floor(), explained, rounding, str(base.storage_dtype))


def _ends(values: NDArray[Any]) -> tuple[float, float, float]:
    least = float(values.min())
    return least, least, float(np.abs(values).max())


def _by_lanczos(operator: Operator) -> tuple[float, float, float]:
    start = np.random.default_rng(0).standard_normal((operator.num_rows, 1))
    lanczos = ProbeLanczos(start, min(_MOST_STEPS, operator.num_rows))
    while lanczos.num_steps < lanczos.max_steps and not lanczos.ended.all():
        lanczos.absorb(operator.matmat(lanczos.block))
    values, residuals = lanczos.ritz()
    return float(values[0]), float(values[0] - _RESIDUALS * residuals[0]), float(np.abs(values).max())
