"""Whether a store was made with the model and the samples that are given now."""

import numpy as np
import torch
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreMismatchError, TileError
from ntkpipe.build.prepare import Prepared
from ntkpipe.jacobian.model.samples import Samples, StoredSource
from ntkpipe.jacobian.probe import probe_samples
from ntkpipe.jacobian.representations.pieces import contract
from ntkpipe.jacobian.representations.sums import Workspace
from ntkpipe.store.manifest import DataRecord, Manifest, differences
from ntkpipe.store.mending.growth import ChunkKey, is_larger
from ntkpipe.store.store import Store

# Outputs of the same model on another machine agree to rounding; those of another function do not.
_OUTPUT_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}
# Rounding across the kink of an activation changes an entry by more than rounding itself.
_ENTRY_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "tf32": 5e-2, "bfloat16": 0.2}


def require_same(store: Store, asked: Manifest) -> None:
    """Check that a store was made with exactly what is asked for."""
    found = differences(store.manifest, asked)
    if found:
        hint = "Use another path, mode='w' to start over, or ask for what is stored"
        if is_larger(store.manifest, asked) and all(field.startswith(("train", "test")) for field, _, _ in found):
            hint = "With grow=True (run --grow) samples are added to those that are stored. " + hint
        listed = "; ".join(f"{field}: stored {_short(left)} → asked {_short(right)}" for field, left, right in found)
        raise StoreMismatchError(
            f"{store.root} holds another kernel; {len(found)} fields differ: {listed}. {hint}", found
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def require_same_but_samples(store: Store, asked: Manifest, *, grow: bool) -> None:
    """Do as :func:`require_same` without fingerprints of samples, which a plan does not read, and sizes that grow."""
    stored = store.manifest
    if grow and is_larger(stored, asked):
        sized = {"num_samples": stored.train.num_samples}
        asked = asked.model_copy(update={"train": asked.train.model_copy(update=sized), "test": stored.test})

    def without(record: DataRecord | None) -> DataRecord | None:
        return None if record is None else record.model_copy(update={"inputs_digest": "", "targets_digest": None})

    def bare(manifest: Manifest) -> Manifest:
        return manifest.model_copy(update={"train": without(manifest.train), "test": without(manifest.test)})

    require_same(Store(store.medium, bare(stored)), bare(asked))


def require_made_from_model(store: Store, *, grows: bool = False) -> None:
    """Refuse to complete or grow a store that is derived from another one."""
    derived = store.manifest.derived
    if derived is not None and (grows or store.missing()):
        what = "does not grow by itself: grow its source, and derive to another path" if grows else "is not complete"
        raise StoreMismatchError(
            f"{store.root} is derived from a store of kind {derived.kind!r} and {what}; go on with ntkpipe derive, or "
            "use mode='w' to compute it from the model",
            (("derived", derived.model_dump(), None),),
        )


def require_beginning(store: Store, before: Prepared, asked: Manifest) -> None:
    """Check that the store's samples and targets come first among those that are asked for."""
    found: dict[str, DataRecord | None] = {"train": None, "test": None}
    kept = store.manifest
    for split, samples, stored in (("train", before.train, kept.train), ("test", before.test, kept.test)):
        if samples is None or stored is None:
            continue
        record = found[split] = samples.inspect(f"{split} inputs")
        digests = ("inputs_digest", "targets_digest")
        differing = [name for name in digests if getattr(record, name) != getattr(stored, name)]
        if differing and record.inputs == stored.inputs and record.targets == stored.targets:
            where = _first_difference(store, split, samples)
            raise StoreMismatchError(
                f"{store.root} holds {stored.num_samples} {split} samples, which must be the first ones of those that "
                f"are asked for, but {where}. Add samples at the end; or use another path, or mode='w' to start over",
                tuple((f"{split}.{name}", getattr(stored, name), getattr(record, name)) for name in differing),
            )
    require_same(store, asked.model_copy(update=found))


def _first_difference(store: Store, split: str, samples: Samples) -> str:
    stored = StoredSource(store, split, samples.num_samples)
    targets = samples.targets
    try:
        for start, stop in samples.spans():
            pairs = [
                (values, stored.read(start, stop)[name]) for name, values in samples.source.read(start, stop).items()
            ]
            if targets is not None:
                pairs.append((targets[start:stop], store.arrays[f"targets/{split}"].read_samples(start, stop)))
            for number in range(stop - start):
                if any(not np.array_equal(one[number], other[number]) for one, other in pairs):
                    return f"sample {start + number} or its target differs"
    except TileError as error:
        return f"they differ ({error})"
    return "the bits of their zeros differ"


def require_same_function(store: Store, prepared: Prepared, doubted: frozenset[ChunkKey] = frozenset()) -> None:
    """Check that outputs and kernel entries of a few samples are those in the first stored tile."""
    # Fingerprints cover parameters, buffers and the module tree, but neither a constant in `forward` nor the hook.
    array = store.arrays["outputs/train"]
    # A truncated chunk counts as missing, too: it is written again.
    good = sorted(index for index in array.present() if (array.layout.name, index) not in doubted)
    if not good:
        return
    first = good[0]
    stored = array.read(first)
    picked = probe_samples(len(stored))
    samples = [first[0] * store.manifest.tile + sample for sample in picked]
    with torch.no_grad():
        outputs = prepared.model(prepared.load(samples)).double().cpu().numpy()
    gap = float(np.abs(outputs - stored[picked]).max())
    scale = float(np.abs(stored[picked]).max()) or 1.0
    if gap > _OUTPUT_TOLERANCE[store.manifest.compute_dtype] * scale:
        raise StoreMismatchError(
            f"{store.root}: parameters and samples are those of the store, but outputs differ by {gap:.2g} (of "
            f"{scale:.2g}): the model's forward pass or the forward hook differs",
            (("outputs", stored[picked].tolist(), outputs.tolist()),),
        )
    tile, index = store.arrays[prepared.planes[0].array("kernel/train")], (first[0], first[0])
    if not tile.has(index) or (tile.layout.name, index) in doubted:
        return
    width, found = store.manifest.num_covectors, _entries(prepared, samples)
    rows = np.add.outer(np.array(picked) * width, np.arange(width)).reshape(-1)
    stored = tile.read(index)[np.ix_(rows, rows)].astype(np.float64)
    scale = float(np.sqrt(np.outer(stored.diagonal(), stored.diagonal())).max()) or 1.0
    error = float(np.abs(found - stored).max()) / scale
    if error > _ENTRY_TOLERANCE[store.manifest.compute_dtype]:
        raise StoreMismatchError(
            f"{store.root}: parameters, samples and outputs are those of the store, but kernel entries differ by "
            f"{error:.1e} of their scale: the model is differentiated in another way (detached, or hooked)",
            (("kernel entries", stored.tolist(), found.tolist()),),
        )


def _entries(prepared: Prepared, samples: list[int]) -> NDArray[np.float64]:
    """Kernel of a few samples, sample-major; that of the first output if each has its own."""
    piece, _ = prepared.engine.piece(prepared.load(samples))
    found = contract(piece, piece, Workspace(), prepared.kind.pairs).double().cpu().numpy()
    return np.asarray(found if prepared.kind.pairs != "same" else found[0])
