"""The public functions ``verify`` and ``repair``: check a store, and repair what is bad."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from ntkpipe.base.arguments import checked
from ntkpipe.base.budget import MemoryLimit
from ntkpipe.base.config import KernelSpec, RunSpec, spec_of
from ntkpipe.base.errors import ConfigError, StoreMismatchError, TileError
from ntkpipe.build.from_model import ModelSource
from ntkpipe.build.life import require_same
from ntkpipe.build.mend import NOT_CERTIFIED, RepairReport, mend, verify_with
from ntkpipe.build.prepare import exact_single_thread
from ntkpipe.build.request import Request
from ntkpipe.build.workers import find_resources
from ntkpipe.jacobian.model.functional import Forward
from ntkpipe.jacobian.model.samples import Samples, StoredSource, as_samples
from ntkpipe.store.kernel_store import KernelStore, open_kernel
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
    given = {"train": (inputs, None), "test": (test_inputs, None)}
    with exact_single_thread(kept.manifest.compute_dtype):
        try:  # mismatches raise before a single tile is read
            source = _source(kept, model, given, forward, RunSpec(device=device), progress=progress)
        except TileError:  # a sample is damaged, which the report names
            report = verify_and_record(kept, progress=progress)
            return replace(report, findings=(*report.findings, NOT_CERTIFIED))
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
        return mend(kept, progress=progress)
    derived, given = kept.manifest.derived, {"train": (inputs, targets), "test": (test_inputs, test_targets)}
    if derived is not None:
        raise ConfigError(
            f"{kept.root} was derived from a store of kind {derived.kind!r}, not computed from the model: "
            "delete the chunks that verify names and derive it again; without a model, repair clears what is left over"
        )

    def find_source() -> ModelSource:
        try:
            return _source(kept, model, given, forward, run, client, code, progress=progress)
        except TileError as error:
            raise ConfigError(
                f"the samples in {kept.root} cannot be used ({error}); give inputs and targets, also of the test set, "
                "or a workflow file"
            ) from error

    with exact_single_thread(kept.manifest.compute_dtype):
        return mend(kept, find_source, progress=progress)


def _source(
    store: Store,
    model: nn.Module,
    given: Mapping[str, tuple[object, object]],
    forward: Forward,
    run: RunSpec,
    client: "Client | None" = None,
    code: str | Path | None = None,
    *,
    progress: bool,
) -> ModelSource:
    """The source that a store was made from; inputs and targets that are not given are those in the store."""
    manifest, known = store.manifest, dict(model.named_parameters())
    if missing := [name for name in manifest.model.parameters if name not in known]:
        raise StoreMismatchError(
            f"{store.root} was made with another model: this one has no parameter {missing[0]!r}, and "
            f"{len(missing) - 1} others of {len(manifest.model.parameters)} are missing. Give the model, or the "
            "workflow file and options, that it was made with",
            (("model.parameters", manifest.model.parameters, tuple(known)),),
        )
    train, test = (_samples(store, split, *each) for split, each in given.items())
    assert train is not None
    same = ("kind", "groups", "compute_dtype", "accumulate_dtype", "store_dtype", "tile")
    spec = KernelSpec(parameters=manifest.model.parameters, **{name: getattr(manifest, name) for name in same})
    request = Request(model, train, test, spec, run, forward)
    source = ModelSource.of(request, find_resources(request, client, code, progress), Samples.inspect)
    hint = "Give those, or the workflow file and options, that it was made with"
    require_same(store, source.manifest, "was made with another model or other samples", hint)
    return replace(source, manifest=manifest)


def _samples(store: Store, split: str, inputs: object, targets: object) -> Samples | None:
    record, derived = store.manifest.train if split == "train" else store.manifest.test, store.manifest.derived
    label = f"{split} inputs"
    if record is None:
        if inputs is not None:
            raise ConfigError(f"{store.root} was made without test_inputs, but test_inputs were given")
        return None
    if inputs is not None:
        samples = as_samples(inputs, targets, label=label, with_targets=record.targets is not None)
    elif derived is None or derived.has_samples:
        samples = Samples(StoredSource(store, split, record.num_samples), record.is_mapping, None, False, label)
    else:
        raise ConfigError(
            f"{store.root} was derived without the samples; needed inputs and, if it has a test set, test_inputs"
        )
    if record.targets is None or samples.targets is not None:
        return samples
    found = store.arrays[f"targets/{split}"].read_samples(0, record.num_samples) if targets is None else targets
    return replace(samples, given_targets=np.asarray(found))
