"""Every operator does what solvers rely on; and the checks see what they are for."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from matrices import check_operator
from numpy.typing import NDArray
from stored import store_matrix

from ntkpipe.base.config import RunSpec
from ntkpipe.base.operator import Operator, Work
from ntkpipe.executors import connect
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.operators.on_dask.operator import WorkerGroup, WorkersOperator
from ntkpipe.operators.streaming import StreamingOperator
from ntkpipe.operators.tiles import ArrayTiles, KernelTiles, MatrixTiles, TileReader

Make = Callable[[NDArray[Any]], Operator]


class Stores:
    """A store for each matrix, made once."""

    def __init__(self, root: str | Path, tile: int) -> None:
        self._root = root
        self._tile = tile
        self._sources: dict[bytes, MatrixTiles] = {}

    def __call__(self, matrix: NDArray[Any]) -> MatrixTiles:
        key = matrix.tobytes()
        if key not in self._sources:
            where = f"{self._root}/{len(self._sources)}.zarr"
            self._sources[key] = KernelTiles(store_matrix(matrix, where, tile=self._tile))
        return self._sources[key]


def streaming(source: MatrixTiles, *, share_kept: float, threads: int) -> StreamingOperator:
    tiles = list(source.grid.tiles())
    cache_bytes = int(share_kept * len(tiles)) * source.tile_bytes
    return StreamingOperator(
        source, TileReader(source, tiles, cache_bytes=cache_bytes, streams=threads), threads=threads
    )


def test_arrays():
    check_operator(DenseOperator, sizes=(1, 2, 7, 40, 300))


@pytest.mark.parametrize(
    ("tile", "share_kept", "threads"), [(1, 0.5, 1), (3, 0.0, 3), (7, 1.0, 3), (16, 0.5, 3), (100, 0.0, 1)]
)
def test_stored_kernels(tmp_path, tile, share_kept, threads):
    sources = Stores(tmp_path, tile)
    sizes = {1: (5,), 3: (1, 7), 7: (1, 20), 16: (40,)}.get(tile, (1, 2, 7, 40))
    check_operator(lambda matrix: streaming(sources(matrix), share_kept=share_kept, threads=threads), sizes=sizes)


def test_stored_kernels_in_object_storage(bucket):
    sources = Stores(bucket.removesuffix("/a.zarr"), 16)
    check_operator(lambda matrix: streaming(sources(matrix), share_kept=0.5, threads=2), sizes=(40,))


def test_arrays_of_zarr(tmp_path):
    numbers = itertools.count()

    def make(matrix: NDArray[Any]) -> Operator:
        stored = zarr.create_array(tmp_path / f"{next(numbers)}.zarr", data=matrix, chunks=(3, 3))
        return streaming(ArrayTiles(stored, edge=6), share_kept=0.5, threads=2)

    check_operator(make, sizes=(13,))


@pytest.mark.parametrize("offset", [0, 3])
def test_memory_maps(tmp_path, offset):
    """Also of entries at odd addresses."""
    numbers = itertools.count()

    def make(matrix: NDArray[Any]) -> Operator:
        path = tmp_path / str(next(numbers))
        path.write_bytes(b"\0" * offset + matrix.tobytes())
        mapped = np.memmap(path, matrix.dtype, "r", offset, matrix.shape)
        return streaming(ArrayTiles(mapped, edge=5), share_kept=0.0, threads=2)

    check_operator(make, sizes=(1, 13))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect.connect("local", RunSpec(workers=2, memory_limit=2**30)) as joined:
        joined.wait_for_workers(2)
        yield joined


def test_workers(client, tmp_path):
    sources = Stores(tmp_path, 4)
    for size, dtype in ((1, np.float64), (10, np.float32)):
        check_operator(
            lambda matrix: WorkersOperator(WorkerGroup(client, sources(matrix))), sizes=(size,), dtypes=(dtype,)
        )


def in_float32(self: DenseOperator, block: NDArray[np.float64]) -> NDArray[np.float64]:
    self.work += Work(1.0)
    return (self._matrix.astype(np.float32) @ block.astype(np.float32)).astype(np.float64)


def of_upper_half(self: DenseOperator, block: NDArray[np.float64]) -> NDArray[np.float64]:
    self.work += Work(1.0)
    return np.triu(self._matrix).astype(np.float64) @ block


def never_the_same(self: DenseOperator, block: NDArray[np.float64]) -> NDArray[np.float64]:
    product = DenseOperator._multiply(self, block)
    product[-1] *= 1 + np.finfo(np.float64).eps * (self.work.passes % 2)
    return product


def changes_the_block(self: DenseOperator, block: NDArray[np.float64]) -> NDArray[np.float64]:
    product = DenseOperator._multiply(self, block)
    block += 1
    return product


def counts_columns(self: DenseOperator, block: NDArray[np.float64]) -> NDArray[np.float64]:
    self.work += Work(block.shape[1] - 1)
    return DenseOperator._multiply(self, block)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (in_float32, "matmat of a block is float64's to rounding"),
        (of_upper_half, "matmat of a block is float64's to rounding"),
        (never_the_same, "has equal bits"),
        (changes_the_block, "matmat leaves the block as it is"),
        (counts_columns, "a product is one pass"),
    ],
)
def test_wrong_products_are_seen(method, words):
    kind = type("Wrong", (DenseOperator,), {"_multiply": method})
    with pytest.raises(AssertionError, match=words):
        check_operator(kind, sizes=(40,))


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("_columns", lambda self, indices: self._matrix[:, np.sort(indices)].astype(float), "columns, repeated"),
        ("_block", lambda self, rows, columns: self._matrix[rows, columns].T.T.copy(order="F").astype(float), "block"),
        ("_leading", lambda self, num_rows: DenseOperator(self._matrix[-num_rows:, -num_rows:]), "matrix leading"),
        ("statistics", lambda self: self._measure(), "statistics are found once"),
        ("identity", lambda self: str(id(self)), "identity is that of equal entries"),
        ("centred", lambda self: self.shifted(0.1), "of the matrix centred"),
    ],
)
def test_other_wrong_answers_are_seen(name, method, words):
    kind = type("Wrong", (DenseOperator,), {name: method})
    with pytest.raises(AssertionError, match=words):
        check_operator(kind, sizes=(40,), dtypes=(np.float64,))
