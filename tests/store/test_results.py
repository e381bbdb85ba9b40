"""Results and checkpoints: what was put is read back, by others too; what is damaged or of anybody is a clear error."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from ntkpipe.base.errors import ConfigError, StoreError, TileError
from ntkpipe.store.media.folder import Folder
from ntkpipe.store.results import ArrayFolder, Checkpoint, as_integer, as_number, as_numbers, load_result, save_result
from ntkpipe.store.store import Store

ARRAYS = [
    np.arange(12.0).reshape(3, 4),
    np.arange(5, dtype=np.float32),
    np.arange(6, dtype=np.int64).reshape(1, 2, 3),
    np.zeros((0, 3)),
    np.zeros((4, 0)),
    np.random.default_rng(0).standard_normal((3, 2**20)),  # a chunk for each row
]


@pytest.fixture
def folder(tmp_path: Path) -> ArrayFolder:
    return ArrayFolder(Folder(tmp_path / "a.zarr"), "results/x")


@pytest.mark.parametrize("values", ARRAYS, ids=lambda values: f"{values.shape} {values.dtype}")
def test_arrays_come_back_here_and_by_plain_zarr(folder, tmp_path, values):
    folder.write_array("v", values)
    folder.write_attributes({"a": 1})
    found = folder.read_array("v")
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "a.zarr" / "results" / "x", mode="r")["v"][...], values)
    assert folder.array_names() == ["v"]


def test_an_array_replaces_one_of_another_shape(folder):
    folder.write_array("v", np.ones((3, 2)))
    folder.write_array("v", np.zeros(7))
    np.testing.assert_array_equal(folder.read_array("v"), np.zeros(7))


def test_a_damaged_chunk_is_named(folder, tmp_path):
    folder.write_array("v", np.ones(3))
    chunk = tmp_path / "a.zarr/results/x/v/c/0"
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(TileError, match=r"results/x/v .* fails its crc32c checksum"):
        folder.read_array("v")
    chunk.unlink()
    with pytest.raises(TileError, match=r"results/x/v .* is missing"):
        folder.read_array("v")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**47]},
        {"shape": [2**40, 2**40]},
        {"shape": [-1]},
        {"shape": [1.5]},
        {"shape": []},
        {"shape": "3"},
        {"data_type": "object"},
        {"data_type": "float16"},
        {"codecs": []},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}},
    ],
    ids=str,
)
def test_a_description_of_anybody_is_refused_before_memory_is_taken(folder, tmp_path, change):
    folder.write_array("v", np.ones(3))
    document = tmp_path / "a.zarr/results/x/v/zarr.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), **change}))
    with pytest.raises(StoreError, match="results/x/v"):
        folder.read_array("v")


def test_a_checkpoint_holds_what_the_last_commit_named(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c", "search")
    assert checkpoint.load() is None
    checkpoint.put("basis-1", np.ones(3))
    assert checkpoint.load() is None  # not yet committed
    checkpoint.commit({"pass": 1}, {"basis-1"})
    checkpoint.put("basis-2", np.zeros(3))  # killed before the next commit
    again = Checkpoint(tmp_path / "c", "search")
    assert again.load() == {"pass": 1}
    np.testing.assert_array_equal(again.get("basis-1", (3,)), np.ones(3))
    again.put("basis-2", np.full(3, 2.0))
    again.commit({"pass": 2}, {"basis-2"})
    np.testing.assert_array_equal(again.get("basis-2", (3,)), np.full(3, 2.0))
    with pytest.raises(StoreError, match="basis-1"):
        again.get("basis-1", (3,))
    again.clear()
    assert Checkpoint(tmp_path / "c", "search").load() is None


def test_checkpoints_of_one_folder_do_not_meet(tmp_path):
    one, other = Checkpoint(tmp_path, "one"), Checkpoint(tmp_path, "other")
    one.commit({"n": 1}, set())
    other.commit({"n": 2}, set())
    one.clear()
    assert (one.load(), other.load()) == (None, {"n": 2})


def test_results_replace_older_ones_whole(tmp_path, make_manifest):
    store = Store.create(tmp_path / "a.zarr", make_manifest())
    save_result(store, "eigsh", {"status": "converged"}, {"old": np.ones(2), "values": np.ones(2)})
    save_result(store, "eigsh", {"status": "step limit"}, {"values": np.zeros(3)})
    found = load_result(store, "eigsh")
    assert found is not None
    assert found.keys() == {"status", "values"}
    np.testing.assert_array_equal(found["values"], np.zeros(3))
    assert load_result(store, "solve") is None


def test_results_in_a_bucket(bucket, make_manifest):
    store = Store.create(bucket, make_manifest())
    save_result(store, "eigsh", {"k": 1}, {"values": np.arange(4.0)})
    found = load_result(Store.open(bucket), "eigsh")
    assert found is not None
    np.testing.assert_array_equal(found["values"], np.arange(4.0))
    checkpoint = Checkpoint(store, "search")
    checkpoint.put("v", np.ones(2))
    checkpoint.commit({"pass": 1}, {"v"})
    np.testing.assert_array_equal(Checkpoint(store, "search").get("v", (2,)), np.ones(2))


@pytest.mark.parametrize(
    "arguments",
    [{"shape": (2, 2)}, {"shape": (1,)}, {"shape": (3,), "dtype": np.int64}, {"shape": (3,)}],
    ids=["axes", "length", "dtype", "NaN"],
)
def test_an_array_of_a_checkpoint_is_what_was_asked_for(tmp_path, arguments):
    checkpoint = Checkpoint(tmp_path, "search")
    checkpoint.put("v", np.array([1.0, np.nan, 2.0]))
    assert np.isnan(checkpoint.get("v", (3,), allow_nan=True)[1])
    with pytest.raises(StoreError, match=r"/search/v|v has dtype"):
        checkpoint.get("v", **arguments)


@pytest.mark.parametrize("error", [KeyError("k"), ValueError("v"), TypeError("t"), StoreError("s"), OverflowError("o")])
def test_whatever_is_wrong_with_a_checkpoint_is_said_with_what_to_do(tmp_path, error):
    checkpoint = Checkpoint(tmp_path, "search")
    with pytest.raises(StoreError, match=r"search.*delete it"), checkpoint.reading():
        raise error
    with pytest.raises(ConfigError, match=r"^other$"), checkpoint.reading():
        raise ConfigError("other")


@pytest.mark.parametrize("value", [True, "1", 1.0, -1, None, [1]])
def test_an_integer_is_an_integer(value):
    assert as_integer(7) == 7
    with pytest.raises(ValueError, match="integer"):
        as_integer(value)


@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), None, [1.0], {}])
def test_a_number_is_a_finite_number(value):
    assert (as_number(7), as_number(0.5)) == (7.0, 0.5)
    with pytest.raises(ValueError, match="finite number"):
        as_number(value)


@pytest.mark.parametrize(
    "value", [1.0, [1.0], [1.0, 2.0, 3.0], [1.0, [2.0]], ["1", "2"], [1.0, None], [True, False], {}, [1.0, 10**400]]
)
def test_numbers_are_not_spread_over_a_larger_array(value):
    np.testing.assert_array_equal(as_numbers([1, 2.5], (2,)), [1.0, 2.5])
    assert as_numbers([], (0, 2)).shape == (0, 2)
    with pytest.raises((ValueError, OverflowError)):
        as_numbers(value, (2,))
