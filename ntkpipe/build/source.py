"""Sources of tiles: what a store is written from. A model is one, another store is one, a formula may be one."""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, NonFiniteError, TileError
from ntkpipe.base.grid import Span
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.growth import ChunkKey, OldEntries
from ntkpipe.store.layout import Index, layouts, planes
from ntkpipe.store.manifest import DataRecord, Manifest
from ntkpipe.store.media.medium import Medium
from ntkpipe.store.store import Store

_KERNELS = ("kernel/train", "kernel/test_train", "kernel/test_diagonal")

Vector = NDArray[np.float64]
Products = dict[tuple[int | None, int | None, str], Vector]  # by group (None: all), output (None: not apart) and split


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

    def products(self, signs: Vector, step: Callable[[], None]) -> Products:
        """Every kernel times a vector, found in another way than its tiles are: what certifies a store."""
        raise ConfigError(f"{type(self).__name__} has no certificate")


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
                for name, values in zip(names, self.planes(kernel, spans[0], spans[is_kernel]), strict=True):
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
