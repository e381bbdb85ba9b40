"""Paths are what they are meant to be, and what stands in the way of one is said."""

import errno
import os
import re
from pathlib import Path

import pytest

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.paths import local_path, obstacle, said


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that may be at a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, target in (("broken", "gone"), ("loop", "loop"), ("to-file", "file"), ("to-folder", "folder")):
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_what_is_meant(place, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for given, meant in {
        "~/a.zarr": "/home/me/a.zarr",
        "file:///tmp/a%20b.zarr": "/tmp/a b.zarr",
        "file://localhost/tmp/a.zarr": "/tmp/a.zarr",
        "FILE:///tmp/a.zarr": "/tmp/a.zarr",
        "file:/tmp/a.zarr": "/tmp/a.zarr",
        "a b/ü.zarr/": "a b/ü.zarr",
        "folder/../a": "folder/../a",
        ".": ".",
        "x$HOME": "x$HOME",
    }.items():
        assert local_path(given) == Path(meant)
    assert local_path(Path("~/a")) == Path("/home/me/a")
    (place / "$HOME").mkdir()
    assert local_path("$HOME/a") == Path("$HOME/a")  # somebody has named a folder so


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "is empty"),
        ("a\0b", "zero byte"),
        ("~nobody-of-this-name/a", "no user 'nobody-of-this-name'"),
        ("$HOME/a", r"a shell replaces \$HOME.*expandvars"),
        ("${DATA}/a", r"a shell replaces \$\{DATA\}"),
        ("file://host/a", "another machine"),
        ("http://host/a", "is a URL"),
        ("http:/host/a", "is a URL"),
    ],
)
def test_what_cannot_be_meant(place, given, words):
    with pytest.raises(ConfigError, match=words):
        local_path(given)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("folder", ""),
        ("new", ""),
        ("new/er", ""),
        ("to-folder/new", ""),
        ("folder/../new", ""),
        ("broken", "broken is a symbolic link to gone, which does not exist"),
        ("broken/new", "broken is a symbolic link to gone, which does not exist"),
        ("loop", "too many levels of symbolic links"),
        ("loop/new", "too many levels of symbolic links"),
        ("file", "file is a file, not a folder"),
        ("to-file", "to-file is a file, not a folder"),
        ("file/new", "file is a file, and nothing can be below it"),
        ("pipe", "pipe is a pipe, not a folder"),
        ("pipe/new", "pipe is a pipe, and nothing can be below it"),
        ("/dev/null", "/dev/null is a device, not a folder"),
        ("n" * 300, "too long|longer than the file system takes"),
        ("new/" + "n" * 300, "longer than the file system takes"),
        ("/".join(["n" * 200] * 30), "too long|longer than the system takes"),
    ],
)
def test_what_stands_in_the_way_of_a_folder(place, path, words):
    found = obstacle(Path(path), writes=True)
    assert re.search(words, found) if words else not found


def test_what_stands_in_the_way_of_a_file(place):
    assert obstacle(Path("file"), writes=True, kind="file") == ""
    assert obstacle(Path("new"), writes=True, kind="file") == ""
    assert obstacle(Path("folder"), writes=True, kind="file").endswith("folder is a folder, not a file")
    assert obstacle(Path("pipe"), writes=True, kind="file").endswith("pipe is a pipe, not a file")


def test_what_a_user_may_not(place, monkeypatch):
    """Tests may run as root, who may do everything."""
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert obstacle(Path("folder")) == ""
    assert obstacle(Path("folder/new"), writes=True) == f"this user may not write in {place}/folder (permission denied)"
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((0,) * 8 + (os.ST_RDONLY, 255)))
    assert obstacle(Path("folder/new"), writes=True) == f"the file system of {place}/folder is read-only"
    monkeypatch.undo()
    monkeypatch.chdir(place)
    lstat = os.lstat

    def closed(path: os.PathLike[str]) -> os.stat_result:
        if Path(path).name == "new":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", closed)
    assert obstacle(Path("folder/new")) == f"permission denied: {place}/folder/new"


def test_words_of_an_error():
    assert said(PermissionError(errno.EACCES, "Permission denied", "/a")) == "permission denied: /a"
    assert said(OSError("it broke.")) == "it broke"
    assert said(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) == "Connection refused"
    assert said(IsADirectoryError(errno.EISDIR, "Is a directory", 7)) == "is a directory"
    assert said(ValueError()) == "ValueError"
