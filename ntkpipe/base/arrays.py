"""Arrays: a short name of their type, digest, rows of samples, sizes whose squares float64 holds, sums of squares."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, NonFiniteError

FloatArray = NDArray[np.float64]

# What the largest entry of a matrix may be: fourth powers of it are numbers of float64. All of float32 is inside.
SMALLEST, LARGEST = 2.0**-200, 2.0**200
# What ridges and the largest target may be, if not zero: they may be far below the matrix.
_LEAST, _MOST = 2.0**-256, 2.0**256
_BOUND = 2.0**400  # what outputs may be, and test kernels: their squares can be added
_DENORMAL = 2.0**-960
_UP, _DOWN = 2.0**600, 2.0**-600
_UNDERFLOW = 1e-250  # digits of sums of squares below it may be lost


def digest_of(values: NDArray[Any]) -> str:
    """Digest of an array's dtype, shape and entries."""
    digest = hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode())
    digest.update(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def rows_of(samples: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Rows of samples in a kernel of ``width`` rows a sample."""
    return np.asarray(samples[:, None] * width + np.arange(width)).reshape(-1)


def runs(count: int, most: int) -> Iterator[slice]:
    """Cut a range of ``count`` into runs of at most ``most``."""
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))


def require_matrix_range(size: float) -> None:
    """Refuse a matrix by its largest entry, or its Frobenius norm, which is not much larger."""
    if not math.isfinite(size):
        raise NonFiniteError("the matrix holds NaN or infinity")
    if size and not SMALLEST <= size <= LARGEST:
        factor = f"2.0**{min(-math.frexp(size)[1], 1023)}"
        # Products with denormal numbers lose digits before they are scaled.
        scaled = f"matrix * {factor}, as an array," if size < _DENORMAL else f"as_operator(matrix).scaled({factor}),"
        raise ConfigError(
            f"entries of the matrix reach about {size:.2g}; needed {SMALLEST:.2g} to {LARGEST:.2g}, since squares of "
            f"others leave the range of float64. Give {scaled} and ridges times {factor}; "
            "solutions of linear systems and inverses are multiplied with it afterwards, eigenvalues divided by it"
        )


def require_range(name: str, size: float) -> float:
    """Refuse a ridge or the largest of some targets if neither zero nor in range."""
    if size and not _LEAST <= abs(size) <= _MOST:
        raise ConfigError(
            f"{name}={size:.3g}; needed zero or {_LEAST:.2g} to {_MOST:.2g}, since squares of others "
            "leave the range of float64: use other units"
        )
    return size


def require_bounded(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Refuse arrays with NaN, infinity, or numbers that are too large; they may be as small as they like."""
    size = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(size):
        raise NonFiniteError(f"{name} holds NaN or infinity")
    if size > _BOUND:
        what = "since sums of squares of larger ones leave the range of float64: use other units"
        raise ConfigError(f"{name} of up to {size:.3g}; needed at most {_BOUND:.2g}, {what}")
    return values


def power_of_two(size: float) -> float:
    """A power of two near a size: scaling by it changes no digit."""
    return 2.0 ** min(max(math.frexp(size)[1], -1000), 1000) if size and math.isfinite(size) else 1.0


def column_norms(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """2-norms of columns, without overflow."""
    largest = np.abs(block).max(axis=0, initial=0.0)
    scaled = block / np.where(largest > 0.0, largest, 1.0)
    return np.asarray(largest * np.linalg.norm(scaled, axis=0))


def column_scales(block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Powers of two near the largest entries of columns; one for columns of zeros."""
    return np.array([power_of_two(float(size)) for size in np.abs(block).max(axis=0, initial=0.0)])


def scaled_back(solution: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """What columns were before they were scaled, where float64 holds it."""
    with np.errstate(over="ignore", under="ignore"):
        found = solution * scales
    if not np.isfinite(found).all():
        raise ConfigError("right-hand sides whose solutions are beyond 1.8e308; needed smaller ones: use other units")
    return np.asarray(found)


class SquareSum:
    """Sum of squares of numbers of any size (Blue, "A portable Fortran program to find the Euclidean norm", 1978)."""

    def __init__(self) -> None:
        self._sums = {_DOWN: 0.0, 1.0: 0.0, _UP: 0.0}  # of the squares of numbers times a scale

    def add(self, parts: Callable[[], Iterable[NDArray[np.float64]]], weight: float = 1.0) -> None:
        """Add arrays of two axes, which are asked for again where their squares leave the range."""
        found, scale = _squares(parts(), 1.0), 1.0
        if found == math.inf or found < _UNDERFLOW:
            scale = _UP if found < _UNDERFLOW else _DOWN
            found = _squares(parts(), scale)
        self._sums[scale] += weight * found

    def __iadd__(self, other: "SquareSum") -> "SquareSum":
        for scale, value in other._sums.items():
            self._sums[scale] += value
        return self

    @property
    def root(self) -> float:
        """The root of the sum; the largest numbers decide."""
        large, plain, small = self._sums.values()
        if large:
            return min(math.sqrt(large + plain * _DOWN * _DOWN) / _DOWN, 1.7e308) if large < math.inf else large
        return math.sqrt(plain) if plain else math.sqrt(small) / _UP


def _squares(parts: Iterable[NDArray[np.float64]], scale: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        scaled = parts if scale == 1.0 else (part * scale for part in parts)
        return sum(float(np.einsum("ij,ij->", part, part)) for part in scaled)
