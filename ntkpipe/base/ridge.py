"""What a ridge is counted in: absolute, unless asked otherwise."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError

# Of which a ridge is a multiple; none is absolute.
RidgeScale = Literal["mean_diagonal"] | None


def absolute_ridge(ridge: float, scale: RidgeScale, diagonal: Callable[[], NDArray[Any]]) -> float:
    """λ as it is added to the diagonal."""
    if scale not in (None, "mean_diagonal"):
        raise ConfigError(f"ridge_scale={scale!r}; needed 'mean_diagonal', or none for an absolute ridge")
    check_number("ridge", ridge, low=0.0)
    return ridge if scale is None else ridge * float(diagonal().astype(np.float64).mean())


def absolute_ridges(ridges: Sequence[float], scale: RidgeScale, diagonal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ridges as they are added to the diagonal, in their order."""
    if not len(ridges):
        raise ConfigError("no ridge is given; needed at least one")
    found = [absolute_ridge(float(ridge), scale, lambda: diagonal) for ridge in ridges]
    for ridge in found:
        check_number("ridge", ridge, low=0.0, high=1e300)
    return np.array(found)


def ridges_or(
    default: Sequence[float], ridges: Sequence[float] | None, scale: RidgeScale
) -> tuple[Sequence[float], RidgeScale]:
    """The given ridges and their scale, or the default ones, which are in mean diagonals, where none are given."""
    return (default, "mean_diagonal") if ridges is None else (ridges, scale)
