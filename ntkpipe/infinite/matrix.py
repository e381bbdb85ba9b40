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
    net: Network,
    x: NDArray[Any],
    other: NDArray[Any] | None = None,
    *,
    memory_limit: MemoryLimit = None,
    force: bool = False,
) -> FloatArray:
    """Kernels of a network of infinite width, in memory."""
    shape = np.shape(x)
    if len(shape) == 4:
        count = (shape[0] + 1) / 2 if other is None else np.size(other) / max(1, np.size(x)) * shape[0]
        net.require_time(shape[1:], shape[0] * count, force=force)
    rows = net.prepare(x)
    columns = rows if other is None else net.prepare(other)
    found = np.empty((2, len(rows), len(columns)))
    net.fill(rows, columns, found)
    return found
