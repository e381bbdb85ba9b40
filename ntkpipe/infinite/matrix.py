"""Kernels of infinite width in memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arguments import checked
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import MemoryLimit
from ntkpipe.infinite.networks import Network


@checked
def infinite_kernel_matrix(
    net: Network, x: NDArray[Any], other: NDArray[Any] | None = None, *, memory_limit: MemoryLimit = None
) -> FloatArray:
    """Kernels of a network of infinite width, in memory."""
    rows = net.prepare(x)
    columns = rows if other is None else net.prepare(other)
    found = np.empty((2, len(rows), len(columns)))
    net.fill(rows, columns, found)
    return found
