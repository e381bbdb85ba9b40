"""Other kinds of kernel from a stored one, without the model, by reducing its S x S blocks tile by tile."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arguments import checked
from ntkpipe.base.errors import ConfigError, NonFiniteError, StoreError, StoreMismatchError
from ntkpipe.base.kinds import Kind, get_kind
from ntkpipe.base.planes import array_of, prefix_of
from ntkpipe.base.progress import Ticks
from ntkpipe.store.chunks import StoredArray, require_complete
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.layout import Index
from ntkpipe.store.manifest import DerivedRecord, Manifest, differences
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.store import Store, prepare_path

# Source kind → kinds derived from it; all others need pairs of outputs that are not stored.
_SOURCES = {"ntk": ("pntk", "trace", "diagonal", "output:k"), "diagonal": ("trace", "output:k")}
_KERNELS = ("kernel/train", "kernel/test_train", "kernel/test_diagonal")


@checked
def derive_kernel(
    store: "str | Path | KernelStore", *, kind: str, to: str | Path, samples: bool = False, progress: bool = True
) -> KernelStore:
    """Write the store of another kind, derived from a stored kernel; needs neither the model nor torch.

    ``pntk``, ``trace``, ``diagonal`` and ``output:k`` come from ``ntk``; ``trace`` and ``output:k`` from ``diagonal``.
    Groups are derived, too. Sums over outputs are float64. The result equals that of a direct run up to the rounding of
    the stored entries, which for ``pntk`` is relative to the largest kernel of an output: where outputs cancel, as
    softmax outputs do, their sum may have few correct digits.

    The new store is complete and verifiable by itself. Outputs and targets are copied. Samples are copied on request
    only; without them, :func:`ntkpipe.verify` with a model must be given ``inputs`` (and ``test_inputs``), as a
    workflow file does. Every chunk of the source is read and its checksum verified once; memory is one of its tiles and
    what is derived from it. Existing chunks at ``to`` stay, so the same call resumes.

    Parameters
    ----------
    store
        The complete source: path, URL, or an open store.
    kind
        Kind to derive: ``"pntk"``, ``"trace"``, ``"diagonal"`` or ``"output:k"``.
    to
        Path or URL of the new store.
    samples
        Copy the samples, too: a certificate needs them, or a workflow file.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    The new store, open for reading.

    Raises
    ------
    ConfigError
        If the kind cannot be derived from the source without loss.
    TileError, NonFiniteError
        If the source is incomplete or damaged, or sums over outputs overflow its dtype; the message names a tile.
    StoreExistsError, StoreMismatchError
        If something else is at ``to``.
    ResourceError, StoreFullError
        If there is too little disk space; finished chunks are kept.
    StoreError
        If the source was changed meanwhile, or cannot be read, or the new store cannot be written.
    """
    source = store if isinstance(store, KernelStore) else open_kernel(store)
    manifest = derived_manifest(source.manifest, kind, samples=samples)
    require_complete(source.store.arrays.values(), "other kinds are derived from it")
    medium = medium_at(to)
    if medium.identity() == source.store.medium.identity():
        raise ConfigError(f"{source.path} is the source; the derived store needs another path")
    existing = prepare_path(medium, "a")
    target = Store.create(medium, manifest) if existing is None else existing
    _require_same(target, manifest)
    target.complete_layout()
    missing = {name: set(indices) for name, indices in target.missing().items()}
    needed = sum(len(indices) * target.arrays[name].layout.chunk_bytes for name, indices in missing.items())
    target.medium.require_room(needed, "the derived store")
    count = sum(map(len, missing.values()))
    with target.in_use(), Ticks(count, what="derive", unit="chunk", enabled=progress) as ticks:
        for array, index, values in _chunks(source.store, target, missing):
            target.arrays[array].write(index, values)
            ticks.tick()
    if Store.open(source.store.medium).manifest.digest() != source.manifest.digest():
        raise StoreError(
            f"{source.path} was replaced or extended while it was read: remove {target.root}, which may mix both, and "
            "derive again"
        )
    return KernelStore(target)


def derived_manifest(source: Manifest, kind: str, *, samples: bool) -> Manifest:
    """The manifest of a store of ``kind`` that is derived from ``source``."""
    wanted = get_kind(kind)
    general = "output:k" if wanted.name.startswith("output:") else wanted.name
    known = _SOURCES.get(source.kind, ())
    if general not in known:
        kept = "it is that already" if general == source.kind else "its store does not hold what that needs"
        possible = f"; from it come {', '.join(known)}" if known else "; kinds are derived from 'ntk' or 'diagonal'"
        raise ConfigError(f"kind={kind!r} cannot be derived from kind {source.kind!r}: {kept}{possible}")
    wanted.covectors(source.num_outputs)  # raises if there is no such output
    if samples and source.derived is not None and not source.derived.has_samples:
        raise ConfigError("samples=True, but the source was itself derived without its samples")
    return source.model_copy(
        update={
            "kind": wanted.name,
            "convention": wanted.convention,
            "num_covectors": wanted.num_covectors(source.num_outputs),
            "derived": DerivedRecord(kind=source.kind, digest=source.digest(), has_samples=samples),
            "growth": (),
            "environment": {**source.environment, "derived": datetime.now(UTC).isoformat(timespec="seconds")},
        }
    )


def _require_same(target: Store, wanted: Manifest) -> None:
    pairs = ((field, getattr(target.manifest, field), getattr(wanted, field)) for field in ("derived", "choices"))
    found = differences(target.manifest, wanted) + tuple(pair for pair in pairs if pair[1] != pair[2])
    if found:
        raise StoreMismatchError(
            f"{target.root} holds another kernel, or one that was made in another way; what differs is "
            f"{', '.join(field for field, _, _ in found)}. Use another path",
            found,
        )


def _chunks(source: Store, target: Store, missing: dict[str, set[Index]]) -> Iterator[tuple[str, Index, NDArray[Any]]]:
    for name, stored in target.arrays.items():
        if stored.layout.grid is None and not stored.layout.holds_blocks:
            for index in sorted(missing.get(name, ())):
                yield name, index, source.arrays[name].read(index)
    kind, manifest = get_kind(target.manifest.kind), target.manifest
    outputs = [*range(manifest.num_outputs)] if kind.pairs == "same" else [None]
    for group in (None, *manifest.groups):
        for name in _KERNELS:
            arrays = {output: array_of(prefix_of(group, output), name) for output in outputs}
            wanted = set().union(*(missing.get(array, ()) for array in arrays.values()))
            for index in sorted(wanted):
                blocks = _Blocks(source, group, name, index)
                for output, array in arrays.items():
                    if index in missing.get(array, ()):
                        layout = target.arrays[array].layout
                        values = _as_stored(_reduce(blocks, kind, output), target.arrays[array], index)
                        if layout.grid is not None and layout.grid.symmetric and index[0] == index[1]:
                            # Sums over transposed blocks run in another order, so mirror them.
                            values = np.triu(values) + np.triu(values, 1).T
                        yield array, index, values if layout.grid is not None else values[:, :, None]


def _as_stored(values: NDArray[Any], array: StoredArray, index: Index) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # an overflow is reported below, with its tile
        found = values.astype(array.layout.dtype)
    if not np.isfinite(found).all():
        raise NonFiniteError(
            f"{array.describe(index)} would have entries that are NaN or infinite: verify the source; where sums over "
            f"outputs overflow {array.layout.dtype}, compute it anew with store_dtype='float64'"
        )
    return found


@dataclass(frozen=True)
class _Blocks:
    """A chunk of the source as blocks of pairs of outputs; each array is read at most once, on demand."""

    source: Store
    group: str | None  # group of parameters
    name: str  # array of the kernel
    index: Index

    def _read(self, output: int | None) -> NDArray[Any]:
        values = self.source.arrays[array_of(prefix_of(self.group, output), self.name)].read(self.index)
        # A test_diagonal becomes a kernel with a single column of samples.
        return values.reshape(-1, values.shape[-1]) if values.ndim == 3 else values

    @cached_property
    def whole(self) -> NDArray[Any]:
        """All pairs of outputs, shape (n, O, m, O), if the source stores them."""
        values, count = self._read(None), self.source.manifest.num_outputs
        return values.reshape(len(values) // count, count, -1, count)

    def equal(self, output: int) -> NDArray[Any]:
        """Entries for an output with itself, shape (n, m)."""
        if get_kind(self.source.manifest.kind).pairs == "same":
            return self._read(output)
        return self.whole[:, output, :, output]


def _reduce(blocks: _Blocks, kind: Kind, output: int | None) -> NDArray[Any]:
    """Reduce blocks to entries of a kind, shape (n, m); sums are float64."""
    count = blocks.source.manifest.num_outputs
    if kind.name == "pntk":
        total: NDArray[np.float64] = blocks.whole.sum(axis=(1, 3), dtype=np.float64)
        return total / count
    if kind.name == "trace":
        total = blocks.equal(0).astype(np.float64)
        for number in range(1, count):
            total += blocks.equal(number)
        return total / count
    if output is None:
        (output,) = np.flatnonzero(kind.covectors(count)[0]).tolist()
    return blocks.equal(output)
