"""Workflow files in action: the kernel is computed or resumed, then each step that the file lists is done."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ntkpipe.analysis.summary import Summary, summarize
from ntkpipe.app.commands import client_of
from ntkpipe.base.arguments import check_options, options_of, require_known
from ntkpipe.base.config import Budget, ModelSpec, RunSpec, StepSpec, Workflow, load_workflow
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.imports import call_factory, import_object
from ntkpipe.base.progress import note_if_slow
from ntkpipe.base.resources import format_bytes, format_seconds
from ntkpipe.base.tables import TableRows
from ntkpipe.build.compute import PlannedKernel, compute_kernel, plan_kernel, repair, verify
from ntkpipe.build.from_formula import compute_infinite_kernel, plan_infinite_kernel
from ntkpipe.build.mend import RepairReport
from ntkpipe.infinite.networks import Network
from ntkpipe.jacobian.model.checkpoints import load_checkpoint
from ntkpipe.jacobian.model.device import count_gpus
from ntkpipe.jacobian.model.functional import Forward
from ntkpipe.report.report import Report, require_libraries, write_report
from ntkpipe.solvers.result import Result
from ntkpipe.steps.inputs import check_step
from ntkpipe.steps.registry import REGISTRY
from ntkpipe.steps.run import run_step
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.layout import planes
from ntkpipe.store.results import reading_results
from ntkpipe.store.store import Mode
from ntkpipe.store.verification import VerificationReport

if TYPE_CHECKING:
    from distributed import Client

_OF_EVERY_STEP = ("array", "memory_limit")  # beside the options of its function

_DATA_KEYS = ("inputs", "targets", "test_inputs", "test_targets")


@dataclass(frozen=True)
class Loaded:
    """A workflow file with its model and data in memory."""

    workflow: Workflow  # the validated file
    model: nn.Module | Network  # model, forward: the model with its checkpoint, and what picks its output
    forward: Forward
    data: Mapping[str, Any]  # `inputs` and optionally `targets`, `test_inputs`, `test_targets`
    folder: Path  # of the workflow file


@dataclass(frozen=True)
class StepResult:
    """What one step found."""

    step: str  # its name
    rows: TableRows  # the result as (quantity, value) in words
    is_good: bool  # whether nothing was found to be wrong


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a workflow file, then make its data and its model."""
    workflow = load_workflow(path, overrides)
    for step in workflow.steps:
        _check_step(step, str(path))
    folder = path.resolve().parent
    with note_if_slow(f"data.factory {workflow.data.factory} is at work"):
        data = call_factory(workflow.data.factory, workflow.data.arguments, folder)
    if not isinstance(data, Mapping) or "inputs" not in data or not set(data) <= set(_DATA_KEYS):
        found = f"the keys {', '.join(map(repr, data))}" if isinstance(data, Mapping) else type(data).__name__
        raise ConfigError(
            f"data.factory {workflow.data.factory} returned {found}; needed a mapping with 'inputs' and, if there are "
            "any, 'targets', 'test_inputs', 'test_targets'"
        )
    model, forward = _model_of(workflow.model, folder)
    return Loaded(workflow, model, forward, data, folder)


def _model_of(spec: ModelSpec, folder: Path) -> tuple[nn.Module | Network, Forward]:
    with note_if_slow(f"model.factory {spec.factory} is at work"):
        model = call_factory(spec.factory, spec.arguments, folder)
    if isinstance(model, Network) and spec.checkpoint is None and spec.forward is None:
        return model, None
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory {spec.factory} returned {type(model).__name__}; needed a torch.nn.Module, or of "
            "ntkpipe.infinite a network without checkpoint and forward"
        )
    if spec.checkpoint is not None:
        load_checkpoint(model, folder / spec.checkpoint)
    forward: Forward = spec.forward
    if isinstance(forward, str) and ":" in forward:
        forward = import_object(forward, folder)
    return model, forward


def run(
    loaded: Loaded, *, mode: Mode = "a", grow: bool = False, progress: bool = True, client: "Client | None" = None
) -> Iterator[StepResult]:
    """Compute or resume the kernel of a workflow, then do its steps one by one."""
    workflow = loaded.workflow
    with _client_of(workflow.run) if client is None else nullcontext(client) as client:
        options = {**_arguments(loaded), "mode": mode, "grow": grow, "client": client, "code": loaded.folder}
        if workflow.run.scheduler == "local":
            options["memory_limit"] = None  # that of the workers, which say how much they have
        compute = compute_infinite_kernel if isinstance(loaded.model, Network) else compute_kernel
        store = compute(**options, progress=progress)
        yield StepResult("kernel", kernel_rows(store), is_good=True)
        for step in workflow.steps:
            yield _done(step, loaded, store, {"progress": progress, "client": client})


def _client_of(run: RunSpec) -> AbstractContextManager["Client | None"]:
    return client_of(run, num_gpus=count_gpus() if run.scheduler == "local" and run.device != "cpu" else 0)


def plan(loaded: Loaded, *, grow: bool = False) -> PlannedKernel:
    """Plan the kernel of a workflow; see :func:`ntkpipe.plan_kernel`."""
    if isinstance(loaded.model, Network):
        return PlannedKernel(plan_infinite_kernel(**_arguments(loaded), grow=grow), ())
    return plan_kernel(**_arguments(loaded), grow=grow)


def _arguments(loaded: Loaded) -> dict[str, Any]:
    """What a workflow asks for, as arguments of :func:`ntkpipe.compute_kernel`."""
    workflow = loaded.workflow
    kernel, run = workflow.kernel, workflow.run
    if isinstance(loaded.model, Network):
        known, ours = ("tile", "store_dtype"), {"memory_limit", "workers", "force"}
        require_known(kernel.model_fields_set, known, "kernel of a network of infinite width", "key")
        specs = {**kernel.model_dump(include={*known}), **run.model_dump(include=ours)}
        return {"net": loaded.model, "store": workflow.store, **loaded.data, **specs}
    specs = {**kernel.model_dump(), **run.model_dump(exclude={"scheduler", "force"})}
    return {"model": loaded.model, "forward": loaded.forward, "store": workflow.store, **loaded.data, **specs}


def verify_store(
    loaded: Loaded, store: KernelStore, *, progress: bool = True, certify: bool = True
) -> VerificationReport:
    """Verify a store and certify it with the model and samples of a workflow."""
    samples = {name: loaded.data[name] for name in ("inputs", "test_inputs") if name in loaded.data}
    against: Any = {"model": loaded.model, "forward": loaded.forward, "device": loaded.workflow.run.device, **samples}
    return verify(store, **(against if certify else {}), progress=progress)


def repair_store(loaded: Loaded, store: KernelStore, *, progress: bool = True) -> RepairReport:
    """Repair a store with the model and samples of a workflow; see :func:`ntkpipe.repair`."""
    run = loaded.workflow.run
    options: Any = {**loaded.data, **run.model_dump(exclude={"scheduler", "force"}), "forward": loaded.forward}
    with _client_of(run) as client:
        return repair(store, loaded.model, client=client, code=loaded.folder, progress=progress, **options)


def kernel_rows(store: KernelStore) -> TableRows:
    """Size of a kernel and how fast it was computed, in words."""
    manifest, progress = store.manifest, store.progress
    shapes = [a.layout.shape for a in store.store.arrays.values() if a.layout.grid is not None]
    train, count = shapes[0], len(planes(manifest))
    size = f"{train[0]:,} × {train[1]:,}"
    if manifest.test is not None:
        size += f", test × train {shapes[1][0]:,} × {shapes[1][1]:,}"
    if count > 1:
        size += f", {count} of each"
    size += f"; {format_bytes(progress.bytes_done)} in {progress.tiles_done} tiles of {manifest.store_dtype}"
    rows = [
        ("store", str(store.path)),
        ("kernel", f"{manifest.kind} of {manifest.maker}"),
        ("size", size),
    ]
    with reading_results(store.path):
        runs = store.store.read_results("runs")
        if runs:
            seconds, flops = sum(run["seconds"] for run in runs), sum(run["flops"] for run in runs)
            last = runs[-1]
            of_model = manifest.source is None
            checked = f", and {last['self_check_seconds']:.1f} s of self-check" if of_model else ""
            rows.append(("time", f"{format_seconds(seconds)}{checked}"))
            share = sum(run["share_of_rate"] * run["seconds"] for run in runs) / seconds
            rate = f"{flops / seconds / 1e9:.1f} GFLOP/s on {last['workers']} workers"
            reach = "what their matrix products reach" if of_model else "what the plan timed"
            rows.append(("rate", f"{rate}, {share:.0%} of {reach}"))
        check = store.store.read_result("self_check")
        if check is not None:
            judge = f"{check['reference']} in {check['dtype']}"
            rows.append(("self-check", f"error {check['compute_error']:.1e} of √(K_ii K_jj) against {judge}"))
    return rows


def _done(step: StepSpec, loaded: Loaded, store: KernelStore, shared: Mapping[str, Any]) -> StepResult:
    name, options = step.step, step.options
    found: Result | Report | VerificationReport
    if name == "summary":
        summary = summarize(store, **options)
        store.store.write_result("summary", summary.to_json())
        return StepResult(name, summary_rows(summary), is_good=True)
    if name == "verify":
        found = verify_store(loaded, store, progress=shared["progress"], **options)
    elif name == "report":
        found = write_report(store, **shared, **options)
    else:
        found = run_step(store, name, **shared, **options)
    return StepResult(name, found.rows(), found.is_good)


def summary_rows(found: Summary) -> TableRows:
    """A summary in words."""
    shown = ", ".join(f"{value:,.4g}" for value in found.eigenvalues)
    part = "" if found.num_samples == found.num_train else "; all below is of these alone, `samples` takes more"
    rows = [
        ("leading block", f"{found.num_samples:,} of {found.num_train:,} samples, {found.num_rows:,} rows{part}"),
        ("eigenvalues", f"{shown}, …, {found.smallest_eigenvalue:.3g}"),
        ("λ₁ / trace", f"{found.eigenvalues[0] / found.trace:.1%}" if found.trace else "-"),
    ]
    if found.targets:
        rows.append(("targets", f"{found.targets}; `task` takes them for something else"))
    if found.alignment is not None:
        rows.append(("kernel-target alignment", f"{found.alignment:.3f} (centred {found.centred_alignment:.3f})"))
    if found.accuracy is not None:
        correct = f"{found.accuracy:.1%} of {found.num_test:,} test samples right"
        rows.append(("ridge regression", f"{correct}, λ = {found.ridge:.3g}"))
    elif found.mean_squared_error is not None:
        rows.append(("ridge regression", f"test error {found.mean_squared_error:.4g}, λ = {found.ridge:.3g}"))
    if found.note:
        rows.append(("test targets", found.note))
    return rows


# Steps that are in no registry, with the functions that have their options.
_STEPS: dict[str, Callable[..., Any]] = {"report": write_report, "verify": verify_store, "summary": summarize}


def _check_step(step: StepSpec, source: str) -> None:
    where = f"{source}: step {step.step!r}"
    require_known([step.step], [*REGISTRY, *_STEPS], source, "step")
    Budget.of(step.options.get("memory_limit"))
    if step.step in REGISTRY:
        check_options(options_of(run_step), {k: step.options[k] for k in ("array",) if k in step.options}, where)
        check_step(step.step, {k: v for k, v in step.options.items() if k not in _OF_EVERY_STEP}, where)
        return
    if step.step == "report":
        require_libraries()
    options = options_of(_STEPS[step.step])
    require_known(step.options, options.keys() - {"progress", "store"}, where, "option")
    check_options(options, step.options, where)
