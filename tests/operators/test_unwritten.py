"""An array of Zarr without some chunks reads as its fill value there: that is no kernel, unless it is meant."""

import itertools
from typing import Any

import numpy as np
import pytest
import zarr
from matrices import matrix_with_spectrum, power_law
from zarr.codecs import BloscCodec

import ntkpipe
from ntkpipe.base.errors import ConfigError, TileError

N, EDGE = 40, 10
K = matrix_with_spectrum(power_law(N, condition=1e3, largest=10.0))
ALL = set(itertools.product(range(N), repeat=2))


def stored(
    where: Any = None, *, data: Any = K, missing: Any = (), chunks: Any = (EDGE, EDGE), fill: Any = 0.0, **options: Any
) -> zarr.Array:
    """An array written chunk by chunk, or shard by shard, without some."""
    where = {} if where is None else where
    array = zarr.create_array(where, shape=(N, N), dtype=data.dtype, chunks=chunks, fill_value=fill, **options)
    high, wide = options.get("shards") or chunks
    for row, column in itertools.product(range(-(-N // high)), range(-(-N // wide))):
        if (row, column) not in missing:
            part = slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)
            array[part] = data[part]
    return array


CASES: dict[str, dict[str, Any]] = {
    "mirror images": {"missing": {(0, 1), (1, 0)}},
    "upper": {"missing": {(1, 3)}},
    "diagonal": {"missing": {(2, 2)}},
    "last": {"missing": {(3, 3)}},
    "all": {"missing": ALL},
    "fill value one": {"missing": {(0, 3), (3, 0)}, "fill": 1.0},
    "fill value NaN": {"missing": {(0, 3), (3, 0)}, "fill": np.nan},
    "no fill value": {"missing": {(0, 3), (3, 0)}, "fill": None, "zarr_format": 2},
    "ragged": {"missing": {(4, 4)}, "chunks": (9, 9)},
    "not square": {"missing": {(1, 2)}, "chunks": (7, 13)},
    "whole rows": {"missing": {(3, 0)}, "chunks": (5, N)},
    "version 2": {"missing": {(0, 2), (2, 0)}, "zarr_format": 2},
    "compressed": {"missing": {(2, 3), (3, 2)}, "compressors": [BloscCodec()]},
    "shards": {"missing": {(0, 1), (1, 0)}, "shards": (2 * EDGE, 2 * EDGE)},
    "float32": {"missing": {(0, 2), (2, 0)}, "data": K.astype("f4")},
    "integers": {"missing": {(0, 2), (2, 0)}, "data": np.round(1000 * K).astype("i8"), "fill": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_unwritten_chunks_are_named_before_anything_is_computed(case, tmp_path):
    array = stored(tmp_path / "k.zarr", **CASES[case])
    for solve in (ntkpipe.eigvalsh, lambda held: ntkpipe.eigsh(held, 2)):
        with pytest.raises(TileError, match=r"the matrix: chunks \(.*k\.zarr.*fill value") as caught:
            solve(array)
    if len(CASES[case]["missing"]) < 3 and case != "shards":
        assert all(str(index) in str(caught.value) for index in CASES[case]["missing"])
    with pytest.raises(TileError, match="the test kernel: chunks"):
        ntkpipe.influence(np.ones(N), array)
    with pytest.raises(TileError, match="chunks"):
        ntkpipe.compare_kernels(K, array)


@pytest.mark.parametrize("case", CASES)
def test_the_same_arrays_once_they_are_written(case):
    options = {**CASES[case], "missing": ()}
    array = stored(**options)
    wanted = np.linalg.eigvalsh(options.get("data", K).astype(np.float64))[::-1]
    found = ntkpipe.eigvalsh(array).eigenvalues
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13 * N * wanted[0])


def test_a_chunk_of_a_shard_that_is_there():
    array = zarr.create_array({}, shape=(N, N), dtype="f8", chunks=(EDGE, EDGE), shards=(2 * EDGE, 2 * EDGE))
    for row, column in itertools.product(range(4), repeat=2):
        if {row, column} != {0, 1}:
            part = slice(row * EDGE, (row + 1) * EDGE), slice(column * EDGE, (column + 1) * EDGE)
            array[part] = K[part]
    assert array.nchunks_initialized == array.nchunks  # it counts shards
    with pytest.raises(TileError, match=r"chunks \(0, 1\), \(1, 0\) of"):
        ntkpipe.eigvalsh(array)


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    blocks = np.kron(np.eye(4), np.abs(K[:EDGE, :EDGE]))
    with h5py.File(tmp_path / "k.h5", "w") as file:
        part = file.create_dataset("part", (N, N), "f8", chunks=(EDGE, EDGE))
        part[: 3 * EDGE] = K[: 3 * EDGE]
        with pytest.raises(TileError, match=r"chunks \(3, 0\), \(3, 1\), \(3, 2\), \(3, 3\) of"):
            ntkpipe.eigvalsh(part)
        for name, data in (("whole", K), ("ragged", K), ("blocks", blocks), ("contiguous", blocks)):
            chunks = {"ragged": (7, 9), "contiguous": None}.get(name, (EDGE, EDGE))
            found = ntkpipe.eigvalsh(file.create_dataset(name, data=data, chunks=chunks)).eigenvalues
            np.testing.assert_allclose(found, np.linalg.eigvalsh(data)[::-1], rtol=0, atol=1e-13)
        with pytest.raises(ConfigError, match="the matrix: a File of arrays, blocks, contiguous, part"):
            ntkpipe.eigvalsh(file)


def test_object_storage():
    obstore = pytest.importorskip("obstore")
    where = zarr.storage.ObjectStore(obstore.store.MemoryStore())
    array = stored(where, missing={(0, 2), (2, 0)})
    with pytest.raises(TileError, match=r"chunks \(0, 2\), \(2, 0\) of"):
        ntkpipe.eigvalsh(array)
    array[:] = K
    np.testing.assert_allclose(ntkpipe.eigvalsh(array).eigenvalues, np.linalg.eigvalsh(K)[::-1], rtol=0, atol=1e-13)


def test_zeros_that_were_written_are_meant():
    """Kernels of samples that have nothing in common: whole chunks are zero."""
    blocks = np.kron(np.eye(4), np.abs(K[:EDGE, :EDGE]))
    left_out, written = stored(data=blocks), stored(data=blocks, config={"write_empty_chunks": True})
    with pytest.raises(TileError, match=r"in memory, array\[\.\.\.\], or write it with config"):
        ntkpipe.eigvalsh(left_out)
    wanted = np.linalg.eigvalsh(blocks)[::-1]
    for array in (written, left_out[...]):  # what the message advises
        np.testing.assert_allclose(ntkpipe.eigvalsh(array).eigenvalues, wanted, rtol=0, atol=1e-13)


def test_an_array_that_is_being_written_is_taken_once_it_is_whole():
    array = stored(missing={(1, 2), (2, 1)})
    with pytest.raises(TileError, match=r"chunks \(1, 2\), \(2, 1\) of"):
        ntkpipe.eigvalsh(array)
    array[EDGE : 2 * EDGE, 2 * EDGE : 3 * EDGE] = K[EDGE : 2 * EDGE, 2 * EDGE : 3 * EDGE]
    with pytest.raises(TileError, match=r"chunks \(2, 1\) of"):
        ntkpipe.eigvalsh(array)
    array[2 * EDGE : 3 * EDGE, EDGE : 2 * EDGE] = K[2 * EDGE : 3 * EDGE, EDGE : 2 * EDGE]
    np.testing.assert_allclose(ntkpipe.eigvalsh(array).eigenvalues, np.linalg.eigvalsh(K)[::-1], rtol=0, atol=1e-13)


def test_targets_and_right_hand_sides_in_zarr():
    vector = zarr.create_array({}, shape=(N,), dtype="f8", chunks=(8,))
    vector[:32] = np.random.default_rng(0).standard_normal(32)
    for refused in (
        lambda: ntkpipe.solve(K, vector, ridge=1.0),
        lambda: ntkpipe.KernelRegression(1.0).fit(K, vector),
        lambda: ntkpipe.cholesky(K).solve(vector),
        lambda: ntkpipe.as_operator(K) @ vector,
    ):
        with pytest.raises(TileError, match=r"chunks \(4,\) of"):
            refused()
    vector[32:] = 1.0
    wanted = np.linalg.solve(K + np.eye(N), vector[...])
    np.testing.assert_allclose(ntkpipe.solve(K, vector, ridge=1.0).coefficients, wanted, rtol=0, atol=1e-10)
