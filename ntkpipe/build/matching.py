"""Whether a few stored entries are those that a model gives now."""

import numpy as np
import torch
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreMismatchError
from ntkpipe.build.prepare import Prepared
from ntkpipe.jacobian.probe import probe_samples
from ntkpipe.jacobian.representations.contract import contract
from ntkpipe.jacobian.representations.workspace import Workspace
from ntkpipe.store.mending.growth import ChunkKey
from ntkpipe.store.store import Store

# Outputs of the same model on another machine agree to rounding; those of another function do not.
_OUTPUT_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}
# Rounding across the kink of an activation changes an entry by more than rounding itself.
_ENTRY_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "tf32": 5e-2, "bfloat16": 0.2}


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
