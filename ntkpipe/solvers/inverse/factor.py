"""The inverse by a Cholesky factor for each ridge, in memory or in files."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.errors import IndefiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.direct.factor import CholeskyFactor
from ntkpipe.solvers.inverse.contract import INDEFINITE, UNKNOWN, Fit, Inverse, Question, Verdict, WithError
from ntkpipe.solvers.inverse.eigenpairs import cut_off
from ntkpipe.solvers.result import Monitor

_PANEL_COLUMNS = 3 * 1024  # beside a factor there are some of its panels
_NUM_VECTORS, _NUM_STEPS = 4, 8
# An eigenvalue that is only estimated must be so many cut-offs large to count as positive.
_MARGIN = 10.0
_SEED = 0


def factor_fits(num_rows: int, budget: Budget) -> bool:
    """Whether memory holds a Cholesky factor, ``4 n²`` bytes, and a few panels."""
    return budget.fits(4 * num_rows**2 + 8 * num_rows * min(num_rows, _PANEL_COLUMNS))


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
            self._factor = cholesky(self.operator, ridge=ridge, path=self._path, **how)
            self._doubt = "" if ridge or self._path is not None else doubt_of(self._factor, self.operator)
        if self._doubt:
            verdict.add(INDEFINITE, 0.0, self._doubt)
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
