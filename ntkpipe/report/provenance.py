"""What a store says of itself: what was computed, how it was checked, how long that took."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from ntkpipe.base.resources import format_bytes
from ntkpipe.report.parts import PageTable, Plot, Section
from ntkpipe.report.theme import COLOURS, linear
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.manifest import DataRecord
from ntkpipe.store.store import Store

Json = Mapping[str, Any]  # a record of the store

_MOST_NAMES = 200
_HELD = "Parameters, and how their Jacobians were held"


def computed_section(store: KernelStore, array: str) -> Section:
    """What was computed: everything that decided the numbers."""
    manifest, progress = store.manifest, store.progress
    model, choices = manifest.model, manifest.choices
    done = f"{progress.tiles_done:,} of {progress.tiles_total:,}, {manifest.tile} samples along an edge"
    rows = [
        ("store", str(store.path)),
        ("kernel of this report", f"{array}, {' × '.join(f'{s:,}' for s in store.store.arrays[array].layout.shape)}"),
        *manifest.rows(),
        ("rows of the kernel for each sample", str(manifest.num_covectors)),
        ("training samples", _samples_in_words(manifest.train)),
        ("test samples", "none" if manifest.test is None else _samples_in_words(manifest.test)),
        ("analyses multiply in", "float64"),
        ("arithmetic", choices.arithmetic),
        ("tiles", f"{done}, {format_bytes(progress.bytes_done)}"),
        ("digest of the manifest", manifest.digest()),
        *(() if model is None else (("digest of the model's state", model.state_digest),)),
        ("digest of the training inputs", manifest.train.inputs_digest),
    ]
    if manifest.derived is not None:
        rows.append(("digest of the source's manifest", manifest.derived.digest))
    tables, is_of = [PageTable("Model, data and numerics", (), tuple(rows))], "the limit of inner products of gradients"
    if model is not None:
        is_of = "the inner product of two gradients of the model's output with respect to its parameters"
        named = model.parameters[:_MOST_NAMES]
        more = (("…", f"{left:,} more"),) if (left := len(model.parameters) - len(named)) else ()
        held = tuple((name, _representation(name, choices.representations)) for name in named)
        tables.append(PageTable(_HELD, ("parameter", "held as"), (*held, *more), is_folded=True))
    return Section(
        "computed",
        "What was computed",
        (
            "A row of the kernel is a training sample (of a full NTK, a sample and an output); an entry is "
            f"{is_of}, as the convention says. "
            "Kernel units are (units of output / units of parameter)². The digest stands for all of this: equal "
            "digests, equal kernels.",
        ),
        tables,
    )


def _samples_in_words(data: DataRecord) -> str:
    shapes = ", ".join(
        f"{name} of shape ({', '.join(map(str, record.shape))}) and dtype {record.dtype}"
        for name, record in data.inputs.items()
    )
    return f"{data.num_samples:,}; {shapes}; targets: {'none' if data.targets is None else data.targets.dtype}"


def _representation(parameter: str, representations: Mapping[str, str]) -> str:
    """That of a parameter, or of a pair that is held together."""
    return next((held for names, held in representations.items() if parameter in names.split(" + ")), "not recorded")


def verification_section(store: Store) -> Section:
    """How the store was checked."""
    found, certificate, check = map(store.read_result, ("verification", "certificate", "self_check"))
    missing, rows = None, []
    if found is None:
        missing = (
            "This store has not been verified since it was computed; `ntkpipe verify STORE --workflow FILE` reads "
            "every chunk and certifies the whole kernel against its model."
        )
    else:
        wrong = "nothing is wrong" if found["is_good"] else f"{found['num_findings']:,} findings"
        read = f"{found['chunks_checked']:,} chunks, {format_bytes(found['bytes_checked'])}, read: {wrong}"
        rows.append(("verification", f"{read} ({found['checked']})"))
        rows += [("finding", f"{one['array']}: {one['problem']}") for one in found["findings"][:5]]
        if certificate is None:
            missing = (
                "There is no certificate against the model; `ntkpipe verify STORE --workflow FILE`, or "
                "ntkpipe.verify(store, model), makes one."
            )
    tables = []
    if certificate is not None:
        rows.append(("certificate", f"of {certificate['checked']}, below"))
        columns = ("kernel", "largest row error", "median row error", "tolerance", "outcome")
        kernels = tuple(map(_certificate_row, certificate["kernels"]))
        tables.append(PageTable("Certificate: K v against J (Jᵀ v), relative, row by row", columns, kernels))
    if check is not None:
        judge = f"{check['reference']} in {check['dtype']}"
        error = f"error {check['compute_error']:.1e} of √(K_ii K_jj) against {judge}"
        rows.append(("self-check before the run", f"{error}, on samples {', '.join(map(str, check['samples']))}"))
    if rows:
        tables.insert(0, PageTable("Checks that the store keeps", (), tuple(rows)))
    return Section(
        "verification",
        "Verification and certificate",
        (
            "Verification reads every chunk: it is there, whole (crc32c), finite, symmetric, and obeys the "
            "Cauchy–Schwarz inequality. The certificate compares the whole stored matrix with the model: for a random "
            "vector v the product K v of the store against J (Jᵀ v), which is computed from the model without any "
            "kernel. A single wrong entry anywhere would show in its row. Where a model's backward pass is not the "
            "derivative of its forward pass, gradients of rows take the place of J, summed over a few rows at a time; "
            "of a network of infinite width the formulas give a row in each row of tiles.",
        ),
        tables,
        missing,
    )


def _certificate_row(kernel: Json) -> tuple[str, ...]:
    outcome = "good" if kernel["is_good"] else f"{kernel['num_suspects']:,} suspect rows"
    outcome += ", by gradients alone" if kernel.get("by_backward") else ""  # earlier versions did not say
    outcome += ", rows at random by the formulas" if kernel.get("by_formula") else ""
    numbers = (f"{kernel[name]:.1e}" for name in ("error", "median_error", "tolerance"))
    return (str(kernel["array"]), *numbers, outcome)


def timings_section(runs: Sequence[Json], seconds: Sequence[tuple[str, float]]) -> Section:
    """Runs of the kernel, and seconds of it and of every part of the page."""
    names = {"kernel, all runs": "seconds", "self-checks before": "self_check_seconds"}
    parts = [(name, sum(float(run[key]) for run in runs)) for name, key in names.items() if runs]
    parts += seconds
    longest = max(parts, key=lambda part: part[1])
    plot = Plot(
        "time",
        "Wall time of each part",
        partial(bars, parts=parts),
        "Bars of wall time: " + "; ".join(f"{name} {seconds:.3g} s" for name, seconds in parts) + ".",
        (
            f"Wall time of the kernel itself and of each analysis on this page; {longest[0]} took longest. What an "
            "earlier step had saved is shown with the time that it took then.",
        ),
        0.2 + 0.075 * len(parts),
    )
    missing = "No run is recorded in this store (it was derived, or results were deleted); ntkpipe run records each."
    return Section("timings", "Timings", (), (plot, _runs_table(runs)) if runs else (plot,), None if runs else missing)


def bars(axes: Axes, parts: Sequence[tuple[str, float]]) -> None:
    """Seconds of each part, from above."""
    names, seconds = [name for name, _ in parts], [value for _, value in parts]
    drawn = axes.barh(range(len(parts)), seconds, color=COLOURS["blue"], height=0.62)
    axes.bar_label(drawn, [f"{value:.3g} s" for value in seconds], padding=4, color=COLOURS["ink"])
    axes.set_yticks(range(len(parts)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    linear(axes, "x")
    axes.set_xlim(0, 1.18 * max(max(seconds), 1e-9))
    axes.set_xlabel("wall time [s]")


def _runs_table(runs: Sequence[Json]) -> PageTable:
    """Every run that computed tiles, the oldest first."""
    rows = [
        {
            "finished": str(run["finished"]),
            "host": str(run["host"]),
            "workers": f"{run['workers']}",
            "tiles": f"{run['tiles']:,}",
            "time [s]": f"{run['seconds']:.3g}",
            "self-check [s]": f"{run['self_check_seconds']:.3g}",
            "rate [GFLOP/s]": f"{run['flops'] / max(run['seconds'], 1e-9) / 1e9:,.1f}",
            "of attainable [%]": f"{100 * run['share_of_rate']:.0f}",
            "peak memory": format_bytes(run["peak_memory_bytes"]),
        }
        for run in runs
    ]
    return PageTable("Runs that computed the kernel", tuple(rows[0]), tuple(tuple(row.values()) for row in rows))
