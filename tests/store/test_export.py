"""An export is the full matrix, readable without this package, whole or not there at all."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from small import compute, inputs

from ntkpipe import export_kernel
from ntkpipe.base.errors import ConfigError, ResourceError, StoreError, StoreExistsError, StoreFullError, TileError
from ntkpipe.store import export
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> KernelStore:
    return compute(tmp_path_factory.mktemp("export") / "k.zarr", kind="ntk")


def load(path: Path) -> np.ndarray:
    """What a program that does not know this package sees."""
    return np.load(path) if path.suffix == ".npy" else zarr.open_array(str(path), mode="r")[...]


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(wanted).tobytes()


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_every_array_is_exported_bit_for_bit(store, tmp_path, suffix):
    for name, array in store.store.arrays.items():
        wanted = store.train[:, :] if name == "kernel/train" else None
        if name == "kernel/test_train":
            wanted = store.test_train[:, :]
        elif wanted is None:
            wanted = array.read_samples(0, array.layout.shape[0])
        path = export_kernel(store, tmp_path / f"{name.replace('/', '-')}{suffix}", array=name, progress=False)
        assert_same_bits(load(path), wanted)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_is_that_of_the_store(tmp_path, suffix, dtype):
    store = compute(tmp_path / "k.zarr", store_dtype=dtype)
    found = load(export_kernel(store.path, tmp_path / f"out{suffix}", progress=False))
    assert_same_bits(found, store.train[:, :])
    assert found.dtype == dtype
    assert np.array_equal(found, found.T)


@settings(max_examples=20)
@given(num_train=st.integers(1, 9), num_test=st.none() | st.integers(1, 6), tile=st.integers(1, 10))
def test_any_tiling_is_undone(make_manifest, tmp_path_factory, num_train, num_test, tile):
    folder = tmp_path_factory.mktemp("any")
    store = Store.create(folder / "k.zarr", make_manifest(num_train, num_test, tile=tile))
    rng = np.random.default_rng(0)
    kernels = [store.arrays[name] for name in ("kernel/train", "kernel/test_train") if name in store.arrays]
    for array in kernels:
        for index in array.layout.indices():
            values = rng.integers(0, 100, [part.stop - part.start for part in array.layout.region(index)])
            is_mirrored = array.layout.name == "kernel/train" and index[0] == index[1]
            array.write(index, (values + values.T if is_mirrored else values).astype(array.layout.dtype))
    opened = KernelStore(store)
    for name in (array.layout.name.removeprefix("kernel/") for array in kernels):
        for suffix in (".npy", ".zarr"):
            found = load(export_kernel(opened, folder / f"{name}{suffix}", array=name, progress=False))
            assert_same_bits(found, getattr(opened, name)[:, :])


def test_a_file_can_be_mapped_and_has_nothing_but_header_and_entries(store, tmp_path):
    path = export_kernel(store, tmp_path / "k.npy", progress=False)
    mapped = np.load(path, mmap_mode="r")
    assert path.stat().st_size == mapped.offset + mapped.nbytes
    assert mapped.flags.c_contiguous
    assert mapped.offset % 64 == 0


def test_an_export_to_zarr_has_every_chunk_and_the_names_of_its_axes(store, tmp_path):
    array = zarr.open_array(str(export_kernel(store, tmp_path / "k.zarr", progress=False)), mode="r")
    assert array.nchunks_initialized == array.nchunks == 25
    assert array.metadata.dimension_names == ("row", "column")


def test_folders_on_the_way_are_made(store, tmp_path):
    assert export_kernel(store, tmp_path / "a/b/k.npy", progress=False).is_file()


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), r"tile \(1, 2\) of kernel/train .* is missing, and 0 other chunks"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"tile \(1, 2\) of kernel/train .* is missing"),
        (
            lambda path: path.write_bytes(bytes(path.stat().st_size)),
            r"tile \(1, 2\) of kernel/train .* fails its crc32c",
        ),
    ],
)
def test_an_incomplete_or_damaged_store_is_refused_by_the_name_of_the_tile(tmp_path, suffix, damage, words):
    store = compute(tmp_path / "k.zarr")
    damage(tmp_path / "k.zarr/kernel/train/c/1/2")
    with pytest.raises(TileError, match=words):
        export_kernel(store, tmp_path / f"out{suffix}", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["k.zarr"]
    # Another array of the same store is whole.
    assert export_kernel(store, tmp_path / f"out{suffix}", array="test_train", progress=False).exists()


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_nothing_is_overwritten(store, tmp_path, suffix):
    path = tmp_path / f"k{suffix}"
    path.write_bytes(b"mine")
    with pytest.raises(StoreExistsError, match="exists; choose another path"):
        export_kernel(store, path, progress=False)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_no_room_is_noticed_before_anything_is_written(store, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("ntkpipe.store.media.folder.free_disk", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"needs 11\.4 KiB .*1000 B of disk are free"):
        export_kernel(store, tmp_path / f"k{suffix}", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [(errno.ENOSPC, StoreFullError, "the disk is full"), (errno.EIO, StoreError, "cannot")],
)
def test_a_disk_that_fails_on_the_way_leaves_nothing(store, tmp_path, monkeypatch, number, error, words):
    def fail(*_):
        raise OSError(number, "failed")

    monkeypatch.setattr(export, "_write_at", fail)
    with pytest.raises(error, match=words):
        export_kernel(store, tmp_path / "k.npy", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_an_interrupt_leaves_nothing(store, tmp_path, monkeypatch, suffix):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_kernel(store, tmp_path / f"k{suffix}", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "array", "words"),
    [
        ("k.npz", "train", r"ends in '\.npz'; needed '\.npy' or '\.zarr'"),
        ("k", "train", "ends in ''"),
        ("k.npy", "test_trian", r"has no array 'test_trian'; it has 'train', .*did you mean 'test_train'"),
    ],
)
def test_wrong_use_says_what_is_known(store, tmp_path, path, array, words):
    with pytest.raises(ConfigError, match=words):
        export_kernel(store, tmp_path / path, array=array, progress=False)


PEAK = """
import sys, zarr
from ntkpipe import export_kernel
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
from ntkpipe import open_kernel
open_kernel(sys.argv[1]).train.read_tile(0, 0)
before = peak()
export_kernel(sys.argv[1], sys.argv[2], progress=False)
assert "torch" not in sys.modules and "dask" not in sys.modules
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_memory_is_a_few_tiles_and_nothing_heavy_is_imported(tmp_path, suffix):
    compute(tmp_path / "k.zarr", inputs=inputs(4000), targets=None, test_inputs=None, tile=500)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "k.zarr"), str(tmp_path / f"out{suffix}")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    tile = 500 * 500 * 4
    assert grown < 10 * tile < open_kernel(tmp_path / "k.zarr").train.nbytes / 6
