"""Whatever holds a symmetric matrix is opened to the numbers of float64 brute force, and whatever does not is named."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import zarr
from holders import HOLDERS, REFUSED
from matrices import matrix_with_spectrum, power_law
from stored import store_matrix

import ntkpipe
from ntkpipe.base.errors import ConfigError, NonFiniteError, NtkpipeError, TileError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.operators.opening import as_operator
from ntkpipe.operators.streaming import StreamingOperator
from ntkpipe.operators.tiles import ArrayTiles

N = 26
K = matrix_with_spectrum(power_law(N, condition=1e3, largest=10.0))
VALUES = np.linalg.eigvalsh(K)[::-1]
BLOCK = np.random.default_rng(0).standard_normal((N, 3))


def check(found: Any, dense: Any = K) -> None:
    """Products, entries and eigenvalues are those of a dense matrix."""
    operator = as_operator(found)
    bound = 1e-13 * np.abs(dense).max() * N
    np.testing.assert_allclose(operator @ BLOCK, dense @ BLOCK, rtol=0, atol=4 * bound)
    np.testing.assert_array_equal(operator.block(slice(0, N), slice(0, N)), dense)
    np.testing.assert_array_equal(operator.diagonal(), dense.diagonal())
    np.testing.assert_allclose(operator.frobenius(), np.linalg.norm(dense), rtol=1e-14)
    exact = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(ntkpipe.eigvalsh(found).eigenvalues, exact, rtol=0, atol=bound)
    np.testing.assert_allclose(ntkpipe.eigsh(found, 3, tol=1e-12).eigenvalues, exact[:3], rtol=0, atol=bound)


@pytest.mark.parametrize("name", HOLDERS)
def test_a_matrix_is_the_same_in_every_hand(name):
    check(HOLDERS[name](K))


@pytest.mark.parametrize("dtype", ["i1", "u1", "i8", "?", "f2", "f4"])
@pytest.mark.parametrize("hold", [np.asarray, HOLDERS["zarr"], HOLDERS["as HDF5"], scipy.sparse.csr_array])
def test_products_of_any_dtype_are_float64(dtype, hold):
    """Sums of products of small integers leave their range, and float16 has three digits."""
    dense = (100 * np.abs(K) / np.abs(K).max()).astype(dtype)
    if not (dtype == "f2" and hold is scipy.sparse.csr_array):  # which scipy does not have
        operator = as_operator(hold(dense))
        wanted = dense.astype(np.float64)
        np.testing.assert_allclose(operator @ BLOCK, wanted @ BLOCK, rtol=0, atol=1e-10)
        np.testing.assert_array_equal(operator.columns(np.arange(N)), wanted)


def test_a_store_stands_for_its_train_kernel(tmp_path):
    kernel = store_matrix(K, tmp_path / "k.zarr", tile=8)
    store = ntkpipe.open_kernel(tmp_path / "k.zarr")
    check(store)
    assert ntkpipe.eigvalsh(store).matrix == ntkpipe.eigvalsh(kernel).matrix == kernel.identity
    for path in (tmp_path / "k.zarr", str(tmp_path / "k.zarr")):
        with pytest.raises(ConfigError, match=r"open_kernel\(path\)\.train"):
            ntkpipe.eigsh(path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_matrix_is_named_and_nothing_is_written(name, tmp_path):
    make, _ = REFUSED[name]
    given = make(K)
    for solve in (ntkpipe.eigvalsh, lambda held: ntkpipe.cholesky(held, path=tmp_path / "factor")):
        with pytest.raises(NtkpipeError, match="the matrix") as caught:
            solve(given)
        assert isinstance(caught.value, ConfigError | TileError)
    assert not list(tmp_path.iterdir()) or not list((tmp_path / "factor").iterdir())


@pytest.mark.parametrize("shape", [(N * N,), (N // 2, N * 2), (1, N, N), (13, 2, 13, 2), (13, 13, 2, 2)])
@pytest.mark.parametrize("hold", ["list", "zarr", "memory map", "dask", "tensor"])
def test_shapes_of_no_matrix(shape, hold):
    with pytest.raises(ConfigError, match=r"the matrix of shape .*needed \(n, n\)"):
        as_operator(HOLDERS[hold](K.reshape(shape)))


@pytest.mark.parametrize("hold", [*HOLDERS])
@pytest.mark.parametrize("place", [(20, 2), (2, 20)])
def test_one_bad_entry_in_either_triangle(hold, place):
    wrong = K.copy()
    wrong[place] = np.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        ntkpipe.eigsh(HOLDERS[hold](wrong), 3)
    wrong[place] = K[place] + 1e-3
    with pytest.raises(ConfigError, match="not symmetric"):
        ntkpipe.eigsh(HOLDERS[hold](wrong), 3)


@pytest.mark.parametrize("hold", ["zarr", "memory map", "sparse", "list"])
@pytest.mark.parametrize("triangle", [np.triu, np.tril])
def test_a_triangle_alone_is_no_symmetric_matrix(hold, triangle):
    with pytest.raises((ConfigError, TileError), match=r"not symmetric|fill value"):
        ntkpipe.eigsh(HOLDERS[hold](triangle(K)), 3)


def test_an_entry_that_is_off_by_a_bit_is_no_matter():
    bent = K.copy()
    bent[20, 2] = np.nextafter(bent[20, 2], 9.0)
    for hold in ("list", "zarr", "memory map", "sparse"):
        found = ntkpipe.eigvalsh(HOLDERS[hold](bent)).eigenvalues
        np.testing.assert_allclose(found, VALUES, rtol=0, atol=1e-13)


def test_lower_tiles_alone_are_refused_and_upper_ones_are_enough(tmp_path):
    blocks = np.kron(np.eye(13), np.ones((2, 2))) > 0
    for name, kept in (("upper", np.triu(K) + np.where(blocks, np.tril(K, -1), 0)), ("lower", None)):
        matrix = kept if kept is not None else np.tril(K) + np.where(blocks, np.triu(K, 1), 0)
        mapped = np.memmap(tmp_path / name, np.float64, "w+", shape=K.shape)
        mapped[:] = matrix
        tiles = ArrayTiles(mapped, edge=2)
        if name == "lower":
            with pytest.raises(ConfigError, match="not symmetric"):
                tiles.require_upper()
            continue
        tiles.require_upper()
        for row, column in tiles.grid.tiles():
            rows, columns = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
            np.testing.assert_array_equal(tiles.read((row, column), None), K[rows, columns])


@pytest.mark.parametrize("dtype", [">f8", "i8", "<f4"])
def test_a_memory_map_that_travels_keeps_its_dtype(dtype, tmp_path):
    """Workers open the file again: they must read it as it was written."""
    mapped = np.memmap(tmp_path / "m", dtype, "w+", shape=K.shape)
    mapped[:] = 100 * K
    mapped.flush()
    tiles = ArrayTiles(mapped)
    there = pickle.loads(pickle.dumps(tiles))
    assert there.dtype == tiles.dtype
    np.testing.assert_array_equal(there.read((0, 0), None), tiles.read((0, 0), None))
    np.testing.assert_array_equal(there.read((0, 0), None), np.asarray(mapped, tiles.dtype))


def test_arrays_are_neither_written_nor_copied():
    read_only = K.copy()
    read_only.flags.writeable = False
    ntkpipe.solve(read_only, BLOCK, ridge=0.1)
    ntkpipe.smallest(read_only)
    np.testing.assert_array_equal(read_only, K)
    assert isinstance(operator := as_operator(read_only), DenseOperator)
    assert np.shares_memory(operator._matrix, read_only)
    assert as_operator(operator) is operator


def test_arrays_in_stores_are_streamed_and_those_in_memory_are_not(tmp_path):
    stored = zarr.create_array(tmp_path / "k.zarr", data=K, chunks=(5, 7))
    assert isinstance(as_operator(stored), StreamingOperator)
    assert isinstance(as_operator(K.tolist()), DenseOperator)
    assert isinstance(as_operator(np.memmap(tmp_path / "m", np.float64, "w+", shape=(3, 3))), StreamingOperator)


def test_a_frame_is_taken_by_its_values():
    pandas = pytest.importorskip("pandas")
    names = [f"sample {number}" for number in range(N)]
    check(pandas.DataFrame(K, index=names, columns=names))
    with pytest.raises(ConfigError, match="not symmetric"):
        as_operator(pandas.DataFrame(K, index=names, columns=names).iloc[::-1])


def test_comparisons_name_the_kernel_that_is_none(tmp_path):
    for bad in (K[:, :-1], Path("k.npy"), K + 0j, {"K": K}, np.ma.array(K, mask=K > 1)):
        words = r"text or a path|no kernel store|not" if isinstance(bad, Path) else r"^b\b"
        with pytest.raises(NtkpipeError, match=words):
            ntkpipe.compare_kernels(K, bad)
    for name in ("tensor with gradient", "zarr", "sparse", "DataArray in chunks"):
        assert ntkpipe.compare_kernels(HOLDERS[name](K), K).relative_difference == 0.0
