"""The store on disk: plain Zarr, whole chunks or none, and every kind of damage named."""

import errno
import json
import os

import numpy as np
import pytest
import zarr
from manifests import ROOT_KEYS

from ntkpipe.base import errors
from ntkpipe.store.layout import layouts
from ntkpipe.store.manifest import ArrayRecord
from ntkpipe.store.store import Store, prepare_path


@pytest.fixture
def store(tmp_path, make_manifest) -> Store:
    return Store.create(tmp_path / "a.zarr", make_manifest())


def fill(array, rng) -> np.ndarray:
    """Write every chunk of an array; return what a plain reader should see."""
    layout = array.layout
    expected = np.full(layout.shape, np.nan if layout.dtype.kind == "f" else 0, layout.dtype)
    for index in layout.indices():
        shape = tuple(part.stop - part.start for part in layout.region(index))
        values = (100 * rng.standard_normal(shape)).astype(layout.dtype)
        array.write(index, values)
        expected[layout.region(index)] = values
    return expected


def test_plain_zarr_reads_what_is_written(store, rng):
    assert set(store.arrays) == ROOT_KEYS
    for name, array in store.arrays.items():
        expected = fill(array, rng)
        plain = zarr.open_group(str(store.root), mode="r")[name]
        np.testing.assert_array_equal(plain[...], expected)
        assert plain.dtype == array.layout.dtype
        assert plain.metadata.dimension_names == array.layout.dimensions
    assert store.missing() == {}


def test_what_was_never_written_reads_as_nan_in_plain_zarr(store):
    store.arrays["kernel/train"].write((0, 1), np.ones((6, 6)))
    plain = zarr.open_array(str(store.root / "kernel/train"), mode="r")[...]
    assert np.array_equal(plain[:6, 6:12], np.ones((6, 6)))
    assert np.isnan(plain).sum() == plain.size - 36


def test_what_is_written_is_read_back_chunk_by_chunk(store, rng):
    for array in store.arrays.values():
        expected = fill(array, rng)
        for index in array.layout.indices():
            np.testing.assert_array_equal(array.read(index), expected[array.layout.region(index)])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", "float64"])
def test_samples_of_every_dtype_survive(tmp_path, make_manifest, rng, dtype):
    manifest = make_manifest()
    inputs = {"input": ArrayRecord(shape=(2, 3), dtype=dtype)}
    manifest = manifest.model_copy(update={"train": manifest.train.model_copy(update={"inputs": inputs})})
    array = Store.create(tmp_path / "a.zarr", manifest).arrays["samples/train/input"]
    expected = fill(array, rng)
    found = array.read_samples(0, 7)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == dtype


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 3), (2, 4), (3, 6), (6, 7), (1, 7)])
def test_any_run_of_samples_can_be_read(store, rng, start, stop):
    array = store.arrays["samples/train/input"]
    expected = fill(array, rng)
    np.testing.assert_array_equal(array.read_samples(start, stop), expected[start:stop])


def test_chunks_that_equal_the_fill_value_are_written(store):
    array = store.arrays["targets/train"]
    array.write((0,), np.zeros(3, np.int64))
    assert array.present() == {(0,)}
    assert zarr.open_array(str(store.root / "targets/train"), mode="r").fill_value == 0


def test_present_and_missing_are_the_grid(store):
    array = store.arrays["kernel/train"]
    assert array.missing() == list(array.layout.grid.tiles())
    array.write((0, 2), np.zeros((6, 2)))
    assert array.present() == {(0, 2)}
    assert (0, 2) not in array.missing()
    assert len(array.missing()) == array.layout.num_chunks - 1


def test_the_number_of_chunks_is_the_number_of_indices(make_manifest):
    for layout in layouts(make_manifest()).values():
        assert layout.num_chunks == len(list(layout.indices()))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path):
    path.write_bytes(b"")


def _lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def _flip_first(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def _flip_padding(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _flip_checksum(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _delete(path):
    path.unlink()


def _replace_by_folder(path):
    path.unlink()
    path.mkdir()


SIZE_DAMAGE = [_truncate, _empty, _lengthen, _delete, _replace_by_folder]
BYTE_DAMAGE = [_flip_first, _flip_padding, _flip_checksum]


@pytest.mark.parametrize("damage", SIZE_DAMAGE + BYTE_DAMAGE)
@pytest.mark.parametrize("index", [(0, 1), (2, 2)])
def test_a_damaged_tile_is_never_read_and_is_named(store, rng, damage, index):
    array = store.arrays["kernel/train"]
    expected = fill(array, rng)
    damage(array.path(index))
    with pytest.raises(errors.TileError, match=rf"tile \({index[0]}, {index[1]}\) of kernel/train .*a\.zarr"):
        array.read(index)
    np.testing.assert_array_equal(array.read((1, 1)), expected[6:12, 6:12])


@pytest.mark.parametrize("damage", SIZE_DAMAGE)
def test_a_tile_of_the_wrong_size_is_missing(store, rng, damage):
    array = store.arrays["kernel/train"]
    fill(array, rng)
    damage(array.path((0, 1)))
    assert array.missing() == [(0, 1)]
    assert store.missing()["kernel/train"] == [(0, 1)]


@pytest.mark.parametrize("damage", [_truncate, _empty, _delete, *BYTE_DAMAGE])
@pytest.mark.parametrize("index", [(0, 1), (2, 2)])
def test_writing_over_a_damaged_tile_repairs_it(store, rng, damage, index):
    array = store.arrays["kernel/train"]
    expected = fill(array, rng)
    damage(array.path(index))
    array.write(index, expected[array.layout.region(index)])
    np.testing.assert_array_equal(array.read(index), expected[array.layout.region(index)])
    assert array.missing() == []


def test_files_of_killed_writers_are_ignored_and_listed(store, rng):
    array = store.arrays["kernel/train"]
    fill(array, rng)
    whole = array.path((0, 0))
    partial = whole.parent / ".0123456789abcdef.partial"
    partial.write_bytes(whole.read_bytes())
    assert store.medium.leftovers() == ["kernel/train/c/0/.0123456789abcdef.partial"]
    assert array.present() == set(array.layout.indices())
    assert array.missing() == []


@pytest.mark.parametrize("name", ["notes.txt", "0/x", "0/1/2", "0/-1", "5"])
def test_foreign_files_are_no_chunks(store, name):
    array = store.arrays["kernel/train"]
    path = store.root / "kernel/train/c" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0" * array.layout.chunk_bytes)
    assert array.present() == set()


@pytest.fixture
def full_disk(monkeypatch):
    """Make every rename and hard link fail as on a full disk."""

    def fail(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, "link", fail)


def _files(root):
    return {path for path in root.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_finished_tiles_and_nothing_else(store, request):
    array = store.arrays["kernel/train"]
    array.write((0, 0), np.ones((6, 6)))
    before = _files(store.root)
    request.getfixturevalue("full_disk")
    with pytest.raises(errors.StoreFullError, match=r"disk is full: .* free, 292 B needed for tile \(0, 1\)"):
        array.write((0, 1), np.ones((6, 6)))
    assert _files(store.root) == before
    assert np.array_equal(array.read((0, 0)), np.ones((6, 6)))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_at_creation_leaves_nothing(tmp_path, make_manifest):
    with pytest.raises(errors.StoreFullError, match="disk is full"):
        Store.create(tmp_path / "a.zarr", make_manifest())
    assert _files(tmp_path) == set()
    assert prepare_path(tmp_path / "a.zarr", "w-") is None


def test_another_error_of_the_system_names_the_tile(store, monkeypatch):
    def fail(*_args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        errors.StoreError, match=r"cannot write tile \(0, 1\) of kernel/train .*Permission denied"
    ) as info:
        store.arrays["kernel/train"].write((0, 1), np.ones((6, 6)))
    assert not isinstance(info.value, errors.StoreFullError)


def test_an_altered_array_is_not_written_to(tmp_path, make_manifest):
    root = tmp_path / "a.zarr"
    Store.create(root, make_manifest())
    path = root / "kernel/train/zarr.json"
    document = json.loads(path.read_text())
    document["shape"] = [12, 12]
    path.write_text(json.dumps(document))
    with pytest.raises(errors.StoreError, match=r"shape \(12, 12\), needed \(14, 14\)"):
        Store.open(root).arrays["kernel/train"].write((0, 0), np.ones((6, 6)))
