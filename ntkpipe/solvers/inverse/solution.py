"""Results of :func:`ntkpipe.solve` and :func:`ntkpipe.solve_path`."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.operator import Work
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.result import Result, Status


@dataclass(frozen=True, kw_only=True)
class SolutionPath(Result):
    """Coefficients at r ridges; as a sequence, a :class:`Solution` for each, unless it was read from a store."""

    ridges: FloatArray  # λ, in the order given, shape (r,)
    coefficients: FloatArray = field(repr=False)  # shape (r, *shape of Y)
    residuals: FloatArray = field(repr=False)  # as of :class:`Solution`, shape (r, c)
    statuses: tuple[Status, ...]
    methods: tuple[str, ...]
    iterations: NDArray[np.int64]
    targets: str = ""
    _solutions: "tuple[Solution, ...]" = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self._solutions)

    def __getitem__(self, number: int) -> "Solution":
        return self._solutions[number]

    def _rows(self) -> TableRows:
        found = zip(self.ridges, self.methods, self.iterations, self.residuals, self.statuses, strict=True)
        said = [
            (f"λ = {ridge:.4g}", f"{method}, {count} iterations, residual {residual.max(initial=0.0):.2g}; {status}")
            for ridge, method, count, residual, status in found
        ]
        return [("targets", self.targets), *said]


@dataclass(frozen=True, kw_only=True)
class Solution(Result):
    """Coefficients A with ``(K + ridge I) A = Y``."""

    coefficients: FloatArray  # A, float64, of the shape of Y
    # |Y - (K + ridge I) A| / |Y| of each column, shape (c,), computed in float64 with the matrix for these
    # coefficients. Zero for a column of zeros, whose coefficients are zero.
    residuals: FloatArray
    ridge: float  # λ
    method: str  # method, why: the method that found them, and why it was chosen
    why: str
    iterations: int  # steps of conjugate gradients, one pass each; each check of true residuals is one pass more
    history: FloatArray  # relative residuals of the recurrence, shape (iterations, c); true ones may be larger
    # checks, check_residuals: after how many iterations true residuals were computed, shape (m,), and their relative
    # size, shape (m, c)
    checks: NDArray[np.int64]
    check_residuals: FloatArray
    replacements: int  # how often residuals were replaced by the true ones and directions began anew
    rank: int  # rank, mu: rank and μ of the preconditioner F F' + μ I; 0 and 1 without one
    mu: float
    preconditioner_work: Work  # the part of `work` that made the preconditioner; zero if it was given
    targets: str = ""  # what Y was taken for, such as "10 classes, one-hot"

    def _rows(self) -> TableRows:
        count = len(self.residuals)
        rows = [
            ("method", f"{self.method}: {self.why}"),
            *([("targets", self.targets)] if self.targets else []),
            ("ridge", f"{self.ridge:.4g}"),
            ("residual", f"{self.residuals.max(initial=0.0):.2g}, the largest of {count} column{'s'[: count != 1]}"),
        ]
        if self.iterations:
            rows.append(("iterations", f"{self.iterations}, and {len(self.checks)} checks of true residuals"))
        if self.rank:
            made = f"{self.preconditioner_work.passes:.3g} passes to make it"
            rows.append(("preconditioner", f"rank {self.rank:,}, mu {self.mu:.3g}, {made}"))
        return rows
