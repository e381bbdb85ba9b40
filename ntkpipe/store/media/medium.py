"""The interface of a storage medium: names such as ``kernel/train/c/0/1``, each put whole, read and listed."""

import contextlib
import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from ntkpipe.base.errors import ResourceError, StoreError, StoreFullError
from ntkpipe.base.paths import said
from ntkpipe.base.resources import format_bytes

Data = bytes | memoryview

DOCUMENT_BYTES = 16 * 2**20  # larger documents, such as manifests and results, are refused, whoever wrote them
PIECE_BYTES = 2**18  # checked while it is in a core's cache, which makes a verified read a third cheaper
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Medium(ABC):
    """Storage of one store's bytes, by relative names with parts joined by ``/``. Pickles, without credentials."""

    # Every failure is an ``OSError``: ``FileNotFoundError`` for a missing name, :class:`StoreError` where the medium
    # knows a remedy, the system's own error otherwise.
    root: Path | str  # path or URL of the store

    @abstractmethod
    def address(self, name: str) -> Path | str:
        """Path or URL of ``name``."""

    @abstractmethod
    def identity(self) -> str:
        """Text that is equal for the same place, however its path was written."""

    def obstacle(self, *, writes: bool = False) -> str:
        """What keeps the root from being opened or made, as far as can be told beforehand; empty if nothing does."""
        return ""

    def nearest(self) -> "Medium":
        """Where things can be put now: this medium, or the folder above in which it would be made."""
        return self

    @abstractmethod
    def get(self, name: str, limit: int = DOCUMENT_BYTES) -> bytes:
        """Read all bytes of ``name``."""

    def get_into(self, name: str, buffer: memoryview, arrived: Callable[[int, int], None]) -> int:
        """Read ``name`` into the start of a reusable buffer and return its size; ``arrived`` gets each new range."""
        data = memoryview(self.get(name, len(buffer)))
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            buffer[start : start + len(piece)] = piece
            arrived(start, start + len(piece))
        return len(data)

    @abstractmethod
    def put(self, name: str, *parts: Data) -> None:
        """Write the concatenated parts as ``name``, replacing it atomically."""

    @abstractmethod
    def put_new(self, name: str, data: Data) -> bool:
        """Write ``name`` atomically unless it exists; exactly one of several concurrent writers gets True."""

    @abstractmethod
    def append(self, name: str, line: bytes) -> None:
        """Append a line to ``name``, for a single writer. A crash may truncate the last line."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of ``name``, or None if there is no such file."""

    @abstractmethod
    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield ``(name, bytes)`` of everything below ``prefix``, in any order, from one listing that is streamed."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete ``name`` if it exists."""

    def delete_below(self, prefix: str) -> None:
        """Delete everything below ``prefix``, folders included; there must be no other writer."""
        for name, _ in list(self.sizes(prefix)):
            self.delete(name)

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that can still be written, or None if unknown."""

    def require_room(self, num_bytes: int, what: str) -> None:
        """Raise ResourceError unless so many bytes can still be written for what needs them."""
        free = self.free_bytes()
        if free is not None and num_bytes > free:
            if why := self.obstacle(writes=True):  # what cannot be written to may have no free bytes
                raise StoreError(f"cannot write {what}: {why}; choose another path")
            found = f"{what} needs {format_bytes(num_bytes)} more, {format_bytes(free)} of disk are free"
            raise ResourceError(f"{found}; free some, or choose another path")

    @abstractmethod
    def is_writable(self) -> bool:
        """Whether this process has write permission, as far as can be told without writing data."""

    @abstractmethod
    def is_vacant(self) -> bool:
        """Whether the root is absent or holds nothing but leftovers of killed writers."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """Names of partial files of killed writers; harmless, and never read."""

    @abstractmethod
    def in_use(self) -> AbstractContextManager[None]:
        """Hold a shared lock, which keeps :meth:`exclusive` out. The last holder removes leftovers."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the exclusive lock."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the whole store; at no moment is half of one at its path."""


class OversizeError(StoreError):
    """A file is larger than anything that belongs there, so it was not read."""

    def __init__(self, where: Path | str, size: int, limit: int) -> None:
        super().__init__(f"{where} has {size} bytes; at most {limit} are read of such a file")
        self.size = size


def check_name(name: str) -> None:
    """Check that a name stays below the root."""
    if "\0" in name or any(part in {"", ".", ".."} for part in name.split("/")):
        raise StoreError(f"{name!r} is not a name inside a store; nothing was read or written")


@contextlib.contextmanager
def writing(medium: Medium, what: str | None = None, num_bytes: int = 0) -> Iterator[None]:
    """Turn errors of writing ``what``, which has ``num_bytes``, or of anything in the medium, into a StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL or (what and isinstance(error, StoreFullError)):
            free = medium.free_bytes()
            full = "the disk quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
            room = f"{full}: {'an unknown number of bytes' if free is None else format_bytes(free)} free"
            need = f", {format_bytes(num_bytes)} needed for {what}" if what else f" at {medium.root}"
            is_of_files = error.errno == errno.ENOSPC and (free or 0) > num_bytes + DOCUMENT_BYTES
            raise StoreFullError(
                room + need + ("; it may take no more files (df -i)" if is_of_files else "")
            ) from error
        if isinstance(error, StoreError) and what is None:
            raise
        why = "" if isinstance(error, StoreError) else medium.obstacle(writes=True)
        raise StoreError(f"cannot write {what or f'to {medium.root}'}: {why or said(error)}") from error
