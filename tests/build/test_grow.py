"""A store that grows keeps every old entry to the last bit, and a crash at any step leaves one that can be finished."""

import contextlib
import json
import shutil
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import zarr
from crashes import Crash, Crashing, data
from forks import FORKS, slowly
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Allowance, chunks, compute, mlp, times

from ntkpipe import plan_kernel, repair, verify
from ntkpipe.base.errors import ConfigError, Interrupted, StoreError, StoreMismatchError, TileError
from ntkpipe.store.growth import (
    OldEntries,
    begin,
    end_growth,
    finish,
    is_larger,
    ragged,
    state_of,
    undo_cut_growth,
)
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.layout import layouts
from ntkpipe.store.media.folder import Folder
from ntkpipe.store.store import Store


def everything(store: KernelStore) -> dict[str, np.ndarray]:
    """All that a user reads of a store."""
    found = {"train": store.train[:, :], "outputs": store.outputs, "targets": store.targets}
    if store.manifest.test is not None:
        found |= {
            "test_train": store.test_train[:, :],
            "test_diagonal": store.test_diagonal,
            "test_outputs": store.test_outputs,
        }
    return found


def assert_begins_with(new: KernelStore, old: dict[str, np.ndarray]) -> None:
    found = everything(new)
    for name, values in old.items():
        part = found[name][tuple(map(slice, values.shape))]
        assert np.ascontiguousarray(part).tobytes() == np.ascontiguousarray(values).tobytes(), name


# From (train, test) samples to (train, test): ragged and not, one axis and both, with and without a test set.
SIZES = [
    ((10, 7), (13, 7)),
    ((10, 7), (19, 11)),
    ((12, 8), (20, 12)),
    ((10, None), (10, 3)),
    ((9, 2), (10, 3)),
    ((3, 1), (10, 5)),
]


@pytest.mark.parametrize(("before", "after", "tile"), [(*sizes, 4) for sizes in SIZES] + [(*SIZES[1], 100)])
def test_old_entries_keep_their_bits_and_new_ones_are_those_of_a_larger_run(tmp_path, before, after, tile):
    store = compute(tmp_path / "k.zarr", tile=tile, **data(*before))
    old, written = everything(store), times(store.path)
    edge = {f"{name}/c/{'/'.join(map(str, index))}" for name, index in ragged(store.manifest, asked(store, *after))}
    grown = compute(store.path, tile=tile, grow=True, **data(*after))
    assert_begins_with(grown, old)
    whole = compute(tmp_path / "whole.zarr", tile=grown.manifest.tile, **data(*after))
    for name, values in everything(whole).items():
        np.testing.assert_allclose(everything(grown)[name], values, rtol=1e-5, atol=1e-5)
    assert np.array_equal(grown.train[:, :], grown.train[:, :].T)
    assert {name for name, when in written.items() if times(store.path)[name] != when} == edge
    assert set(chunks(grown.path)) == set(chunks(whole.path))
    assert not (grown.path / "growth").exists()
    assert verify(grown.path, mlp(), progress=False).is_good
    assert [r.train.num_samples for r in grown.manifest.growth] == [before[0]]


def asked(store: KernelStore, num_train: int, num_test: int | None):
    """The manifest of a store with that many samples."""
    manifest = store.manifest
    train = manifest.train.model_copy(update={"num_samples": num_train})
    like = (manifest.test or manifest.train).model_copy(update={"targets": None})
    test = None if num_test is None else like.model_copy(update={"num_samples": num_test})
    return manifest.grown(train, test, {})


@pytest.mark.parametrize("kind", ["ntk", "trace"])
def test_every_kind_grows(tmp_path, kind):
    store = compute(tmp_path / "k.zarr", kind=kind, **data(10, 6))
    old = everything(store)
    grown = compute(store.path, kind=kind, grow=True, **data(15, 9))
    assert_begins_with(grown, old)
    assert verify(grown.path, mlp(), progress=False).is_good


def test_growing_again_and_again_keeps_all_that_was_there(tmp_path):
    path = tmp_path / "k.zarr"
    store, old = compute(path, **data(5)), []
    for sizes in ((6, None), (8, 2), (11, 3), (18, 7)):
        old.append(everything(store))
        store = compute(path, grow=True, **data(*sizes))
        for values in old:
            assert_begins_with(store, values)
    assert [r.train.num_samples for r in store.manifest.growth] == [5, 6, 8, 11]
    assert [r.test and r.test.num_samples for r in store.manifest.growth] == [None, None, 2, 3]
    assert verify(path, mlp(), progress=False).is_good
    before = times(path)
    assert compute(path, grow=True, **data(18, 7)).progress.is_complete
    assert compute(path, **data(18, 7)).progress.is_complete
    assert times(path) == before


@pytest.fixture(scope="module")
def grown_twice(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("growth") / "whole.zarr"
    compute(path, **data(10, 6))
    compute(path, grow=True, **data(13, 7))
    compute(path, grow=True, **data(14, 9))
    return path


@pytest.mark.parametrize(("cut", "tiles"), [("before", 0), ("before", 4), ("within", 0), ("within", 3)])
def test_growing_an_interrupted_store_ends_with_the_bits_of_an_undisturbed_growth(
    tmp_path, monkeypatch, grown_twice, cut, tiles
):
    """Also where the edge was not there yet: bits depend on the sizes that the store had, not on the moment."""
    if cut == "within":
        compute(tmp_path / "cut", **data(10, 6))
    with monkeypatch.context() as patch:
        Allowance(patch, tiles, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            compute(tmp_path / "cut", grow=cut == "within", **(data(10, 6) if cut == "before" else data(13, 7)))
    compute(tmp_path / "cut", grow=True, **data(13, 7))
    compute(tmp_path / "cut", grow=True, **data(14, 9))
    assert chunks(tmp_path / "cut") == chunks(grown_twice)


def test_a_second_growth_in_the_middle_of_the_first_completes_the_edge_before(tmp_path, monkeypatch, grown_twice):
    path = compute(tmp_path / "k.zarr", **data(10, 6)).path
    with monkeypatch.context() as patch:
        Allowance(patch, 1, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            compute(path, grow=True, **data(13, 7))
    assert state_of(Store.open(path)) == "resumable"
    compute(path, grow=True, **data(14, 9))
    assert chunks(path) == chunks(grown_twice)


def test_a_repair_ends_a_growth_whose_copies_are_left(tmp_path, monkeypatch):
    path = compute(tmp_path / "k.zarr", **data(10, 6)).path
    with monkeypatch.context() as patch:
        patch.setattr("ntkpipe.store.growth.finish", lambda _: None)
        compute(path, grow=True, **data(13, 7))
    assert (path / "growth").exists()
    report = repair(path, progress=False)
    assert [(action.array, action.done) for action in report.actions] == [
        ("growth", "ended: copies of old entries removed")
    ]
    assert not (path / "growth").exists()


def test_without_grow_a_larger_set_is_refused_and_the_message_says_how(tmp_path):
    store = compute(tmp_path / "k.zarr", **data(10))
    before = times(store.path)
    for sizes in ((11, None), (10, 2)):
        with pytest.raises(StoreMismatchError, match=r"With grow=True \(run --grow\) samples are added"):
            compute(store.path, **data(*sizes))
    for sizes in ((9, None), (9, 20)):
        for grow in (False, True):
            with pytest.raises(StoreMismatchError, match="num_samples: stored 10 → asked 9") as info:
                compute(store.path, grow=grow, **data(*sizes))
            assert "grow=True" not in str(info.value)
    assert times(store.path) == before


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("first", [0, 5])
def test_samples_that_do_not_begin_with_the_stored_ones_are_refused_by_the_first_that_differs(tmp_path, split, first):
    store = compute(tmp_path / "k.zarr", **data(10, 6))
    before = chunks(store.path)
    more = data(14, 9)
    name = "inputs" if split == "train" else "test_inputs"
    more[name] = more[name].copy()
    more[name][first:] += 1
    with pytest.raises(StoreMismatchError, match=rf"{split} samples, which must be the first .* but sample {first} or"):
        compute(store.path, grow=True, **more)
    assert chunks(store.path) == before
    assert compute(store.path, grow=True, **data(14, 9)).progress.is_complete


def test_targets_must_begin_with_the_stored_ones_too(tmp_path):
    store = compute(tmp_path / "k.zarr", **data(10))
    more = data(14)
    more["targets"] = more["targets"][::-1].copy()
    with pytest.raises(StoreMismatchError, match="sample 0 or its target differs"):
        compute(store.path, grow=True, **more)


@pytest.mark.parametrize(
    "changes", [{"kind": "trace"}, {"model": mlp(seed=1)}, {"tile": 3}, {"targets": None}, {"store_dtype": "float64"}]
)
def test_growth_changes_nothing_but_the_samples(tmp_path, changes):
    store = compute(tmp_path / "k.zarr", **data(10))
    with pytest.raises(StoreMismatchError, match="holds another kernel"):
        compute(store.path, grow=True, **{**data(14), **changes})


@pytest.mark.parametrize("mode", ["w", "w-"])
def test_growth_needs_the_store(tmp_path, mode):
    with pytest.raises(ConfigError, match="grow=True adds samples to the store that is there"):
        compute(tmp_path / "k.zarr", grow=True, mode=mode)


@pytest.mark.parametrize("changes", [{"kind": "diagonal"}, {"groups": {"first": ["0.*"], "last": ["2.*"]}}])
def test_planes_grow_together(tmp_path, changes):
    path = compute(tmp_path / "k.zarr", **changes, **data(10, 6)).path
    store = Store.open(path)
    old = entries(store)
    grown = compute(path, grow=True, **changes, **data(14, 9))
    for name, values in entries(grown.store).items():
        assert np.array_equal(values[tuple(map(slice, old[name].shape))], old[name])
    assert verify(path, mlp(), progress=False).is_good


def test_growth_of_what_is_not_there_creates_it(tmp_path):
    assert compute(tmp_path / "k.zarr", grow=True, **data(6)).progress.is_complete


def test_growth_is_refused_while_another_run_writes(tmp_path):
    store = compute(tmp_path / "k.zarr", **data(10)).store
    before = chunks(store.root)
    with store.in_use(), pytest.raises(StoreError, match=r"another run is writing to .* so it cannot grow now"):
        compute(store.root, grow=True, **data(14))
    assert chunks(store.root) == before
    compute(store.root, grow=True, **data(14))
    with pytest.raises(StoreError, match="was replaced by another run"), store.in_use():
        pass


def test_a_damaged_edge_is_refused_before_anything_changes(tmp_path):
    store = compute(tmp_path / "k.zarr", **data(10))
    tile = store.path / "kernel/train/c/1/2"
    tile.write_bytes(bytes(tile.stat().st_size))
    before = chunks(store.path)
    with pytest.raises(TileError, match=r"tile \(1, 2\) of kernel/train .* crc32c"):
        compute(store.path, grow=True, **data(14))
    assert chunks(store.path) == before
    assert open_kernel(store.path).manifest == store.manifest


def test_a_plan_of_a_growth_counts_what_is_new(tmp_path):
    path = compute(tmp_path / "k.zarr", **data(10, 6)).path
    before = chunks(path)
    options = {"tile": 4, "workers": 1}
    with pytest.raises(StoreMismatchError, match="grow=True"):
        plan_kernel(mlp(), store=path, **options, **data(14, 9))
    planned, _ = plan_kernel(mlp(), store=path, grow=True, **options, **data(14, 9))
    assert chunks(path) == before
    assert planned.workload.num_tiles == 10 + 12
    assert planned.tiles_done == 3 + 2  # those of the first two tiles of samples
    compute(path, grow=True, **data(14, 9))
    planned, _ = plan_kernel(mlp(), store=path, **options, **data(14, 9))
    assert planned.bytes_to_write == 0


def test_runs_before_a_growth_are_still_listed(tmp_path):
    path = compute(tmp_path / "k.zarr", **data(10)).path
    compute(path, grow=True, **data(14))
    assert [run["tiles"] for run in open_kernel(path).store.read_results("runs")] == [6, 7]


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
def test_plain_zarr_sees_the_grown_arrays(tmp_path):
    path = compute(tmp_path / "k.zarr", **data(10)).path
    zarr.consolidate_metadata(str(path))
    store = compute(path, grow=True, **data(14, 5))
    group = zarr.open_group(str(path), mode="r")
    for name, array in store.store.arrays.items():
        assert group[name].shape == array.layout.shape
    assert np.isfinite(group["kernel/test_train"][...]).all()


def filled(path: Path, manifest) -> Store:
    """A complete store of random entries; diagonal tiles are symmetric."""
    store, rng = Store.create(path, manifest), np.random.default_rng(0)
    for array in store.arrays.values():
        for index in array.layout.indices():
            write_random(array, index, rng)
    return store


def write_random(array, index, rng, kept: OldEntries | None = None) -> None:
    shape = [part.stop - part.start for part in array.layout.region(index)]
    values = rng.integers(1, 100, shape).astype(array.layout.dtype)
    if array.layout.grid is not None and array.layout.grid.symmetric and index[0] == index[1]:
        values = values + values.T
    if kept is not None:
        kept.paste(array.layout.name, index, values)
    array.write(index, values)


def larger(manifest, num_train: int, num_test: int | None):
    train = manifest.train.model_copy(update={"num_samples": num_train})
    test = None if num_test is None else manifest.train.model_copy(update={"num_samples": num_test})
    return manifest.grown(train, test, {"created": "now"})


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def entries(store: Store) -> dict[str, np.ndarray]:
    """Every array as a reader sees it, upper tiles only."""
    found = {}
    for name, array in store.arrays.items():
        found[name] = np.zeros(array.layout.shape, array.layout.dtype)
        for index in array.layout.indices():
            found[name][array.layout.region(index)] = array.read(index)
    return found


def assert_no_wrong_entry(store: Store, old: dict[str, np.ndarray]) -> None:
    """What can be read of the old entries is right; what cannot says so."""
    for name, array in store.arrays.items():
        for index in array.layout.indices():
            with contextlib.suppress(TileError):
                part, region = array.read(index), array.layout.region(index)
                was = old.get(name, np.zeros((0,) * part.ndim))[region]
                assert np.array_equal(part[tuple(map(slice, was.shape))], was)
                assert np.isfinite(part).all()
                assert not store.missing().get(name) or index not in store.missing()[name]


def complete(store: Store) -> None:
    """What a run does: create arrays, write what is missing with old entries pasted in, clear up."""
    rng = np.random.default_rng(1)
    store.complete_layout()
    kept = OldEntries.of(store, store.manifest.earlier())
    for name, indices in store.missing().items():
        for index in indices:
            write_random(store.arrays[name], index, rng, kept)
    end_growth(store)


def crashed(path: Path, original: Path, steps: int, monkeypatch: pytest.MonkeyPatch, act) -> bool:
    """Copy a store, crash ``act`` on it after some steps, and say whether it did."""
    shutil.copytree(original, path)
    with monkeypatch.context() as patch:
        Crashing(patch, steps)
        try:
            act(Store.open(path))
        except Crash:
            return True
    return False


@pytest.mark.parametrize("sizes", [((5, 2), (7, 4)), ((6, None), (7, 2))])
def test_a_crash_at_any_step_of_a_growth_is_undone_or_resumed_and_never_wrong(
    tmp_path, make_manifest, monkeypatch, sizes
):
    before, after = sizes
    manifest = make_manifest(*before, kind="pntk")
    wanted = larger(manifest, *after)
    old, original = entries(filled(tmp_path / "old", manifest)), files(tmp_path / "old")
    begin(filled(tmp_path / "grown", manifest), wanted)
    begun = Path()
    for steps in count():
        path = tmp_path / f"begin{steps}"
        if not crashed(path, tmp_path / "old", steps, monkeypatch, lambda store: begin(store, wanted)):
            break
        store = Store.open(path)
        assert store.manifest == manifest
        assert_no_wrong_entry(store, old)
        if state_of(store) == "begun":
            begun = path
            assert undo_cut_growth(store)
        assert files(path) == original
    assert steps > 5
    assert files(tmp_path / f"begin{steps}") == files(tmp_path / "grown")
    assert state_of(Store.open(tmp_path / "grown")) == "resumable"
    begin(Store.open(begun), wanted)  # what was undone can grow
    assert files(begun) == files(tmp_path / "grown")


def test_a_crash_in_undoing_or_ending_a_growth_is_made_good(tmp_path, make_manifest, monkeypatch):
    manifest = make_manifest(5, 2, kind="pntk")
    wanted = larger(manifest, 7, 4)
    old, original = entries(filled(tmp_path / "old", manifest)), files(tmp_path / "old")
    reader = Store.open(tmp_path / "old")
    total = len(ragged(manifest, wanted))
    assert crashed(tmp_path / "cut", tmp_path / "old", 3 * total, monkeypatch, lambda store: begin(store, wanted))
    assert Store.open(tmp_path / "cut").missing()
    for steps in count():
        path = tmp_path / f"undo{steps}"
        if not crashed(path, tmp_path / "cut", steps, monkeypatch, undo_cut_growth):
            break
        assert_no_wrong_entry(Store.open(path), old)
        undo_cut_growth(Store.open(path))
        assert files(path) == original
    begin(Store.open(tmp_path / "old"), wanted)
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    complete(Store.open(tmp_path / "whole"))
    assert Store.open(tmp_path / "whole").missing() == {}
    for steps in count(step=4):
        path = tmp_path / f"end{steps}"
        if not crashed(path, tmp_path / "old", steps, monkeypatch, complete):
            break
        assert_no_wrong_entry(Store.open(path), old)
        complete(Store.open(path))
        assert_no_wrong_entry(Store.open(path), old)
        assert files(path).keys() == files(tmp_path / "whole").keys()
    # A reader from before the growth sees what it always saw.
    complete(Store.open(tmp_path / "old"))
    assert_no_wrong_entry(reader, old)
    assert not any(name.startswith("kernel/") for name in reader.missing())


def test_an_old_command_on_a_growth_that_was_cut_short_finds_the_old_store(tmp_path, monkeypatch):
    path = compute(tmp_path / "k.zarr", **data(10, 6)).path
    before = chunks(path)
    steps = 12
    while True:
        with monkeypatch.context() as patch:
            Crashing(patch, steps)
            with pytest.raises(Crash):
                compute(path, grow=True, **data(14, 9))
        if state_of(Store.open(path)) != "begun":
            break
        assert Store.open(path).missing() or all(chunks(path)[name] == values for name, values in before.items())
        compute(path, **data(10, 6))
        assert chunks(path) == before
        assert verify(path, progress=False).is_good
        steps += 11
    with pytest.raises(StoreMismatchError, match="stored 14 → asked 10"):
        compute(path, **data(10, 6))


def test_a_process_killed_at_any_moment_of_a_growth_is_finished_by_the_same_command(tmp_path):
    compute(tmp_path / "whole", **data(10, 6))
    compute(tmp_path / "whole", grow=True, **data(15, 9))
    wanted, rng, kills = chunks(tmp_path / "whole"), np.random.default_rng(), 0
    path = tmp_path / "k.zarr"
    old = everything(compute(path, **data(10, 6)))
    while kills < 4:
        child = FORKS.Process(target=growing, args=(path,))
        child.start()
        before = names(path)
        while child.exitcode is None and names(path) == before:
            time.sleep(0.002)
        child.join(rng.uniform(0, 0.06))
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        kills += 1
        stored = Store.open(path)
        if stored.manifest.growth and not stored.missing():
            assert_begins_with(KernelStore(stored), old)
    assert kills > 0
    assert_begins_with(compute(path, grow=True, **data(15, 9)), old)
    assert chunks(path) == wanted
    assert not (path / "growth").exists()


def names(path: Path) -> set[str]:
    return {name for name, _ in Folder(path).sizes("")}


def growing(path: Path) -> None:
    slowly(path, 0.005, grow=True, **data(15, 9))


def test_another_program_that_writes_an_old_chunk_in_mid_growth_is_noticed(tmp_path, make_manifest):
    """A worker that outlived its run may write a chunk of the old size, which is padded to the same bytes."""
    manifest = make_manifest(7, None)
    store = filled(tmp_path / "k.zarr", manifest)
    grown = begin(store, larger(manifest, 8, None))
    store.arrays["kernel/train"].write((0, 2), np.ones((6, 2)))
    with grown.in_use(), contextlib.suppress(TileError):
        finish(grown)
    complete_all_but = OldEntries.of(grown, grown.manifest.earlier())
    rng = np.random.default_rng(1)
    for name, indices in grown.missing().items():
        for index in indices:
            write_random(grown.arrays[name], index, rng, complete_all_but)
    with grown.in_use(), pytest.raises(TileError, match=r"tile \(0, 2\) of kernel/train .* before the store grew"):
        finish(grown)
    Folder(tmp_path / "k.zarr").delete("kernel/train/c/0/2")
    complete(grown)
    assert not (tmp_path / "k.zarr/growth").exists()


@settings(max_examples=25)
@given(
    train=st.integers(1, 9),
    more_train=st.integers(0, 7),
    test=st.none() | st.integers(1, 7),
    more_test=st.integers(0, 5),
    tile=st.integers(1, 10),
)
def test_what_is_ragged_is_what_changes_its_region(make_manifest, train, more_train, test, more_test, tile):
    before = make_manifest(train, test, tile=min(tile, train))
    after = larger(before, train + more_train, (test or 0) + more_test or None)
    old, new = layouts(before), layouts(after)
    brute = {
        (name, index)
        for name, layout in old.items()
        for index in layout.indices()
        if layout.region(index) != new[name].region(index) or layout.chunks != new[name].chunks
    }
    assert ragged(before, after) == brute
    assert is_larger(before, after) == (more_train + more_test > 0)
    assert after.earlier() == (before,)
    assert after.earlier()[0].digest() == before.digest()


def test_a_record_of_another_store_is_an_error(tmp_path, make_manifest):
    store = filled(tmp_path / "k.zarr", make_manifest())
    (tmp_path / "k.zarr/growth").mkdir()
    (tmp_path / "k.zarr/growth/zarr.json").write_text(json.dumps({"attributes": {"before": "a", "after": "b"}}))
    with pytest.raises(StoreError, match="is damaged: it belongs to another manifest"):
        state_of(store)
    (tmp_path / "k.zarr/growth/zarr.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        state_of(store)
