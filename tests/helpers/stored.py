"""Matrices in stores, and tiles that say who reads them and take their time; workers of a cluster can import it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from manifests import small_manifest
from numpy.typing import NDArray

from ntkpipe import open_kernel
from ntkpipe.base.errors import TileError
from ntkpipe.base.grid import Grid
from ntkpipe.operators.tiles import MatrixTiles, TileIndex
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.store import Store


def store_matrix(matrix: NDArray[Any], where: str | Path, *, tile: int) -> Kernel:
    """A symmetric matrix as the train kernel of a new store, one row a sample."""
    manifest = small_manifest(len(matrix), None, kind="pntk", tile=tile, store_dtype=str(matrix.dtype))
    array = Store.create(where, manifest).arrays["kernel/train"]
    for index in array.layout.indices():
        array.write(index, matrix[array.layout.region(index)])
    return open_kernel(where).train


@dataclass(frozen=True)
class WatchedTiles:
    """Tiles of another source: each reading process leaves its number in a folder, and takes its time.

    Attributes
    ----------
    source
        Where tiles come from.
    folder
        Of the numbers.
    seconds
        That a tile takes.
    """

    source: MatrixTiles
    folder: Path
    seconds: float = 0.0

    @property
    def grid(self) -> Grid:
        return self.source.grid

    @property
    def rows_per_sample(self) -> int | None:
        return self.source.rows_per_sample

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    @property
    def tile_bytes(self) -> int:
        return self.source.tile_bytes

    @property
    def is_local(self) -> bool:
        return self.source.is_local

    def identity(self) -> str:
        return self.source.identity()

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        if index != (0, 0):  # which is read when workers are asked what they are
            (self.folder / str(os.getpid())).touch()
        time.sleep(self.seconds)
        return self.source.read(index, buffer)

    def readers(self) -> set[int]:
        """Processes that have read, but this one."""
        return {int(path.name) for path in self.folder.iterdir()} - {os.getpid()}


@dataclass(frozen=True)
class HereOnly(WatchedTiles):
    """Tiles that no other process reaches.

    Attributes
    ----------
    process
        That does.
    """

    process: int = 0

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        if os.getpid() != self.process:
            raise TileError(f"tile {index} is not here")
        return self.source.read(index, buffer)
