"""Growth: add samples to a store while every stored entry keeps its bits.

Tiles at a ragged edge are recomputed with more entries, and other batches may round differently: copies below
``growth/`` keep the old entries until they are pasted in. The steps, after each of which the process may crash:

1. copy the chunks at the ragged edge, verifying their checksums;
2. delete these chunks; from now on the store is incomplete, and reading reports that;
3. write the new shape into ``zarr.json`` of each array;
4. replace the manifest atomically; an earlier crash means undoing the growth, a later one resuming it;
5. compute missing chunks as in any run, then remove the copies.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from numpy.typing import NDArray

from ntkpipe.base.errors import StoreError, TileError
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.documents import group_document
from ntkpipe.store.layout import ArrayLayout, Index, layouts
from ntkpipe.store.manifest import Manifest
from ntkpipe.store.store import Store, read_group

ChunkKey = tuple[str, Index]  # name of the array, and index of the chunk

_FOLDER = "growth"
_RECORD = f"{_FOLDER}/zarr.json"


# A growth that is `begun` was cut short before the manifest was replaced: what was dropped is put back from the copies.
# One that is `resumable` has given the store its new size; tiles are missing.
State = Literal["none", "begun", "resumable"]


def state_of(store: Store) -> State:
    """Read the progress of a growth from one small file."""
    attributes = read_group(store.medium, _FOLDER)
    if attributes is None:
        return "none"
    digest = store.manifest.digest()
    if attributes.get("after") == digest:
        return "resumable"
    if attributes.get("before") == digest:
        return "begun"
    raise StoreError(f"{_RECORD} of {store.root} is damaged: it belongs to another manifest than the store's")


def is_larger(stored: Manifest, asked: Manifest) -> bool:
    """Whether more train or test samples are asked for than are stored, and of neither set fewer."""
    before, after = (
        (manifest.train.num_samples, manifest.test.num_samples if manifest.test else 0) for manifest in (stored, asked)
    )
    return before != after and before[0] <= after[0] and before[1] <= after[1]


def ragged(before: Manifest, after: Manifest) -> frozenset[ChunkKey]:
    """Chunks that hold more entries after a growth than before, or have another shape."""
    new = layouts(after)
    return frozenset((name, index) for name, old in layouts(before).items() for index in _ragged(old, new[name]))


def _ragged(old: ArrayLayout, new: ArrayLayout) -> Iterator[Index]:
    if old.chunks != new.chunks:  # few samples in one chunk, which becomes larger
        yield from old.indices()
        return
    for axis, (size, wanted, chunk) in enumerate(zip(old.shape, new.shape, old.chunks, strict=True)):
        if size != wanted and size % chunk:
            edge = [range(count) if other != axis else (count - 1,) for other, count in enumerate(old.chunk_counts)]
            yield from (index for index in product(*edge) if old.grid is None or old.grid.is_stored(*index))


def aside(store: Store, before: Manifest) -> dict[str, StoredArray]:
    """Arrays that hold copies of chunks as under an earlier manifest, by the name of the original array."""
    folder, found = f"{_FOLDER}/{len(before.growth)}", layouts(before).items()
    return {name: StoredArray(store.medium, replace(layout, name=f"{folder}/{name}")) for name, layout in found}


@dataclass(frozen=True)
class OldEntries:
    """Old entries of chunks that a growth enlarges."""

    copies: Mapping[ChunkKey, StoredArray] = field(default_factory=dict)  # where the copy of each chunk is

    @classmethod
    def of(cls, store: Store, earlier: tuple[Manifest, ...]) -> "OldEntries":
        """Find the copies in a store from its earlier manifests; those of the latest growth count."""
        if next(store.medium.sizes(_FOLDER), None) is None:
            return cls()
        every = (item for before in earlier for item in aside(store, before).items())
        return cls({(name, index): array for name, array in every for index in sorted(array.present())})

    def paste(self, array: str, index: Index, values: NDArray[Any]) -> None:
        """Overwrite the leading entries of a new chunk with its old entries, if any."""
        if copy := self.copies.get((array, index)):
            old = copy.read(index)
            values[tuple(map(slice, old.shape))] = old


def begin(store: Store, after: Manifest) -> Store:
    """Do steps 1 to 4: give a store with a complete ragged edge its new size."""
    chunks = sorted(ragged(store.manifest, after))
    grown = Store(store.medium, after)
    with store.exclusive("it cannot grow"):
        kept = aside(store, store.manifest)
        store.medium.put(_RECORD, group_document({"before": store.manifest.digest(), "after": after.digest()}))
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
    """Restore a store if a growth was interrupted before its manifest was replaced; return whether it was."""
    if state_of(store) != "begun":
        return False
    with store.exclusive("it cannot grow"):
        for array in store.arrays.values():
            array.replace_metadata()
        for (name, index), copy in OldEntries.of(store, (store.manifest,)).copies.items():
            if not store.arrays[name].has(index):
                store.arrays[name].write(index, copy.read(index))
        _clear(store)
    return True


def end_growth(store: Store) -> bool:
    """Call :func:`finish` on a store that this process does not use; return whether that ended a growth."""
    if state_of(store) != "resumable":
        return False
    with store.in_use():
        finish(store)
    return state_of(store) == "none"


def finish(store: Store) -> None:
    """Remove the copies of old entries once all their chunks exist and agree with them."""
    if next(store.medium.sizes(_FOLDER), None) is None:
        return
    is_grown = state_of(store) == "resumable"  # else leftovers of a repair
    kept = OldEntries.of(store, store.manifest.earlier() if is_grown else ())
    for (name, index), copy in kept.copies.items():
        array = store.arrays[name]
        if not array.has(index):
            return
        old, found = copy.read(index), array.read(index)
        part = found[tuple(map(slice, old.shape))]
        if array.layout.count_bad(found) or part.tobytes() != old.tobytes():
            raise TileError(
                f"{array.describe(index)} does not hold what it held before the store grew, or not all of it is "
                f"finite: another program wrote it. Delete {array.path(index)} and run again: it is recomputed"
            )
    _clear(store)


def _clear(store: Store) -> None:
    """Remove all copies, and the record of the growth last."""
    copies = {"/".join(name.split("/")[:2]) for name, _ in store.medium.sizes(_FOLDER)} - {_RECORD}
    for level in sorted(copies):
        store.medium.delete_below(level)
    store.medium.delete_below(_FOLDER)
