"""Checks of blocks of columns from callers: targets, right-hand sides, starts."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.errors import ConfigError, NonFiniteError


def as_block(name: str, values: ArrayLike, num_rows: int, *, allow_none: bool = False) -> NDArray[np.float64]:
    """Check a block, and return it as C-contiguous float64 of two axes; without a copy where it is that already."""
    block = np.asarray(values)
    fits = block.ndim in {1, 2} and block.shape[0] == num_rows and (block.size > 0 or allow_none)
    if not fits or block.dtype.kind not in "fiub":
        raise ConfigError(
            f"{name} of shape {block.shape} and dtype {block.dtype}; needed ({num_rows},) or ({num_rows}, c) of real "
            "numbers"
        )
    block = np.ascontiguousarray(block, np.float64).reshape(num_rows, -1 if block.size else 0)
    if not np.isfinite(block).all():
        raise NonFiniteError(f"{name} hold NaN or infinity")
    return block
