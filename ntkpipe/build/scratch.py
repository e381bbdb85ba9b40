"""Jacobian strips in files of this machine: what one process of a run has computed, the others read."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ntkpipe.base.grid import Span
from ntkpipe.base.paths import said
from ntkpipe.base.resources import free_disk
from ntkpipe.store.layout import CHECKSUM_BYTES
from ntkpipe.store.media.folder import Folder
from ntkpipe.store.media.medium import PIECE_BYTES

StripKey = tuple[str, Span]  # the split, and samples of it

_LOCK = "in_use"  # every process of the run holds a shared lock on this file of the folder
_Checksum: Any = google_crc32c.Checksum  # it has no annotations


class Scratch:
    """Strips of one run, which never fails for them; each process opens it, and pickles are not open."""

    # A strip is read into the memory of a new one of the same layout, and believed if its checksum is right, which
    # covers its name. What cannot be read is computed, which gives the same bits. The folder is private to the user.
    # The last process to leave removes it, and the next run those whose processes were killed.

    def __init__(self, store: Path | None = None, store_bytes: int = 0, token: str | None = None) -> None:
        self._store, self._store_bytes = store and store.absolute(), store_bytes  # where the run writes, and how much
        self._token = token or uuid4().hex
        self._mutex, self._is_full = threading.Lock(), False
        self._folder: Folder | None = None
        self._leave: Callable[[], object] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, (self._store, self._store_bytes, self._token)

    def open(self, base: Path) -> None:
        """Use a folder below ``base``, with all processes of the run that do; once."""
        with self._mutex:
            if self._folder is not None or self._is_full:
                return
            start = f"ntkpipe-strips-{os.getuid()}-"
            folder = base / f"{start}{self._token}"
            try:
                descriptor = _enter(folder)
            except OSError as error:
                self._stop(base, error)
                return
            self._folder, self._leave = Folder(folder), weakref.finalize(self, _release, folder, descriptor)
            for other in base.glob(f"{start}*"):
                if other != folder:
                    with contextlib.suppress(OSError):
                        _release(other, _lock_file(other))

    def close(self) -> None:
        """Leave: this process keeps and finds nothing any more."""
        self._folder, self._is_full = None, True
        self._leave()

    def has(self, key: StripKey) -> bool:
        """Whether a strip is there."""
        return self._folder is not None and self._folder.size(_name(key)) is not None

    def get(self, key: StripKey, memory: Sequence[Tensor]) -> bool:
        """Fill the bytes of a strip; false if the file is not whole, and then they hold nothing."""
        folder, name = self._folder, _name(key)
        if folder is None:
            return False
        checksum = _Checksum(name.encode())
        with contextlib.suppress(OSError), (folder.root / name).open("rb", buffering=0) as file:
            for piece, found in _pieces(memory):
                if file.readinto(piece) != len(piece):
                    return False
                checksum.update(found)
            return bool(file.read(CHECKSUM_BYTES + 1) == checksum.digest())
        return False

    def put(self, key: StripKey, memory: Sequence[Tensor]) -> None:
        """Keep the bytes of a strip if there is room; says once if there is none."""
        folder, name = self._folder, _name(key)
        if folder is None or self._is_full:
            return
        checksum = _Checksum(name.encode())
        for _, piece in _pieces(memory):
            checksum.update(piece)
        try:
            self._require_room(folder.root, sum(each.nbytes for each in memory))
            folder.put(name, *(each.numpy().data for each in memory), checksum.digest())
        except OSError as error:
            self._stop(folder.root, error)

    def _require_room(self, root: Path, num_bytes: int) -> None:
        if self._store is not None and self._store.stat().st_dev == root.stat().st_dev:
            num_bytes += self._store_bytes
        if (free := free_disk(root)) is not None and free < num_bytes:
            raise OSError(errno.ENOSPC, "no room beside the store", str(root))

    def _stop(self, where: Path, error: OSError) -> None:
        """Keep nothing more, and say why; not by a warning, which a filter would make an error."""
        if not self._is_full:
            print(f"Jacobians are computed again instead of kept in {where}: {said(error)}", file=sys.stderr)
        self._is_full = True


def _name(key: StripKey) -> str:
    return f"{key[0]}-{key[1].start}-{key[1].stop}"


def _pieces(memory: Sequence[Tensor]) -> Iterator[tuple[memoryview, NDArray[np.uint8]]]:
    """Bytes of tensors, to be written and to be read, a few at a time: the checksum blocks other threads."""
    for each in memory:
        values, fixed = each.numpy(), each.numpy()
        fixed.flags.writeable = False
        for start in range(0, len(values), PIECE_BYTES):
            yield values[start : start + PIECE_BYTES].data, fixed[start : start + PIECE_BYTES]


def _lock_file(folder: Path) -> int:
    """Open the file to lock in a folder that is this user's alone."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EACCES, "it is not a folder of this user alone", str(folder))
    return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _enter(folder: Path) -> int:
    """Make a folder if it is not there, and lock it; returns the descriptor that holds the lock."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Until it is locked, another process may remove it at any moment.
        with contextlib.suppress(FileNotFoundError):
            descriptor = _lock_file(folder)
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(descriptor), os.stat(folder / _LOCK)):
                    undo.pop_all()
                    return descriptor


def _release(folder: Path, descriptor: int) -> None:
    """Give up a lock, and remove the folder unless another process holds one."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
