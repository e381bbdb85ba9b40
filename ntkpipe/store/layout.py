"""The arrays of a store: names, shapes, chunks and dtypes, all derived from the manifest."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreError
from ntkpipe.base.grid import Grid, kernel_grids
from ntkpipe.base.kinds import MAX_PLANES, Plane, num_planes, planes_of
from ntkpipe.store.manifest import DataRecord, Manifest

Index = tuple[int, ...]

CHECKSUM_BYTES = 4  # each chunk is followed by the crc32c of its bytes
_BLOCK_DIMENSIONS = ("row", "column")
# Limits: lists of chunks, and single chunks, are held in memory.
MOST_CHUNKS = 2**22
MOST_CHUNK_BYTES = 2**33
_SAMPLE_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a store."""

    name: str  # path below the store's root
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    dimensions: tuple[str, ...]
    grid: Grid | None = None  # the tiles, for a kernel; all chunks of other arrays are stored

    @property
    def holds_blocks(self) -> bool:
        """Whether the array is a ``test_diagonal``: the S x S block of each sample with itself."""
        return self.dimensions == ("sample", *_BLOCK_DIMENSIONS)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk's file. Ragged chunks are padded to full size, as Zarr does."""
        return math.prod(self.chunks) * self.dtype.itemsize + CHECKSUM_BYTES

    @property
    def fill_value(self) -> float:
        """Value that plain Zarr readers see in missing chunks, and that pads ragged ones."""
        return float("nan") if self.dtype.kind == "f" else 0

    def count_bad(self, values: NDArray[Any]) -> int:
        """Entries of a whole chunk that cannot be right: NaN, and where they are no samples, infinite ones."""
        if values.dtype.kind != "f" or np.isfinite(values).all():
            return 0
        return int((np.isnan(values) if self.name.startswith("samples/") else ~np.isfinite(values)).sum())

    @property
    def chunk_counts(self) -> tuple[int, ...]:
        """Chunks along each axis, stored or not."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))

    def indices(self) -> Iterator[Index]:
        """Chunks of a complete array."""
        return np.ndindex(*self.chunk_counts) if self.grid is None else self.grid.tiles()

    @property
    def num_chunks(self) -> int:
        """Number of :meth:`indices`."""
        return math.prod(self.chunk_counts) if self.grid is None else self.grid.num_tiles

    def holds(self, index: Index) -> bool:
        """Whether a complete array has chunk ``index``."""
        inside = all(0 <= i < count for i, count in zip(index, self.chunk_counts, strict=True))
        return inside and (self.grid is None or self.grid.is_stored(*index))

    def region(self, index: Index) -> tuple[slice, ...]:
        """Part of the array in chunk ``index``, cut at the array's end."""
        parts = zip(index, self.chunks, self.shape, strict=True)
        return tuple(slice(i * chunk, min((i + 1) * chunk, size)) for i, chunk, size in parts)


def planes(manifest: Manifest) -> tuple[Plane, ...]:
    """The planes of a store with this manifest."""
    count = num_planes(manifest.kind, manifest.num_outputs, len(manifest.groups))
    if count > MAX_PLANES:
        raise StoreError(f"the manifest asks for {count} kernels side by side; at most {MAX_PLANES} are possible")
    return planes_of(manifest.kind, manifest.num_outputs, manifest.groups)


def layouts(manifest: Manifest) -> dict[str, ArrayLayout]:
    """Every array of a store with this manifest, by name."""
    every, dtype, width, tile = planes(manifest), manifest.store_dtype, manifest.num_covectors, manifest.tile
    num_test = None if manifest.test is None else manifest.test.num_samples
    grids = kernel_grids(manifest.train.num_samples, num_test, width, tile)
    found: list[ArrayLayout] = []
    for plane in every:
        for name, grid in grids.items():
            chunks = (grid.rows.tile_rows, grid.columns.tile_rows)
            found.append(ArrayLayout(plane.array(name), grid.shape, chunks, np.dtype(dtype), ("row", "column"), grid))
    for split, data in (("train", manifest.train), ("test", manifest.test)):
        if data is not None:
            found += _data_layouts(split, data, manifest)
    if num_test is not None:
        names = [plane.array("kernel/test_diagonal") for plane in every]
        found += [_by_sample(name, num_test, tile, (width, width), dtype, _BLOCK_DIMENSIONS) for name in names]
    _require_possible(found)
    return {layout.name: layout for layout in found}


def _data_layouts(split: str, data: DataRecord, manifest: Manifest) -> Iterator[ArrayLayout]:
    has_samples = manifest.derived is None or manifest.derived.has_samples
    records = {f"samples/{split}/{name}": record for name, record in data.inputs.items() if has_samples}
    if data.targets is not None:
        records[f"targets/{split}"] = data.targets
    for name, record in records.items():
        sample_bytes = max(1, math.prod(record.shape) * np.dtype(record.dtype).itemsize)
        chunk = max(1, min(manifest.tile, data.num_samples, _SAMPLE_CHUNK_BYTES // sample_bytes))
        dimensions = tuple(f"axis_{axis}" for axis in range(1, 1 + len(record.shape)))
        yield _by_sample(name, data.num_samples, chunk, record.shape, record.dtype, dimensions)
    shape, dtype = (manifest.num_outputs,), manifest.store_dtype
    yield _by_sample(f"outputs/{split}", data.num_samples, manifest.tile, shape, dtype, ("output",))


def _by_sample(
    name: str, num_samples: int, chunk: int, shape: tuple[int, ...], dtype: str, dimensions: tuple[str, ...]
) -> ArrayLayout:
    """An array in chunks of whole samples; shape and dimensions are those of one sample."""
    return ArrayLayout(name, (num_samples, *shape), (chunk, *shape), np.dtype(dtype), ("sample", *dimensions))


def _require_possible(found: list[ArrayLayout]) -> None:
    """Check, before anything is allocated, that the chunks can be listed and read; counts may be of any size."""
    count = sum(layout.num_chunks for layout in found)
    if count > MOST_CHUNKS:
        raise StoreError(
            f"a store of {_about(found[0].shape[0])} rows in tiles of {_about(found[0].chunks[0])} would have "
            f"{_about(count)} chunks; at most {MOST_CHUNKS:,} can be listed. Choose a larger tile"
        )
    largest = max(found, key=lambda layout: layout.chunk_bytes)
    if largest.chunk_bytes > MOST_CHUNK_BYTES:
        raise StoreError(
            f"one chunk of {largest.name} would have {_about(largest.chunk_bytes)} bytes; at most "
            f"{MOST_CHUNK_BYTES:,} are possible. Choose a smaller tile"
        )


def _about(count: int) -> str:
    return f"{count:,}" if count < 10**15 else f"10^{len(str(count)) - 1}"
