"""Other kinds of kernel from a stored one, without the model, by reducing its S x S blocks tile by tile."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arguments import checked
from ntkpipe.base.errors import ConfigError, StoreError
from ntkpipe.base.grid import Span
from ntkpipe.base.kinds import array_of, get_kind, prefix_of
from ntkpipe.build.life import Place, PlaneSource, fill
from ntkpipe.store.chunks import StoredArray, require_complete
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.layout import Index
from ntkpipe.store.manifest import DerivedRecord, Manifest
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.store import Store

# Source kind → kinds derived from it; all others need pairs of outputs that are not stored.
_SOURCES = {"ntk": ("pntk", "trace", "diagonal", "output:k"), "diagonal": ("trace", "output:k")}


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
    source = open_kernel(store)
    manifest = derived_manifest(source.manifest, kind, samples=samples)
    require_complete(source.store.arrays.values(), "other kinds are derived from it")
    if medium_at(to).identity() == source.store.medium.identity():
        raise ConfigError(f"{source.path} is the source; the derived store needs another path")
    target = fill(Place.at(to), DerivedSource(source.store, manifest), progress=progress)
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


@dataclass(frozen=True)
class DerivedSource(PlaneSource):
    """Tiles come from those of a store of another kind, each of which is read once."""

    source: Store
    manifest: Manifest

    def data(self, array: StoredArray, index: Index) -> NDArray[Any]:
        """See :meth:`TileSource.data`."""
        return self.source.arrays[array.layout.name].read(index)

    def planes(self, kernel: str, rows: Span, columns: Span) -> Iterator[NDArray[Any]]:
        """See :meth:`PlaneSource.planes`."""
        tile, count, kind = self.manifest.tile, self.manifest.num_outputs, get_kind(self.manifest.kind)
        row, column = rows.start // tile, columns.start // tile
        index = (row, 0, 0) if kernel == "kernel/test_diagonal" else (row, column)
        is_one, is_apart = kind.name.startswith("output:"), get_kind(self.source.manifest.kind).pairs == "same"
        outputs = np.flatnonzero(kind.covectors(count)[0]).tolist() if is_one else range(count)
        for group in (None, *self.manifest.groups):
            equal: Iterator[NDArray[Any]]
            # Entries for each output with itself, shape (n, m), read one after the other where they are apart.
            if is_apart:
                equal = (self._read(group, kernel, index, output) for output in outputs)
            else:
                values = self._read(group, kernel, index)
                pairs = values.reshape(len(values) // count, count, -1, count)
                equal = (pairs[:, output, :, output] for output in outputs)
            if kind.name == "pntk":  # of a source that has all pairs of outputs
                equal = iter([pairs.sum(axis=(1, 3), dtype=np.float64) / count])
            elif kind.name == "trace":
                equal = iter([sum(equal, next(equal).astype(np.float64)) / count])
            yield from (values[:, :, None] if len(index) == 3 else values for values in equal)

    def _read(self, group: str | None, kernel: str, index: Index, output: int | None = None) -> NDArray[Any]:
        """A chunk of the source as a matrix; a ``test_diagonal`` becomes a kernel with a single column of samples."""
        values = self.source.arrays[array_of(prefix_of(group, output), kernel)].read(index)
        return values.reshape(-1, values.shape[-1]) if values.ndim == 3 else values
