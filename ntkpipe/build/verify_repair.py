"""The public functions ``verify`` and ``repair``: check a store, and repair what is bad."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from ntkpipe.base.arguments import checked
from ntkpipe.base.budget import MemoryLimit
from ntkpipe.base.config import KernelSpec, RunSpec, spec_of
from ntkpipe.base.errors import ConfigError, StoreMismatchError, TileError
from ntkpipe.build.certify import verify_with
from ntkpipe.build.from_model import ModelSource
from ntkpipe.build.life import require_same, rewrite
from ntkpipe.build.prepare import exact_single_thread
from ntkpipe.build.request import Request
from ntkpipe.build.workers import Resources, find_resources
from ntkpipe.jacobian.model.functional import Forward
from ntkpipe.jacobian.model.samples import Samples, StoredSource, as_samples
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.manifest import DataRecord
from ntkpipe.store.mending.repair import RepairReport, mend, undo
from ntkpipe.store.store import Store
from ntkpipe.store.verification import VerificationReport, verify_and_record

if TYPE_CHECKING:
    from distributed import Client


@checked
def verify(
    store: "str | Path | KernelStore",
    model: nn.Module | None = None,
    inputs: object = None,
    *,
    test_inputs: object = None,
    forward: "Forward" = None,
    device: str | None = None,
    progress: bool = True,
) -> VerificationReport:
    """Verify a store, and with a model certify its whole kernels; the store keeps the report.

    Without a model: every chunk present, whole and finite, diagonal tiles symmetric, entries within the
    Cauchy-Schwarz bound. With one: fingerprints of model and samples are compared first, then K v from the store with
    J(J'v), in which every entry takes part.

    Parameters
    ----------
    store
        Path or URL, or an open store.
    model
        The model that the store was made with; default none, and no certificate.
    inputs
        The train samples that the store was made with; default those in the store.
    test_inputs
        The test samples that the store was made with; default those in the store.

    Returns
    -------
    The report; ``report.is_good`` says whether anything was found.

    Raises
    ------
    ConfigError, StoreMismatchError
        If inputs are given without a model, or model or samples are not those of the store.
    """
    if model is None and inputs is not None:
        raise ConfigError("inputs were given without a model; a certificate needs both")
    kept = open_kernel(store).store
    if model is None:
        return verify_and_record(kept, progress=progress)
    manifest = kept.manifest
    is_given = inputs is not None and (test_inputs is not None or manifest.test is None)
    if not is_given and manifest.derived is not None and not manifest.derived.has_samples:
        raise ConfigError(
            f"{kept.root} was derived without the samples; needed inputs and, if it has a test set, test_inputs"
        )
    samples = [_samples(kept, split, given) for split, given in (("train", inputs), ("test", test_inputs))]

    def look(samples: Samples, label: str) -> DataRecord:
        """Records of what is in the store, whose chunks are verified, as they are; targets have no part in this."""
        record = manifest.test if label == "test_inputs" else manifest.train
        if record is None or isinstance(samples.source, StoredSource):
            return record or samples.describe()
        targets = {"targets": record.targets, "targets_digest": record.targets_digest}
        return samples.inspect(label).model_copy(update=targets)

    request = _request(kept, model, samples, RunSpec(device=device), forward)
    with exact_single_thread(manifest.compute_dtype):
        # Mismatches raise before a single tile is read.
        source = _source_of(kept, request, Resources(request.run, progress), look)
        return verify_with(kept, source, progress=progress)


@checked
def repair(
    store: "str | Path | KernelStore",
    model: nn.Module | None = None,
    inputs: object = None,
    *,
    targets: object = None,
    test_inputs: object = None,
    test_targets: object = None,
    forward: "Forward" = None,
    memory_limit: MemoryLimit = None,
    device: str | None = None,
    self_check: bool = True,
    client: "Client | None" = None,
    code: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> RepairReport:
    """Verify a store and repair what is bad; the store keeps a record below ``results/repairs``.

    With the model, exactly the chunks that are missing or bad are computed again, with the choices that the store
    recorded, so they get the bits that they had; each is replaced when the new one is written. Then the kernels are
    certified. Without a model: leftovers and chunks that belong to no array are removed, damaged ``zarr.json`` of
    arrays written anew, a growth that was cut short is undone; bad chunks are reported and stay.

    Parameters
    ----------
    store
        Path or URL, or an open store.
    model
        The model that the store was made with; default none, and nothing is computed again.
    inputs
        The train samples that the store was made with; default those in the store.
    targets
        The train targets that the store was made with; default those in the store.
    test_inputs
        The test samples that the store was made with; default those in the store.
    test_targets
        The test targets that the store was made with; default those in the store.

    Returns
    -------
    What was found, done and left; ``report.is_good`` says whether the store is good now.

    Raises
    ------
    ConfigError
        If inputs are given without a model, or none are given and those in the store are damaged; or the store was
        derived from another one.
    StoreMismatchError, StoreError
        If model or samples are not those of the store (nothing was changed then), or the store cannot be written.
    """
    if model is None and inputs is not None:
        raise ConfigError("inputs were given without a model; bad tiles are computed again with both")
    kept, run = open_kernel(store).store, spec_of(RunSpec, locals())
    if model is None:
        return mend(kept, done=undo(kept), progress=progress)
    manifest = kept.manifest
    if manifest.derived is not None:
        raise ConfigError(
            f"{kept.root} was derived from a store of kind {manifest.derived.kind!r}, not computed from the model: "
            "delete the chunks that verify names and derive it again; without a model, repair clears what is left over"
        )
    done = undo(kept)
    given = (("train", inputs, targets), ("test", test_inputs, test_targets))
    request = _request(kept, model, [_whole(kept, *each) for each in given], run, forward)
    resources = find_resources(request, client, code, progress)
    with exact_single_thread(manifest.compute_dtype):
        source = _source_of(kept, request, resources, Samples.inspect)
        return mend(
            kept,
            lambda chunks: rewrite(kept, chunks, source, progress=progress),
            lambda: verify_with(kept, source, progress=progress),
            done=done,
            progress=progress,
        )


def _request(
    store: Store, model: nn.Module, samples: Sequence[Samples | None], run: RunSpec, forward: Forward
) -> Request:
    """What a store was made with, every default filled in."""
    manifest, (train, test) = store.manifest, samples
    assert train is not None
    known = dict(model.named_parameters())
    if missing := [name for name in manifest.model.parameters if name not in known]:
        raise StoreMismatchError(
            f"{store.root} was made with another model: this one has no parameter {missing[0]!r}, and "
            f"{len(missing) - 1} others of {len(manifest.model.parameters)} are missing. Give the model, or the "
            "workflow file and options, that it was made with",
            (("model.parameters", manifest.model.parameters, tuple(known)),),
        )
    same = ("kind", "groups", "compute_dtype", "accumulate_dtype", "store_dtype", "tile")
    spec = KernelSpec(parameters=manifest.model.parameters, **{name: getattr(manifest, name) for name in same})
    return Request(model, train, test, spec, run, forward)


def _source_of(
    store: Store, request: Request, resources: Resources, look: Callable[[Samples, str], DataRecord]
) -> ModelSource:
    """The source that a store was made from."""
    source = ModelSource.of(request, resources, look)
    require_same(store, source.manifest)
    return replace(source, manifest=store.manifest)


def _samples(store: Store, split: str, inputs: object, targets: object = None) -> Samples | None:
    """Samples of one set: the given ones, else those in the store."""
    record = store.manifest.train if split == "train" else store.manifest.test
    label = f"{split} inputs"
    if record is None:
        if inputs is not None:
            raise ConfigError(f"{store.root} was made without test_inputs, but test_inputs were given")
        return None
    if inputs is not None:
        return as_samples(inputs, targets, label=label, with_targets=record.targets is not None)
    return Samples(StoredSource(store, split, record.num_samples), record.is_mapping, None, False, label)


def _whole(store: Store, split: str, inputs: object, targets: object) -> Samples | None:
    """The same with targets, once the checksums of what is taken from the store hold."""
    try:
        samples = _samples(store, split, inputs, targets)
        if samples is None:
            return None
        if inputs is None:
            for start, stop in samples.spans():
                samples.source.read(start, stop)
        array = store.arrays.get(f"targets/{split}")
        if array is not None and samples.targets is None:
            found = array.read_samples(0, samples.num_samples) if targets is None else targets
            samples = replace(samples, given_targets=np.asarray(found))
    except (TileError, KeyError) as error:
        names = "inputs and targets" if split == "train" else "test_inputs and test_targets"
        raise ConfigError(
            f"the {split} samples in {store.root} cannot be used ({error}); give {names}, or a workflow file"
        ) from error
    return samples
