"""The public functions ``verify`` and ``repair``: check a store, and repair what is bad."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ntkpipe.base.arguments import checked
from ntkpipe.base.budget import MemoryLimit
from ntkpipe.base.config import RunSpec, spec_of
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.progress import Ticks
from ntkpipe.build.certify import certify, find_reference, with_certificates
from ntkpipe.build.matching import require_same
from ntkpipe.build.prepare import prepare
from ntkpipe.build.request import Request
from ntkpipe.build.run import exact_single_thread, manifest_of
from ntkpipe.build.upkeep.recompute import given_or_stored, recompute, stored_spec
from ntkpipe.build.workers import find_resources
from ntkpipe.jacobian.model.functional import Forward
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.mending.repair import RepairReport, mend, undo
from ntkpipe.store.verification import Finding, VerificationReport, record_report, verify_and_record

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
    opened = open_kernel(store)
    if model is None:
        return verify_and_record(opened.store, progress=progress)
    return _certified(opened, model, inputs, test_inputs, forward, device, progress)


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
    opened, run = open_kernel(store), spec_of(RunSpec, locals())
    if model is None:
        return mend(opened.store, done=undo(opened.store), progress=progress)
    kept, manifest = opened.store, opened.manifest
    if manifest.derived is not None:
        raise ConfigError(
            f"{kept.root} was derived from a store of kind {manifest.derived.kind!r}, not computed from the model: "
            "delete the chunks that verify names and derive it again; without a model, repair clears what is left over"
        )
    done = undo(kept)
    train = given_or_stored(kept, "train", inputs, targets)
    test = given_or_stored(kept, "test", test_inputs, test_targets)
    assert train is not None
    request = Request(model, train, test, stored_spec(manifest), run, forward)
    resources = find_resources(request, client, code, progress)
    with exact_single_thread(manifest.compute_dtype):
        prepared = prepare(request, device=resources.device)
        require_same(kept, manifest_of(model, prepared, *prepared.inspect()))
        return mend(
            kept,
            lambda chunks: recompute(kept, chunks, prepared, resources),
            lambda: _certified(opened, model, inputs, test_inputs, forward, resources.device, progress),
            done=done,
            progress=progress,
        )


def _certified(
    opened: KernelStore,
    model: nn.Module,
    inputs: object,
    test_inputs: object,
    forward: Forward,
    device: str | None,
    progress: bool,
) -> VerificationReport:
    with exact_single_thread(opened.manifest.compute_dtype):
        # Mismatches raise before a single tile is read.
        reference = find_reference(opened, model, inputs, test_inputs, forward=forward, device=device)
        report = verify_and_record(opened.store, progress=progress)
        if not report.is_good:
            missing = Finding("certificate", (), "not computed: mend the findings above first", is_harmless=True)
            return replace(report, findings=(*report.findings, missing))
        with Ticks(reference.num_steps, what="certify", unit="step", enabled=progress) as ticks:
            certificates = certify(opened, reference, step=ticks.tick)
    report = with_certificates(report, certificates)
    record_report(opened.store, report)
    return report
