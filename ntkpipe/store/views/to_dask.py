"""A stored kernel in the shapes that other libraries read: dask arrays."""

from typing import Any, Protocol

import dask.array as da
import numpy as np
from numpy.typing import NDArray


class Tiled(Protocol):
    """A matrix that is read by slices and stored in tiles."""

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
    """A lazy dask array of the full matrix, one dask chunk a tile.

    The graph holds the path of the store, not data; a mirrored tile is read from the tile that is stored.
    """
    meta = np.empty((0, 0), dtype=kernel.dtype)
    array: da.Array = da.from_array(  # type: ignore[no-untyped-call]
        kernel, chunks=kernel.chunks, name=f"kernel-{kernel.token}", asarray=False, fancy=False, meta=meta
    )
    return array
