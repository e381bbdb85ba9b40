"""How far a matrix is from positive definite: an estimate of its smallest eigenvalue, and the ridge that helps."""

from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np

from ntkpipe.base.operator import Operator
from ntkpipe.operators.blas import single_threaded_blas
from ntkpipe.solvers.probe_lanczos import ProbeLanczos

_FEW_ROWS = 2048  # up to so many all eigenvalues take about a second
_MOST_STEPS = 40  # passes over larger matrices
_RESIDUALS = 3.0  # a Ritz value is above the eigenvalue by the square of its residual over a gap, here hardly by more
_FLOORS = 10.0  # rounding of entries can make a small positive eigenvalue negative, by up to so many floors
_EPS = float(np.finfo(np.float64).eps)
_TWO_DIGITS = Context(prec=2, rounding=ROUND_CEILING)


@dataclass(frozen=True)
class Lowest:
    """The smallest eigenvalue of a matrix, as far as some tens of passes show it."""

    most: float  # λ_min is at most this: a Ritz value
    least: float  # and hardly less than this
    floor: float  # what rounding of entries to the storage dtype does to eigenvalues
    rounding: float  # what rounding of factors and products in float64 does
    dtype: str  # of stored entries

    def ridge(self, least: float = 0.0) -> float:
        """What makes the matrix definite, by as much as it is not now, and at least this; rounded up to two digits."""
        return rounded_up(max(-2.0 * self.least, self.floor, self.rounding, least)) or 1.0

    @property
    def words(self) -> str:
        """What rounding explains of it."""
        moved = f"rounding of entries to {self.dtype} moves eigenvalues by about {self.floor:.2g} (the storage floor)"
        explained = explained_by_rounding(self.floor, self.rounding)
        if self.most < -explained:
            return f"an eigenvalue is at most {self.most:.3g}, and {moved}: the matrix is not positive semi-definite"
        if self.most <= explained:
            return f"the smallest eigenvalue is at most {self.most:.3g}, and {moved}: indefinite at storage precision"
        return f"the smallest eigenvalue is at most {self.most:.3g}, and {moved}"


def rounded_up(value: float) -> float:
    """The next number of two digits."""
    return float(_TWO_DIGITS.create_decimal(value))


def explained_by_rounding(floor: float, rounding: float) -> float:
    """How negative eigenvalues of a positive semi-definite matrix may become by rounding of entries and products."""
    return max(_FLOORS * floor, rounding)


@single_threaded_blas()
def lowest_eigenvalue(operator: Operator, known: float | None = None) -> Lowest:
    """Estimate the smallest eigenvalue where it is not known, once for a matrix and all ``K + shift I``."""
    base, shift = operator.unshifted
    if known is not None:
        base.lowest = known - shift, known - shift
    if base.lowest is None:
        base.lowest = _by_lapack(base) if base.num_rows <= _FEW_ROWS else _by_lanczos(base)
    most, least = (value + shift for value in base.lowest)
    rounding = 4 * base.num_rows * _EPS * (base.frobenius() + abs(shift))
    return Lowest(most, least, base.storage_floor(), rounding, str(base.storage_dtype))


def _by_lapack(operator: Operator) -> tuple[float, float]:
    every = slice(0, operator.num_rows)
    value = float(np.linalg.eigvalsh(operator.block(every, every))[0])
    return value, value


def _by_lanczos(operator: Operator) -> tuple[float, float]:
    start = np.random.default_rng(0).standard_normal((operator.num_rows, 1))
    lanczos = ProbeLanczos(start, min(_MOST_STEPS, operator.num_rows))
    while lanczos.num_steps < lanczos.max_steps and not lanczos.ended.all():
        lanczos.absorb(operator.matmat(lanczos.block))
    values, residuals = lanczos.ritz()
    return float(values[0]), float(values[0] - _RESIDUALS * residuals[0])
