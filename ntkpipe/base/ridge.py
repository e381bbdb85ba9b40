"""Units of a ridge: absolute, or multiples of the mean diagonal of the kernel."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.ranges import require_range

RidgeScale = Literal["mean_diagonal"] | None  # unit of a ridge; None is absolute


def absolute_ridge(ridge: float, scale: RidgeScale, diagonal: Callable[[], NDArray[Any]]) -> float:
    """Convert a ridge to the λ that is added to the diagonal."""
    if scale not in (None, "mean_diagonal"):
        raise ConfigError(f"ridge_scale={scale!r}; needed 'mean_diagonal', or none for an absolute ridge")
    ridge = check_number("ridge", ridge, low=0.0)
    if scale is None:
        return checked_ridge(ridge)
    if (unit := float(diagonal().astype(np.float64).mean())) < 0.0:
        raise ConfigError(f"the mean diagonal, {unit:.3g}, is no unit of ridges; needed a kernel, or absolute ridges")
    return checked_ridge(ridge * unit)


def checked_ridge(ridge: float) -> float:
    """Check what is added to the diagonal."""
    return require_range("ridge", float(check_number("ridge", ridge, low=0.0)))


def absolute_ridges(
    ridges: Sequence[float], scale: RidgeScale, diagonal: Callable[[], NDArray[Any]]
) -> NDArray[np.float64]:
    """Convert ridges to what is added to the diagonal, in their order."""
    if not len(ridges):
        raise ConfigError("no ridge is given; needed at least one")
    return np.array([absolute_ridge(float(ridge), scale, diagonal) for ridge in ridges])


def ridges_or(
    default: Sequence[float], ridges: Sequence[float] | None, scale: RidgeScale
) -> tuple[Sequence[float], RidgeScale]:
    """Return the given ridges with their scale, or the default ones, which are multiples of the mean diagonal."""
    return (default, "mean_diagonal") if ridges is None else (ridges, scale)
