"""Kernels of infinite width in memory."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arguments import checked
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import Pool
from ntkpipe.base.config import Budget, MemoryLimit
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
    shape = (2, len(rows), len(columns))
    advice = "use compute_infinite_kernel, which writes a store"
    Budget.of(memory_limit).require(8.0 * prod(shape), f"an array {shape} of both kernels", advice, share=0.7)
    found = np.empty(shape)
    with Pool.open() as pool:
        net.fill(rows, columns, found, pool)
    return found
