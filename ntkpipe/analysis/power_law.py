"""Power laws of eigenvalues by rank, with the uncertainty of their exponent."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError

_LEAST_RANKS = 20
_NUM_BLOCKS = 10


@dataclass(frozen=True)
class PowerLaw:
    """``λ_i ~ prefactor i^-exponent`` over a range of ranks."""

    exponent: float  # α
    exponent_error: float  # one standard deviation, by a jackknife over blocks of ranks
    prefactor: float  # λ at rank 1 of the fitted line
    first_rank: int  # first_rank, last_rank: the range, both included; ranks begin at 1
    last_rank: int
    # exponent_of_first_half, exponent_of_second_half: α of both halves of the range (halves of log i). Where they
    # differ by much more than the error, the eigenvalues bend, and no exponent describes them.
    exponent_of_first_half: float
    exponent_of_second_half: float
    scatter: float  # root mean square distance from the line, in decades of λ


def default_ranks(num_rows: int, num_known: int) -> tuple[int, int] | None:
    """The range that is fitted unless asked otherwise: from rank 10 to n/4, or to the last known one before.

    The first few eigenvalues of a kernel are of single features; from about n/4 on sample eigenvalues fall off faster
    than those of the population, since n samples have no more of them. None if this leaves fewer than 20 ranks.
    """
    last = min(num_rows // 4, num_known)
    return (10, last) if last - 10 + 1 >= _LEAST_RANKS else None


def fit_power_law(eigenvalues: ArrayLike, *, first_rank: int, last_rank: int) -> PowerLaw:
    """Fit a power law to eigenvalues by rank: least squares in log λ against log i, each rank with weight 1/i.

    The weights make equal factors of i count alike; without them half of all weight is on the last half of the
    ranks. Ordered eigenvalues are not independent, so the usual error of a regression line is too small by far.
    The error here is the delete-one jackknife (Künsch 1989) over ten blocks of equal width in log i. It says how much
    the exponent depends on which part of the range is looked at; it does not say that there is a power law, for which
    see the exponents of both halves. Nor is this the fit of a density to independent draws, for which regression in
    logarithms is biased (Clauset, Shalizi, Newman 2009, SIAM Review 51).
    """
    values = np.asarray(eigenvalues, np.float64)
    check_number("the first of tail_ranks", first_rank, low=1)
    check_number("the last of tail_ranks", last_rank, low=first_rank + _LEAST_RANKS - 1, high=len(values))
    inside = values[first_rank - 1 : last_rank]
    if inside.min() <= 0:
        rank = first_rank + int(np.argmax(inside <= 0))
        raise ConfigError(f"eigenvalue {rank} is not positive; end the range before it")
    ranks = np.arange(first_rank, last_rank + 1, dtype=np.float64)
    x, y, weights = np.log(ranks), np.log(inside), 1 / ranks
    slope, intercept = _line(x, y, weights)
    edges = np.linspace(x[0], x[-1], _NUM_BLOCKS + 1)
    block = np.clip(np.searchsorted(edges, x, "right") - 1, 0, _NUM_BLOCKS - 1)
    middle = (x[0] + x[-1]) / 2
    # At small ranks a block may be empty.
    parts = [x <= middle, x >= middle, *(block != b for b in np.unique(block))]
    first, second, *slopes = (_line(x[kept], y[kept], weights[kept])[0] for kept in parts if kept.any())
    without, count = np.array(slopes), len(slopes)
    residuals = y - intercept - slope * x
    return PowerLaw(
        exponent=-slope,
        exponent_error=math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum())),
        prefactor=math.exp(intercept),
        first_rank=int(first_rank),
        last_rank=int(last_rank),
        exponent_of_first_half=-first,
        exponent_of_second_half=-second,
        scatter=math.sqrt(float(np.average(residuals**2, weights=weights))) / math.log(10),
    )


def _line(x: FloatArray, y: FloatArray, weights: FloatArray) -> tuple[float, float]:
    """Slope and intercept of weighted least squares."""
    centre_x, centre_y = np.average(x, weights=weights), np.average(y, weights=weights)
    slope = float((weights * (x - centre_x)) @ (y - centre_y) / ((weights * (x - centre_x)) @ (x - centre_x)))
    return slope, float(centre_y - slope * centre_x)
