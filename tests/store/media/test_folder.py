"""Where bytes are: whole or not at all, the first of creators wins, and nothing leaves the root."""

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ntkpipe.base.errors import StoreError
from ntkpipe.store.media.folder import Folder
from ntkpipe.store.media.medium import OversizeError
from ntkpipe.store.media.objects import ObjectMedium


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "a.zarr")


@pytest.fixture(params=["folder", "objects"])
def medium(request, tmp_path):
    """Either medium, empty."""
    if request.param == "folder":
        return Folder(tmp_path / "a.zarr")
    return ObjectMedium(request.getfixturevalue("bucket"))


def test_what_is_put_is_there_whole_and_over_what_was(medium):
    assert medium.is_vacant()
    assert medium.size("zarr.json") is None
    with pytest.raises(FileNotFoundError):
        medium.get("zarr.json")
    assert medium.put_new("zarr.json", b"first")
    medium.put("a/c/0/1", b"one ", memoryview(b"two"))
    assert medium.get("a/c/0/1") == b"one two"
    medium.put("a/c/0/1", b"three")
    assert (medium.get("a/c/0/1"), medium.size("a/c/0/1")) == (b"three", 5)
    assert not medium.is_vacant()
    assert medium.is_writable()
    assert medium.leftovers() == []


def test_one_listing_has_names_and_sizes_of_all_below_a_prefix(medium):
    medium.put_new("zarr.json", b"{}")
    sizes = {f"a/c/{i}/{j}": 10 * i + j for i in range(4) for j in range(3)}
    for name, size in sizes.items():
        medium.put(name, b"x" * size)
    medium.put("ab/c/0", b"a neighbour with a longer name")
    assert dict(medium.sizes("a/c")) == sizes
    assert dict(medium.sizes("none")) == {}
    assert set(dict(medium.sizes(""))) == {"zarr.json", "ab/c/0", *sizes}


def test_deleting_is_of_one_name_and_may_be_repeated(medium):
    medium.put_new("zarr.json", b"{}")
    medium.put("a/x", b"1")
    medium.put("a/y", b"2")
    medium.delete("a/x")
    medium.delete("a/x")
    assert dict(medium.sizes("a")) == {"a/y": 1}


def test_lines_are_added_in_order(medium):
    medium.put_new("zarr.json", b"{}")
    for line in (b"1\n", b"22\n", b"333\n"):
        medium.append("results/runs/r/blocks.jsonl", line)
    assert medium.get("results/runs/r/blocks.jsonl") == b"1\n22\n333\n"


def test_of_creators_at_once_exactly_one_wins(medium):
    barrier = threading.Barrier(4)

    def create(number: int) -> bool:
        other = pickle.loads(pickle.dumps(medium))
        barrier.wait()
        return other.put_new("zarr.json", b"creator %d" % number)

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(create, range(4)))
    assert sum(won) == 1
    assert medium.get("zarr.json") == b"creator %d" % won.index(True)


def test_what_is_larger_than_the_limit_is_not_read(medium):
    medium.put_new("zarr.json", b"12345")
    assert medium.get("zarr.json", 5) == b"12345"
    with pytest.raises(OversizeError, match="has 5 bytes; at most 4") as info:
        medium.get("zarr.json", 4)
    assert info.value.size == 5


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "", "a/", "a\0b", "..", "."])
def test_names_never_leave_the_root(medium, name):
    medium.put_new("zarr.json", b"{}")
    calls = [
        lambda: medium.get(name),
        lambda: medium.put(name, b""),
        lambda: medium.put_new(name, b""),
        lambda: medium.append(name, b""),
        lambda: medium.size(name),
        lambda: medium.delete(name),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="is not a name inside a store"):
            call()
    assert set(dict(medium.sizes(""))) == {"zarr.json"}


def test_nothing_is_written_or_deleted_through_links(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("years of work")
    folder.put_new("zarr.json", b"{}")
    (folder.root / "kernel").symlink_to(outside)
    (folder.root / "dangling").symlink_to(tmp_path / "not-yet")
    calls = [
        lambda: folder.put("kernel/thesis.tex", b"x"),
        lambda: folder.put("kernel/deep/er", b"x"),
        lambda: folder.put_new("kernel/zarr.json", b"x"),
        lambda: folder.append("kernel/thesis.tex", b"x"),
        lambda: folder.delete("kernel/thesis.tex"),
        lambda: folder.put("dangling/x", b"x"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="is a symbolic link"):
            call()
    assert [path.name for path in outside.iterdir()] == ["thesis.tex"]
    assert (outside / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "not-yet").exists()


def test_a_file_that_is_a_link_is_replaced_and_its_target_kept(folder, tmp_path):
    target = tmp_path / "target"
    target.write_text("kept")
    folder.put_new("zarr.json", b"{}")
    (folder.root / "x").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        folder.append("x", b"line\n")
    folder.put("x", b"new")
    assert (target.read_text(), folder.get("x")) == ("kept", b"new")


def test_pipes_and_devices_are_refused_at_once(folder):
    folder.put_new("zarr.json", b"{}")
    os.mkfifo(folder.root / "pipe")
    (folder.root / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(StoreError, match="is a device or a pipe"):
            folder.get(name)
        assert folder.size(name) is None


def test_loops_of_links_are_not_walked(folder):
    folder.put_new("zarr.json", b"{}")
    (folder.root / "loop").symlink_to(folder.root)
    (folder.root / "self").symlink_to("self")
    (folder.root / "folders" / "/".join("x" * 200)).mkdir(parents=True)
    assert dict(folder.sizes("")) == {"zarr.json": 2}
    assert folder.size("self") is None


def test_a_writer_that_outlives_its_store_begins_no_other(folder):
    folder.put_new("zarr.json", b"{}")
    folder.put("a/c/0", b"x")
    folder.remove()
    with pytest.raises(StoreError, match="was removed or renamed"):
        folder.put("a/c/1", b"x")
    with pytest.raises(StoreError, match="was removed or renamed"):
        folder.append("results/x", b"x")
    assert not folder.root.exists()


def test_the_exclusive_user_waits_for_nobody_and_keeps_nobody_out_by_an_old_file(folder):
    folder.put_new("zarr.json", b"old")
    with folder.in_use(), folder.in_use(), pytest.raises(BlockingIOError), folder.exclusive():
        pass
    with folder.exclusive():
        folder.put("zarr.json", b"new")
    with folder.in_use(), pytest.raises(BlockingIOError), folder.exclusive():
        pass
    with folder.exclusive():
        pass


def test_a_lock_taken_after_a_replacement_is_on_the_new_file(folder):
    """Whoever waits while the document is replaced must not end up with a lock on the file that is gone."""
    folder.put_new("zarr.json", b"old")
    entered = threading.Event()

    def use() -> None:
        with folder.in_use(), pytest.raises(BlockingIOError), folder.exclusive():
            entered.set()

    with folder.exclusive():
        waiting = threading.Thread(target=use)
        waiting.start()
        folder.put("zarr.json", b"new")
    waiting.join(10)
    assert not entered.is_set()
    assert not waiting.is_alive()


def test_without_locks_a_store_is_used_but_never_replaced(folder, monkeypatch):
    folder.put_new("zarr.json", b"{}")

    def flock(*_args):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("fcntl.flock", flock)
    with folder.in_use():
        folder.put("a", b"x")
    with pytest.raises(StoreError, match="has no locks"):
        folder.remove()
    assert folder.get("a") == b"x"
