"""A repair computes exactly the bad chunks again, to the bits that they had, and loses nothing on its way."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from crashes import Crash, Crashing, data
from damage import DAMAGE, flip, forge
from small import Allowance, chunks, compute, inputs, mlp, times

from ntkpipe import repair, verify
from ntkpipe.base.errors import ArgumentError, ConfigError, Interrupted, StoreError, StoreMismatchError
from ntkpipe.build.life import StoreSink
from ntkpipe.store.growth import state_of
from ntkpipe.store.kernel_store import open_kernel
from ntkpipe.store.store import Store
from ntkpipe.store.verification import verify_store

BAD = {
    "kernel/train": [(0, 1), (1, 1), (4, 4), (2, 4)],
    "kernel/test_train": [(0, 0), (1, 4)],
    "kernel/test_diagonal": [(1, 0, 0)],
    "outputs/train": [(3, 0), (4, 0)],
    "outputs/test": [(1, 0)],
    "samples/train/input": [(2, 0)],
    "samples/test/input": [(1, 0)],
    "targets/train": [(4,)],
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return compute(tmp_path_factory.mktemp("repair") / "k.zarr").path


@pytest.fixture
def store(tmp_path, undisturbed) -> Store:
    shutil.copytree(undisturbed, tmp_path / "k.zarr")
    return Store.open(tmp_path / "k.zarr")


@pytest.fixture
def written(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """The chunks that workers write."""
    found = []
    write = StoreSink.write
    monkeypatch.setattr(StoreSink, "write", lambda *args: (found.append(args[1:3]), write(*args)))
    return found


def mended(store: Store, **changes):
    """Repair the store of :func:`small.compute`."""
    options = {"model": mlp(), "self_check": False, "workers": 2, "progress": False, **changes}
    return repair(store.root, **options)


ALL = {"inputs": inputs(), "targets": np.arange(18), "test_inputs": inputs(7, seed=1)}


@pytest.mark.parametrize("words", DAMAGE)
def test_exactly_the_bad_chunks_are_computed_again_to_the_same_bits(store, undisturbed, written, words):
    bad = {(name, index) for name, indices in BAD.items() for index in indices}
    for name, index in bad:
        DAMAGE[words](store.arrays[name].path(index))
    before = times(store.root)
    report = mended(store, **ALL)
    assert report.is_good
    assert len(report.found.findings) == len(bad)
    assert {(action.array, action.index) for action in report.actions} == bad
    assert report.num_computed == len(bad)
    assert sorted(written) == sorted(chunk for chunk in bad if not chunk[0].startswith(("samples", "targets")))
    assert chunks(store.root) == chunks(undisturbed)
    after = times(store.root)
    assert {name for name in after if before.get(name) != after[name]} == {
        f"{name}/c/{'/'.join(map(str, index))}" for name, index in bad
    }
    assert [certificate["is_good"] for certificate in report.left.certificates] == [True, True]


@pytest.mark.parametrize(
    ("name", "index"), [("kernel/train", (0, 0)), ("outputs/train", (0, 0)), ("kernel/test_diagonal", (0, 0, 0))]
)
def test_without_inputs_the_samples_of_the_store_are_taken(store, undisturbed, name, index):
    flip(store.arrays[name].path(index))
    report = mended(store)
    assert report.is_good
    assert report.num_computed == 1
    assert chunks(store.root) == chunks(undisturbed)


def test_samples_that_are_damaged_themselves_must_be_given(store, undisturbed):
    flip(store.arrays["samples/train/input"].path((2, 0)))
    flip(store.arrays["kernel/train"].path((0, 1)))
    before = chunks(store.root)
    with pytest.raises(ConfigError, match=r"samples in .* cannot be used .*samples/train.*crc32c.*give inputs"):
        mended(store)
    assert chunks(store.root) == before
    assert mended(store, inputs=ALL["inputs"]).is_good
    assert chunks(store.root) == chunks(undisturbed)


def asymmetric(values):
    values[0, 1] = np.nextafter(values[0, 1], -np.inf)


def negative(values):
    values[(0,) * values.ndim] *= -1


def infinite(values):
    values[(0,) * values.ndim] = np.inf


def large(values):
    values[0, 0] = 1e6


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("kernel/train", (2, 2), asymmetric),
        ("kernel/train", (2, 2), negative),
        ("kernel/test_diagonal", (0, 0, 0), negative),
        ("kernel/test_train", (1, 1), infinite),
        ("outputs/test", (0, 0), infinite),
        ("kernel/train", (1, 3), large),
    ],
)
def test_entries_that_no_kernel_has_are_computed_again(store, undisturbed, name, index, change):
    forge(store, name, index, change)
    report = mended(store)
    assert report.is_good
    computed = [(action.array, action.index) for action in report.actions]
    # A negative diagonal makes every other tile of its rows exceed its bound.
    assert (name, index) in computed if change is negative else computed == [(name, index)]
    assert chunks(store.root) == chunks(undisturbed)


def test_a_diagonal_that_makes_good_tiles_look_bad_is_found(tmp_path):
    """The diagonal tile holds nothing else, so it is not found by itself."""
    options = {"tile": 1, "inputs": inputs(6), "targets": None, "test_inputs": None}
    whole = compute(tmp_path / "whole", **options)
    store = compute(tmp_path / "k.zarr", **options).store

    def shrink(values):
        values[0, 0] /= 100

    forge(store, "kernel/train", (2, 2), shrink)
    found = {finding.index for finding in verify_store(store).findings}
    assert found
    assert (2, 2) not in found
    report = mended(store)
    assert report.is_good
    assert ("kernel/train", (2, 2)) in {(action.array, action.index) for action in report.actions}
    assert chunks(store.root) == chunks(whole.path)


@pytest.mark.parametrize(
    ("name", "index"), [("kernel/train", (1, 3)), ("kernel/train", (2, 2)), ("kernel/test_train", (1, 2))]
)
def test_a_wrong_entry_that_only_the_certificate_sees_is_computed_again(store, undisturbed, name, index):
    def change(values):
        values[1, 0] *= 0.9
        if index[0] == index[1] and name == "kernel/train":
            values[0, 1] = values[1, 0]

    forge(store, name, index, change)
    assert verify_store(store).is_good
    report = mended(store)
    assert report.is_good
    assert [(action.array, action.index) for action in report.actions] == [(name, index)]
    assert chunks(store.root) == chunks(undisturbed)


@pytest.mark.parametrize(
    "changes", [{"kind": "ntk"}, {"kind": "diagonal"}, {"groups": {"first": ["0.*"], "last": ["2.*"]}}]
)
def test_every_kind_and_group_is_repaired(tmp_path, changes):
    whole = compute(tmp_path / "whole", **changes)
    store = compute(tmp_path / "k.zarr", **changes).store
    bad = [
        (name, max(array.layout.indices())) for name, array in store.arrays.items() if not name.startswith("samples")
    ]
    for name, index in bad:
        flip(store.arrays[name].path(index))
    report = mended(store, targets=ALL["targets"])
    assert report.is_good
    assert report.num_computed == len(bad)
    assert chunks(store.root) == chunks(whole.path)


@pytest.mark.parametrize("words", ["crc32c", "missing"])
def test_tiles_at_the_edge_of_a_grown_store_get_the_bits_that_they_had(tmp_path, words):
    """They were put together of what was computed before each growth and after it."""
    path = tmp_path / "k.zarr"
    compute(path, **data(10, 6))
    compute(path, grow=True, **data(11, 7))
    compute(path, grow=True, **data(17, 10))
    store, whole = Store.open(path), chunks(path)
    bad = [
        (name, index)
        for name, array in store.arrays.items()
        for index in array.layout.indices()
        if name.startswith(("kernel/", "outputs/"))
    ]
    for name, index in bad:
        DAMAGE[words](store.arrays[name].path(index))
    report = mended(store)
    assert report.is_good
    assert report.num_computed == len(bad)
    assert chunks(path) == whole
    assert not (path / "growth").exists()


def test_an_interrupted_run_is_completed(tmp_path, monkeypatch, undisturbed):
    with monkeypatch.context() as patch:
        Allowance(patch, 7, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            compute(tmp_path / "k.zarr")
    report = mended(Store.open(tmp_path / "k.zarr"))
    assert report.is_good
    assert chunks(tmp_path / "k.zarr") == chunks(undisturbed)


@pytest.mark.parametrize("tiles", [0, 1, 2])
def test_an_interrupted_repair_has_lost_nothing_and_the_next_one_goes_on(store, monkeypatch, undisturbed, tiles):
    bad = [(0, 1), (1, 1), (2, 4)]
    for index in bad:
        flip(store.arrays["kernel/train"].path(index))
    with monkeypatch.context() as patch:
        Allowance(patch, tiles, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            mended(store)
    assert chunks(store.root).keys() == chunks(undisturbed).keys()
    report = mended(store)
    assert report.is_good
    assert report.num_computed == len(bad) - tiles
    assert chunks(store.root) == chunks(undisturbed)


def test_another_model_or_other_samples_are_refused_and_nothing_changes(store):
    flip(store.arrays["kernel/train"].path((0, 1)))
    (store.root / "kernel/train/c/9/9").parent.mkdir()
    (store.root / "kernel/train/c/9/9").write_bytes(b"stray")
    before = chunks(store.root)
    with pytest.raises(StoreMismatchError, match=r"model\.state_digest"):
        mended(store, model=mlp(seed=1))
    with pytest.raises(StoreMismatchError, match=r"train\.inputs_digest"):
        mended(store, inputs=inputs(seed=9))
    with pytest.raises(StoreMismatchError, match="num_samples: stored 18 → asked 17"):
        mended(store, inputs=inputs(17), targets=np.arange(17))
    with pytest.raises(ConfigError, match="without a model"):
        repair(store.root, inputs=inputs())
    assert chunks(store.root) == before


@pytest.mark.parametrize("first_is_bad", [False, True])
def test_another_function_behind_the_same_parameters_is_refused(store, first_is_bad):
    """Also if the chunk that is compared first is one of the bad ones."""
    if first_is_bad:
        flip(store.arrays["outputs/train"].path((0, 0)))
    flip(store.arrays["kernel/train"].path((0, 1)))
    before = chunks(store.root)
    with pytest.raises(StoreMismatchError, match="outputs differ"):
        mended(store, forward=lambda model, x: 2 * model(x))
    assert chunks(store.root) == before


def test_a_derived_store_is_not_computed_from_the_model(tmp_path):
    from ntkpipe import derive_kernel

    compute(tmp_path / "ntk", kind="ntk")
    derived = derive_kernel(tmp_path / "ntk", kind="pntk", to=tmp_path / "pntk")
    with pytest.raises(ConfigError, match="was derived from a store of kind 'ntk'"):
        mended(derived.store)


def test_without_a_model_all_is_put_right_that_needs_none(store, undisturbed):
    root = store.root
    (root / "kernel/train/zarr.json").write_text("{")
    (root / "outputs/test/zarr.json").unlink()
    document = root / "samples/train/input/zarr.json"
    document.write_text(document.read_text().replace("float32", "float64"))
    (root / "kernel/train/c/0/0.0123.partial").write_bytes(b"half")
    for stray in ("kernel/train/c/3/1", "kernel/train/c/9/9", "outputs/test/c/2/0"):
        (root / stray).parent.mkdir(parents=True, exist_ok=True)
        (root / stray).write_bytes(b"stray")
    flip(store.arrays["kernel/train"].path((0, 1)))
    damaged = chunks(root)["kernel/train/c/0/1"]
    report = repair(root, progress=False)
    assert {(action.array, action.index) for action in report.actions} == {
        ("kernel/train", ()),
        ("outputs/test", ()),
        ("samples/train/input", ()),
        ("kernel/train/c/0/0.0123.partial", ()),
        ("kernel/train", (3, 1)),
        ("kernel/train", (9, 9)),
        ("outputs/test", (2, 0)),
    }
    assert not report.is_good
    assert [(finding.array, finding.index) for finding in report.left.findings] == [("kernel/train", (0, 1))]
    assert chunks(root) == {**chunks(undisturbed), "kernel/train/c/0/1": damaged}
    assert mended(Store.open(root)).is_good
    assert chunks(root) == chunks(undisturbed)
    for name in ("kernel/train", "outputs/test", "samples/train/input"):
        assert (root / name / "zarr.json").read_bytes() == (undisturbed / name / "zarr.json").read_bytes()


def test_what_was_done_is_kept_in_the_store(store):
    flip(store.arrays["kernel/train"].path((0, 1)))
    report = mended(store)
    (kept,) = open_kernel(store.root).store.read_results("repairs")
    assert kept["num_computed"] == 1
    assert kept["is_good"]
    assert kept["actions"] == [{"array": "kernel/train", "index": [0, 1], "done": "computed again"}]
    words = str(report)
    assert "kernel/train (0, 1): computed again" in words
    assert "1 finding in" in words
    again = mended(store)
    assert again.actions == ()
    assert "nothing" in str(again)
    assert len(open_kernel(store.root).store.read_results("repairs")) == 1


def test_a_growth_that_was_cut_short_is_undone(tmp_path, monkeypatch):
    path = compute(tmp_path / "k.zarr", **data(10, 6)).path
    before = chunks(path)
    with monkeypatch.context() as patch:
        Crashing(patch, 24)
        with pytest.raises(Crash):
            compute(path, grow=True, **data(14, 9))
    assert state_of(Store.open(path)) == "begun"
    report = repair(path, progress=False)
    assert report.is_good
    assert [action.array for action in report.actions] == ["growth"]
    assert chunks(path) == before
    assert verify(path, mlp(), progress=False).is_good


def test_a_store_that_cannot_be_written_is_an_error(store, monkeypatch):
    flip(store.arrays["kernel/train"].path((0, 1)))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(StoreError, match="cannot write"):
        mended(store)


def test_targets_of_a_data_set_are_compared_with_those_of_the_store(tmp_path):
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(inputs()), torch.arange(18))
    store = compute(tmp_path / "k.zarr", inputs=pairs, targets=None).store
    whole = chunks(store.root)
    flip(store.arrays["targets/train"].path((2,)))
    assert mended(store, inputs=pairs, test_inputs=ALL["test_inputs"]).is_good
    assert chunks(store.root) == whole


@pytest.mark.parametrize("call", [verify, repair])
def test_arguments_of_another_name_or_type_are_refused(store, call):
    with pytest.raises(ArgumentError, match="the nearest is 'device'"):
        call(store.root, devise="cpu")
    with pytest.raises(ConfigError, match="progress='no'; needed True or False"):
        call(store.root, progress="no")


def test_reports_print_as_tables(store):
    flip(store.arrays["kernel/train"].path((0, 1)))
    report = repair(store.root, progress=False)
    assert str(verify(store.root, progress=False)).splitlines()[-1].split() == ["verdict", "1", "finding"]
    assert str(report).splitlines()[1].split() == ["repaired", "nothing"]
    assert {"verified", "last run"} <= {name for name, _ in open_kernel(store.root).rows()}
