"""The inverse exactly: by all eigenpairs, which give a pseudo-inverse too, or by a Cholesky factor for each ridge."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.config import Budget
from ntkpipe.base.errors import ConfigError, IndefiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.direct.cholesky import factor_for_solves
from ntkpipe.solvers.direct.eigh import eigh
from ntkpipe.solvers.direct.factor import CholeskyFactor
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.inverse.contract import INDEFINITE, UNKNOWN, Fit, Inverse, Question, Verdict, WithError
from ntkpipe.solvers.probe_lanczos import lowest_eigenvalue, ridge_of_solves
from ntkpipe.solvers.result import Monitor

_EPS = float(np.finfo(np.float64).eps)
_BYTES_A_ROW = 2 * 8 * 1024  # beside all eigenpairs: panels of 1,024 rows
_BYTES_AT_ONCE = 2**25  # of a temporary array
# Rows of eigenvectors are known to about ε; a part of a row in the null space below its root is rounding.
_NOTHING = 1e-8
_NUM_VECTORS, _NUM_STEPS, _SEED = 4, 8, 0  # of an estimate of the smallest eigenvalue
_MARGIN = 10.0  # an eigenvalue that is only estimated must be so many cut-offs large to count as positive


def eigenpairs_fit(num_rows: int, budget: Budget) -> bool:
    """Whether memory holds K and all of its eigenvectors, ``16 n²`` bytes."""
    return budget.fits(16 * num_rows**2 + _BYTES_A_ROW * num_rows)


def cut_off(operator: Operator, largest: float) -> float:
    """Size up to which an eigenvalue counts as zero: ``max(ε_store |K|_F / √n, n ε λ_1)``.

    The first is the storage floor, see :meth:`ntkpipe.base.operator.Operator.storage_floor`; the second bounds
    what LAPACK's float64 does to an eigenvalue.
    """
    return max(operator.storage_floor(), operator.num_rows * _EPS * largest)


class ByEigenpairs(Inverse):
    """Exact, ``n² (2 c + S)`` multiplications a ridge once all eigenpairs are known.

    At λ = 0 eigenvalues up to the cut-off count as zero: products are those with the pseudo-inverse, and a fit is the
    minimum-norm solution, as the limit of ridges above the cut-off.
    """

    method = "eigh"

    def __init__(self, operator: Operator, pairs: Eigenpairs, why: str, tol: float = 1.0) -> None:
        super().__init__(operator)
        self._tol = tol  # of residuals, for which ridges are advised
        self.values, self.vectors, self.why = np.asarray(pairs.eigenvalues, np.float64), pairs.vectors, why
        if not pairs.is_whole:
            with_shape = f"eigenpairs with vectors of shape {pairs.vectors.shape} for {operator.num_rows} rows"
            raise ConfigError(f"{with_shape}; needed all, such as ntkpipe.eigh(kernel) returns")
        self.columns_at_once = operator.num_rows
        largest = float(np.abs(self.values).max())
        self.cut, self._rounding = cut_off(operator, largest), operator.num_rows * _EPS * largest

    @classmethod
    def of(cls, operator: Operator, budget: Budget, monitor: Monitor, why: str, tol: float = 1.0) -> "ByEigenpairs":
        """All eigenpairs are computed."""
        return cls(operator, eigh(operator, memory_limit=budget, monitor=monitor), why, tol)

    def weights(self, ridge: float) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Eigenvalues of ``(K + λI)⁺``, and which of K's count: at λ = 0 those beyond the cut-off."""
        shifted = self.values + ridge
        kept = np.ones(len(shifted), bool) if ridge else np.abs(self.values) > self.cut
        return np.divide(1.0, shifted, out=np.zeros_like(shifted), where=kept & (shifted != 0.0)), kept

    def judge(self, ridge: float, verdict: Verdict) -> None:
        """Tell where K + λI is not positive, or rounding in float64 does not tell it from a singular matrix."""
        smallest = float((self.values + ridge)[self.weights(ridge)[1]].min(initial=np.inf))
        if smallest <= self._rounding:
            lowest = lowest_eigenvalue(self.operator, self.values)
            ridge = lowest.ridge(ridge_of_solves(self.operator, self._tol))
            said = f"an eigenvalue of K + λI is {smallest:.3g}; of K {lowest.words}"
            verdict.add(INDEFINITE, 0.0, f"{said}. Give an absolute ridge of at least {ridge:.2g}")

    def times(self, block: FloatArray, ridge: float, verdict: Verdict) -> FloatArray:
        """See :class:`Inverse`; nothing is outside of the range of rounding, so residuals are not computed."""
        self.judge(ridge, verdict)
        return np.asarray(self.vectors @ (self.weights(ridge)[0][:, None] * (self.vectors.T @ block)))

    def forms(self, block: FloatArray, ridge: float, width: int, verdict: Verdict) -> FloatArray:
        """See :class:`Inverse`."""
        self.judge(ridge, verdict)
        inside = (self.vectors.T @ block).T.reshape(-1, width, len(self.values))
        return np.asarray((inside * self.weights(ridge)[0]) @ inside.transpose(0, 2, 1))

    def logdet(self, ridge: float, verdict: Verdict) -> WithError:
        """See :class:`Inverse`; -∞ for a singular matrix."""
        self.judge(ridge, verdict)
        shifted = np.where(self.weights(ridge)[1], self.values + ridge, 0.0)
        return WithError(float(np.log(shifted).sum()) if (shifted > 0.0).all() else -np.inf)

    def outside(self, block: FloatArray) -> FloatArray:
        """The part of a block in the null space."""
        null = ~self.weights(0.0)[1]
        return np.asarray(self.vectors[:, null] @ (self.vectors[:, null].T @ block))

    def fit(self, question: Question, ridge: float, start: FloatArray | None = None) -> Fit:
        """See :class:`Inverse`."""
        verdict, (weights, kept), width = Verdict(), self.weights(ridge), question.width
        coefficients = self.times(question.rhs, ridge, verdict)
        blocks = _weighted_blocks(self.vectors, weights, width)
        if kept.all():
            trace, squares = WithError(float(weights.sum())), WithError(float((weights**2).sum()))
            return question.fit(ridge, coefficients, blocks, verdict, trace=trace, squared_trace=squares)
        null = (~kept).astype(np.float64)
        outside, rank = self.outside(question.rhs), WithError(float(null.sum()))
        null_blocks = _weighted_blocks(self.vectors, null, width)
        left_out = limit_residuals(null_blocks, outside, blocks, coefficients)
        how: dict[str, Any] = {"trace": rank, "squared_trace": rank, "left_out": left_out}
        return replace(question.fit(ridge, coefficients, blocks, verdict, **how), complement=outside, weight=1.0)


def _weighted_blocks(vectors: FloatArray, weights: FloatArray, width: int) -> FloatArray:
    """Diagonal blocks of ``V diag(w) V'``, shape (N, S, S): n² S multiplications."""
    count = len(vectors) // width
    found = np.empty((count, width, width))
    for samples in runs(count, max(1, _BYTES_AT_ONCE // (8 * width * vectors.shape[1]))):
        rows = vectors[samples.start * width : samples.stop * width].reshape(-1, width, vectors.shape[1])
        if width == 1:  # as one product, for which there is BLAS
            found[samples, 0, 0] = np.square(rows[:, 0]) @ weights
        else:
            found[samples] = (rows * weights) @ rows.transpose(0, 2, 1)
    return found


def limit_residuals(
    null_blocks: FloatArray, null_targets: FloatArray, inverse: FloatArray, coefficients: FloatArray
) -> FloatArray:
    """Leave-one-out residuals of the minimum-norm solution of a singular kernel: the limit λ → 0 of ``(G_ii)^-1 A_i``.

    There G = P/λ + K⁺ + O(λ) with P the projection onto the null space, and A = PY/λ + K⁺Y + O(λ). Within the range of
    P_ii the limit is decided by P, in the rest of a sample's rows by what remains: with Q an orthonormal basis of that,
    ``r = P_ii⁺ (PY)_i + Q s`` and ``Q'K⁺_ii Q s = Q'((K⁺Y)_i - K⁺_ii P_ii⁺ (PY)_i)``.
    """
    count, width, _ = inverse.shape
    shape = count, width, -1
    found = np.empty((count, width, coefficients.shape[1]))
    parts, rest = null_targets.reshape(shape), coefficients.reshape(shape)
    for sample in range(count):
        values, vectors = np.linalg.eigh(null_blocks[sample])
        inside = values > _NOTHING
        decided, free = vectors[:, inside], vectors[:, ~inside]
        residual = decided @ ((decided.T @ parts[sample]) / values[inside, None])
        if free.shape[1]:
            left = free.T @ (rest[sample] - inverse[sample] @ residual)
            residual = residual + free @ np.linalg.solve(free.T @ inverse[sample] @ free, left)
        found[sample] = residual
    return found.reshape(coefficients.shape)


def doubt_of(factor: CholeskyFactor, operator: Operator, seed: int = _SEED) -> str:
    """Why a matrix that was factored without a ridge may be singular, as positive pivots do not exclude; else nothing.

    About the smallest eigenvalue, from above, by subspace iteration with the inverse: eight steps of four random
    vectors, each of which reads the factor twice; k steps are within a factor of about n^(1/2k), so within two for most
    n that fit memory.
    """
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((factor.num_rows, min(_NUM_VECTORS, factor.num_rows))))[0]
    largest = 0.0
    for _ in range(_NUM_STEPS):
        product = factor.half_solve(factor.half_solve(vectors), transposed=True)
        largest = float(np.linalg.norm(product, axis=0).max())
        vectors = np.linalg.qr(product)[0]
    smallest, cut = 1.0 / largest, cut_off(operator, operator.frobenius())
    if smallest > _MARGIN * cut:
        return ""
    return f"λ = 0, and an eigenvalue of about {smallest:.2g} is not well above the cut-off {cut:.2g}"


class ByFactors(Inverse):
    """Exact where K + λI is positive definite: n³/3 multiplications and additions a ridge, twice that for a fit.

    Answers raise IndefiniteError where it is not; a fit has no numbers then, and says so. Where K is not surely regular
    at λ = 0, and its factor in memory, verdicts say that.
    """

    method, columns_at_once = "cholesky", sys.maxsize

    def __init__(
        self, operator: Operator, tol: float, budget: Budget, monitor: Monitor, why: str, path: str | Path | None = None
    ) -> None:
        super().__init__(operator)
        self._tol, self._budget, self._monitor, self._path, self.why = tol, budget, monitor, path, why
        self._factor: CholeskyFactor | None = None
        self._doubt = ""

    def _factored(self, ridge: float, verdict: Verdict) -> CholeskyFactor:
        """The factor, which is kept for the next question at this ridge."""
        if self._factor is None or self._factor.ridge != ridge:
            self._factor = None  # before there is another
            how: dict[str, Any] = {"memory_limit": self._budget, "monitor": self._monitor}
            self._factor = factor_for_solves(self.operator, ridge, self._tol, path=self._path, **how)
            self._doubt = "" if ridge or self._path is not None else doubt_of(self._factor, self.operator)
        if self._doubt:
            ridge = ridge_of_solves(self.operator, self._tol)
            verdict.add(INDEFINITE, 0.0, f"{self._doubt}. Give an absolute ridge of at least {ridge:.2g}")
        return self._factor

    def times(self, block: FloatArray, ridge: float, verdict: Verdict) -> FloatArray:
        """See :class:`Inverse`; with one step of refinement."""
        found = self._factored(ridge, verdict).solve(block, tol=self._tol)
        verdict.add(found.status, float(found.residuals.max(initial=0.0)), found.message)
        return found.coefficients

    def forms(self, block: FloatArray, ridge: float, width: int, verdict: Verdict) -> FloatArray:
        """See :class:`Inverse`."""
        half = self._factored(ridge, verdict).half_solve(block).T.reshape(-1, width, len(block))
        return np.asarray(half @ half.transpose(0, 2, 1))

    def logdet(self, ridge: float, verdict: Verdict) -> WithError:
        """See :class:`Inverse`."""
        return WithError(self._factored(ridge, verdict).logdet)

    def fit(self, question: Question, ridge: float, start: FloatArray | None = None) -> Fit:
        """See :class:`Inverse`; tr G² is an estimate, from as many probes as are asked for."""
        verdict, width, squares = Verdict(), question.width, UNKNOWN
        try:
            factor = self._factored(ridge, Verdict())
        except IndefiniteError as error:
            verdict.add(INDEFINITE, 0.0, str(error))
            blocks = np.full((question.num_samples, width, width), np.nan)
            return question.fit(ridge, np.full_like(question.rhs, np.nan), blocks, verdict)
        coefficients = self.times(question.rhs, ridge, verdict)
        if question.num_probes:
            squares = question.traces(self.times(question.signs(), ridge, verdict))[1]
        if width == 1:
            blocks = factor.inverse_diagonal().reshape(-1, 1, 1)
        else:  # about the work of the factor, and memory of n times as many columns as its panels have
            form = partial(self.forms, ridge=ridge, width=width, verdict=Verdict())
            blocks = self.blocks(np.arange(question.num_samples), width, factor.panel_width, form)
        return question.fit(ridge, coefficients, blocks, verdict, squared_trace=squares)
