"""The command line: parse, call one public function, print. Torch is imported by the commands that compute alone."""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console

from ntkpipe.app.commands import ARRAY, AS_JSON, MEMORY_LIMIT, SCHEDULER, STORE, StepCommand, show_result
from ntkpipe.base import errors
from ntkpipe.base.errors import Interrupted, NtkpipeError, needed_for
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import print_rows, print_table, printable
from ntkpipe.base.targets import Task
from ntkpipe.base.version import VERSION
from ntkpipe.build.derive import derive_kernel
from ntkpipe.build.mend import RepairReport, bad_chunks, mend
from ntkpipe.steps.registry import REGISTRY
from ntkpipe.store.export import export_kernel, find_array
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.verification import VerificationReport, verify_and_record
from ntkpipe.store.watch import watch

_FOUND, _WRONG_USE, _INTERRUPTED = 1, 2, 130  # exit codes: a bad tile, a failed check, a full disk; and the others
_FINDING = (errors.TileError, errors.StoreFullError, errors.SelfCheckError, errors.NonFiniteError, errors.ResourceError)

WORKFLOW = click.Argument(["workflow"], type=click.Path(path_type=Path, dir_okay=False))
OVERRIDES = click.Option(
    ["--set", "overrides"], multiple=True, metavar="A.B=VALUE", help="Override a key of the workflow file; repeatable."
)
GROW = click.Option(
    ["--grow"], is_flag=True, help="Add samples to a store that holds fewer: the first ones of the workflow's."
)
MODE = click.Option(
    ["--mode"],
    type=click.Choice(["a", "w", "w-"]),
    default="a",
    show_default=True,
    help="a: create or resume; w: start over; w-: only create.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
@click.option("--traceback", is_flag=True, expose_value=False, help="Show the whole traceback of an error.")
def cli() -> None:
    """Empirical neural tangent kernels at data-set size: exact, verified, resumable."""
    warnings.showwarning = _show_warning


@cli.command(params=[WORKFLOW, OVERRIDES, GROW, MODE, SCHEDULER])
def run(workflow: Path, overrides: tuple[str, ...], mode: Any, grow: bool, scheduler: str | None) -> None:
    """Compute or resume the kernel of WORKFLOW, then do the steps that it lists."""
    from ntkpipe.app import workflow as workflows

    loaded = workflows.load(workflow, _with_scheduler(overrides, scheduler))
    are_good = []
    for result in workflows.run(loaded, mode=mode, grow=grow):
        print_rows(result.step, result.rows)
        are_good.append(result.is_good)
    if not all(are_good):
        sys.exit(_FOUND)


@cli.command(params=[WORKFLOW, OVERRIDES, GROW, MODE])
@click.option("--scheduler", metavar="ADDRESS", required=True, help="Of the cluster: tcp://host:8786 or tls://….")
def submit(workflow: Path, overrides: tuple[str, ...], grow: bool, mode: Any, scheduler: str) -> None:
    """Run WORKFLOW on a Dask cluster, its driver included, and return once the first block is handed out."""
    with needed_for("submit", "cluster"):
        from ntkpipe.app import submission

    print_rows("submitted", submission.submit(workflow, overrides, scheduler=scheduler, mode=mode, grow=grow))


@cli.command(params=[WORKFLOW, OVERRIDES, GROW, AS_JSON])
@click.option(
    "--parameters", "by_parameter", is_flag=True, help="Show how each parameter's Jacobian is found and held."
)
def plan(workflow: Path, overrides: tuple[str, ...], grow: bool, as_json: bool, by_parameter: bool) -> None:
    """Show tiles, bytes, operations, memory and time of WORKFLOW before anything runs, and how Jacobians are found.

    With a `cluster` in the file, or `--set cluster.workers=64`, also what that would take.
    """
    from ntkpipe.app import workflow as workflows
    from ntkpipe.build.estimate import estimate_cluster
    from ntkpipe.jacobian import parameter_report as reports

    loaded = workflows.load(workflow, overrides)
    planned, found = workflows.plan(loaded, grow=grow)
    described = loaded.workflow.cluster
    estimate = None if described is None else estimate_cluster(planned, described)
    if as_json:
        numbers = {**planned.to_json(), "jacobians": [each.to_json() for each in found]}
        print(json.dumps({**numbers, "cluster": None if estimate is None else estimate.to_json()}, indent=1))
    else:
        print_rows("plan" if estimate is None else "plan for this machine", planned.rows())
        if estimate is not None:
            print_rows("estimate for the described cluster", estimate.rows())
        if found:
            table = reports.list_reports(found) if by_parameter else reports.summarize_reports(found)
            print_table(f"Jacobians ({table.title})", table.columns, table.rows, num_texts=table.num_texts)
            print_rows("held as", reports.explain_reports(found))
        if reasons := reports.fallback_reasons(found):
            print_rows("in the fallback", reasons)
    # Whoever describes a cluster asks about that one.
    if planned.problems if estimate is None else estimate.plan.problems:
        sys.exit(_FOUND)


@cli.command(params=[STORE, AS_JSON])
@click.option("--watch", "is_watched", is_flag=True, help="Follow a run until it is complete or has failed.")
def info(store: str, as_json: bool, is_watched: bool) -> None:
    """Show what STORE holds, how far it is and what was found; reads no tile."""
    opened = watch(store) if is_watched else open_kernel(store)
    if as_json:
        print(json.dumps(_describe(opened), indent=1))
    else:
        print_rows(store, opened.rows())


@cli.command(params=[STORE, OVERRIDES, SCHEDULER, AS_JSON])
@click.option(
    "--workflow",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also certify the whole kernel against the model and data of this workflow file.",
)
@click.option(
    "--repair",
    is_flag=True,
    help="Put right what is bad: leftovers, descriptions of arrays, and with --workflow the bad tiles.",
)
def verify(
    store: str, workflow: Path | None, overrides: tuple[str, ...], repair: bool, scheduler: str | None, as_json: bool
) -> None:
    """Check every chunk of STORE, and with --workflow the whole kernel against its model."""
    if scheduler is not None and not (repair and workflow):
        raise click.UsageError(
            "--scheduler is where bad tiles are computed again; give --repair and --workflow as well"
        )
    opened = open_kernel(store)
    report: VerificationReport | RepairReport
    if workflow is not None:
        from ntkpipe.app.workflow import load, repair_store, verify_store

        loaded = load(workflow, _with_scheduler(overrides, scheduler))
        report = (repair_store if repair else verify_store)(loaded, opened)
    elif overrides:
        raise click.UsageError("--set changes a workflow file; give --workflow FILE as well")
    elif repair:
        report = mend(opened.store, progress=True)
    else:
        report = verify_and_record(opened.store, progress=True)
    more = []
    if isinstance(report, RepairReport) and workflow is None and bad_chunks(opened.store, report.left):
        more.append(("what else", "the chunks above need the model and the data: give --workflow FILE as well"))
    show_result(f"{'repair' if repair else 'verify'} {store}", report, more, as_json=as_json)


@cli.command(params=[STORE])
@click.option("--kind", required=True, help="pntk, trace, diagonal or output:k; trace and output:k also from diagonal.")
@click.option("--to", required=True, metavar="PATH", help="Path or URL of the new store.")
@click.option("--samples", is_flag=True, help="Copy the samples, too: a certificate needs them, or a workflow file.")
def derive(store: str, kind: str, to: str, samples: bool) -> None:
    """Write a store of another KIND from the complete STORE of kind ntk or diagonal, without its model."""
    written = derive_kernel(store, kind=kind, to=to, samples=samples)
    progress = written.progress
    size = f"{written.manifest.shape}, {progress.tiles_total:,} tiles, {format_bytes(progress.bytes_done)}"
    print_rows(f"derive {store}", [("kind", written.manifest.kind), ("kernel", size), ("written", str(written.path))])


@cli.command(params=[STORE])
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--array", default="train", show_default=True, help="Which one: train, test_train, outputs/train, targets/train, …"
)
def export(store: str, path: Path, array: str) -> None:
    """Write the full matrix of STORE to PATH: .npy, or .zarr for plain Zarr. It appears there when it is whole."""
    opened = open_kernel(store)
    written = export_kernel(opened, path, array=array)
    layout = find_array(opened.store, array).layout
    shape = " × ".join(f"{size:,}" for size in layout.shape)
    print_rows(f"export {store}", [("array", f"{layout.name}, {shape} {layout.dtype}"), ("written", str(written))])


@cli.command(params=[STORE, ARRAY, MEMORY_LIMIT, AS_JSON])
@click.option("--output", metavar="PATH", help="Of the page.  [default: beside the store, as run.html for run.zarr]")
@click.option(
    "--ridge", "ridges", type=float, multiple=True, help="λ of the regressions; repeatable.  [default: what is saved]"
)
@click.option(
    "--ridge-scale", type=click.Choice(["mean_diagonal"]), help="What --ridge is a multiple of.  [default: absolute]"
)
@click.option(
    "--task",
    type=click.Choice(get_args(Task)),
    help="What targets are.  [default: what saved results took them for, else auto]",
)
@click.option("--saved-only", is_flag=True, help="Show what steps have saved; compute nothing but the picture.")
def report(store: str, output: str | None, ridges: tuple[float, ...], as_json: bool, **options: Any) -> None:
    """Write one HTML page on STORE that needs no network: what it is, how it was checked, what it is good for."""
    from ntkpipe.report.report import write_report  # keeps scipy out of other commands

    show_result(f"report {store}", write_report(store, output, ridges=ridges or None, **options), as_json=as_json)


for _entry in REGISTRY.values():
    cli.add_command(StepCommand(_entry))


def _with_scheduler(overrides: tuple[str, ...], scheduler: str | None) -> tuple[str, ...]:
    return overrides if scheduler is None else (*overrides, f"run.scheduler={scheduler}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of ``ntkpipe`` and ``python -m ntkpipe``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        cli.main(given, prog_name="ntkpipe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(_WRONG_USE)
    except (KeyboardInterrupt, click.Abort) as error:
        # click wraps an interrupt, and so its message, into an Abort.
        message = str(error.__cause__) if isinstance(error.__cause__, Interrupted) else "interrupted"
        _fail(message, _INTERRUPTED, given)
    except NtkpipeError as error:
        _fail(str(error), _FOUND if isinstance(error, _FINDING) else _WRONG_USE, given)


def _fail(message: str, code: int, arguments: list[str]) -> None:
    """Print an error as one line, or with its traceback; called while the error is handled."""
    if "--traceback" in arguments:
        Console(stderr=True).print_exception()
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def _describe(store: KernelStore) -> dict[str, Any]:
    progress = store.progress
    return {
        "path": str(store.path),
        "manifest": store.manifest.model_dump(mode="json"),
        "progress": {**asdict(progress), "is_complete": progress.is_complete},
        "kernels": {
            name: {"shape": array.layout.shape, "dtype": str(array.layout.dtype), "tiles": array.layout.num_chunks}
            for name, array in store.store.arrays.items()
            if array.layout.grid is not None
        },
        "runs": store.store.read_results("runs"),
        **{
            name: store.store.read_result(name)
            for name in ("verification", "certificate", "self_check", "summary", "driver", *REGISTRY)
        },
    }


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {printable(str(message))}", file=sys.stderr)
