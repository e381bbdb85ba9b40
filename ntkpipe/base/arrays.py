"""Types of arrays, and rows of samples."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def rows_of(samples: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Rows of samples in a kernel of ``width`` rows a sample."""
    return np.asarray(samples[:, None] * width + np.arange(width)).reshape(-1)


def runs(count: int, most: int) -> Iterator[slice]:
    """Cut a range of ``count`` into runs of at most ``most``."""
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))
