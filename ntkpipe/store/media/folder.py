"""Where the bytes of a store are: names such as ``kernel/train/c/0/1`` that are put whole, read and listed.

Here are the interface and the folder of a file system; object stores are in :mod:`ntkpipe.store.media.objects`.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO

from ntkpipe.base.errors import StoreError, StoreExistsError
from ntkpipe.base.resources import free_disk

Data = bytes | memoryview

# Of what is no chunk, as a manifest or a result: more is not read, whoever wrote it.
DOCUMENT_BYTES = 16 * 2**20

# Writers hold a lock on it, since every store has one.
_LOCKED = "zarr.json"
_PARTIAL = ".partial"
# Parts of a name: more than the chunks of an array of 64 axes, the most that numpy has, can need.
_DEEPEST = 70
# What arrives is looked at while it is in a core's own cache; that makes a read and its check a third cheaper.
_PIECE_BYTES = 2**18
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Medium(ABC):
    """Where the bytes of one store are. Pickles, without credentials.

    Names are relative to the store, parts joined by ``/``. Whatever fails is an ``OSError``: ``FileNotFoundError``
    where there is nothing of that name, :class:`StoreError` where the medium knows what to do next, what the system
    says otherwise.
    """

    root: Path | str  # path or URL of the store

    @abstractmethod
    def address(self, name: str) -> Path | str:
        """Path or URL of ``name``."""

    @abstractmethod
    def identity(self) -> str:
        """The same for the same place, however it was written."""

    @abstractmethod
    def get(self, name: str, limit: int = DOCUMENT_BYTES) -> bytes:
        """All bytes of ``name``."""

    def get_into(self, name: str, buffer: memoryview, arrived: Callable[[int, int], None]) -> int:
        """All bytes of ``name`` at the beginning of a buffer that may be reused, and their number."""
        data = memoryview(self.get(name, len(buffer)))
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            buffer[start : start + len(piece)] = piece
            arrived(start, start + len(piece))
        return len(data)

    @abstractmethod
    def put(self, name: str, *parts: Data) -> None:
        """Write the parts one after the other as ``name``: whole or not at all, over what is there."""

    @abstractmethod
    def put_new(self, name: str, data: Data) -> bool:
        """Write ``name`` whole if there is none, and say whether: of writers at once exactly one does."""

    @abstractmethod
    def append(self, name: str, line: bytes) -> None:
        """Add a line to ``name``, which one process at a time does. After a crash the last line may be cut."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of ``name``, or none if there is no such file."""

    @abstractmethod
    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """``(name, bytes)`` of all that is below ``prefix``, in any order, from one listing; never held as a whole."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete ``name``, if it is there."""

    def delete_below(self, prefix: str) -> None:
        """Delete all that is below ``prefix``, where nobody else writes; folders, too, where the medium has them."""
        for name, _ in list(self.sizes(prefix)):
            self.delete(name)

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that can still be written, or none where that is not known."""

    @abstractmethod
    def is_writable(self) -> bool:
        """Whether this process may write, as far as can be told without doing it."""

    @abstractmethod
    def is_vacant(self) -> bool:
        """Whether there is nothing at the root but what killed writers left."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """Names of what killed writers left; harmless, and never read."""

    @abstractmethod
    def in_use(self) -> AbstractContextManager[None]:
        """Keep others out of :meth:`exclusive`; any number of holders may. The last one clears leftovers."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Be the only user."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the whole store, in a way that never leaves half of one."""


class OversizeError(StoreError):
    """Something is larger than anything that belongs there, so it was not read."""

    def __init__(self, where: Path | str, size: int, limit: int) -> None:
        super().__init__(f"{where} has {size} bytes; at most {limit} are read of such a file")
        self.size = size


def check_name(name: str) -> None:
    """Check that a name stays below the root."""
    if "\0" in name or any(part in {"", ".", ".."} for part in name.split("/")):
        raise StoreError(f"{name!r} is no name inside a store; nothing was read or written")


def _size_of_file(look: Callable[[], os.stat_result]) -> int | None:
    """Bytes of a plain file; none if it is another thing, or a link that leads nowhere."""
    try:
        status = look()
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return None
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@dataclass(frozen=True)
class Folder(Medium):
    """A folder of a file system.

    Files are written under a temporary name and renamed, so a killed writer leaves ``.partial`` files only. What is
    written never follows a symbolic link below the root. Users hold locks (``flock``) on ``zarr.json``; a file system
    that has none, as Lustre may, is written without, and then nothing there is ever replaced.
    """

    root: Path

    def __reduce__(self) -> tuple[type["Folder"], tuple[Path]]:
        return Folder, (self.root.absolute(),)  # other processes have other current folders

    def address(self, name: str) -> Path:
        """Path of ``name``."""
        return self.root / name

    def identity(self) -> str:
        """See :meth:`Medium.identity`."""
        return str(self.root.resolve())

    def get(self, name: str, limit: int = DOCUMENT_BYTES) -> bytes:
        """See :meth:`Medium.get`."""
        with self._opened(name, limit) as file:
            return file.readall()

    def get_into(self, name: str, buffer: memoryview, arrived: Callable[[int, int], None]) -> int:
        """See :meth:`Medium.get_into`."""
        with self._opened(name, len(buffer)) as file:
            done = 0
            while count := file.readinto(buffer[done : done + _PIECE_BYTES]):
                arrived(done, done + count)
                done += count
            return done

    @contextlib.contextmanager
    def _opened(self, name: str, limit: int) -> Iterator[FileIO]:
        """``name`` for reading, if it is a file of at most ``limit`` bytes."""
        check_name(name)
        # Without waiting: a pipe in a store of somebody else would never answer.
        descriptor = os.open(self.root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with FileIO(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, "is a folder", str(self.root / name))
            if not stat.S_ISREG(status.st_mode):
                raise StoreError(f"{self.root / name} is a device or a pipe; needed a file")
            if status.st_size > limit:
                raise OversizeError(self.root / name, status.st_size, limit)
            yield file

    def put(self, name: str, *parts: Data) -> None:
        """See :meth:`Medium.put`."""
        with self._written(name, parts) as temporary:
            temporary.replace(self.root / name)

    def put_new(self, name: str, data: Data) -> bool:
        """See :meth:`Medium.put_new`; makes the root."""
        self.root.mkdir(parents=True, exist_ok=True)
        with self._written(name, (data,)) as temporary:
            try:
                os.link(temporary, self.root / name)
            except FileExistsError:
                return False
        return True

    @contextlib.contextmanager
    def _written(self, name: str, parts: tuple[Data, ...]) -> Iterator[Path]:
        """The parts in a file of a temporary name beside ``name``, which is gone at the end."""
        path = self._inside(name)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
        try:
            with self._create(temporary, lambda path: path.open("wb")) as file:
                for part in parts:
                    file.write(part)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _create(self, path: Path, create: Callable[[Path], IO[bytes]]) -> IO[bytes]:
        """A new file, in a new folder where there is none."""
        try:
            return create(path)
        except FileNotFoundError:
            if not self.root.is_dir():
                # A writer that outlives its store must not begin another one.
                raise StoreError(f"{self.root} was removed or renamed while it was written to") from None
            path.parent.mkdir(parents=True, exist_ok=True)
            return create(path)

    def _inside(self, name: str) -> Path:
        """Path of ``name`` for writing."""
        check_name(name)
        folder = str(self.root)
        for part in name.split("/")[:-1]:
            folder = f"{folder}/{part}"
            if os.path.islink(folder):
                raise StoreError(f"{folder} is a symbolic link; nothing is written through links inside of a store")
        return self.root / name

    def append(self, name: str, line: bytes) -> None:
        """See :meth:`Medium.append`."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._create(self._inside(name), lambda path: open(os.open(path, flags, 0o666), "ab")) as file:
            file.write(line)

    def size(self, name: str) -> int | None:
        """See :meth:`Medium.size`."""
        check_name(name)
        return _size_of_file((self.root / name).stat)

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See :meth:`Medium.sizes`. What vanishes meanwhile is passed over; links to folders are not entered."""
        if prefix:
            check_name(prefix)
        try:
            entries = os.scandir(self.root / prefix)
        except (FileNotFoundError, NotADirectoryError):
            return
        with entries:
            for entry in entries:
                name = f"{prefix}/{entry.name}" if prefix else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if name.count("/") < _DEEPEST:
                        yield from self.sizes(name)
                elif (size := _size_of_file(entry.stat)) is not None:
                    yield name, size

    def delete(self, name: str) -> None:
        """See :meth:`Medium.delete`."""
        self._inside(name).unlink(missing_ok=True)

    def delete_below(self, prefix: str) -> None:
        """See :meth:`Medium.delete_below`."""
        super().delete_below(prefix)
        for folder, _, _ in os.walk(self._inside(prefix), topdown=False):
            os.rmdir(folder)

    def free_bytes(self) -> int:
        """See :meth:`Medium.free_bytes`."""
        return free_disk(self.root)

    def is_writable(self) -> bool:
        """See :meth:`Medium.is_writable`."""
        return os.access(self.root, os.W_OK)

    def is_vacant(self) -> bool:
        """See :meth:`Medium.is_vacant`."""
        if not self.root.is_dir():
            return not os.path.lexists(self.root)
        with os.scandir(self.root) as entries:
            return all(entry.name.endswith(_PARTIAL) for entry in entries)

    def leftovers(self) -> list[str]:
        """See :meth:`Medium.leftovers`."""
        return sorted(name for name, _ in self.sizes("") if name.endswith(_PARTIAL))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """See :meth:`Medium.in_use`."""
        with self._lock_file(fcntl.LOCK_SH) as file:
            try:
                yield
            finally:
                if file is not None:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        for name in self.leftovers():
                            self.delete(name)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """See :meth:`Medium.exclusive`."""
        with self._lock_file(fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
            if file is None:
                raise StoreError(
                    f"the file system of {self.root} has no locks (flock), so nobody knows whether another run writes "
                    "to it; choose another path, or delete the folder yourself"
                )
            yield

    @contextlib.contextmanager
    def _lock_file(self, kind: int) -> Iterator[IO[bytes] | None]:
        """The locked file, closed and so unlocked at the end; none where the file system has no locks."""
        while True:
            # For writing: NFS gives an exclusive lock to nobody else.
            with (self.root / _LOCKED).open("r+b") as file:
                try:
                    fcntl.flock(file, kind)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    yield None
                    return
                if not self._is_current(file):
                    continue  # replaced while we waited: a lock on the old file keeps nobody out
                yield file
                return

    def _is_current(self, file: IO[bytes]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.root / _LOCKED))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """See :meth:`Medium.remove`."""
        if self.root.is_symlink():
            raise StoreExistsError(
                f"{self.root} is a symbolic link, so mode='w' does not remove it; give the path it points to"
            )
        doomed = self.root.with_name(f"{self.root.name}.{uuid.uuid4().hex}.removed")
        with self.exclusive():
            self.root.rename(doomed)
        shutil.rmtree(doomed)
