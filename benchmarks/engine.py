"""This engine against others, side by side: seconds, share of the machine's matrix-product rate, accuracy, memory.

Every method computes the same float32 kernel of the same model and samples. A timing is the median of repeats that are
interleaved with those of the other methods and with plain matrix products; on one core it is CPU time, on all of them
wall time. Warm-up is not timed. ``ntkpipe`` is this engine from its first tile on; ``whole call`` is all of
``kernel_matrix`` but the self-check, in a process that has computed other kernels, with a model that it has not seen.
What the first call of a process does before its first tile, and the self-check, are printed as numbers of their own,
without imports. A share of 1 is the least number of operations that an exact kernel needs
(``comparison.work.least_flops``) at the rate of the best of the products of 1024, 2048 and 4096.

A method that is too slow for the full size is timed at two smaller ones, and its seconds are extrapolated as
a * Jacobians + b * pairs; the note says at which. One that is not installed or fails is listed with the reason. An
error is |K - K64| / sqrt(K64_ii K64_jj) against this engine in float64, which is compared with plain autograd on three
samples: the largest, and the one that 99 % of the entries stay below. The largest is often that of an activation beside
zero, which float32 puts on the other side of a ReLU, for this method or that; it grows with the number of samples, so
compare methods timed at the same.

    pip install -e '.[compute,bench]'
    python benchmarks/engine.py [--rows mlp-ntk,cnn-pntk] [--methods ntkpipe,hooks] [--cores one|all|both]
                                [--repeats 3] [--budget 8] [--scale 1] [--memory]

``--memory`` runs each method in a process of its own and prints by how much its resident memory grows at most.
nngeometry asks for torchvision and does not use it; ``make bench`` installs it without, as PyPI's torchvision does not
load beside a CPU build of torch and would then break transformers.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import psutil
import torch
from comparison.memory import measure
from comparison.methods import METHODS, Method, Ours, Reference, autograd_kernel, versions
from comparison.work import ROWS, Work, least_flops
from torch import Tensor

from ntkpipe.base.resources import format_bytes, num_cores

_PRODUCTS = (1024, 2048, 4096)
_SMALLEST = 4


@dataclass
class Result:
    """What was found for one method in one row.

    Attributes
    ----------
    method
        Ready to compute.
    sizes
        Samples it is timed at: all, or two smaller numbers.
    seconds
        By size, one a repeat.
    error, usual_error
        Against the reference: the largest, and the 99th percentile.
    failure
        Why there is no number.
    """

    method: Method
    sizes: tuple[int, ...] = ()
    seconds: dict[int, list[float]] = field(default_factory=dict)
    error: float = float("nan")
    usual_error: float = float("nan")
    failure: str = ""

    @property
    def median(self) -> float:
        """Seconds of the full size."""
        medians = [statistics.median(self.seconds[size]) for size in self.sizes]
        if len(medians) == 1:
            return medians[0]
        return extrapolate(
            [self.method.effort(size) for size in self.sizes], medians, self.method.effort(self.method.work.num_samples)
        )

    @property
    def note(self) -> str:
        """How it was timed, if not at the full size."""
        return "" if len(self.sizes) < 2 else f"extrapolated from {self.sizes[0]} and {self.sizes[1]} samples"


def extrapolate(efforts: list[tuple[int, int]], seconds: list[float], wanted: tuple[int, int]) -> float:
    """Solve seconds = a * Jacobians + b * pairs from two sizes, with a and b not below zero, for a third.

    Of one size alone, which is how a search begins, all seconds are taken for those of pairs.
    """
    (n1, p1), (n2, p2) = efforts
    determinant = p2 * n1 - p1 * n2
    b = max(0.0, (seconds[1] * n1 - seconds[0] * n2) / determinant) if determinant else seconds[1] / p2
    a = (seconds[1] - b * p2) / n2
    if a < 0:
        a, b = 0.0, seconds[1] / p2
    return a * wanted[0] + b * wanted[1]


def product_rate(clock: Callable[[], float]) -> float:
    """Operations a second of the fastest plain float32 product."""
    best = 0.0
    for size in _PRODUCTS:
        left, result = torch.ones(size, size), torch.empty(size, size)
        start = clock()
        torch.mm(left, left, out=result)
        best = max(best, 2.0 * size**3 / (clock() - start))
    return best


def timed(method: Method, size: int, clock: Callable[[], float]) -> tuple[float, Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        if not isinstance(method, Ours):
            warnings.simplefilter("ignore")  # deprecated hooks, missing batching rules
        start = clock()
        kernel = method.kernel(size)
        return clock() - start, kernel


def warm_up(result: Result, reference: Tensor, budget: float, clock: Callable[[], float]) -> None:
    """Find the sizes at which a run stays within the budget by doubling, and the error at the largest."""
    method, whole = result.method, result.method.work.num_samples
    size = whole
    if not isinstance(method, Ours):
        while size % 2 == 0 and size // 2 >= max(_SMALLEST, whole // 16):
            size //= 2
    efforts, seconds = [(0, 0)], [0.0]
    while True:
        last, kernel = timed(method, size, clock)
        efforts, seconds = [*efforts[-1:], method.effort(size)], [*seconds[-1:], last]
        if size == whole or extrapolate(efforts, seconds, method.effort(2 * size)) > budget:
            break
        size *= 2
    result.sizes = (size,) if size == whole else (size // 2, size)
    rows = size * method.work.num_covectors
    result.error, result.usual_error = errors(kernel, reference[:rows, :rows])


def errors(kernel: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest gap and 99th percentile, relative to the diagonal; NaN counts as infinite."""
    scale = expected.diagonal().sqrt()
    gaps = ((kernel.double() - expected).abs() / (scale[:, None] * scale)).nan_to_num(torch.inf).flatten()
    return float(gaps.max()), float(gaps.kthvalue(max(1, round(0.99 * len(gaps)))).values)


def reference_kernel(work: Work, inputs: Tensor) -> tuple[Tensor, float]:
    """K in float64, and how far it is from plain autograd on three samples."""
    model, width = work.model(), work.num_covectors
    kernel = Reference(work, model, inputs, num_cores()).kernel(work.num_samples)
    samples = torch.tensor([0, 1, work.num_samples - 1])
    rows = (samples[:, None] * width + torch.arange(width)).flatten()
    expected = autograd_kernel(work, deepcopy(model).double(), inputs[samples].double())
    return kernel, errors(kernel[rows][:, rows], expected)[0]


def compare(
    work: Work, names: list[str], cores: int, repeats: int, budget: float, reference: Tensor
) -> tuple[dict[str, Result], float]:
    """Results by method, and the rate of matrix products."""
    clock = process_time if cores == 1 else perf_counter
    torch.set_num_threads(cores)
    model, inputs = work.model(), work.inputs()
    results = {name: Result(METHODS[name](work, model, inputs, cores)) for name in names}

    def attempt(result: Result, step: Callable[[], object]) -> None:
        if result.failure:
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001  # a peer may fail with anything; it is printed
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else type(error).__name__
            result.failure = f"{reason}: {' '.join(str(error).split())[:160]}"

    def record(result: Result) -> None:
        for size in result.sizes:
            result.seconds.setdefault(size, []).append(timed(result.method, size, clock)[0])

    for result in results.values():
        attempt(result, lambda result=result: warm_up(result, reference, budget, clock))
    product_rate(clock)
    rate = 0.0
    for _ in range(repeats):
        for result in results.values():
            attempt(result, lambda result=result: record(result))
        rate = max(rate, product_rate(clock))
    return results, rate


def print_results(work: Work, results: dict[str, Result], cores: int, rate: float, scale: float) -> dict[str, str]:
    """Print one row in full, and return its line of the summary."""
    flops, found = least_flops(work), {name: each.median for name, each in results.items() if not each.failure}
    own, call = found.get("ntkpipe"), found.get("whole call")
    unit = "one core, CPU time" if cores == 1 else f"{cores} cores, wall time"
    print(f"\n{work.key}: {work.title}, {work.num_samples} samples; {unit}")
    print(f"  least {flops / 1e9:.1f} GFLOP, matrix products {rate / 1e9:.1f} GFLOP/s", end="")
    first = child(work, "ntkpipe", "first", scale)[0] if "ntkpipe" in results else {}
    print("".join(f"; in a new process {what} {seconds:.2f} s" for what, seconds in first.items()))
    print(f"  {'method':12} {'seconds':>9} {'share':>7} {'/ ntkpipe':>11} {'/ call':>7} {'error':>9} {'99 %':>9}")
    summary = {"row": work.key, "N": str(work.num_samples), "cores": str(cores)}
    for name, result in results.items():
        if result.failure:
            print(f"  {name:12} {'—':>9} {result.failure}")
            summary[name] = "—"
            continue
        seconds, mark = found[name], "~" if result.note else ""
        ratios = [float("nan") if base is None else seconds / base for base in (own, call)]
        columns = f"{name:12} {seconds:9.3f} {flops / rate / seconds:7.2f} {ratios[0]:11.2f} {ratios[1]:7.2f}"
        print(f"  {columns} {result.error:9.1e} {result.usual_error:9.1e}  {result.note}".rstrip())
        is_ours = isinstance(result.method, Ours)
        share, several = f", {flops / rate / seconds:.2f}", " / ".join(f"{mark}{ratio:.2f}" for ratio in ratios)
        summary[name] = f"{seconds:.3f} s{share if name == 'ntkpipe' else ''}" if is_ours else several
    sys.stdout.flush()
    return summary


def print_summary(lines: list[dict[str, str]]) -> None:
    """All rows as one table: seconds and share of ntkpipe, ratios of the others."""
    names = list(lines[0])
    print(
        "\nntkpipe: seconds, share of the matrix-product rate; others: seconds over ntkpipe's / over the whole call's\n"
    )
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for line in lines:
        print(f"| {' | '.join(line[name] for name in names)} |")


def child(work: Work, name: str, measured: str, scale: float) -> tuple[dict[str, Any], str]:
    """What a process of its own measures, or why it failed."""
    command = [sys.executable, __file__, "--rows", work.key, "--methods", name, "--scale", str(scale)]
    done = subprocess.run([*command, "--measure", measured], capture_output=True, text=True)
    return (json.loads(done.stdout), "") if done.returncode == 0 else ({}, done.stderr.strip().splitlines()[-1][:160])


def first_call(work: Work) -> dict[str, float]:
    """Seconds of the first call of this process before its first tile, and of its self-check."""
    torch.set_num_threads(1)
    method = Ours(work, work.model(), work.inputs(), 1)
    check = method.settled(work.num_samples).check_seconds
    return {"before the first tile": method.settle_seconds - check, "self-check": check}


def compare_memory(works: list[Work], names: list[str], scale: float) -> None:
    """Run each method in a process of its own."""
    for work in works:
        print(f"\n{work.key}: {work.title}, {work.num_samples} samples; growth of resident memory at most")
        for name in names:
            found, problem = child(work, name, "memory", scale)
            if problem:
                print(f"  {name:12} {'—':>10} {problem}")
                continue
            size, extra = found["samples"], ""
            if size < work.num_samples:
                extra = f"  at {size} samples: the same as for all, but for the kernel"
            if name == "ntkpipe":
                extra = (
                    f"  before that, settling: {format_bytes(found['settle'])}; planned at most "
                    f"{format_bytes(found['planned'])}\n  {'':12} Jacobian block of {found['block_samples']} samples: "
                    f"predicted {format_bytes(found['predicted'])}, real {format_bytes(found['real'])}"
                )
            print(f"  {name:12} {format_bytes(found['peak']):>10}{extra}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="of " + ", ".join(ROWS))
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--cores", choices=("one", "all", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of one run of a peer")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of samples, for a quick look")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--measure", choices=("memory", "first"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    keys, names = options.rows.split(","), options.methods.split(",")
    for given, known in ((keys, ROWS), (names, METHODS)):
        if not set(given) <= set(known):
            parser.error(f"{', '.join(sorted(set(given) - set(known)))}: unknown; known are {', '.join(known)}")
    works = [ROWS[key].scaled(options.scale) for key in keys]
    if options.measure:
        print(json.dumps(measure(works[0], METHODS[names[0]]) if options.measure == "memory" else first_call(works[0])))
        return
    memory = format_bytes(psutil.virtual_memory().total)
    print(f"{', '.join(versions())}; {torch.backends.cpu.get_cpu_capability()}, {num_cores()} cores, {memory}")
    if options.memory:
        compare_memory(works, names, options.scale)
        return
    modes = {"one": [1], "all": [num_cores()], "both": [1, num_cores()]}[options.cores]
    lines = []
    for work in works:
        reference, gap = reference_kernel(work, work.inputs())
        for cores in dict.fromkeys(modes):
            results, rate = compare(work, names, cores, options.repeats, options.budget, reference)
            lines.append(print_results(work, results, cores, rate, options.scale))
        print(f"  reference: float64, {gap:.1e} from plain autograd on three samples")
    print_summary(lines)


if __name__ == "__main__":
    main()
