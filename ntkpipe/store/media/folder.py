"""A folder of a file system as the storage medium of a store."""

# ruff: noqa: D102 - overridden methods are documented in Medium

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO

from ntkpipe.base.errors import StoreError, StoreExistsError
from ntkpipe.base.paths import obstacle
from ntkpipe.base.resources import free_disk
from ntkpipe.store.media.medium import DOCUMENT_BYTES, PIECE_BYTES, Data, Medium, OversizeError, check_name

_LOCKED = "zarr.json"  # every store has it, so writers lock it
_PARTIAL = ".partial"
_DEEPEST = 70  # listed levels; the chunks of an array of 64 axes, numpy's maximum, need fewer parts
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def partial_beside(path: Path) -> Path:
    """Where a file is written before it gets its name, which may be as long as a name can be."""
    return path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex}{_PARTIAL}")


def _size_of_file(look: Callable[[], os.stat_result]) -> int | None:
    """Bytes of a regular file, or None for anything else, dangling links included."""
    try:
        status = look()
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return None
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@dataclass(frozen=True)
class Folder(Medium):
    """A folder of a file system."""

    # Files are written under a temporary name and renamed, so a killed writer leaves only ``.partial`` files. Writing
    # never follows symbolic links below the root. Users lock ``zarr.json`` (``flock``); a file system without locks,
    # which Lustre may be, is written without them, and then no store there is ever replaced.
    root: Path

    def __reduce__(self) -> tuple[type["Folder"], tuple[Path]]:
        return Folder, (self.root.absolute(),)  # other processes have another working directory

    def address(self, name: str) -> Path:
        return self.root / name

    def identity(self) -> str:
        return os.path.realpath(self.root)

    def obstacle(self, *, writes: bool = False) -> str:
        return obstacle(self.root, writes=writes)

    def nearest(self) -> "Folder":
        root = self.root.absolute()
        return Folder(next(each for each in (root, *root.parents) if each.is_dir()))

    def get(self, name: str, limit: int = DOCUMENT_BYTES) -> bytes:
        with self._opened(name, limit) as file:
            return file.readall()

    def get_into(self, name: str, buffer: memoryview, arrived: Callable[[int, int], None]) -> int:
        with self._opened(name, len(buffer)) as file:
            done = 0
            while count := file.readinto(buffer[done : done + PIECE_BYTES]):
                arrived(done, done + count)
                done += count
            return done

    @contextlib.contextmanager
    def _opened(self, name: str, limit: int) -> Iterator[FileIO]:
        """Open ``name`` for reading if it is a regular file of at most ``limit`` bytes."""
        check_name(name)
        # Non-blocking: opening a pipe in an untrusted store would wait forever.
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
        with self._written(name, parts) as temporary:
            temporary.replace(self.root / name)

    def put_new(self, name: str, data: Data) -> bool:
        self.root.mkdir(parents=True, exist_ok=True)
        with self._written(name, (data,)) as temporary:
            try:
                os.link(temporary, self.root / name)
            except FileExistsError:
                return False
        return True

    @contextlib.contextmanager
    def _written(self, name: str, parts: tuple[Data, ...]) -> Iterator[Path]:
        """Write the parts to a temporary file beside ``name``, which is removed at the end."""
        path = self._inside(name)
        temporary = partial_beside(path)
        try:
            with self._create(temporary, lambda path: path.open("wb")) as file:
                for part in parts:
                    file.write(part)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _create(self, path: Path, create: Callable[[Path], IO[bytes]]) -> IO[bytes]:
        try:
            return create(path)
        except FileNotFoundError:
            if not self.root.is_dir():
                # A writer that outlives its store must not start another one.
                raise StoreError(f"{self.root} was removed or renamed while it was written to") from None
            path.parent.mkdir(parents=True, exist_ok=True)
            return create(path)

    def _inside(self, name: str) -> Path:
        """Return the path of ``name`` for writing, with no symbolic link on the way."""
        check_name(name)
        folder = str(self.root)
        for part in name.split("/")[:-1]:
            folder = f"{folder}/{part}"
            if os.path.islink(folder):
                raise StoreError(f"{folder} is a symbolic link; nothing is written through links inside a store")
        return self.root / name

    def append(self, name: str, line: bytes) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._create(self._inside(name), lambda path: open(os.open(path, flags, 0o666), "ab")) as file:
            file.write(line)

    def size(self, name: str) -> int | None:
        check_name(name)
        return _size_of_file((self.root / name).stat)

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """List as Medium does; files that vanish meanwhile are skipped, links to folders not followed."""
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
        self._inside(name).unlink(missing_ok=True)

    def delete_below(self, prefix: str) -> None:
        super().delete_below(prefix)
        for folder, _, _ in os.walk(self._inside(prefix), topdown=False):
            os.rmdir(folder)

    def free_bytes(self) -> int | None:
        return free_disk(self.root)

    def is_writable(self) -> bool:
        return os.access(self.root, os.W_OK)

    def is_vacant(self) -> bool:
        if not self.root.is_dir():
            return not os.path.lexists(self.root)
        with os.scandir(self.root) as entries:
            return all(entry.name.endswith(_PARTIAL) for entry in entries)

    def leftovers(self) -> list[str]:
        return sorted(name for name, _ in self.sizes("") if name.endswith(_PARTIAL))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
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
        with self._lock_file(fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
            if file is None:
                raise StoreError(
                    f"the file system of {self.root} has no locks (flock), so nobody knows whether another run writes "
                    "to it; choose another path, or delete the folder yourself"
                )
            yield

    @contextlib.contextmanager
    def _lock_file(self, kind: int) -> Iterator[IO[bytes] | None]:
        """Lock the file until the end; yields None where the file system has no locks."""
        while True:
            # Open for writing: NFS requires that for an exclusive lock.
            with (self.root / _LOCKED).open("r+b") as file:
                try:
                    fcntl.flock(file, kind)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    yield None
                    return
                if not self._is_current(file):
                    continue  # replaced while we waited: a lock on the old file excludes nobody
                yield file
                return

    def _is_current(self, file: IO[bytes]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.root / _LOCKED))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        if self.root.is_symlink():
            raise StoreExistsError(
                f"{self.root} is a symbolic link, so mode='w' does not remove it; give the path it points to"
            )
        doomed = self.root.with_name(f"{self.root.name}.{uuid.uuid4().hex}.removed")
        with self.exclusive():
            self.root.rename(doomed)
        shutil.rmtree(doomed)
