"""Growth: a store gets more samples, and what it holds stays as it is, to the last bit.

Tiles at a ragged edge get more entries, so they are computed again; their old entries must not change, although other
batches may round otherwise. They are kept aside below ``growth/`` until the new tiles, with the old entries pasted in,
are there. The steps, each of which may be the last one before a crash:

1. copies of the chunks at the ragged edge are written aside, each checked against its checksum;
2. these chunks are dropped; from here on the store is incomplete, and readers say so;
3. each array's ``zarr.json`` gets the new shape;
4. the manifest is replaced, in one step, which decides: before it the growth is undone, after it resumed;
5. whatever is missing is computed, as in any run; then the copies go.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreError, TileError
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.documents import group_attributes, group_document
from ntkpipe.store.layout import ArrayLayout, Index, layouts
from ntkpipe.store.manifest import Manifest
from ntkpipe.store.store import Store

ChunkKey = tuple[str, Index]

_FOLDER = "growth"
_RECORD = f"{_FOLDER}/zarr.json"


class State(Enum):
    """How far the growth of a store is."""

    NONE = "no growth is under way"
    BEGUN = "a growth was cut short before the manifest was replaced: what was dropped is put back from the copies"
    RESUMABLE = "the store has its new size; tiles of it are missing"


def state_of(store: Store) -> State:
    """How far the growth of a store is, from one small file."""
    where = f"{_RECORD} of {store.root}"
    try:
        attributes = group_attributes(store.medium.get(_RECORD), where)
    except FileNotFoundError:
        return State.NONE
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {where}: {error}") from error
    digest = store.manifest.digest()
    if attributes.get("after") == digest:
        return State.RESUMABLE
    if attributes.get("before") == digest:
        return State.BEGUN
    raise StoreError(f"{where} is damaged: it is of another manifest than the store's")


def is_larger(stored: Manifest, asked: Manifest) -> bool:
    """Whether more samples are asked for than are stored, of either set, and of none fewer."""
    sizes = [
        (left.num_samples if left else 0, right.num_samples if right else 0)
        for left, right in ((stored.train, asked.train), (stored.test, asked.test))
    ]
    return all(left <= right for left, right in sizes) and any(left < right for left, right in sizes)


def ragged(before: Manifest, after: Manifest) -> frozenset[ChunkKey]:
    """Chunks that hold more entries after a growth than before it, or are cut otherwise."""
    new = layouts(after)
    return frozenset((name, index) for name, old in layouts(before).items() for index in _ragged(old, new[name]))


def _ragged(old: ArrayLayout, new: ArrayLayout) -> Iterator[Index]:
    if old.chunks != new.chunks:  # one chunk of a few samples gets larger
        yield from old.indices()
        return
    counts = [-(-size // chunk) for size, chunk in zip(old.shape, old.chunks, strict=True)]
    for axis, (size, wanted, chunk) in enumerate(zip(old.shape, new.shape, old.chunks, strict=True)):
        if size != wanted and size % chunk:
            edge = [range(count) if other != axis else (count - 1,) for other, count in enumerate(counts)]
            yield from (index for index in product(*edge) if old.grid is None or old.grid.is_stored(*index))


def aside(store: Store, before: Manifest) -> dict[str, StoredArray]:
    """Where chunks are kept as they were under an earlier manifest, by the array that they belong to."""
    folder = f"{_FOLDER}/{len(before.growth)}"
    return {
        name: StoredArray(store.medium, replace(layout, name=f"{folder}/{name}"))
        for name, layout in layouts(before).items()
    }


@dataclass(frozen=True)
class OldEntries:
    """Old entries of chunks that a growth makes larger."""

    # The arrays that are kept aside and the chunks that they have, the latest growth first
    levels: tuple[tuple[Mapping[str, StoredArray], frozenset[ChunkKey]], ...] = ()

    @classmethod
    def of(cls, store: Store, earlier: tuple[Manifest, ...]) -> "OldEntries":
        """What a store keeps from its earlier manifests."""
        if next(store.medium.sizes(_FOLDER), None) is None:
            return cls()
        levels = []
        for before in reversed(earlier):
            arrays = aside(store, before)
            levels.append((arrays, frozenset((name, i) for name, array in arrays.items() for i in array.present())))
        return cls(tuple(level for level in levels if level[1]))

    def chunks(self) -> frozenset[ChunkKey]:
        """Every chunk of which something is kept."""
        return frozenset().union(*(chunks for _, chunks in self.levels))

    def read(self, array: str, index: Index) -> NDArray[Any] | None:
        """The old entries of a chunk, its leading ones along every axis, or none."""
        for arrays, chunks in self.levels:
            if (array, index) in chunks:
                return arrays[array].read(index)
        return None

    def paste(self, array: str, index: Index, values: NDArray[Any]) -> None:
        """Put the old entries of a chunk, if there are any, where they belong in the new ones."""
        old = self.read(array, index)
        if old is not None:
            values[tuple(map(slice, old.shape))] = old


NO_OLD_ENTRIES = OldEntries()


def begin(store: Store, after: Manifest) -> Store:
    """Steps 1 to 4: give a store, whose ragged edge is complete, its new size."""
    chunks = sorted(ragged(store.manifest, after))
    grown = Store(store.medium, after)
    with store.exclusive("it cannot grow"):
        kept = aside(store, store.manifest)
        digests = {"before": store.manifest.digest(), "after": after.digest()}
        store.medium.put(_RECORD, group_document(digests))
        for name in {name for name, _ in chunks}:
            kept[name].create()
        try:
            for name, index in chunks:
                kept[name].write(index, store.arrays[name].read(index))
        except TileError:
            _clear(store)
            raise
        for name, index in chunks:
            store.medium.delete(store.arrays[name].name(index))
        for name, array in store.arrays.items():
            if grown.arrays[name].layout.shape != array.layout.shape:
                grown.arrays[name].replace_metadata()
        store.replace_manifest(after)
    return grown


def undo_cut_growth(store: Store) -> bool:
    """Put a store back as it was if a growth was cut short before its manifest was replaced, and say whether."""
    if state_of(store) is not State.BEGUN:
        return False
    with store.exclusive("it cannot grow"):
        kept = OldEntries.of(store, (store.manifest,))
        for array in store.arrays.values():
            array.replace_metadata()
        for name, index in sorted(kept.chunks()):
            array, values = store.arrays[name], kept.read(name, index)
            if values is not None and not array.has(index):
                array.write(index, values)
        _clear(store)
    return True


def end_growth(store: Store) -> bool:
    """As :func:`finish`, for a store that nobody uses here; says whether there was something to end, and now is not."""
    if state_of(store) is not State.RESUMABLE:
        return False
    with store.in_use():
        finish(store)
    return state_of(store) is State.NONE


def finish(store: Store) -> None:
    """Remove the copies of old entries once everything that they belong to is there and agrees."""
    if next(store.medium.sizes(_FOLDER), None) is None:
        return
    is_grown = state_of(store) is State.RESUMABLE  # else a repair has left them
    kept = OldEntries.of(store, store.manifest.earlier()) if is_grown else NO_OLD_ENTRIES
    for name, index in sorted(kept.chunks()):
        array, old = store.arrays[name], kept.read(name, index)
        if old is None or not array.has(index):
            return
        found = array.read(index)
        part = found[tuple(map(slice, old.shape))]
        is_whole = found.dtype.kind != "f" or bool(np.isfinite(found).all())
        if not (is_whole and part.tobytes() == old.tobytes()):
            raise TileError(
                f"{array.describe(index)} does not hold what it held before the store grew, or not all of it is "
                f"finite: another program wrote it. Delete {array.path(index)} and run again: it is recomputed"
            )
    _clear(store)


def _clear(store: Store) -> None:
    """Remove all copies, and at last what says that there are any."""
    copies = {"/".join(name.split("/")[:2]) for name, _ in store.medium.sizes(_FOLDER)} - {_RECORD}
    for level in sorted(copies):
        store.medium.delete_below(level)
    store.medium.delete_below(_FOLDER)
