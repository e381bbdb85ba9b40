"""Kernels read from a store are the full matrix, indexed as numpy does."""

import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ntkpipe.base.errors import ArgumentError, ConfigError, ResourceError, StoreError, StoreNotFoundError, TileError
from ntkpipe.build.derive import derive_kernel
from ntkpipe.store import kernel as kernel_module
from ntkpipe.store.export import export_kernel
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.store import Store

NUM_TRAIN, NUM_TEST, NUM_OUTPUTS = 7, 5, 2


class Case(NamedTuple):
    """A store and the matrices that it holds."""

    store: Store
    train: np.ndarray
    test_train: np.ndarray
    test_diagonal: np.ndarray

    @property
    def opened(self) -> KernelStore:
        return open_kernel(self.store.root)


def write_array(store: Store, name: str, values: np.ndarray) -> None:
    array = store.arrays[name]
    for index in array.layout.indices():
        array.write(index, values[array.layout.region(index)])


def make_case(path, manifest) -> Case:
    rng = np.random.default_rng(0)
    factor = rng.standard_normal(((NUM_TRAIN + NUM_TEST) * NUM_OUTPUTS, 30))
    matrix, size = factor @ factor.T, NUM_TRAIN * NUM_OUTPUTS
    matrix = (matrix + matrix.T) / 2
    train, test_train, test = matrix[:size, :size], matrix[size:, :size], matrix[size:, size:]
    split = test.reshape(NUM_TEST, NUM_OUTPUTS, NUM_TEST, NUM_OUTPUTS)
    test_diagonal = np.stack([split[i, :, i] for i in range(NUM_TEST)])
    store = Store.create(path, manifest)
    write_array(store, "kernel/train", train)
    write_array(store, "kernel/test_train", test_train)
    write_array(store, "kernel/test_diagonal", test_diagonal)
    return Case(store, train, test_train, test_diagonal)


@pytest.fixture(scope="module", params=[1, 2, 3, 7, 100], ids="tile={}".format)
def case(request, make_manifest, tmp_path_factory) -> Case:
    """Stores of the same matrices in tiles that divide the samples, leave a rest, or hold everything."""
    manifest = make_manifest(NUM_TRAIN, NUM_TEST, num_outputs=NUM_OUTPUTS, tile=request.param)
    return make_case(tmp_path_factory.mktemp("kernel") / "a.zarr", manifest)


@pytest.fixture
def fresh(make_manifest, tmp_path) -> Case:
    """A store that a test may damage."""
    return make_case(tmp_path / "a.zarr", make_manifest(NUM_TRAIN, NUM_TEST, num_outputs=NUM_OUTPUTS, tile=3))


def pairs(case: Case) -> list[tuple[Kernel, np.ndarray]]:
    return [(case.opened.train, case.train), (case.opened.test_train, case.test_train)]


def assert_same(found, expected):
    assert np.shape(found) == np.shape(expected)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


@st.composite
def one_axis(draw: st.DrawFn, size: int) -> object:
    return draw(
        st.one_of(
            st.integers(-size, size - 1),
            st.slices(size),
            npst.arrays(np.int64, st.integers(0, 6), elements=st.integers(-size, size - 1)),
            npst.arrays(bool, size),
            st.lists(st.integers(-size, size - 1), min_size=1, max_size=4),
        )
    )


def keys(shape: tuple[int, int]) -> st.SearchStrategy[object]:
    rows, columns = one_axis(shape[0]), one_axis(shape[1])
    numbers = [st.lists(st.integers(-size, size - 1), max_size=5).map(np.intp) for size in shape]
    masks = [npst.arrays(bool, size) for size in shape]
    return st.one_of(
        npst.basic_indices(shape, allow_newaxis=False),
        rows,
        st.tuples(rows, columns),
        st.tuples(rows, st.just(...)),
        st.tuples(st.just(...), columns),
        st.tuples(*numbers).map(lambda pair: np.ix_(*pair)),
        st.tuples(*masks).map(lambda pair: np.ix_(*pair)),
        st.tuples(*numbers).map(lambda pair: (pair[0][:, None], pair[1])),
        npst.integer_array_indices(shape, result_shape=npst.array_shapes(min_dims=2, max_dims=2, max_side=4)),
    )


@settings(max_examples=30)
@given(data=st.data())
def test_indexing_is_numpys(case, data):
    for kernel, matrix in pairs(case):
        key = data.draw(keys(matrix.shape))
        try:
            expected = matrix[key]
        except IndexError:
            with pytest.raises((IndexError, ValueError)):
                kernel[key]
        else:
            assert_same(kernel[key], expected)


@pytest.mark.parametrize(
    "key",
    [99, (0, -99), (slice(None), 99), (0, 0, 0), None, (0, None), (..., ...), "a", 1.0, np.zeros((14, 14), bool)],
    ids=repr,
)
def test_what_is_no_index_is_refused(fresh, key):
    with pytest.raises(IndexError):
        fresh.opened.train[key]


@pytest.mark.parametrize(
    "key", [(np.zeros((2, 2), int), slice(None)), (np.zeros((2, 1), int), slice(0, 2)), [[0], [1]]]
)
def test_what_would_have_three_dimensions_is_refused(fresh, key):
    with pytest.raises(IndexError, match=r"two-dimensional"):
        fresh.opened.train[key]


def test_the_whole_matrix_by_every_way(case):
    for kernel, matrix in pairs(case):
        assert_same(kernel.to_numpy(), matrix)
        assert_same(np.asarray(kernel), matrix)
        assert_same(np.asarray(kernel, dtype=np.float32), matrix.astype(np.float32))
        assert_same(kernel.to_dask().compute(scheduler="synchronous"), matrix)
        tiles = [
            [kernel.read_tile(row, column) for column in range(kernel.grid.columns.num_tiles)]
            for row in range(kernel.grid.rows.num_tiles)
        ]
        assert_same(np.block(tiles), matrix)


def test_an_array_without_a_copy_is_refused(fresh):
    with pytest.raises(ValueError, match="copies; use copy=None"):
        np.array(fresh.opened.train, copy=False)


def test_dask_sees_tiles_as_chunks_and_may_compute_part(case):
    for kernel, matrix in pairs(case):
        array = kernel.to_dask()
        assert array.chunks == kernel.chunks
        assert array.dtype == matrix.dtype
        assert_same((array @ array.T)[2:5].compute(scheduler="threads"), (array @ array.T).compute()[2:5])
        assert_same(array[3:9:2, ::-1].compute(scheduler="synchronous"), matrix[3:9:2, ::-1])


def test_the_symmetric_kernel_is_exactly_symmetric_and_knows_its_diagonal(case):
    kernel = case.opened.train
    assert np.array_equal(kernel.to_numpy(), kernel.to_numpy().T)
    assert_same(kernel.diagonal(), case.train.diagonal())
    with pytest.raises(ValueError, match="has no diagonal"):
        case.opened.test_train.diagonal()


def four_dimensional(matrix: np.ndarray) -> np.ndarray:
    rows, columns = (size // NUM_OUTPUTS for size in matrix.shape)
    return matrix.reshape(rows, NUM_OUTPUTS, columns, NUM_OUTPUTS).transpose(0, 2, 1, 3)


@settings(max_examples=30)
@given(data=st.data())
def test_blocks_are_the_four_dimensional_kernel(case, data):
    for kernel, matrix in pairs(case):
        expected = four_dimensional(matrix)
        key = data.draw(npst.basic_indices(expected.shape, allow_newaxis=False))
        assert_same(kernel.blocks[key], expected[key])


def test_blocks_as_a_whole(case):
    for kernel, matrix in pairs(case):
        expected = four_dimensional(matrix)
        assert kernel.blocks.shape == expected.shape
        assert_same(np.asarray(kernel.blocks), expected)


@pytest.mark.parametrize("key", [99, (0, 0, 2), (0, 0, 0, 0, 0), None, [0, 1], (..., ...)], ids=repr)
def test_what_is_no_index_of_blocks_is_refused(fresh, key):
    with pytest.raises(IndexError):
        fresh.opened.train.blocks[key]


def test_shape_dtype_and_words(fresh):
    kernel = fresh.opened.train
    assert (kernel.shape, kernel.ndim, len(kernel), kernel.size, kernel.nbytes) == ((14, 14), 2, 14, 196, 1568)
    assert (kernel.num_covectors, kernel.is_symmetric, kernel.dtype) == (2, True, np.float64)
    assert repr(kernel) == "<Kernel kernel/train 14 x 14 float64, 1.5 KiB>"
    assert repr(kernel.blocks) == "<KernelBlocks (7, 7, 2, 2) float64>"
    assert "kind=ntk 7 samples, 2 outputs, 12/12 tiles" in repr(fresh.opened)


def test_what_does_not_fit_is_refused_with_both_numbers_and_what_fits_is_read(fresh, monkeypatch):
    monkeypatch.setattr(kernel_module, "available_memory", lambda: 1024)
    kernel = fresh.opened.train
    for read in (kernel.to_numpy, lambda: np.asarray(kernel), lambda: kernel[:10], lambda: kernel.blocks[...]):
        with pytest.raises(ResourceError, match=r"needs 1\.[0-9] KiB; 1\.0 KiB of memory is available"):
            read()
    assert_same(kernel[:4], fresh.train[:4])
    monkeypatch.setattr(kernel_module, "available_memory", lambda: 100)
    with pytest.raises(ResourceError, match=r"kernel/test_diagonal of shape \(5, 2, 2\)"):
        _ = fresh.opened.test_diagonal


def test_a_missing_or_damaged_tile_stops_every_read_that_needs_it(fresh):
    path = fresh.store.arrays["kernel/train"].path((0, 1))
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    kernel = fresh.opened.train
    for key in [(0, 6), (6, 0), ..., (slice(None), 7), np.ix_([0], [8]), ([11], [5])]:
        with pytest.raises(TileError, match=r"tile \(0, 1\) of kernel/train .* crc32c"):
            kernel[key]
    with pytest.raises(TileError, match=r"tile \(0, 1\)"):
        kernel.to_dask().compute(scheduler="synchronous")
    assert_same(kernel[:6, :6], fresh.train[:6, :6])
    path.unlink()
    with pytest.raises(TileError, match=r"tile \(0, 1\) of kernel/train .* is missing"):
        kernel[0]


def test_progress_counts_whole_tiles(fresh):
    progress = fresh.opened.progress
    assert (progress.tiles_done, progress.tiles_total, progress.is_complete) == (12, 12, True)
    array = fresh.store.arrays["kernel/train"]
    array.path((0, 1)).write_bytes(b"half")
    array.path((2, 2)).unlink()
    progress = fresh.opened.progress
    assert (progress.tiles_done, progress.tiles_total, progress.is_complete) == (10, 12, False)
    assert progress.bytes_done == 10 * array.layout.chunk_bytes


def test_what_is_stored_beside_the_kernels(fresh, rng):
    assert_same(fresh.opened.test_diagonal, fresh.test_diagonal)
    arrays = {
        "outputs/train": rng.standard_normal((NUM_TRAIN, NUM_OUTPUTS)),
        "outputs/test": rng.standard_normal((NUM_TEST, NUM_OUTPUTS)),
        "targets/train": rng.integers(0, 9, NUM_TRAIN),
        "targets/test": rng.integers(0, 9, NUM_TEST),
    }
    for name, values in arrays.items():
        write_array(fresh.store, name, values)
    opened = fresh.opened
    assert_same(opened.outputs, arrays["outputs/train"])
    assert_same(opened.test_outputs, arrays["outputs/test"])
    assert_same(opened.targets, arrays["targets/train"])
    assert_same(opened.test_targets, arrays["targets/test"])


def test_a_store_without_test_samples_or_targets_says_so(tmp_path, make_manifest):
    manifest = make_manifest(num_test=None)
    train = manifest.train.model_copy(update={"targets": None, "targets_digest": None})
    opened = KernelStore(Store.create(tmp_path / "a.zarr", manifest.model_copy(update={"train": train})))
    assert opened.targets is None
    assert opened.test_targets is None
    for name in ("test_train", "test_diagonal", "test_outputs"):
        with pytest.raises(StoreError, match="it was made without test_inputs"):
            getattr(opened, name)


def test_opening_what_is_not_there(tmp_path):
    with pytest.raises(StoreNotFoundError, match="does not exist"):
        open_kernel(tmp_path / "none.zarr")


def test_opening_and_reading_loads_neither_torch_nor_dask(fresh):
    script = """
import sys
from ntkpipe.store.kernel_store import open_kernel
kernel = open_kernel(sys.argv[1]).train
kernel[3:5, ::2], kernel.diagonal(), kernel.blocks[0, 1], kernel.to_numpy()
print(sorted({"torch", "dask", "safetensors"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(fresh.store.root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_copies_of_a_store_are_different_dask_arrays(case, tmp_path):
    copied = shutil.copytree(case.store.root, tmp_path / "copy.zarr")
    assert case.opened.train.to_dask().name != open_kernel(copied).train.to_dask().name


def test_progress_counts_only_tiles_that_belong(fresh):
    tiles = fresh.store.arrays["kernel/train"]
    tiles.path((0, 1)).rename(tiles.path((1, 1)).with_name("0"))
    assert not fresh.opened.progress.is_complete


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda store: open_kernel(where=store.path), ArgumentError, "the nearest is 'path'"),
        (lambda _: open_kernel(3), ConfigError, r"open_kernel\(\): path=3; needed text or a path"),
        (lambda store: export_kernel(store, "k.npy", aray="train"), ArgumentError, "the nearest is 'array'"),
        (lambda store: export_kernel(store, 3), ConfigError, "path=3; needed text or a path"),
        (lambda store: derive_kernel(store, kind="trace", too="k.zarr"), ArgumentError, "the nearest is 'to'"),
        (lambda store: derive_kernel(store, kind="trace", to="k", samples=1), ConfigError, "needed True or False"),
    ],
)
def test_arguments_of_another_name_or_type_are_refused(fresh, call, error, words):
    with pytest.raises(error, match=words):
        call(fresh.opened)


def test_a_store_prints_what_it_holds_and_how_far_it_is(fresh):
    rows = dict(fresh.opened.rows())
    assert rows["tiles"].startswith(f"{fresh.opened.progress.tiles_done} of {fresh.opened.progress.tiles_total}, ")
    assert rows["verified"] == "never"
    assert (
        str(fresh.opened).splitlines()[: len(fresh.opened.manifest.rows())] == str(fresh.opened.manifest).splitlines()
    )


def test_a_store_prints_results_of_solvers_but_nothing_that_moves_the_cursor(fresh):
    result = {"status": "converged\x1b[2J", "work": {"passes": 3.0}, "seconds": 1.5}
    fresh.opened.store.write_result("eigsh", result)
    fresh.opened.store.write_result("summary", {"trace": 1.0})
    assert dict(fresh.opened.rows())["eigsh"] == "converged\x1b[2J, 3 passes, 1.5 s"
    assert "summary" not in dict(fresh.opened.rows())
    assert "\x1b" not in str(fresh.opened)
