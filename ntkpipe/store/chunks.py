"""Chunks of one array: written, read and listed, each with a crc32c checksum.

Chunks are uncompressed and put whole or not at all: one of the expected size is complete, and a listing tells progress.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreError, TileError
from ntkpipe.base.paths import said
from ntkpipe.store.documents import DOCUMENT, array_difference, array_document
from ntkpipe.store.layout import CHECKSUM_BYTES, ArrayLayout, Index
from ntkpipe.store.media.medium import PIECE_BYTES, Medium, OversizeError, writing

_Checksum: Any = google_crc32c.Checksum  # it has no annotations
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")  # of a chunk along an axis, within the size of any array


class StoredArray:
    """One array of a store, read and written in verified chunks."""

    def __init__(self, medium: Medium, layout: ArrayLayout) -> None:
        self.medium = medium
        self.layout = layout
        self._document = f"{layout.name}/{DOCUMENT}"
        self._is_checked = False

    def name(self, index: Index) -> str:
        """Name of chunk ``index`` in the medium."""
        return f"{self.layout.name}/c/{'/'.join(map(str, index))}"

    def path(self, index: Index) -> Path | str:
        """Path or URL of chunk ``index``."""
        return self.medium.address(self.name(index))

    def describe(self, index: Index) -> str:
        """Describe a chunk for messages: its array, and the samples or rows that it holds."""
        region = ", ".join(f"{part.start}:{part.stop}" for part in self.layout.region(index)[:2])
        chunk = ", ".join(map(str, index))
        noun = "tile" if self.layout.grid is not None else "chunk"
        return f"{noun} ({chunk}) of {self.layout.name} (entries [{region}]) in {self.medium.root}"

    def present(self) -> set[Index]:
        """Chunks that exist with the expected size, from one listing."""
        needed, holds = self.layout.chunk_bytes, self.layout.holds
        return {index for index, size in self.sizes() if size == needed and holds(index)}

    def sizes(self) -> Iterator[tuple[Index, int]]:
        """Yield the index and size of every chunk file, whatever its size; other files are skipped."""
        prefix = f"{self.layout.name}/c"
        for name, size in self.medium.sizes(prefix):
            parts = name[len(prefix) + 1 :].split("/")
            if len(parts) == len(self.layout.chunks) and all(map(_NUMBER.fullmatch, parts)):
                yield tuple(map(int, parts)), size

    def has(self, index: Index) -> bool:
        """Whether chunk ``index`` exists with the expected size."""
        return self.medium.size(self.name(index)) == self.layout.chunk_bytes

    def missing(self) -> list[Index]:
        """Chunks that are missing from a complete array, in order."""
        present = self.present()
        return [index for index in self.layout.indices() if index not in present]

    def create(self) -> None:
        """Write ``zarr.json`` if there is none, else check it; chunks are left as they are."""
        if self.medium.size(self._document) is None:
            with writing(self.medium):
                self.medium.put_new(self._document, array_document(self.layout))
        self.check_metadata()

    def replace_metadata(self) -> None:
        """Replace ``zarr.json``, whatever it holds; chunks are left as they are."""
        with writing(self.medium):
            self.medium.put(self._document, array_document(self.layout))

    def check_metadata(self) -> None:
        """Check once that ``zarr.json`` is what this package writes, so that any Zarr reader sees the same entries."""
        if self._is_checked:
            return
        where = f"{self._document} in {self.medium.root}"
        remedy = "delete that file and run again: it is written anew, and every chunk is kept"
        try:
            difference = array_difference(self.medium.get(self._document), array_document(self.layout), where)
        except FileNotFoundError:
            raise StoreError(f"{where} is missing; run again: it is written, and every chunk is kept") from None
        except OSError as error:
            raise StoreError(f"{where} is damaged ({said(error)}); {remedy}") from error
        if difference is not None:
            raise StoreError(f"{where} was altered: {difference}; {remedy}")
        self._is_checked = True

    def write(self, index: Index, values: NDArray[Any]) -> None:
        """Write one whole chunk, atomically; values of a ragged one are padded with the fill value."""
        self.check_metadata()
        layout, dtype = self.layout, self.layout.dtype.newbyteorder("<")
        chunk = values
        if values.shape != layout.chunks or values.dtype != dtype or not values.flags.c_contiguous:
            shape = tuple(part.stop - part.start for part in layout.region(index))
            assert values.shape == shape, f"{values.shape} is not the shape {shape} of the chunk"
            chunk = np.full(layout.chunks, layout.fill_value, dtype)  # not by Zarr, which would copy three times
            chunk[tuple(map(slice, shape))] = values
        raw, checksum = chunk.reshape(-1).view(np.uint8), _Checksum()
        raw.flags.writeable = False
        for start in range(0, len(raw), PIECE_BYTES):  # in pieces: the library blocks other threads
            checksum.update(raw[start : start + PIECE_BYTES])
        with writing(self.medium, self.describe(index), layout.chunk_bytes):
            self.medium.put(self.name(index), raw.data, checksum.digest()[::-1])  # stored little-endian

    def read(self, index: Index, buffer: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        """Read and verify one chunk, cut at the array's end as in :meth:`ArrayLayout.region`."""
        layout = self.layout
        buffer = np.empty(layout.chunk_bytes, np.uint8) if buffer is None else buffer
        payload, checksum = buffer[: layout.chunk_bytes - CHECKSUM_BYTES], _Checksum()
        payload.flags.writeable = False
        try:
            count = self.medium.get_into(
                self.name(index), buffer.data, lambda start, stop: checksum.update(payload[start:stop])
            )
        except FileNotFoundError:
            raise TileError(f"{self.describe(index)} is missing: not computed yet, or deleted") from None
        except OversizeError as error:
            count = error.size
        except OSError as error:
            raise TileError(f"{self.describe(index)} cannot be read: {said(error)}") from error
        if count != layout.chunk_bytes:
            remedy = ": truncated. Run" if count < layout.chunk_bytes else f". Delete {self.path(index)} and run"
            found = f"{self.describe(index)} has {count} bytes; needed {layout.chunk_bytes}"
            raise TileError(f"{found}{remedy} again: it is recomputed")
        if checksum.digest()[::-1] != buffer[len(payload) : count].tobytes():
            raise TileError(
                f"{self.describe(index)} fails its crc32c checksum: its bytes were altered. Delete {self.path(index)} "
                "and run again: it is recomputed"
            )
        chunk = payload.view(layout.dtype.newbyteorder("<")).reshape(layout.chunks)
        return chunk[tuple(slice(part.stop - part.start) for part in layout.region(index))]

    def read_samples(self, start: int, stop: int) -> NDArray[Any]:
        """Read entries ``start:stop`` of the first axis of an array that is chunked along that axis only."""
        size, rest = self.layout.chunks[0], (0,) * (len(self.layout.chunks) - 1)
        numbers = range(start // size, -(-stop // size))
        parts = [self.read((i, *rest))[max(start - i * size, 0) : stop - i * size] for i in numbers]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def require_complete(arrays: Iterable[StoredArray], then: str) -> None:
    """Raise TileError, which names the first chunk, if chunks of some arrays are missing."""
    if missing := [(array, index) for array in arrays for index in array.missing()]:
        array, index = missing[0]
        others = f"{len(missing) - 1} other chunks"
        raise TileError(f"{array.describe(index)} is missing, and {others}: finish the run before {then}")
