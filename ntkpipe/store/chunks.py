"""The kernel store: how the chunks of its arrays are written, read and listed.

A chunk is done if it exists with the expected size: chunks are uncompressed, unsharded, and put whole or not at all. So
one listing tells progress. Where the bytes are, on a disk or in an object store, is the medium's business.
"""

import contextlib
import errno
import heapq
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import (
    ConfigError,
    NtkpipeError,
    StoreError,
    StoreExistsError,
    StoreFullError,
    StoreNotFoundError,
    TileError,
)
from ntkpipe.base.resources import format_bytes
from ntkpipe.store.documents import array_difference, array_document, group_attributes, group_document
from ntkpipe.store.layout import CHECKSUM_BYTES, ArrayLayout, Index, layouts
from ntkpipe.store.manifest import ATTRIBUTE, Manifest, from_attribute
from ntkpipe.store.media.folder import DOCUMENT_BYTES, Folder, Medium, OversizeError

Mode = Literal["a", "w", "w-"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DOCUMENT = "zarr.json"
_MOST_RESULTS = 1000
_CHECKED_AT_ONCE = 2**20
OF_WRONG_VALUES = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)
# What pathlib makes of s3://bucket.
_SHORTENED_URL = re.compile(r"(s3|gs|az):/[^/]")


class StoredArray:
    """One array of a store: chunks in and out, each verified."""

    def __init__(self, medium: Medium, layout: ArrayLayout) -> None:
        self.medium = medium
        self.layout = layout
        self._is_checked = False

    def name(self, index: Index) -> str:
        """Name of chunk ``index`` in the medium."""
        return f"{self.layout.name}/c/{'/'.join(map(str, index))}"

    def path(self, index: Index) -> Path | str:
        """Path or URL of chunk ``index``."""
        return self.medium.address(self.name(index))

    def describe(self, index: Index) -> str:
        """Words for messages: which chunk of which array, and the samples or rows that it holds."""
        region = ", ".join(f"{part.start}:{part.stop}" for part in self.layout.region(index)[:2])
        chunk = ", ".join(map(str, index))
        noun = "tile" if self.layout.grid is not None else "chunk"
        return f"{noun} ({chunk}) of {self.layout.name} (entries [{region}]) in {self.medium.root}"

    def present(self) -> set[Index]:
        """Chunks that exist with the expected size, from one listing."""
        size_of_one, holds = self.layout.chunk_bytes, self.layout.holds
        return {index for index, size in self.sizes() if size == size_of_one and holds(index)}

    def sizes(self) -> Iterator[tuple[Index, int]]:
        """Chunks that exist, whatever their size, with the size; files that are no chunks are passed over."""
        prefix = f"{self.layout.name}/c"
        for name, size in self.medium.sizes(prefix):
            parts = name[len(prefix) + 1 :].split("/")
            if len(parts) == len(self.layout.chunks) and all(map(_is_number, parts)):
                yield tuple(map(int, parts)), size

    def has(self, index: Index) -> bool:
        """Whether chunk ``index`` exists with the expected size."""
        return self.medium.size(self.name(index)) == self.layout.chunk_bytes

    def missing(self) -> list[Index]:
        """Chunks that a complete array has and that this one has not, in order."""
        present = self.present()
        return [index for index in self.layout.indices() if index not in present]

    def create(self) -> None:
        """Create the array where there is none, and check the one that is there; chunks are left as they are."""
        name = f"{self.layout.name}/{_DOCUMENT}"
        if self.medium.size(name) is None:
            with writing(self.medium):
                self.medium.put_new(name, self._document())
        self.check_metadata()

    def replace_metadata(self) -> None:
        """Write ``zarr.json`` anew, whatever is there; chunks are left as they are."""
        with writing(self.medium):
            self.medium.put(f"{self.layout.name}/{_DOCUMENT}", self._document())

    def _document(self) -> bytes:
        layout = self.layout
        return array_document(
            shape=layout.shape,
            chunks=layout.chunks,
            dtype=layout.dtype,
            fill_value=layout.fill_value,
            dimensions=layout.dimensions,
        )

    def check_metadata(self) -> None:
        """Check that ``zarr.json`` is what this package writes, so that any Zarr reader sees what is stored."""
        if self._is_checked:
            return
        where = f"{self.layout.name}/{_DOCUMENT} in {self.medium.root}"
        remedy = "delete that file and run again: it is written anew, and every chunk is kept"
        try:
            difference = array_difference(self.medium.get(f"{self.layout.name}/{_DOCUMENT}"), self._document(), where)
        except FileNotFoundError:
            raise StoreError(f"{where} is missing; run again: it is written, and every chunk is kept") from None
        except OSError as error:
            raise StoreError(f"{where} is damaged ({error}); {remedy}") from error
        if difference is not None:
            raise StoreError(f"{where} was altered: {difference}; {remedy}")
        self._is_checked = True

    def write(self, index: Index, values: NDArray[Any]) -> None:
        """Write one whole chunk, atomically."""
        self.check_metadata()
        chunk = self._whole_chunk(index, values)
        checksum = _checksum(chunk.reshape(-1).view(np.uint8))
        try:
            self.medium.put(self.name(index), chunk.data, checksum)
        except OSError as error:
            if isinstance(error, StoreFullError) or error.errno in _DISK_FULL:
                raise StoreFullError(
                    f"{_full(self.medium)}, {format_bytes(self.layout.chunk_bytes)} needed for {self.describe(index)}"
                ) from error
            raise StoreError(f"cannot write {self.describe(index)}: {error}") from error

    def _whole_chunk(self, index: Index, values: NDArray[Any]) -> NDArray[Any]:
        """``values`` as a whole chunk, padded with the fill value; a read-only view of them where nothing is to do.

        Written by us rather than through Zarr, which copies a chunk three times on its way.
        """
        layout = self.layout
        dtype = layout.dtype.newbyteorder("<")
        if values.shape == layout.chunks and values.dtype == dtype and values.flags.c_contiguous:
            chunk = values.view()
        else:
            shape = tuple(part.stop - part.start for part in layout.region(index))
            assert values.shape == shape, f"{values.shape} is not the shape {shape} of the chunk"
            chunk = np.full(layout.chunks, layout.fill_value, dtype)
            chunk[tuple(map(slice, shape))] = values
        chunk.flags.writeable = False
        return chunk

    def read(self, index: Index, buffer: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        """Read one chunk and check it, shape as :meth:`ArrayLayout.region` says."""
        layout = self.layout
        payload_bytes = layout.chunk_bytes - CHECKSUM_BYTES
        try:
            if buffer is None:
                raw = np.frombuffer(self.medium.get(self.name(index), layout.chunk_bytes), np.uint8)
                found = _checksum(raw[:payload_bytes])
            else:
                running = _RunningChecksum(buffer[:payload_bytes])
                raw = buffer[: self.medium.get_into(self.name(index), buffer.data, running.add)]
                found = running.value
        except FileNotFoundError:
            raise TileError(f"{self.describe(index)} is missing: not computed yet, or deleted") from None
        except OversizeError as error:
            raise TileError(
                f"{self.describe(index)} has {error.size} bytes; needed {layout.chunk_bytes}. Delete "
                f"{self.path(index)} and run again: it is recomputed"
            ) from error
        except OSError as error:
            raise TileError(f"{self.describe(index)} cannot be read: {error}") from error
        if len(raw) != layout.chunk_bytes:
            raise TileError(
                f"{self.describe(index)} has {len(raw)} bytes; needed {layout.chunk_bytes}: truncated. Run "
                "again: it is recomputed"
            )
        raw.flags.writeable = False
        payload, checksum = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
        if found != checksum.tobytes():
            raise TileError(
                f"{self.describe(index)} fails its crc32c checksum: its bytes were altered. Delete {self.path(index)} "
                "and run again: it is recomputed"
            )
        chunk = payload.view(layout.dtype.newbyteorder("<")).reshape(layout.chunks)
        return chunk[tuple(slice(part.stop - part.start) for part in layout.region(index))]

    def read_samples(self, start: int, stop: int) -> NDArray[Any]:
        """Entries ``start:stop`` of the first axis of an array that is chunked along it alone."""
        size = self.layout.chunks[0]
        rest = (0,) * (len(self.layout.chunks) - 1)
        parts = []
        for number in range(start // size, -(-stop // size)):
            part = self.read((number, *rest))
            parts.append(part[max(start - number * size, 0) : stop - number * size])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _checksum(data: NDArray[np.uint8]) -> bytes:
    """crc32c of read-only bytes, a mebibyte at a time: the library keeps other threads waiting meanwhile."""
    value = 0
    for start in range(0, len(data), _CHECKED_AT_ONCE):
        value = google_crc32c.extend(value, data[start : start + _CHECKED_AT_ONCE])
    return value.to_bytes(CHECKSUM_BYTES, "little")


class _RunningChecksum:
    """crc32c of bytes that arrive in a buffer; pieces beyond its end are cut."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data = data.view()
        self._data.flags.writeable = False
        self._value = 0

    def add(self, start: int, stop: int) -> None:
        """Bytes ``start:stop`` are there; they follow those before."""
        self._value = google_crc32c.extend(self._value, self._data[start:stop])

    @property
    def value(self) -> bytes:
        """As it is stored."""
        return int(self._value).to_bytes(CHECKSUM_BYTES, "little")


def _is_number(part: str) -> bool:
    """Whether it is how a chunk is numbered: no other digits than ours, no leading zero, no number beyond an array."""
    return part.isascii() and part.isdecimal() and len(part) <= 18 and (part == "0" or part[0] != "0")


class Store:
    """A store that exists: its manifest, its arrays, its results."""

    def __init__(self, medium: Medium, manifest: Manifest) -> None:
        self.medium = medium
        self.manifest = manifest
        self.arrays = {name: StoredArray(medium, layout) for name, layout in layouts(manifest).items()}

    @property
    def root(self) -> Path | str:
        """Path or URL, for messages."""
        return self.medium.root

    @classmethod
    def open(cls, where: str | Path | Medium) -> "Store":
        """Open a store; reads its manifest and nothing else."""
        medium = medium_at(where)
        document = medium.address(_DOCUMENT)
        try:
            data = medium.get(_DOCUMENT)
        except FileNotFoundError:
            what = "does not exist or is empty" if medium.is_vacant() else "holds no Zarr group"
            raise StoreNotFoundError(f"{medium.root} {what}; needed the path of a kernel store") from None
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"cannot read {document}: {error}") from error
        attributes = group_attributes(data, str(document))
        return cls(medium, from_attribute(attributes.get(ATTRIBUTE), str(medium.root)))

    @classmethod
    def create(cls, where: str | Path | Medium, manifest: Manifest) -> "Store":
        """Create a store, or open the one that another process created a moment ago.

        The group and its manifest appear in one atomic step, and the first process wins: callers compare the
        manifest they get with the one they asked for.
        """
        medium = medium_at(where)
        with writing(medium):
            medium.put_new(_DOCUMENT, _readable_group({ATTRIBUTE: manifest.to_attribute()}, _DOCUMENT))
        store = cls.open(medium)
        store.complete_layout()
        return store

    def complete_layout(self) -> None:
        """Create the arrays that are missing, as after a kill during creation."""
        self.complete_groups()
        for array in self.arrays.values():
            array.create()

    def complete_groups(self) -> None:
        """Create the groups of the arrays that are missing."""
        self._create_groups(self.arrays)

    def _create_groups(self, names: Iterable[str]) -> None:
        """Create the groups that the arrays or groups of these names are in."""
        folders = {"/".join(parts[:depth]) for parts in (n.split("/") for n in names) for depth in range(1, len(parts))}
        with writing(self.medium):
            for folder in sorted(folders):
                if self.medium.size(f"{folder}/{_DOCUMENT}") is None:
                    self.medium.put_new(f"{folder}/{_DOCUMENT}", group_document({}))

    def partials(self) -> list[str]:
        """Names of files that killed writers left behind; harmless, and never read."""
        return self.medium.leftovers()

    def missing(self) -> dict[str, list[Index]]:
        """Missing chunks of each array that has any."""
        found = {name: array.missing() for name, array in self.arrays.items()}
        return {name: indices for name, indices in found.items() if indices}

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the store from being replaced (``mode="w"``) while it is written; any number of writers may.

        At the end the last writer removes the partial files that killed ones left behind.
        """
        with contextlib.ExitStack() as held:
            with writing(self.medium):
                held.enter_context(self.medium.in_use())
            self._require_current()
            yield

    @contextlib.contextmanager
    def exclusive(self, otherwise: str) -> Iterator[None]:
        """Be the only one who writes to the store."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self.medium.exclusive())
            except BlockingIOError:
                raise StoreError(
                    f"another run is writing to {self.root}, so {otherwise} now; wait for its end, or stop it"
                ) from None
            except OSError as error:
                raise StoreError(f"{self.root} cannot be locked, so {otherwise}: {error}") from error
            self._require_current()
            yield

    def replace_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest in one atomic step; other attributes of the group are kept."""
        with writing(self.medium):
            attributes = group_attributes(self.medium.get(_DOCUMENT), str(self.medium.address(_DOCUMENT)))
            self.medium.put(_DOCUMENT, group_document({**attributes, ATTRIBUTE: manifest.to_attribute()}))

    def _require_current(self) -> None:
        if Store.open(self.medium).manifest != self.manifest:
            raise StoreError(f"{self.root} was replaced by another run after this one opened it; run again")

    def is_writable(self) -> bool:
        """Whether this process may write below the root, as far as can be told without doing it."""
        return self.medium.is_writable()

    def write_result(self, name: str, result: Mapping[str, Any]) -> None:
        """Store a JSON result below ``results/name``, with the digest of the manifest that it came from."""
        name = f"results/{name}"
        self._create_groups([name])
        attributes = {"result": dict(result), "manifest_digest": self.manifest.digest()}
        with writing(self.medium):
            self.medium.put(f"{name}/{_DOCUMENT}", _readable_group(attributes, name))

    def append_result(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line of JSON to the file ``results/name``, which one process at a time does."""
        with writing(self.medium):
            self.medium.append(f"results/{name}", json.dumps(line).encode() + b"\n")

    def read_results(self, folder: str) -> list[dict[str, Any]]:
        """Results below ``results/folder`` by name, also from before the store grew: all, or the last thousand."""
        prefix = f"results/{folder}"
        below = (name[len(prefix) + 1 :].split("/") for name, _ in self.medium.sizes(prefix))
        every = (parts[0] for parts in below if len(parts) == 2 and parts[1] == _DOCUMENT)
        names = heapq.nlargest(_MOST_RESULTS, every)[::-1]
        known = {manifest.digest() for manifest in (self.manifest, *self.manifest.earlier())}
        found = [self._read_result(f"{folder}/{name}", known) for name in names]
        return [result for result in found if result is not None]

    def read_result(self, name: str) -> dict[str, Any] | None:
        """Read a stored result; none if there is none or it came from another manifest, as before a growth.

        Raises
        ------
        StoreError
            If it is damaged.
        """
        return self._read_result(name, {self.manifest.digest()})

    def _read_result(self, name: str, known: set[str]) -> dict[str, Any] | None:
        """A result that came from a manifest with one of these digests."""
        where = f"results/{name} of {self.root}"
        try:
            # Results may hold NaN: a mean of nothing is one.
            attributes = group_attributes(self.medium.get(f"results/{name}/{_DOCUMENT}"), where, allow_nan=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{where} is damaged: {error}") from error
        result = attributes.get("result")
        if not isinstance(result, dict) or "manifest_digest" not in attributes:
            raise StoreError(f"{where} is damaged: it holds no result")
        return result if attributes["manifest_digest"] in known else None


@contextlib.contextmanager
def reading_results(root: Path | str) -> Iterator[None]:
    """What results hold is anybody's: there, a value that is missing or of another type is damage and no bug."""
    try:
        yield
    except NtkpipeError:
        raise
    except OF_WRONG_VALUES as error:
        raise StoreError(
            f"a result in {root} is damaged, or of another version ({error!r}); delete its folder below results, and "
            "run or verify again"
        ) from error


def _readable_group(attributes: dict[str, Any], name: str) -> bytes:
    """A group that is small enough to be read back."""
    data = group_document(attributes)
    if len(data) > DOCUMENT_BYTES:
        raise StoreError(
            f"{name} would have {format_bytes(len(data))}; at most {format_bytes(DOCUMENT_BYTES)} are read back"
        )
    return data


def prepare_path(where: str | Path | Medium, mode: Mode) -> Store | None:
    """Apply ``mode`` to what is at the path: the store to resume, or none where one may be created."""
    medium = medium_at(where)
    try:
        is_store = medium.size(_DOCUMENT) is not None
        is_vacant = not is_store and medium.is_vacant()
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {medium.root}: {error}") from error
    if is_vacant:
        return None
    if not is_store:
        raise StoreExistsError(f"{medium.root} exists and is not a kernel store; choose another path")
    if mode == "w-":
        raise StoreExistsError(
            f"{medium.root} exists and mode='w-' only creates; use mode='a' to resume or 'w' to start over"
        )
    if mode == "a":
        return Store.open(medium)
    _remove(medium)
    return None


def _remove(medium: Medium) -> None:
    """Remove a store in a way that never leaves half of one at its path; anything but a store is refused."""
    try:
        is_ours = ATTRIBUTE in group_attributes(medium.get(_DOCUMENT), str(medium.root))
    except OSError:
        is_ours = False
    if not is_ours:
        raise StoreExistsError(
            f"{medium.root} is not a kernel store, so mode='w' does not remove it; choose another path"
        )
    with writing(medium):
        try:
            medium.remove()
        except BlockingIOError:
            raise StoreExistsError(
                f"another run is writing to {medium.root}, so mode='w' does not remove it; stop it, or choose another "
                "path"
            ) from None


def medium_at(where: str | Path | Medium) -> Medium:
    """Where a store is: a path of this machine, ``~`` expanded, or the URL of an object store."""
    if isinstance(where, Medium):
        return where
    if not isinstance(where, str | os.PathLike):
        raise ConfigError(f"the store is {type(where).__name__}; needed a path or a URL")
    text = os.fspath(where)
    if "://" in text:
        try:
            from ntkpipe.store.media.objects import ObjectMedium  # keeps obstore out of sessions that use local stores
        except ModuleNotFoundError as error:
            raise StoreError(f"stores in object storage need {error.name}: pip install 'ntkpipe[objects]'") from error
        return ObjectMedium(text)
    if _SHORTENED_URL.match(text):
        raise StoreError(f"{text!r} is a URL that became a path on its way and lost a slash; give it as text")
    return Folder(Path(os.path.expanduser(text)))


def _full(medium: Medium) -> str:
    free = medium.free_bytes()
    return f"the disk is full: {'an unknown number of bytes' if free is None else format_bytes(free)} free"


@contextlib.contextmanager
def writing(medium: Medium) -> Iterator[None]:
    """Say what it means that something cannot be written."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        if error.errno in _DISK_FULL:
            raise StoreFullError(f"{_full(medium)} at {medium.root}") from error
        raise StoreError(f"cannot write to {medium.root}: {error}") from error
