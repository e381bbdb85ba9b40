"""The public functions that compute: they join the making of a kernel with its store."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe.build import BuildJob, Index, StripCache, TileRecord
from ntkpipe.certify import JacobianProducts, certify, num_steps
from ntkpipe.config import KernelSpec, RunSpec, parse
from ntkpipe.datasets import Samples, Source, StoredSource, as_samples, require_same_arrays
from ntkpipe.errors import ConfigError, DataError, ResourceError, StoreMismatchError
from ntkpipe.execute import ThreadExecutor
from ntkpipe.grid import Grid
from ntkpipe.jacobian.block import Engine
from ntkpipe.kernel import KernelStore
from ntkpipe.kinds import get_kind
from ntkpipe.manifest import DataRecord
from ntkpipe.models import DTYPES, Forward, fingerprint, prepare_model, resolve_device
from ntkpipe.plan import Plan, Task
from ntkpipe.prepare import Prepared, plan_run, prepare
from ntkpipe.progress import Ticks, show_progress
from ntkpipe.resources import available_memory, format_bytes
from ntkpipe.runs import (
    build,
    checked,
    exact_single_thread,
    manifest_of,
    progress_of,
    require_same,
    require_same_function,
    settle,
)
from ntkpipe.store import Mode, Store, local_path, prepare_path
from ntkpipe.verification import Finding, VerificationReport, record_report, verify_and_record

Patterns = str | tuple[str, ...] | list[str] | None

_SHARE_OF_MEMORY = 0.8


def compute_kernel(
    model: nn.Module,
    inputs: object,
    *,
    store: str | Path,
    kind: str = "pntk",
    targets: object = None,
    test_inputs: object = None,
    test_targets: object = None,
    forward: Forward = None,
    parameters: Patterns = None,
    compute_dtype: str = "float32",
    accumulate_dtype: str | None = None,
    store_dtype: str | None = None,
    tile: int | None = None,
    memory_limit: int | str | None = None,
    device: str | None = None,
    self_check: bool = True,
    mode: Mode = "a",
    client: None = None,
    workers: int | None = None,
    jacobian: str = "structured",
    progress: bool = True,
) -> KernelStore:
    """Compute an empirical neural tangent kernel into a store, or resume one.

    Every finished tile is safe: after a kill, Ctrl-C or a full disk the same call goes on where it stopped and ends
    with the same bits.

    Parameters
    ----------
    model
        A module in eval mode. It is copied, not changed. Parameters with ``requires_grad=False`` are left out.
    inputs
        N samples: a tensor or array (first axis the sample), a dict of them (keyword arguments of the model), or a
        map-style data set of samples or (sample, target) pairs.
    store
        Path of the store.
    kind
        ``"pntk"`` (N x N) or ``"ntk"`` (N*O x N*O); conventions in :mod:`ntkpipe.kinds`.
    targets
        First axis N; kept in the store for what is done with the kernel later.
    test_inputs, test_targets
        M more samples: adds the test x train kernel and the diagonal blocks of the test samples.
    forward
        Picks the (batch, O) tensor: ``".logits"``, a function of the model's output, or one of (model, inputs).
    parameters
        Shell-style patterns of parameter names, as ``"head.*"``; default all that require a gradient.
    compute_dtype
        Of the forward pass and the Jacobians: ``"float32"``, ``"float64"`` or ``"bfloat16"``.
    accumulate_dtype
        Of the sum over parameters; default ``compute_dtype``, at least float32.
    store_dtype
        Of the stored matrix; default ``accumulate_dtype``.
    tile
        Samples along the edge of a tile (one file); default about 2048 rows.
    memory_limit
        Bytes, or text as ``"8GiB"``, that this process may use; default 70 % of what is free.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; default the first GPU where there is one.
    self_check
        Compare the engine with plain ``torch.func`` on three samples before the first tile.
    mode
        As in Zarr: ``"a"`` creates or resumes, ``"w"`` starts over, ``"w-"`` only creates.
    client
        Reserved for a Dask client; this version computes in this process and needs None.
    workers
        Threads, each with single-threaded arithmetic; default one a core. Results do not depend on it.
    jacobian
        ``"structured"``, or ``"fallback"`` for plain ``torch.func`` throughout.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    The finished store, open for reading.

    Raises
    ------
    ConfigError
        If an argument is wrong.
    ModelError, DataError, NonFiniteError
        If model or samples cannot be used as they are.
    StoreMismatchError
        If the store was made with something else; lists the fields that differ.
    ResourceError
        If memory or disk cannot hold it, before anything is computed.
    SelfCheckError
        If the engine and the reference disagree.
    StoreFullError
        If the disk fills up during the run. What is finished is kept.
    Interrupted
        On Ctrl-C. What is finished is kept.
    """
    if client is not None:
        raise ConfigError(f"client={client!r}; this version computes in this process, so client must be None")
    if mode not in {"a", "w", "w-"}:
        raise ConfigError(f"mode={mode!r}; needed 'a' (create or resume), 'w' (start over) or 'w-' (only create)")
    spec = _kernel_spec(kind, parameters, compute_dtype, accumulate_dtype, store_dtype, tile, jacobian)
    run = _run_spec(memory_limit, device, workers, self_check)
    path = local_path(store)
    existing = prepare_path(path, mode) if mode != "w" else None
    train, test = _as_both(inputs, targets, test_inputs, test_targets)
    with exact_single_thread():
        stored_tile = None if existing is None else existing.manifest.tile
        prepared = prepare(model, train, test, spec, forward=forward, device=run.device, tile=stored_tile)
        asked = manifest_of(
            model, prepared, train.inspect("inputs"), None if test is None else test.inspect("test_inputs")
        )
        if existing is not None:
            require_same(existing, asked)
            require_same_function(existing, prepared)
            existing.complete_layout()
            if not existing.missing():
                return KernelStore(existing)
        settled = settle(prepared, asked, existing, path, run, mode)
        build(settled, train, test, progress=progress)
    return KernelStore(settled.store)


def plan_kernel(
    model: nn.Module,
    inputs: object,
    *,
    store: str | Path,
    kind: str = "pntk",
    targets: object = None,
    test_inputs: object = None,
    test_targets: object = None,
    forward: Forward = None,
    parameters: Patterns = None,
    compute_dtype: str = "float32",
    accumulate_dtype: str | None = None,
    store_dtype: str | None = None,
    tile: int | None = None,
    memory_limit: int | str | None = None,
    device: str | None = None,
    workers: int | None = None,
    jacobian: str = "structured",
) -> tuple[Plan, dict[str, str]]:
    """Plan what :func:`compute_kernel` would do with the same arguments; reads five samples and writes nothing.

    Returns
    -------
    The plan, and for each parameter how its Jacobian is found; those that go to the fallback with the reason. Where
    memory or disk cannot hold it, ``plan.problems`` says so with both numbers.

    Raises
    ------
    ConfigError, ModelError, DataError, NonFiniteError, StoreMismatchError
        As :func:`compute_kernel`.
    """
    spec = _kernel_spec(kind, parameters, compute_dtype, accumulate_dtype, store_dtype, tile, jacobian)
    run = _run_spec(memory_limit, device, workers, self_check=False)
    path = local_path(store)
    existing = prepare_path(path, "a")
    train, test = _as_both(inputs, targets, test_inputs, test_targets)
    with exact_single_thread():
        stored_tile = None if existing is None else existing.manifest.tile
        prepared = prepare(model, train, test, spec, forward=forward, device=run.device, tile=stored_tile)
        asked = manifest_of(model, prepared, train.describe(), None if test is None else test.describe())
        if existing is not None:
            _require_same_but_samples(existing, asked)
        engine = prepared.engine
        planned = plan_run(
            prepared,
            engine,
            run,
            prepared.grids(),
            path=path,
            choices=None if existing is None else existing.manifest.choices,
            **progress_of(asked, existing),
        )
    reasons = {name: f"torch.func:{engine.method} ({why})" for name, why in engine.tracing.fallback.items()}
    unused = dict.fromkeys(engine.tracing.unused, "unused: the outputs do not depend on it")
    return planned, {**engine.representations, **reasons, **unused}


def _require_same_but_samples(store: Store, asked: Any) -> None:
    """As :func:`require_same`, without the fingerprints of samples, which a plan does not read."""
    stored = store.manifest

    def without(record: DataRecord | None) -> DataRecord | None:
        return None if record is None else record.model_copy(update={"inputs_digest": "", "targets_digest": None})

    bare = stored.model_copy(update={"train": without(stored.train), "test": without(stored.test)})
    require_same(Store(store.root, bare), asked)


def kernel_matrix(
    model: nn.Module,
    inputs: object,
    other: object = None,
    *,
    kind: str = "pntk",
    forward: Forward = None,
    parameters: Patterns = None,
    compute_dtype: str = "float32",
    accumulate_dtype: str | None = None,
    store_dtype: str | None = None,
    tile: int | None = None,
    memory_limit: int | str | None = None,
    device: str | None = None,
    self_check: bool = True,
    workers: int | None = None,
    jacobian: str = "structured",
    progress: bool = False,
) -> NDArray[Any]:
    """Compute a kernel in memory, without a store.

    Parameters
    ----------
    model, inputs, kind, forward, parameters, compute_dtype, accumulate_dtype, store_dtype, tile
        As for :func:`compute_kernel`; ``store_dtype`` is the dtype of the result.
    other
        Other samples for the columns; default the inputs themselves.
    memory_limit, device, self_check, workers, jacobian, progress
        As for :func:`compute_kernel`.

    Returns
    -------
    K(inputs, other), shape (N*S, M*S), or the symmetric K(inputs, inputs), shape (N*S, N*S); row = sample * S +
    covector.

    Raises
    ------
    ResourceError
        If the matrix does not fit in memory.
    """
    spec = _kernel_spec(kind, parameters, compute_dtype, accumulate_dtype, store_dtype, tile, jacobian)
    run = _run_spec(memory_limit, device, workers, self_check)
    # The columns play the part of the train samples: a symmetric kernel is train x train, another test x train.
    train, test = as_samples(inputs), None
    if other is not None:
        train, test = as_samples(other, label="other"), train
        require_same_arrays(train, test, "inputs")
    for samples, label in ((train, "other" if other is not None else "inputs"), (test, "inputs")):
        if samples is not None:
            samples.inspect(label)
    with exact_single_thread():
        prepared = prepare(model, train, test, spec, forward=forward, device=run.device)
        grids = prepared.grids()
        name = "kernel/train" if test is None else "kernel/test_train"
        shape, dtype = grids[name].shape, np.dtype(spec.resolved_store_dtype())
        needed, available = shape[0] * shape[1] * dtype.itemsize, available_memory()
        if needed > _SHARE_OF_MEMORY * available:
            raise ResourceError(
                f"the kernel of shape {shape} and dtype {dtype} needs {format_bytes(needed)}; "
                f"{format_bytes(available)} of memory is available. Use compute_kernel, which writes a store"
            )
        engine, planned = _settle_in_memory(prepared, run, {name: grids[name]}, needed)
        sink = _MatrixSink(np.empty(shape, dtype), name, grids[name])
        sources: dict[str, Source] = {"train": train.source}
        if test is not None:
            sources["test"] = test.source
        cache = StripCache(planned.cache_bytes)
        job = BuildJob(engine, planned, sources, train.is_mapping, sink, cache, dtype)
        executor: ThreadExecutor[Task, TileRecord] = ThreadExecutor(planned.machine.workers)
        with contextlib.closing(executor.run(job, planned.tasks())) as running:
            records: Iterator[TileRecord] = running
            if progress:
                records = show_progress(running, total=planned.workload.num_tiles, done=0, what=kind, unit="tile")
            for _ in records:
                pass
    return sink.matrix


def _settle_in_memory(
    prepared: Prepared, run: RunSpec, grids: dict[str, Grid], result_bytes: int
) -> tuple[Engine, Plan]:
    """Plan and self-check a kernel that is not stored."""
    engine = prepared.engine
    planned = plan_run(prepared, engine, run, grids, path=None, result_bytes=result_bytes)
    planned.require_fit()
    if run.self_check:
        engine, _ = checked(prepared, engine, planned)
        if engine.representations != prepared.engine.representations:
            planned = plan_run(prepared, engine, run, grids, path=None, result_bytes=result_bytes)
            planned.require_fit()
    return engine, planned


class _MatrixSink:
    """Tiles go to a matrix in memory, mirrored where it is symmetric; outputs are dropped."""

    def __init__(self, matrix: NDArray[Any], name: str, grid: Grid) -> None:
        self.matrix = matrix
        self._name = name
        self._grid = grid

    def exists(self, array: str, index: Index) -> bool:
        """Outputs count as there; no tile does."""
        return array != self._name

    def write(self, array: str, index: Index, values: NDArray[Any]) -> None:
        """Copy a tile to its place, and to its mirror image."""
        if array != self._name:
            return
        rows, columns = self._grid.rows.rows(index[0]), self._grid.columns.rows(index[1])
        self.matrix[rows.start : rows.stop, columns.start : columns.stop] = values
        if self._grid.symmetric and index[0] != index[1]:
            self.matrix[columns.start : columns.stop, rows.start : rows.stop] = values.T


def verify(
    store: str | Path | KernelStore,
    model: nn.Module | None = None,
    inputs: object = None,
    *,
    test_inputs: object = None,
    forward: Forward = None,
    device: str | None = None,
    progress: bool = True,
) -> VerificationReport:
    """Verify a store, and with a model certify its whole kernels; the report is kept in the store.

    Without a model: every chunk present, whole and finite, diagonal tiles symmetric, entries within the
    Cauchy-Schwarz bound. With one: fingerprints of model and samples are compared first, then K v from the store with
    J(J'v), which every entry takes part in.

    Parameters
    ----------
    store
        Path, or an open store.
    model
        What the store was made with.
    inputs, test_inputs
        The samples it was made with; default those in the store.
    forward, device
        As for :func:`compute_kernel`.
    progress
        Show progress bars on standard error.

    Returns
    -------
    The report; ``report.is_good`` says whether anything was found.

    Raises
    ------
    ConfigError
        If inputs are given without a model.
    StoreMismatchError
        If model or samples are not those of the store.
    """
    opened = store if isinstance(store, KernelStore) else KernelStore(Store.open(store))
    report = verify_and_record(opened.store, progress=progress)
    if model is not None and report.is_good:
        with exact_single_thread():
            report = _certified(opened, report, model, inputs, test_inputs, forward, device, progress)
        record_report(opened.store, report)
    elif model is None and inputs is not None:
        raise ConfigError("inputs were given without a model; a certificate needs both")
    return report


def _certified(
    opened: KernelStore,
    report: VerificationReport,
    model: nn.Module,
    inputs: object,
    test_inputs: object,
    forward: Forward,
    device: str | None,
    progress: bool,
) -> VerificationReport:
    store, manifest = opened.store, opened.manifest
    found: dict[str, Source] = {"train": StoredSource(store, "train", manifest.train.num_samples)}
    if manifest.test is not None:
        found["test"] = StoredSource(store, "test", manifest.test.num_samples)
    for split, given, record in (("train", inputs, manifest.train), ("test", test_inputs, manifest.test)):
        if given is not None:
            found[split] = _matching_samples(store, given, record, split).source
    stored = fingerprint(model, manifest.model.parameters)
    fields = ("state_digest", "structure_digest", "num_parameters")
    differing = tuple(
        (f"model.{field}", getattr(manifest.model, field), getattr(stored, field))
        for field in fields
        if getattr(manifest.model, field) != getattr(stored, field)
    )
    if differing:
        names = ", ".join(field for field, _, _ in differing)
        raise StoreMismatchError(f"{store.root} was made with another model: {names} differ", differing)
    functional = prepare_model(
        model,
        forward=forward,
        parameters=manifest.model.parameters,
        dtype=DTYPES[manifest.compute_dtype],
        device=resolve_device(device),
    )
    choices = manifest.choices
    products = JacobianProducts(
        model=functional,
        covectors=torch.from_numpy(get_kind(manifest.kind).covectors(manifest.num_outputs)).to(
            device=functional.device, dtype=functional.dtype
        ),
        batch=choices.batch,
        strip=choices.strip,
        tile=manifest.tile,
        is_mapping=manifest.train.is_mapping,
    )
    with Ticks(num_steps(products, found), what="certify", unit="step", enabled=progress) as ticks:
        certificates = certify(opened, products, found, step=ticks.tick)
    findings = tuple(
        Finding(
            certificate.array,
            (),
            f"K v and J(J'v) differ by up to {certificate.error:.1e} (tolerance {certificate.tolerance:.0e}, median "
            f"{certificate.median_error:.1e}); suspect rows: {', '.join(map(str, certificate.suspect_rows)) or 'none'}",
        )
        for certificate in certificates
        if not certificate.is_good
    )
    return VerificationReport(
        report.chunks_checked,
        report.bytes_checked,
        report.findings + findings,
        tuple(certificate.to_json() for certificate in certificates),
    )


def _matching_samples(store: Store, given: object, record: DataRecord | None, split: str) -> Samples:
    if record is None:
        raise ConfigError(f"{store.root} was made without test_inputs, but test_inputs were given")
    samples = as_samples(given, label=f"{split} inputs")
    inspected = samples.inspect(f"{split} inputs")
    if inspected.inputs_digest != record.inputs_digest:
        raise StoreMismatchError(
            f"the {split} inputs are not those that {store.root} was made with: it holds {record.num_samples} samples "
            f"of {record.inputs}, given are {inspected.num_samples} of {inspected.inputs}",
            ((f"{split}.inputs_digest", record.inputs_digest, inspected.inputs_digest),),
        )
    return samples


def _as_both(
    inputs: object, targets: object, test_inputs: object, test_targets: object
) -> tuple[Samples, Samples | None]:
    train = as_samples(inputs, targets)
    if test_inputs is None:
        if test_targets is not None:
            raise DataError("test_targets were given without test_inputs")
        return train, None
    test = as_samples(test_inputs, test_targets, label="test_inputs")
    require_same_arrays(train, test, "test_inputs")
    return train, test


def _kernel_spec(
    kind: str,
    parameters: Patterns,
    compute_dtype: str,
    accumulate_dtype: str | None,
    store_dtype: str | None,
    tile: int | None,
    jacobian: str,
) -> KernelSpec:
    values = {
        "kind": kind,
        "parameters": parameters,
        "compute_dtype": compute_dtype,
        "accumulate_dtype": accumulate_dtype,
        "store_dtype": store_dtype,
        "tile": tile,
        "jacobian": jacobian,
    }
    return parse(KernelSpec, values, source="kernel arguments")


def _run_spec(memory_limit: int | str | None, device: str | None, workers: int | None, self_check: bool) -> RunSpec:
    values = {"memory_limit": memory_limit, "device": device, "workers": workers, "self_check": self_check}
    return parse(RunSpec, values, source="run arguments")
