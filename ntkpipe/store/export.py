"""Export of one array of a store to a ``.npy`` file or Zarr array; a kernel becomes the full matrix."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arguments import checked
from ntkpipe.base.errors import ConfigError, StoreError, StoreExistsError, nearest
from ntkpipe.base.paths import local_path, obstacle
from ntkpipe.base.progress import Ticks
from ntkpipe.store.chunks import StoredArray, require_complete
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.layout import ArrayLayout, Index
from ntkpipe.store.media.folder import Folder, partial_beside
from ntkpipe.store.media.medium import writing
from ntkpipe.store.store import Store

_KERNELS = "kernel/"

Write = Callable[[Index, NDArray[Any]], None]


@checked
def export_kernel(
    store: "str | Path | KernelStore", path: str | Path, *, array: str = "train", progress: bool = True
) -> Path:
    """Write one array of a store for programs that do not know this package.

    A symmetric kernel becomes the full matrix. Each tile is read and verified once; memory is two tiles, whatever the
    size of the matrix. The file appears at ``path`` only once it is complete.

    Parameters
    ----------
    store
        Path or URL, or an open store.
    path
        ``….npy`` for one file that ``numpy.load(path, mmap_mode="r")`` maps, or ``….zarr`` for a Zarr v3 array (no
        compression, crc32c, one chunk per tile) that any Zarr library reads. The path must not exist.
    array
        Name of the array in the store; ``kernel/`` may be omitted, as in ``"train"`` and ``"test_train"``.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    The path. The dtype and the order of axes are those of the store; row = sample * S + covector.

    Raises
    ------
    ConfigError
        If the path has another suffix, or the store has no such array.
    StoreExistsError
        If something is at the path.
    TileError
        If the store is incomplete or damaged; the message names the tile, and nothing is left at the path.
    ResourceError, StoreFullError, StoreError
        If the disk has too little space (ResourceError: nothing was written), or the file cannot be written.
    """
    opened = open_kernel(store)
    source = find_array(opened.store, array)
    target = local_path(path)
    if target.suffix not in _WRITERS:
        raise ConfigError(f"{target} ends in {target.suffix!r}; needed {' or '.join(map(repr, _WRITERS))}")
    if os.path.lexists(target):
        raise StoreExistsError(f"{target} exists; choose another path, or remove it first")
    if why := obstacle(target, writes=True):
        raise StoreError(f"cannot write {target}: {why}; choose another path")
    require_complete([source], "the export")
    beside = Folder(target.parent)
    beside.require_room(math.prod(source.layout.shape) * source.layout.dtype.itemsize, str(target))
    partial = partial_beside(target) / "array"
    count, grid = source.layout.num_chunks, source.layout.grid
    with writing(beside), Ticks(count, what="export", unit="chunk", enabled=progress) as ticks:
        partial.parent.mkdir(parents=True)
        try:
            with _WRITERS[target.suffix](partial, source.layout) as write:
                for index in source.layout.indices():
                    values = source.read(index)
                    write(index, values)
                    if grid is not None and grid.symmetric and index[0] != index[1]:
                        write((index[1], index[0]), values.T)
                    ticks.tick()
            partial.rename(target)
        finally:
            shutil.rmtree(partial.parent)
    return target


def find_array(store: Store, name: str) -> StoredArray:
    """Find the array ``name``, or ``kernel/name``, of a store."""
    for known in (name, _KERNELS + name):
        if known in store.arrays:
            return store.arrays[known]
    names = [known.removeprefix(_KERNELS) for known in store.arrays]
    shown = ", ".join(map(repr, names))
    raise ConfigError(f"{store.root} has no array {name!r}; it has {shown}{nearest(name, names)}")


def find_kernel(store: KernelStore, array: str) -> Kernel:
    """Open a symmetric kernel of a store by name."""
    found = find_array(store.store, array)
    grid = found.layout.grid
    if grid is None or not grid.symmetric:
        raise ConfigError(f"{found.layout.name} is no kernel of samples with themselves; needed one such as 'train'")
    return Kernel(found, store.manifest.digest())


@contextlib.contextmanager
def _npy(path: Path, layout: ArrayLayout) -> Iterator[Write]:
    """Fill a ``.npy`` file by positioned writes; with a memory map, a full disk would raise a signal."""
    dtype = layout.dtype.newbyteorder("<")
    row_bytes = int(np.prod(layout.shape[1:])) * dtype.itemsize
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": layout.shape}
    with path.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()

        def write(index: Index, values: NDArray[Any]) -> None:
            region = layout.region(index)
            if values.shape[1:] == layout.shape[1:]:
                _write_at(file, start + region[0].start * row_bytes, values, dtype)
                return
            for row, entries in enumerate(values, start=region[0].start):
                _write_at(file, start + row * row_bytes + region[1].start * dtype.itemsize, entries, dtype)

        yield write
        file.flush()
        os.fsync(file.fileno())  # errors of writing must surface before the file gets its name


def _write_at(file: BinaryIO, position: int, values: NDArray[Any], dtype: np.dtype[Any]) -> None:
    file.seek(position)
    file.write(np.ascontiguousarray(values, dtype).data)


@contextlib.contextmanager
def _zarr(path: Path, layout: ArrayLayout) -> Iterator[Write]:
    plain = ArrayLayout(path.name, layout.shape, layout.chunks, layout.dtype, layout.dimensions)
    array = StoredArray(Folder(path.parent), plain)
    array.create()
    yield array.write


_WRITERS = {".npy": _npy, ".zarr": _zarr}
