"""The kernel store on disk: how the chunks of its arrays are written, read and listed.

A chunk is done if its file exists with the expected size: chunks are uncompressed, unsharded, written whole to a
temporary name and renamed. So one listing tells progress, and a writer that is killed leaves only a ``.partial`` file.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from ntkpipe.errors import ConfigError, StoreError, StoreExistsError, StoreFullError, StoreNotFoundError, TileError
from ntkpipe.layout import CHECKSUM_BYTES, ArrayLayout, Index, layouts
from ntkpipe.manifest import ATTRIBUTE, Manifest, from_attribute
from ntkpipe.resources import format_bytes, free_disk

Mode = Literal["a", "w", "w-"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoredArray:
    """One array of a store: chunks in and out, each verified."""

    def __init__(self, root: Path, layout: ArrayLayout) -> None:
        self.root = root
        self.layout = layout
        self._folder = root / layout.name / "c"
        self._is_checked = False

    def path(self, index: Index) -> Path:
        """File of chunk ``index``."""
        return self._folder.joinpath(*map(str, index))

    def describe(self, index: Index) -> str:
        """Words for messages: which chunk of which array, and the samples or rows that it holds."""
        region = ", ".join(f"{part.start}:{part.stop}" for part in self.layout.region(index)[:2])
        chunk = ", ".join(map(str, index))
        noun = "tile" if self.layout.grid is not None else "chunk"
        return f"{noun} ({chunk}) of {self.layout.name} (entries [{region}]) in {self.root}"

    def present(self) -> set[Index]:
        """Chunks that exist with the expected size, from one listing."""
        return {index for index, size in self.sizes() if size == self.layout.chunk_bytes}

    def sizes(self) -> Iterator[tuple[Index, int]]:
        """Chunks that exist, whatever their size, with the size; files that are no chunks are passed over."""
        for path, size in _files(self._folder):
            parts = path.relative_to(self._folder).parts
            if len(parts) == len(self.layout.chunks) and all(part.isdecimal() for part in parts):
                yield tuple(map(int, parts)), size

    def missing(self) -> list[Index]:
        """Chunks that a complete array has and that this one has not, in order."""
        present = self.present()
        return [index for index in self.layout.indices() if index not in present]

    def create(self) -> None:
        """Create the array where there is none, and check the one that is there; chunks are left as they are.

        Raises
        ------
        StoreError
            If its ``zarr.json`` is damaged or was altered.
        """
        if not (self.root / self.layout.name / "zarr.json").exists():
            with _writing(self.root), contextlib.suppress(zarr.errors.ContainsArrayError):
                _create(str(self.root), self.layout)
        self.check_metadata()

    def check_metadata(self) -> None:
        """Check that ``zarr.json`` is what this package writes, so that any Zarr reader sees what is stored.

        Raises
        ------
        StoreError
            If it is missing, damaged or altered.
        """
        if self._is_checked:
            return
        where = f"{self.layout.name}/zarr.json in {self.root}"
        remedy = "delete that file and run again: it is written anew, and every chunk is kept"
        try:
            array = zarr.open_array(str(self.root / self.layout.name), mode="r")
        except FileNotFoundError:
            raise StoreError(f"{where} is missing; run again: it is written, and every chunk is kept") from None
        except Exception as error:
            raise StoreError(f"{where} is damaged ({error!r}); {remedy}") from error
        needed = _create(MemoryStore(), self.layout)
        for field in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"):
            found, wanted = (getattr(a.metadata, field) for a in (array, needed))
            if repr(found) != repr(wanted):  # NaN, a fill value, does not equal itself
                raise StoreError(f"{where} was altered: it has {field} {found}, needed {wanted}; {remedy}")
        self._is_checked = True

    def write(self, index: Index, values: NDArray[Any]) -> None:
        """Write one whole chunk, atomically.

        Raises
        ------
        StoreFullError
            If the disk is full. Nothing of the chunk is left behind.
        StoreError
            If it cannot be written for another reason, or the array's ``zarr.json`` was altered.
        """
        self.check_metadata()
        path = self.path(index)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        chunk = self._whole_chunk(index, values)
        checksum = google_crc32c.value(chunk).to_bytes(CHECKSUM_BYTES, "little")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(chunk.data)
                file.write(checksum)
            temporary.replace(path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            if error.errno in _DISK_FULL:
                raise StoreFullError(
                    f"the disk is full: {format_bytes(free_disk(self.root))} free, "
                    f"{format_bytes(self.layout.chunk_bytes)} needed for {self.describe(index)}"
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

    def read(self, index: Index) -> NDArray[Any]:
        """Read one chunk and check it, shape as :meth:`ArrayLayout.region` says.

        Raises
        ------
        TileError
            If the chunk is missing, has a wrong size, or fails its checksum; the message names it.
        """
        layout = self.layout
        try:
            raw = self.path(index).read_bytes()
        except FileNotFoundError:
            raise TileError(f"{self.describe(index)} is missing: not computed yet, or deleted") from None
        except OSError as error:
            raise TileError(f"{self.describe(index)} cannot be read: {error}") from error
        if len(raw) != layout.chunk_bytes:
            raise TileError(
                f"{self.describe(index)} has {len(raw)} bytes; needed {layout.chunk_bytes}: truncated. Run "
                "again: it is recomputed"
            )
        payload = np.frombuffer(raw, np.uint8)[:-CHECKSUM_BYTES]
        if google_crc32c.value(payload).to_bytes(CHECKSUM_BYTES, "little") != raw[-CHECKSUM_BYTES:]:
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


def _create(store: str | MemoryStore, layout: ArrayLayout) -> zarr.Array[Any]:
    return zarr.create_array(
        store,
        name=layout.name,
        shape=layout.shape,
        chunks=layout.chunks,
        dtype=layout.dtype,
        fill_value=layout.fill_value,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        dimension_names=layout.dimensions,
        config={"write_empty_chunks": True},
    )


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Every file below ``folder`` with its size; what vanishes meanwhile is passed over."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            with contextlib.suppress(FileNotFoundError):
                yield Path(entry.path), entry.stat().st_size


class Store:
    """A store that exists: its manifest, its arrays, its results."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self.arrays = {name: StoredArray(root, layout) for name, layout in layouts(manifest).items()}

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Open a store; reads its manifest and nothing else.

        Raises
        ------
        StoreNotFoundError
            If there is nothing at the path.
        StoreError
            If what is there is not a kernel store, or its manifest is damaged.
        """
        root = local_path(path)
        try:
            text = (root / "zarr.json").read_text()
        except FileNotFoundError:
            what = "holds no Zarr group" if root.exists() else "does not exist"
            raise StoreNotFoundError(f"{root} {what}; needed the path of a kernel store") from None
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"cannot read {root / 'zarr.json'}: {error}") from error
        try:
            attributes = json.loads(text)["attributes"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{root / 'zarr.json'} is damaged or no Zarr v3 group: {error!r}") from error
        value = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
        return cls(root, from_attribute(value, str(root)))

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> "Store":
        """Create a store, or open the one that another process created a moment ago.

        The group and its manifest appear in one atomic step, and the first process wins: callers compare the
        manifest they get with the one they asked for.
        """
        root = local_path(path)
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            temporary = root / f"zarr.json.{uuid.uuid4().hex}.partial"
            try:
                temporary.write_text(_group_document({ATTRIBUTE: manifest.to_attribute()}))
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, root / "zarr.json")
            finally:
                temporary.unlink(missing_ok=True)
        store = cls.open(root)
        store.complete_layout()
        return store

    def complete_layout(self) -> None:
        """Create the arrays that are missing, as after a kill during creation.

        Raises
        ------
        StoreError
            If the ``zarr.json`` of one that is there is damaged or was altered.
        """
        for array in self.arrays.values():
            array.create()

    def partials(self) -> list[Path]:
        """Files that killed writers left behind; harmless, and never read."""
        return sorted(path for path, _ in _files(self.root) if path.name.endswith(".partial"))

    def missing(self) -> dict[str, list[Index]]:
        """Missing chunks of each array that has any."""
        found = {name: array.missing() for name, array in self.arrays.items()}
        return {name: indices for name, indices in found.items() if indices}

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the store from being replaced (``mode="w"``) while it is written; any number of writers may.

        At the end the last writer removes the partial files that killed ones left behind.

        Raises
        ------
        StoreError
            If it was replaced since it was opened.
        """
        with _writing(self.root):
            file = (self.root / "zarr.json").open("rb")
        with file:
            with _writing(self.root):
                fcntl.flock(file, fcntl.LOCK_SH)
            if Store.open(self.root).manifest != self.manifest:
                raise StoreError(f"{self.root} was replaced by another run after this one opened it; run again")
            try:
                yield
            finally:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    for path in self.partials():
                        path.unlink(missing_ok=True)

    def is_writable(self) -> bool:
        """Whether this process may write below the root."""
        return os.access(self.root, os.W_OK)

    def write_result(self, name: str, result: Mapping[str, Any]) -> None:
        """Store a JSON result below ``results/name``, with the digest of the manifest that it came from."""
        folder = self.root / "results"
        with _writing(self.root):
            for part in ("", *name.split("/")[:-1]):
                folder = folder / part
                if not (folder / "zarr.json").exists():
                    _write_group(folder, {})
            attributes = {"result": dict(result), "manifest_digest": self.manifest.digest()}
            _write_group(self.root / "results" / name, attributes)

    def read_results(self, folder: str) -> list[dict[str, Any]]:
        """Every result below ``results/folder``, by name."""
        names = sorted(path.parent.name for path in (self.root / "results" / folder).glob("*/zarr.json"))
        found = [self.read_result(f"{folder}/{name}") for name in names]
        return [result for result in found if result is not None]

    def read_result(self, name: str) -> dict[str, Any] | None:
        """Read a stored result; none if there is none or it came from another manifest."""
        try:
            attributes = json.loads((self.root / "results" / name / "zarr.json").read_text())["attributes"]
            result, digest = dict(attributes["result"]), attributes["manifest_digest"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"results/{name} of {self.root} is damaged: {error!r}") from error
        return result if digest == self.manifest.digest() else None


def _group_document(attributes: dict[str, Any]) -> str:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1)


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    """Write a Zarr group of attributes alone, in one atomic step: other processes may write the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"zarr.json.{uuid.uuid4().hex}.partial"
    try:
        temporary.write_text(_group_document(attributes))
        temporary.replace(folder / "zarr.json")
    finally:
        temporary.unlink(missing_ok=True)


def prepare_path(path: str | Path, mode: Mode) -> Store | None:
    """Apply ``mode`` to what is at the path: the store to resume, or none where one may be created.

    Raises
    ------
    StoreExistsError
        With ``w-`` if a store is there; with any mode if something else is there.
    StoreError
        If what is at the path cannot be read.
    """
    root = local_path(path)
    try:
        is_store = (root / "zarr.json").exists()
    except OSError as error:
        raise StoreError(f"cannot read {root}: {error}") from error
    if not is_store:
        if root.is_dir() and all(name.endswith(".partial") for name in os.listdir(root)):
            return None
        if root.exists():
            raise StoreExistsError(f"{root} exists and is not a kernel store; choose another path")
        return None
    if mode == "w-":
        raise StoreExistsError(f"{root} exists and mode='w-' only creates; use mode='a' to resume or 'w' to start over")
    if mode == "a":
        return Store.open(root)
    _remove(root)
    return None


def _remove(root: Path) -> None:
    """Remove a store in a way that never leaves half of one at its path; anything but a store is refused."""
    try:
        is_ours = ATTRIBUTE in json.loads((root / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise StoreExistsError(f"{root} is not a kernel store, so mode='w' does not remove it; choose another path")
    if root.is_symlink():
        raise StoreExistsError(f"{root} is a symbolic link, so mode='w' does not remove it; give the path it points to")
    doomed = root.with_name(f"{root.name}.{uuid.uuid4().hex}.removed")
    with _writing(root), (root / "zarr.json").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreExistsError(
                f"another run is writing to {root}, so mode='w' does not remove it; stop it, or choose another path"
            ) from None
        root.rename(doomed)
    with _writing(doomed):
        shutil.rmtree(doomed)


def local_path(path: str | Path) -> Path:
    """Return ``path`` as a local path, ``~`` expanded; URLs are refused."""
    if isinstance(path, str) and "://" in path:
        raise StoreError(f"{path!r} is a URL; this version writes stores to local paths only")
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"the store is {type(path).__name__}; needed a path")
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        if error.errno in _DISK_FULL:
            raise StoreFullError(f"the disk is full: {format_bytes(free_disk(root))} free at {root}") from error
        raise StoreError(f"cannot write to {root}: {error}") from error
