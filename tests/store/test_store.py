"""The life of a store on disk: created once, opened, resumed, replaced, and never mistaken for something else."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from manifests import ROOT_KEYS

from ntkpipe.base import errors
from ntkpipe.store.store import Store, prepare_path


@pytest.fixture
def store(tmp_path, make_manifest) -> Store:
    return Store.create(tmp_path / "a.zarr", make_manifest())


def _files(root):
    return {path for path in root.rglob("*") if path.is_file()}


def test_a_process_that_stops_between_group_and_arrays_is_completed(store):
    for path in (store.root / "kernel/train/zarr.json", store.root / "outputs/test/zarr.json"):
        path.unlink()
    assert set(Store.create(store.root, store.manifest).arrays) == ROOT_KEYS
    assert zarr.open_array(str(store.root / "kernel/train"), mode="r").shape == (14, 14)


@pytest.mark.parametrize("attempt", range(5))
def test_of_creators_at_once_the_first_wins(tmp_path, make_manifest, attempt):
    manifests = [make_manifest(environment={"creator": str(creator)}) for creator in range(4)]
    barrier = threading.Barrier(len(manifests))

    def create(manifest):
        barrier.wait()
        return Store.create(tmp_path / "a.zarr", manifest).manifest

    with ThreadPoolExecutor(len(manifests)) as pool:
        found = list(pool.map(create, manifests))
    store = Store.open(tmp_path / "a.zarr")
    assert all(manifest == store.manifest for manifest in found)
    assert store.manifest in manifests
    assert store.medium.leftovers() == []
    store.arrays["kernel/train"].write((0, 0), np.ones((6, 6)))


def test_opening_nothing_or_something_else(tmp_path):
    with pytest.raises(errors.StoreNotFoundError, match="does not exist"):
        Store.open(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(errors.StoreNotFoundError, match="holds no Zarr group"):
        Store.open(tmp_path)
    zarr.open_group(str(tmp_path / "group"), mode="w")
    with pytest.raises(errors.StoreError, match="without an ntkpipe manifest"):
        Store.open(tmp_path / "group")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"zarr_format": 3}', '{"attributes": null}', "\0\xff"])
def test_a_damaged_group_is_refused_by_name(store, text):
    (store.root / "zarr.json").write_text(text, encoding="latin-1")
    with pytest.raises(errors.StoreError, match=r"a\.zarr"):
        Store.open(store.root)


@pytest.mark.parametrize("mode", ["a", "w", "w-"])
def test_where_nothing_is_any_mode_creates(tmp_path, mode):
    assert prepare_path(tmp_path / "none" / "yet", mode) is None
    (tmp_path / "empty").mkdir()
    assert prepare_path(tmp_path / "empty", mode) is None
    (tmp_path / "empty" / "zarr.json.ab12.partial").touch()
    assert prepare_path(tmp_path / "empty", mode) is None


def test_modes_where_a_store_is(store):
    with pytest.raises(errors.StoreExistsError, match="mode='w-' only creates; use mode='a'"):
        prepare_path(store.root, "w-")
    assert prepare_path(store.root, "a").manifest == store.manifest
    assert prepare_path(store.root, "w") is None
    assert list(store.root.parent.iterdir()) == []


@pytest.mark.parametrize("mode", ["a", "w", "w-"])
def test_what_is_no_store_is_never_touched(tmp_path, mode):
    folder, file, group = tmp_path / "folder", tmp_path / "file", tmp_path / "group"
    odd = tmp_path / "odd"
    (odd / "zarr.json").mkdir(parents=True)
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    file.write_text("more of it")
    zarr.open_group(str(group), mode="w", attributes={"made": "by someone else"})
    before = {path: path.read_bytes() for path in _files(tmp_path)}
    for path in (folder, file, group, odd):
        with pytest.raises(errors.StoreError):
            prepare_path(path, mode)
    assert {path: path.read_bytes() for path in _files(tmp_path)} == before


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"attributes": null}', '{"attributes": {}}'])
def test_removing_refuses_a_group_that_is_not_ours(tmp_path, text):
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(errors.StoreExistsError, match="mode='w' does not remove it"):
        prepare_path(tmp_path, "w")
    assert (tmp_path / "zarr.json").read_text() == text


def test_removing_refuses_a_symbolic_link(store):
    link = store.root.with_name("link.zarr")
    link.symlink_to(store.root)
    with pytest.raises(errors.StoreExistsError, match="is a symbolic link"):
        prepare_path(link, "w")
    assert prepare_path(link, "a").manifest == store.manifest


def test_a_store_with_a_damaged_manifest_can_be_replaced_but_not_resumed(store):
    path = store.root / "zarr.json"
    path.write_text(path.read_text().replace('"tile": 3', '"tile": 4'))
    with pytest.raises(errors.StoreError, match="does not match its digest"):
        prepare_path(store.root, "a")
    assert prepare_path(store.root, "w") is None
    assert not store.root.exists()


def test_results_come_back_only_for_the_manifest_they_belong_to(store, make_manifest):
    assert store.read_result("summary") is None
    store.write_result("summary", {"trace": 3.5, "names": ["a"]})
    store.write_result("summary", {"trace": 4.5})
    assert store.read_result("summary") == {"trace": 4.5}
    assert Store(store.medium, make_manifest(tile=4)).read_result("summary") is None
    assert dict(zarr.open_group(str(store.root), mode="r")["results/summary"].attrs)["result"] == {"trace": 4.5}
    (store.root / "results/summary/zarr.json").write_text("{}")
    with pytest.raises(errors.StoreError, match=r"results/summary.* is damaged"):
        store.read_result("summary")
