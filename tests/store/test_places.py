"""Every way to a path says what is wrong with it before anything is written; no permission is no full disk."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from small import compute, inputs, mlp

from ntkpipe import cholesky, derive_kernel, export_kernel, open_kernel, plan_kernel, write_report
from ntkpipe.app.cli import main
from ntkpipe.base.errors import NtkpipeError, ResourceError, StoreError, StoreFullError, StoreNotFoundError
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.media.folder import Folder
from ntkpipe.store.media.medium import writing
from ntkpipe.store.results import Checkpoint

HERE = {
    "broken": "symbolic link to gone, which does not exist",
    "broken/a.zarr": "symbolic link to gone, which does not exist",
    "loop": "too many levels of symbolic links",
    "file.txt/a.zarr": "file.txt is a file, and nothing can be below it",
    "pipe": "is a pipe, not a f",
    "a" * 300: "too long|longer than the file system takes",
    "": "is empty",
    "~nobody-of-this-name/a.zarr": "no user",
    "$STUDY/a.zarr": "a shell replaces",
    "a\0b": "zero byte",
}
WAYS: dict[str, Callable[[KernelStore, str], Any]] = {
    "open_kernel": lambda store, path: open_kernel(path),
    "compute_kernel": lambda store, path: compute(path),
    "compute_kernel, over": lambda store, path: compute(path, mode="w"),
    "plan_kernel": lambda store, path: plan_kernel(mlp(), inputs(), store=path),
    "derive_kernel": lambda store, path: derive_kernel(store, kind="pntk", to=path, progress=False),
    "cholesky": lambda store, path: cholesky(store.train, path=path, ridge=1.0),
    "write_report": lambda store, path: write_report(store, path, saved_only=True),
    "Checkpoint": lambda store, path: Checkpoint(path, "a").commit({}, keep=()),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    return compute(tmp_path_factory.mktemp("places") / "a.zarr", kind="ntk")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "broken").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def everything(place: Path) -> list[str]:
    return sorted(str(path) for path in place.rglob("*"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", HERE)
def test_every_way_says_what_is_wrong_and_writes_nothing(place, store, way, path):
    before = everything(place)
    with pytest.raises(NtkpipeError, match=HERE[path]):
        WAYS[way](store, path)
    assert everything(place) == before


def test_what_is_no_store_is_called_what_it_is(place):
    np.save("a.npy", np.eye(2))
    zarr.open_group("plain.zarr", mode="w").create_array("x", data=np.eye(2))
    for path, words in (
        ("a.npy", "a.npy is a file, not a folder"),
        ("plain.zarr", "without an ntkpipe manifest"),
        (".", "holds no Zarr group"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(StoreError, match=words):
            open_kernel(path)
    with pytest.raises(StoreNotFoundError, match="which does not exist"):
        open_kernel("broken")


def test_good_paths_are_not_refused(place, store, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    (place / "link").symlink_to(place)
    for given, path in (
        ("~/home.zarr", "home.zarr"),
        (f"file://{place}/url%20of.zarr", "url of.zarr"),
        ("new/er/a.zarr/", "new/er/a.zarr"),
        ("link/ü b.zarr", "ü b.zarr"),
        (Path("path.zarr"), "path.zarr"),
    ):
        compute(given)
        assert open_kernel(given).progress.is_complete
        assert open_kernel(place / path).progress.is_complete
    export_kernel(store, "~/a.npy", progress=False)
    np.testing.assert_array_equal(np.load(place / "a.npy"), store.train[:])


def test_a_factor_goes_into_no_folder_of_something_else(place, store):
    """Partial files of others there would be taken for leftovers of a killed writer."""
    (place / "notes").mkdir()
    (place / "notes" / "download.partial").write_text("x")
    (place / "notes" / "n.txt").write_text("x")
    zarr.open_group("plain.zarr", mode="w").create_array("x", data=np.eye(2))
    zarr.create_array("array.zarr", data=np.eye(2))
    (place / "no-group.zarr" / "zarr.json").mkdir(parents=True)
    before = everything(place)
    for path, words in (
        ("notes", "holds something else; give the factor a path of its own"),
        ("plain.zarr", "holds something else"),
        ("array.zarr", "holds something else"),
        (".", "holds something else"),
        (store.path, "holds something else"),
        ("no-group.zarr", "cannot read no-group.zarr/zarr.json: is a directory$"),
    ):
        with pytest.raises(StoreError, match=words):
            cholesky(store.train, path=path, ridge=1.0)
    assert everything(place) == before


def test_a_factor_resumes_beside_what_came_later(place, store):
    (place / "factor").mkdir()
    first = cholesky(store.train, path="factor", ridge=1.0)
    (place / "factor" / "download.partial").write_text("x")
    again = cholesky(store.train, path="factor", ridge=1.0)
    assert again.resumed == first.num_panels
    assert (place / "factor" / "download.partial").exists()


def test_names_may_be_as_long_as_the_file_system_takes(place, store):
    for suffix, write in (
        (".npy", lambda path: export_kernel(store, path, progress=False)),
        (".zarr", lambda path: export_kernel(store, path, progress=False)),
        (".html", lambda path: write_report(store, path, saved_only=True)),
    ):
        path = "n" * (255 - len(suffix)) + suffix
        write(path)
        assert os.path.exists(path)
        with pytest.raises(NtkpipeError, match=r"too long|longer than the file system takes"):
            write(f"n{path}")


def test_a_growth_that_cannot_be_written(place, store, monkeypatch):
    compute(place / "a.zarr")

    def full(folder: Folder, name: str, *parts: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", full)
        patch.setattr(Folder, "free_bytes", lambda self: 2**40)
        with pytest.raises(StoreFullError, match=r"the disk is full: .*take no more files"):
            compute(place / "a.zarr", grow=True, inputs=inputs(22), targets=np.arange(22))
    grown = compute(place / "a.zarr", grow=True, inputs=inputs(22), targets=np.arange(22))
    assert grown.progress.is_complete


def test_the_command_line_says_it_too(place, capsys):
    with pytest.raises(SystemExit):
        main(["info", "broken"])
    assert "symbolic link to gone, which does not exist" in capsys.readouterr().err


def test_no_permission_is_not_a_full_disk(place, monkeypatch):
    """A read-only file system has no free bytes."""
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr(Folder, "free_bytes", lambda self: 0)
    with pytest.raises(StoreError, match=r"may not write in .*permission denied.*choose another path"):
        compute(place / "a.zarr")
    with pytest.raises(StoreError, match="may not write in"):
        Folder(place).require_room(1, "it")
    monkeypatch.undo()
    monkeypatch.setattr(Folder, "free_bytes", lambda self: 0)
    with pytest.raises(ResourceError, match="0 B of disk are free"):
        Folder(place).require_room(1, "it")


def test_a_finished_store_is_read_where_nothing_may_be_written(place, monkeypatch):
    expected = compute(place / "a.zarr").train[:]
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    np.testing.assert_array_equal(open_kernel(place / "a.zarr").train[:], expected)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, StoreFullError, "the disk is full: .* free"),
        (errno.EDQUOT, StoreFullError, "the disk quota is used up"),
        (errno.EROFS, StoreError, "cannot write to .*: read-only file system"),
        (errno.EACCES, StoreError, "cannot write to .*: permission denied"),
        (errno.EIO, StoreError, "cannot write to .*: input/output error"),
    ],
)
def test_errors_of_the_system_in_words(place, number, kind, words):
    with pytest.raises(kind, match=words) as failure, writing(Folder(place)):
        raise OSError(number, os.strerror(number), "a")
    assert "Errno" not in str(failure.value)
