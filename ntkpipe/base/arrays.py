"""Arrays: a short name of their type, their digest, and rows of samples."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


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
