"""The public functions that compute a kernel into a store, plan that, and verify and repair the store."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import nn

from ntkpipe.base.arguments import checked, with_arguments_of
from ntkpipe.base.config import ComputeDtype, KernelSpec, MemoryLimit, RealDtype, RunSpec, spec_of
from ntkpipe.base.errors import ConfigError, StoreMismatchError, TileError
from ntkpipe.base.paths import said
from ntkpipe.base.progress import Phase
from ntkpipe.base.tables import as_table
from ntkpipe.build.formula_source import FormulaSource
from ntkpipe.build.from_model import ModelSource
from ntkpipe.build.from_samples import SampleSource
from ntkpipe.build.life import Place, fill, require_same
from ntkpipe.build.mend import NOT_CERTIFIED, RepairReport, mend, verify_with
from ntkpipe.build.plan import Plan
from ntkpipe.build.prepare import Request, exact_single_thread, time_jacobians, traced_or_whole
from ntkpipe.build.workers import find_resources
from ntkpipe.infinite.networks import Network
from ntkpipe.jacobian.model.functional import Forward, uncompiled
from ntkpipe.jacobian.model.samples import Samples, StoredSource, as_samples
from ntkpipe.jacobian.parameter_report import ParameterReport, report_of, report_rows
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.store import Mode, Store
from ntkpipe.store.verification import VerificationReport, verify_and_record

if TYPE_CHECKING:
    from distributed import Client


@checked
def compute_kernel(
    model: nn.Module,
    inputs: object,
    *,
    store: str | Path,
    kind: str = "pntk",
    targets: object = None,
    test_inputs: object = None,
    test_targets: object = None,
    forward: "Forward" = None,
    parameters: str | Sequence[str] | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    compute_dtype: ComputeDtype = "float32",
    accumulate_dtype: RealDtype | None = None,
    store_dtype: RealDtype | None = None,
    tile: int | None = None,
    memory_limit: MemoryLimit = None,
    device: str | None = None,
    self_check: bool = True,
    mode: Mode = "a",
    grow: bool = False,
    client: "Client | None" = None,
    code: str | Path | None = None,
    workers: int | None = None,
    jacobian: Literal["structured", "fallback"] = "structured",
    progress: bool = True,
) -> KernelStore:
    """Compute an empirical neural tangent kernel into a store, or resume one.

    Every finished tile is safe: after a kill, Ctrl-C or a full disk the same call resumes, and ends with the same bits.

    Parameters
    ----------
    store
        Path or URL of the store.
    targets
        Targets of the N samples, along the first axis; stored for later use with the kernel.
    test_inputs
        M test samples, which add the test x train kernel and the diagonal blocks of the test samples.
    test_targets
        Targets of the M test samples.
    groups
        Groups of those parameters (name → patterns, disjoint), each of which gets a kernel from the same pass. It is
        ``store.group(name).train``; if the groups cover all parameters, their kernels sum to the whole.
    tile
        Samples along the edge of a tile (one file); default about 2048 rows.
    mode
        ``"a"`` creates or resumes, ``"w"`` starts over, ``"w-"`` only creates; these are the modes of Zarr.
    grow
        Add samples to a smaller store, at the end or as a first test set. Only new tiles are computed.
    client
        A ``distributed.Client`` whose workers compute the blocks and write to the store. The store must be on a disk
        that they share, or at a URL. Default threads of this process.

    Returns
    -------
    The finished store, open for reading.

    Raises
    ------
    ConfigError, ModelError, DataError, NonFiniteError
        If an argument is wrong, or model or samples cannot be used as they are.
    StoreMismatchError, ResourceError
        If the store was made with something else (lists the fields that differ), or memory or disk cannot hold it.
    SelfCheckError, ClusterError
        If the engine and the reference disagree, or the workers of the client cannot compute or are lost.
    StoreFullError, Interrupted
        If the disk fills up, or on Ctrl-C. Finished tiles are kept.
    """
    arguments, place = locals(), Place.at(store, mode, grow=grow)
    request = Request.of(arguments, stored=place.existing)
    with exact_single_thread(request.kernel.compute_dtype):
        dtype = request.kernel.resolved_accumulate_dtype()
        resources = find_resources(request.run, dtype, client, code, progress)
        with Phase("prepare", enabled=progress):
            source = ModelSource.of(request, resources, Samples.inspect)
        return KernelStore(fill(place, source, progress=progress))


class PlannedKernel(NamedTuple):
    """A plan, and how the Jacobian of each parameter is found; prints as a table."""

    plan: Plan
    parameters: tuple[ParameterReport, ...]

    def __str__(self) -> str:
        return as_table([*self.plan.rows(), *report_rows(self.parameters)])


@with_arguments_of(compute_kernel)
def plan_kernel(arguments: Mapping[str, Any]) -> PlannedKernel:
    """Plan what :func:`compute_kernel` would do with the same arguments; reads five samples and writes nothing.

    With a client it is what its workers would do, but Jacobians are not timed.

    Returns
    -------
    The plan, and how the Jacobian of every selected parameter is found and held and what that costs; for those of the
    fallback why. A parameter and its bias, or all that is computed together, share one report
    (:class:`ntkpipe.jacobian.parameter_report.ParameterReport`). The self-check of a run may move further parameters to
    the fallback. Where memory or disk cannot hold the kernel, ``plan.problems`` says so with both numbers, and nothing
    is raised; other errors are those of :func:`compute_kernel`.
    """
    place = Place.at(arguments["store"], arguments["mode"], grow=arguments["grow"])
    request = Request.of(arguments, stored=place.existing)
    with exact_single_thread(request.kernel.compute_dtype):
        dtype = request.kernel.resolved_accumulate_dtype()
        resources = find_resources(request.run, dtype, *(arguments[name] for name in ("client", "code", "progress")))
        source = ModelSource.of(request, resources, lambda samples, _: samples.describe())
        work = place.work(source)
        engine, planned = traced_or_whole(
            source.prepared, source.engine(work), lambda engine: (engine, source.plan(work, engine))
        )
        if resources.cluster is None:
            planned = time_jacobians(planned, source.prepared, engine)
        return PlannedKernel(planned, report_of(engine))


@checked
def verify(
    store: "str | Path | KernelStore",
    model: nn.Module | Network | None = None,
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
    J(J'v), in which every entry takes part. With a network of infinite width K v is formed anew in a random row of each
    row of tiles, some of its entries by other formulas.

    Parameters
    ----------
    store
        Path or URL, or an open store.
    model
        The model, or network of infinite width, that the store was made with; default none, and no certificate.
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
    arguments = locals()
    if model is None and inputs is not None:
        raise ConfigError("inputs were given without a model; a certificate needs both")
    kept = open_kernel(store).store
    if model is None:
        return verify_and_record(kept, progress=progress)
    with exact_single_thread(kept.manifest.compute_dtype):
        try:  # mismatches raise before a single tile is read
            source = _source(kept, arguments)
        except TileError:  # a sample is damaged, which the report names
            report = verify_and_record(kept, progress=progress)
            return replace(report, findings=(*report.findings, NOT_CERTIFIED))
        return verify_with(kept, source, progress=progress)


@checked
def repair(
    store: "str | Path | KernelStore",
    model: nn.Module | Network | None = None,
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
        The model, or network, that the store was made with; default none, and nothing is computed again.
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
    arguments = locals()
    if model is None and inputs is not None:
        raise ConfigError("inputs were given without a model; bad tiles are computed again with both")
    kept = open_kernel(store).store
    if model is None:
        return mend(kept, progress=progress)
    if (derived := kept.manifest.derived) is not None:
        raise ConfigError(
            f"{kept.root} was derived from a store of kind {derived.kind!r}, not computed from the model: "
            "delete the chunks that verify names and derive it again; without a model, repair clears what is left over"
        )

    def find_source() -> SampleSource:
        try:
            return _source(kept, arguments)
        except TileError as error:
            raise ConfigError(
                f"the samples in {kept.root} cannot be used ({said(error)}); give inputs and targets, also of the "
                "test set, or a workflow file"
            ) from error

    with exact_single_thread(kept.manifest.compute_dtype):
        return mend(kept, find_source, progress=progress)


def _source(store: Store, arguments: Mapping[str, Any]) -> SampleSource:
    """The source that a store was made from; inputs and targets that are not given are those in the store."""
    manifest, model = store.manifest, arguments["model"]
    is_formula = isinstance(model, Network)
    if is_formula != (manifest.model is None):
        raise StoreMismatchError(
            f"{store.root} was made of {manifest.maker}, and {type(model).__name__} was given; give the former",
            (("model", manifest.maker, type(model).__name__),),
        )
    parameters = None
    if manifest.model is not None:
        parameters, model = manifest.model.parameters, uncompiled(model)
        known = dict(model.named_parameters())
        if missing := [name for name in parameters if name not in known]:
            raise StoreMismatchError(
                f"{store.root} was made with another model: this one has no parameter {missing[0]!r}, and "
                f"{len(missing) - 1} others of {len(parameters)} are missing. Give the model, or the "
                "workflow file and options, that it was made with",
                (("model.parameters", parameters, tuple(known)),),
            )
    train = _samples(store, "train", arguments["inputs"], arguments.get("targets"))
    test = _samples(store, "test", arguments["test_inputs"], arguments.get("test_targets"))
    assert train is not None
    same = ("kind", "groups", "compute_dtype", "accumulate_dtype", "store_dtype", "tile")
    kept = {name: getattr(manifest, name) for name in same if not (is_formula and name == "groups")}
    spec = KernelSpec(parameters=parameters, **kept)
    run = spec_of(RunSpec, {**arguments, "device": "cpu"} if is_formula else arguments)
    request = Request(model, train, test, spec, run, arguments["forward"])
    dtype, cluster = spec.resolved_accumulate_dtype(), (arguments.get("client"), arguments.get("code"))
    resources = find_resources(request.run, dtype, *cluster, arguments["progress"])
    source: FormulaSource | ModelSource
    if is_formula:
        count = manifest.num_outputs
        source = FormulaSource.of(request, resources, Samples.inspect, num_outputs=count, is_forced=True)
    else:
        source = ModelSource.of(request, resources, Samples.inspect)
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
