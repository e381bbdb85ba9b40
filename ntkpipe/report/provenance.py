"""What a store says of itself: what was computed, how it was checked, how long that took."""

from collections.abc import Mapping, Sequence
from typing import Any

from ntkpipe.base.resources import format_bytes
from ntkpipe.report.parts import Note, PageTable, Section
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
        ("digest of the model's state", model.state_digest),
        ("digest of the training inputs", manifest.train.inputs_digest),
    ]
    if manifest.derived is not None:
        rows.append(("digest of the source's manifest", manifest.derived.digest))
    named = model.parameters[:_MOST_NAMES]
    more = (("…", f"{len(model.parameters) - len(named):,} more"),) if len(named) < len(model.parameters) else ()
    held = tuple((name, _representation(name, choices.representations)) for name in named)
    return Section(
        "computed",
        "What was computed",
        (
            "A row of the kernel is a training sample (of a full NTK, a sample and an output); an entry is the inner "
            "product of two gradients of the model's output with respect to its parameters, as the convention says. "
            "Kernel units are (units of output / units of parameter)². The digest stands for all of this: equal "
            "digests, equal kernels.",
        ),
        (
            PageTable("Model, data and numerics", (), tuple(rows)),
            PageTable(_HELD, ("parameter", "held as"), (*held, *more), is_folded=True),
        ),
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
    certificate = store.read_result("certificate")
    missing, rows = _verification_rows(store, certificate)
    kernels = () if certificate is None else tuple(map(_certificate_row, certificate["kernels"]))
    parts: list[PageTable | Note] = [PageTable("Checks that the store keeps", (), tuple(rows))] if rows else []
    if kernels:
        columns = ("kernel", "largest row error", "median row error", "tolerance", "outcome")
        parts.append(PageTable("Certificate: K v against J (Jᵀ v), relative, row by row", columns, kernels))
    return Section(
        "verification",
        "Verification and certificate",
        (
            "Verification reads every chunk: it is there, whole (crc32c), finite, symmetric, and obeys the "
            "Cauchy–Schwarz inequality. The certificate compares the whole stored matrix with the model: for a random "
            "vector v the product K v of the store against J (Jᵀ v), which is computed from the model without any "
            "kernel. A single wrong entry anywhere would show in its row.",
        ),
        tuple(parts),
        missing,
    )


def _verification_rows(store: Store, certificate: Json | None) -> tuple[str | None, list[tuple[str, str]]]:
    missing, rows, found, check = None, [], store.read_result("verification"), store.read_result("self_check")
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
    if certificate is not None:
        rows.append(("certificate", f"of {certificate['checked']}, below"))
    if check is not None:
        judge = f"{check['reference']} in {check['dtype']}"
        error = f"error {check['compute_error']:.1e} of √(K_ii K_jj) against {judge}"
        rows.append(("self-check before the run", f"{error}, on samples {', '.join(map(str, check['samples']))}"))
    return missing, rows


def _certificate_row(kernel: Json) -> tuple[str, ...]:
    outcome = "good" if kernel["is_good"] else f"{kernel['num_suspects']:,} suspect rows"
    numbers = (f"{kernel[name]:.1e}" for name in ("error", "median_error", "tolerance"))
    return (str(kernel["array"]), *numbers, outcome)


def runs_table(runs: Sequence[Json]) -> PageTable | None:
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
    if not rows:
        return None
    return PageTable("Runs that computed the kernel", tuple(rows[0]), tuple(tuple(row.values()) for row in rows))
