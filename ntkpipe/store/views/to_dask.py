"""A stored kernel as a lazy dask array."""

from typing import Any

import dask.array as da
import numpy as np


def to_dask(kernel: Any) -> da.Array:
    """Return a lazy dask array of the full matrix, one chunk per tile; its graph holds the path, not the data."""
    meta = np.empty((0, 0), dtype=kernel.dtype)
    array: da.Array = da.from_array(  # type: ignore[no-untyped-call]
        kernel, chunks=kernel.chunks, name=f"kernel-{kernel.token}", asarray=False, fancy=False, meta=meta
    )
    return array
