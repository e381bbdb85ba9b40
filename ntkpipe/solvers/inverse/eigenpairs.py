"""The Moore-Penrose solution of systems with a singular kernel, by all eigenpairs in memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.learning.regression.eigensystem import KnownEigenpairs
from ntkpipe.solvers.direct.eigh import eigh
from ntkpipe.solvers.direct.factor import CholeskyFactor
from ntkpipe.solvers.linear.solution import Solution
from ntkpipe.solvers.result import Status

_EPS = float(np.finfo(np.float64).eps)
_NUM_VECTORS, _NUM_STEPS = 4, 8


def require_all(eigenpairs: KnownEigenpairs, num_rows: int) -> FloatArray:
    """The eigenvectors, if there are all."""
    vectors = eigenpairs.eigenvectors
    if vectors is None or vectors.shape != (num_rows, num_rows) or len(eigenpairs.eigenvalues) != num_rows:
        shape = "no vectors" if vectors is None else f"vectors of shape {vectors.shape}"
        raise ConfigError(
            f"eigenpairs with {shape} for {num_rows} rows; needed all, such as ntkpipe.eigh(kernel) returns"
        )
    return vectors


def cut_off(operator: Operator, largest: float) -> float:
    """Size up to which an eigenvalue counts as zero: ``max(ε_store |K|_F / √n, n ε λ_1)``.

    The first is the storage floor, see :meth:`ntkpipe.base.operator.Operator.storage_floor`; the second bounds
    what LAPACK's float64 does to an eigenvalue.
    """
    return max(operator.storage_floor(), operator.num_rows * _EPS * largest)


def pseudo_inverse(values: FloatArray, ridge: float, cut: float) -> tuple[FloatArray, NDArray[np.bool_], float]:
    """Eigenvalues of ``(K + λI)⁺``, which of K's count (at λ = 0 those beyond the cut-off), and the least of those."""
    shifted = values + ridge
    kept = np.ones(len(values), bool) if ridge else np.abs(values) > cut
    inverse = np.divide(1.0, shifted, out=np.zeros_like(shifted), where=kept & (shifted != 0.0))
    return inverse, kept, float(shifted[kept].min(initial=np.inf))


def smallest_by_factor(factor: CholeskyFactor, seed: int) -> float:
    """About the smallest eigenvalue of what was factored, from above: subspace iteration with the inverse.

    Eight steps of four random vectors, each of which reads the factor twice; k steps are within a factor of about
    n^(1/2k), so within two for most n that fit memory.
    """
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((factor.num_rows, min(_NUM_VECTORS, factor.num_rows))))[0]
    largest = 0.0
    for _ in range(_NUM_STEPS):
        product = factor.half_solve(factor.half_solve(vectors), transposed=True)
        largest = float(np.linalg.norm(product, axis=0).max())
        vectors = np.linalg.qr(product)[0]
    return 1.0 / largest


def minimum_norm(
    operator: Operator, rhs: FloatArray, ridge: float, *, tol: float, why: str, budget: Budget
) -> Solution:
    """``(K + λI)⁺ Y``: the least-squares solution of the smallest norm, where eigenvalues up to a cut-off are zero."""
    pairs = eigh(operator, memory_limit=budget)
    vectors, values = require_all(pairs, operator.num_rows), pairs.eigenvalues
    cut = cut_off(operator, float(np.abs(values).max())) if ridge == 0.0 else 0.0
    inverse, kept, smallest = pseudo_inverse(values, ridge, cut)
    inside = vectors.T @ rhs
    coefficients = vectors @ (inverse[:, None] * inside)
    sizes = np.linalg.norm(rhs, axis=0)
    residual = rhs - operator.shifted(ridge).matmat(coefficients)
    relative = _relative(np.linalg.norm(residual, axis=0), sizes)
    outside = vectors[:, ~kept] @ inside[~kept]
    beside = float(_relative(np.linalg.norm(residual - outside, axis=0), sizes).max(initial=0.0))
    rank = int(kept.sum())
    status: Status = "converged" if beside <= tol else "stagnated"
    message = f"all eigenpairs; {rank:,} of {len(values):,} eigenvalues are above the cut-off {cut:.2g}"
    if ridge:
        message = f"all eigenpairs, {values[-1] + ridge:.3g} to {values[0] + ridge:.3g} with the ridge"
    if rank < len(values):
        left = float(relative.max(initial=0.0))
        message += (
            f", the solution is the one of smallest norm, and leaves {left:.2g} of Y that is outside of the range"
        )
    if smallest <= 0.0:
        status = "indefinite at storage precision"
        message = f"an eigenvalue of K + λI is {smallest:.3g}: the matrix is not positive; give a larger ridge"
    elif status == "stagnated":
        message += f"; the residual inside of the range is {beside:.2g}, more than tol={tol:.2g}"
    options = {"cut_off": cut, "rank": rank}
    found = {"status": status, "message": message, "method": "eigh", "why": why, "options": options}
    return _solution(coefficients, relative, ridge=ridge, **found)


def by_factor(factor: CholeskyFactor, rhs: FloatArray, *, tol: float, why: str) -> Solution:
    """``(K + shift I)^-1 Y`` with a factor that is there, and one step of refinement."""
    direct = factor.solve(rhs, tol=tol)
    found = {"status": direct.status, "message": direct.message, "method": "cholesky", "why": why}
    return _solution(np.array(direct.coefficients), np.array(direct.residuals), ridge=factor.shift, **found)


def _solution(coefficients: FloatArray, residuals: FloatArray, **found: Any) -> Solution:
    columns = coefficients.shape[1]
    return Solution(
        coefficients=coefficients,
        residuals=residuals,
        iterations=0,
        history=np.zeros((0, columns)),
        checks=np.zeros(0, np.int64),
        check_residuals=np.zeros((0, columns)),
        replacements=0,
        rank=0,
        mu=1.0,
        preconditioner_work=Work(),
        **found,
    )


def _relative(norms: FloatArray, sizes: FloatArray) -> FloatArray:
    return np.divide(norms, sizes, out=np.zeros_like(norms), where=sizes > 0)
