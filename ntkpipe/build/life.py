"""The life of a store: the sources it is written from, what is at a path, and the one operation that writes it."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, Interrupted, NonFiniteError, StoreFullError, StoreMismatchError, TileError
from ntkpipe.base.grid import Span
from ntkpipe.base.paths import said
from ntkpipe.base.progress import Phase, show_progress
from ntkpipe.store import growth
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.growth import ChunkKey, OldEntries, aside, ragged
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.layout import Index, layouts, planes
from ntkpipe.store.manifest import DataRecord, Manifest, differences
from ntkpipe.store.media.medium import Medium
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.store import Mode, Store, is_taken, prepare_path

_KERNELS = ("kernel/train", "kernel/test_train", "kernel/test_diagonal")

Vector = NDArray[np.float64]
Key = tuple[int | None, int | None, str]  # group (None: all), output (None: not apart) and split
Products = dict[Key, Vector]


class RowProducts(Protocol):
    """Every kernel times a vector at a few rows, or summed over some, by gradients of rows alone or by formulas."""

    by_tolerance: ClassVar[bool] = False  # whether rows are few, so that none stands out from the others

    def words(self) -> Mapping[str, Any]:
        """What a certificate says of them."""
        return {"by_backward": True}

    def bundles(self, split: str) -> NDArray[np.int64]:
        """A label for each row; sums over the rows of a label cost about as much as tiles of their samples."""

    def sums(self, labels: Mapping[str, NDArray[np.int64]]) -> Products:
        """Sums over the rows with each label, but those with a negative one, for each split that is given."""


@dataclass(frozen=True)
class StoreSink:
    """Chunks go to a store."""

    arrays: Mapping[str, StoredArray]
    wanted: frozenset[ChunkKey] | None = None  # chunks to compute even if they exist; None: all that are missing
    kept: OldEntries = field(default_factory=OldEntries)  # old entries that a growth must not change

    def exists(self, array: str, index: Index) -> bool:
        """Whether the chunk need not be computed: it has its full size, or is not wanted."""
        return self.arrays[array].has(index) if self.wanted is None else (array, index) not in self.wanted

    def place(self, array: str, index: Index) -> None:
        """None: tiles are computed in buffers, and written when they are complete."""

    def write(self, array: str, index: Index, values: NDArray[Any]) -> None:
        """Write the chunk atomically; entries from before a growth first replace those in ``values``."""
        stored = self.arrays[array]
        try:
            self.kept.paste(array, index, values)
        except TileError:
            if self.wanted is None and stored.has(index):  # another run has written it and cleared up
                return
            raise
        stored.write(index, values)


@dataclass(frozen=True)
class Work:
    """What is to be written at a path, known before anything is."""

    medium: Medium
    existing: Store | None  # none: a store is created, with the choices of the source
    manifest: Manifest  # that the store has in the end
    left: Mapping[str, int]  # chunks to write of each array

    @property
    def num_bytes(self) -> int:
        """Bytes to write."""
        return sum(self.left.get(name, 0) * layout.chunk_bytes for name, layout in layouts(self.manifest).items())


class TileSource(Protocol):
    """What the chunks of a store come from; see :class:`PlaneSource` for one that needs no more than a formula."""

    manifest: Manifest  # all that decides the numbers; its choices are recorded in a store that it creates

    def data(self, array: StoredArray, index: Index) -> NDArray[Any] | None:
        """A chunk of samples, targets or outputs; None if it comes with the tiles."""

    def first(self, stored: Manifest) -> tuple[DataRecord, DataRecord | None]:
        """Records of the first samples, as many of each set as a manifest has; a store grows by those after them."""
        return stored.train, stored.test

    def require_same_function(self, store: Store, doubted: frozenset[ChunkKey] = frozenset()) -> None:
        """Check that entries of a store, but for doubted chunks, are those that would be computed now."""
        return

    def settle(self, work: Work) -> Self:
        """Plan the work by what it costs, and raise where it does not fit; ``manifest`` has final choices then."""
        work.medium.require_room(work.num_bytes, "the store")
        return self

    def run(self, store: Store, manifest: Manifest, sink: StoreSink) -> Generator[object, None, None]:
        """Write the missing tiles of a store, or of one with an earlier manifest, and yield once for each."""
        raise NotImplementedError

    def num_steps(self) -> int:
        """Calls of ``step`` by :meth:`products`."""
        return 0

    def products(self, signs: Vector, step: Callable[[], None]) -> Products | None:
        """Every kernel times a vector, found in another way than its tiles are: what certifies a store."""
        raise ConfigError(f"{type(self).__name__} has no certificate")

    def row_products(self, signs: Vector, progress: bool) -> RowProducts | None:
        """The same row by row, where :meth:`products` has none or may be of something else."""
        return None


class PlaneSource(TileSource, Protocol):
    """Tiles are computed one by one, by this thread."""

    def planes(self, kernel: str, rows: Span, columns: Span) -> Iterable[NDArray[Any]]:
        """Entries of each plane in turn; of a ``test_diagonal`` the block of each sample of ``rows`` with itself."""
        raise NotImplementedError

    def run(self, store: Store, manifest: Manifest, sink: StoreSink) -> Generator[str, None, None]:
        """See :meth:`TileSource.run`."""
        for kernel in _KERNELS if manifest.test else _KERNELS[:1]:
            names = [plane.array(kernel) for plane in planes(manifest)]
            layout = sink.arrays[names[0]].layout
            is_kernel, width = layout.grid is not None, 1 if layout.grid is None else manifest.num_covectors
            for index in layout.indices():
                missing = {name for name in names if not sink.exists(name, index)}
                if not missing:
                    continue
                spans = [Span(part.start // width, part.stop // width) for part in layout.region(index)]
                found = self.planes(kernel, spans[0], spans[1] if is_kernel else spans[0])
                for name, values in zip(names, found, strict=True):
                    if name in missing:
                        sink.write(name, index, _as_stored(values, sink.arrays[name], index))
                        if is_kernel:
                            yield name


def _as_stored(values: NDArray[Any], array: StoredArray, index: Index) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # an overflow is reported below, with its tile
        found: NDArray[Any] = values.astype(array.layout.dtype)
    if not np.isfinite(found).all():
        raise NonFiniteError(
            f"{array.describe(index)} would have entries that are NaN or infinite: verify what it is made from; where "
            f"sums overflow {array.layout.dtype}, compute it anew with store_dtype='float64'"
        )
    if array.layout.grid is not None and array.layout.grid.symmetric and index[0] == index[1]:
        found = np.triu(found) + np.triu(found, 1).T  # sums over transposed entries may run in another order
    return found


@dataclass(frozen=True)
class Place:
    """A path, and what may be done there."""

    medium: Medium
    existing: Store | None  # to go on with
    starts_over: bool = False  # whether what is there is removed, once a new store is certain
    grows: bool = False  # whether samples may be added

    @classmethod
    def at(cls, where: str | Path, mode: Mode = "a", *, grow: bool = False) -> "Place":
        """Look at a path; changes nothing there."""
        if grow and mode != "a":
            raise ConfigError(
                f"grow=True adds samples to the store that is there, mode={mode!r} needs none; use mode='a'"
            )
        medium = medium_at(where)
        if mode == "w":
            is_taken(medium)
            return cls(medium, None, starts_over=True)
        return cls(medium, prepare_path(medium, mode), grows=grow)

    def work(self, source: TileSource) -> Work:
        """Decide what a source is to write here: a new store, what a store lacks, or more samples."""
        existing, asked = self.existing, source.manifest
        if existing is None:
            return Work(self.medium, None, asked, {name: each.num_chunks for name, each in layouts(asked).items()})
        manifest = existing.manifest
        if self.grows and growth.is_larger(manifest, asked):
            manifest = manifest.grown(asked.train, asked.test, asked.environment)
            _require_beginning(existing, source)
        else:
            require_same(existing, asked)
        edge = Counter(name for name, index in ragged(existing.manifest, manifest) if existing.arrays[name].has(index))
        left = {}
        for name, array in Store(self.medium, manifest).arrays.items():
            is_recut = name in existing.arrays and existing.arrays[name].layout.chunks != array.layout.chunks
            left[name] = array.layout.num_chunks if is_recut else len(array.missing()) + edge[name]
        if any(left.values()) and manifest.derived is not None and asked.derived is None:
            kind, what = manifest.derived.kind, "is not complete"
            if manifest != existing.manifest:
                what = "does not grow by itself: grow its source, and derive to another path"
            raise StoreMismatchError(
                f"{existing.root} is derived from a store of kind {kind!r} and {what}; go on with ntkpipe derive, or "
                "use mode='w' to compute it from the model",
                (("derived", manifest.derived.model_dump(), None),),
            )
        return Work(self.medium, existing, manifest, left)


def fill(place: Place, source: TileSource, *, progress: bool) -> Store:
    """Create, resume or grow: make the store at a place hold all that a source has."""
    if place.existing is not None:
        growth.undo_cut_growth(place.existing)
    work, store = place.work(source), place.existing
    if store is None:
        settled = _settled(source, work, progress)
        if place.starts_over:
            prepare_path(place.medium, "w")
        store = Store.create(place.medium, settled.manifest)
        require_same(store, settled.manifest)
        if store.manifest.choices != settled.manifest.choices:  # another run has created it meanwhile: go on with that
            return fill(replace(place, existing=store), source, progress=progress)
    else:
        source.require_same_function(store)
        store.complete_layout()
        if not any(work.left.values()):
            growth.end_growth(store)
            return store
        settled = _settled(source, work, progress)
        if work.manifest != store.manifest:
            # What is stored then depends only on the manifest and its history, not on when runs were interrupted.
            old = OldEntries.of(store, store.manifest.earlier())
            needed = ragged(store.manifest, work.manifest).union(old.copies)
            wanted = {(name, index) for name, index in needed if not store.arrays[name].has(index)}
            if wanted:
                data = (name for name in store.arrays if name.startswith(("samples/", "targets/")))
                wanted |= {(name, index) for name in data for index in store.arrays[name].missing()}
                _write(store, settled, progress=progress, wanted=frozenset(wanted))
            growth.end_growth(store)
            store = growth.begin(store, work.manifest)
            store.complete_layout()
    _write(store, settled, progress=progress)
    return store


def rewrite(store: Store, chunks: frozenset[ChunkKey], source: TileSource, *, progress: bool) -> None:
    """Repair: write chunks again, each with the bits that it had, and replace them one by one."""
    source.require_same_function(store, chunks)
    store.complete_layout()
    with store.in_use():
        tiles = chunks - _write_data(store, source, chunks)
    if not tiles:
        return
    work = Work(store.medium, store, store.manifest, Counter(name for name, _ in tiles))
    settled = _settled(source, work, progress)
    # A tile at the former edge of a store that grew has entries from before and after: the earlier come first, aside.
    for before, after in pairwise((*store.manifest.earlier(), store.manifest)):
        arrays = aside(store, before)
        wanted = {(name, index) for name, index in tiles & ragged(before, after) if not arrays[name].has(index)}
        if wanted:
            for name in {name for name, _ in wanted}:
                arrays[name].create()
            _write(store, settled, progress=progress, wanted=frozenset(wanted), before=before)
    _write(store, settled, progress=progress, wanted=tiles)


def _settled(source: TileSource, work: Work, progress: bool) -> TileSource:
    with Phase("plan and self-check", enabled=progress):
        return source.settle(work)


def _write(
    store: Store,
    source: TileSource,
    *,
    progress: bool,
    wanted: frozenset[ChunkKey] | None = None,
    before: Manifest | None = None,
) -> None:
    """Write wanted chunks of a store, or aside as they were under an earlier manifest; or all that are left."""
    manifest, arrays = (store.manifest, store.arrays) if before is None else (before, aside(store, before))
    sink = StoreSink(arrays, wanted, OldEntries.of(store, manifest.earlier()))
    if wanted is None:
        found = KernelStore(store).progress
        total, done = found.tiles_total, found.tiles_done
    else:
        total, done = sum(arrays[name].layout.grid is not None for name, _ in wanted), 0
    running = source.run(store, manifest, sink)
    try:
        # Mark the store as in use before writing: another run that ends meanwhile removes unused partial files.
        with store.in_use():
            if before is None:
                _write_data(store, source, wanted)
            with closing(running):
                drain(running, total, done, manifest.kind if progress else None)
            if before is None:
                growth.finish(store)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {_state(store)}") from error
    except StoreFullError as error:
        raise StoreFullError(f"{said(error)}. {_state(store)} once there is room") from error


def _write_data(store: Store, source: TileSource, wanted: frozenset[ChunkKey] | None) -> set[ChunkKey]:
    """Write samples, targets, and what else comes without tiles, where it is wanted or missing; returns the chunks."""
    found = set()
    for name, array in store.arrays.items():
        if array.layout.grid is None and not array.layout.holds_blocks:
            asked = array.missing() if wanted is None else sorted(index for other, index in wanted if other == name)
            for index in asked:
                if (values := source.data(array, index)) is not None:
                    array.write(index, values)
                    found.add((name, index))
    return found


def drain(tiles: Iterator[Any], total: int, done: int, what: str | None) -> None:
    """Wait for all tiles; show how many are done, if ``what`` says of what."""
    for _ in tiles if what is None else show_progress(tiles, total=total, done=done, what=what, unit="tile"):
        pass


def _state(store: Store) -> str:
    progress = KernelStore(store).progress
    done = f"{progress.tiles_done} of {progress.tiles_total} tiles are in {store.root}"
    return f"{done}; every finished tile is stored; the same call or command resumes"


def require_same(
    store: Store,
    asked: Manifest,
    what: str = "holds another kernel",
    hint: str = "Use another path, mode='w' to start over, or ask for what is stored",
) -> None:
    """Check that a store was made with exactly what is asked for; samples without a digest were not read."""
    stored = store.manifest
    found = differences(stored, asked)
    if not asked.train.inputs_digest:
        found = tuple(each for each in found if not each[0].endswith(("inputs_digest", "targets_digest")))
    if asked.derived is not None:  # its numbers are those of another store
        pairs = ((field, getattr(stored, field), getattr(asked, field)) for field in ("derived", "choices"))
        found, hint = (*found, *(pair for pair in pairs if pair[1] != pair[2])), "Use another path"
    if not found:
        return
    if growth.is_larger(stored, asked) and all(field.startswith(("train", "test")) for field, _, _ in found):
        hint = "With grow=True (run --grow) samples are added to those that are stored. " + hint
    listed = "; ".join(f"{field}: stored {_short(left)} → asked {_short(right)}" for field, left, right in found)
    raise StoreMismatchError(f"{store.root} {what}; {len(found)} fields differ: {listed}. {hint}", found)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _require_beginning(store: Store, source: TileSource) -> None:
    """Check that the store's samples and targets come first among those of a source."""
    kept = store.manifest
    train, test = source.first(kept)
    for split, stored, record in (("train", kept.train, train), ("test", kept.test, test)):
        if stored is None or record is None or not record.inputs_digest:
            continue
        digests = ("inputs_digest", "targets_digest")
        differing = [name for name in digests if getattr(record, name) != getattr(stored, name)]
        if differing and record.inputs == stored.inputs and record.targets == stored.targets:
            raise StoreMismatchError(
                f"{store.root} holds {stored.num_samples} {split} samples, which must be the first ones of those that "
                f"are asked for, but {_first_difference(store, source, split)}. Add samples at the end; or use another "
                "path, or mode='w' to start over",
                tuple((f"{split}.{name}", getattr(stored, name), getattr(record, name)) for name in differing),
            )
    require_same(store, source.manifest.model_copy(update={"train": train, "test": test}))


def _first_difference(store: Store, source: TileSource, split: str) -> str:
    found = []
    try:
        for name, array in store.arrays.items():
            for index in array.layout.indices() if name.startswith((f"samples/{split}/", f"targets/{split}")) else ():
                given, stored = source.data(array, index), array.read(index)
                differs = (stored != given).reshape(len(stored), -1).any(axis=1)
                found += [array.layout.region(index)[0].start + int(n) for n in np.flatnonzero(differs)[:1]]
    except TileError as error:
        return f"they differ ({said(error)})"
    return f"sample {min(found)} or its target differs" if found else "the bits of their zeros differ"
