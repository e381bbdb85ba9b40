"""A stored kernel as a lazy dask array."""

from typing import Any, Protocol

import dask.array as da
import numpy as np
from numpy.typing import NDArray


class Tiled(Protocol):
    """A matrix that is stored in tiles and read by slices."""

    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102
    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]: ...  # noqa: D102
    @property
    def token(self) -> str: ...  # noqa: D102
    def __getitem__(self, key: Any) -> NDArray[Any]: ...


def to_dask(kernel: Tiled) -> da.Array:
    """Return a lazy dask array of the full matrix, one chunk per tile; its graph holds the path, not the data."""
    meta = np.empty((0, 0), dtype=kernel.dtype)
    array: da.Array = da.from_array(  # type: ignore[no-untyped-call]
        kernel, chunks=kernel.chunks, name=f"kernel-{kernel.token}", asarray=False, fancy=False, meta=meta
    )
    return array
