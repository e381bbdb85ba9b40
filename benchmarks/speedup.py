"""Two workers against one, threads and processes of a local Dask cluster: pNTK of an MLP 784-1024-1024-10.

Timed from the first block to the last tile, as the workers record it; repeats are interleaved, each cluster is new and
has done a smaller run before, so that torch is loaded. Beside it, how much faster than one the same two workers
multiply matrices and do nothing else, which is what the machine allows; and what the plan said before anything ran,
from call to end.

    python benchmarks/speedup.py [--samples 16384] [--repeats 5]
"""

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

import ntkpipe
from ntkpipe.base.config import RunSpec
from ntkpipe.build.estimate import estimate_cluster
from ntkpipe.executors.connect import connect

TILE = 2048
_WORKERS = (1, 2)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers).eval()


def multiply(seconds: float = 2.0) -> int:
    """How many products one thread does in so many seconds."""
    torch.set_num_threads(1)
    left = torch.ones(TILE, 1024)
    out, count, start = torch.empty(TILE, TILE), 0, perf_counter()
    while perf_counter() - start < seconds:
        torch.mm(left, left.T, out=out)
        count += 1
    return count


def timed(model: nn.Module, inputs: np.ndarray, path: Path, **where: Any) -> dict[str, float]:
    """Seconds of a run, from call to end and from the first block to the last."""
    start = perf_counter()
    ntkpipe.compute_kernel(model, inputs, store=path, mode="w", tile=TILE, self_check=False, progress=False, **where)
    whole = perf_counter() - start
    (lines,) = path.glob("results/runs/*/blocks.jsonl")
    blocks = [json.loads(line) for line in lines.read_text().splitlines()]
    first, last = min(b["started"] for b in blocks), max(b["started"] + b["seconds"] for b in blocks)
    return {"whole": whole, "blocks": last - first}


def by_threads(workers: int, model: nn.Module, inputs: np.ndarray, path: Path) -> dict[str, float]:
    """A run of this process, and what its threads multiply at once."""
    with ThreadPoolExecutor(workers) as pool:
        products = sum(pool.map(lambda _: multiply(), range(workers)))
    return {**timed(model, inputs, path, workers=workers), "products": products}


def by_processes(workers: int, model: nn.Module, inputs: np.ndarray, path: Path) -> dict[str, float]:
    """A run on a local Dask cluster of its own, and what its processes multiply at once."""
    with connect("local", RunSpec(workers=workers)) as client:
        timed(model, inputs[: 2 * TILE], path, client=client)
        products = sum(client.run(multiply).values())
        return {**timed(model, inputs, path, client=client), "products": products}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, inputs = mlp(), np.random.default_rng(0).random((options.samples, 784), dtype=np.float32)
    ways = {"threads": by_threads, "Dask processes": by_processes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.zarr"
        plan, _ = ntkpipe.plan_kernel(model, inputs, store=path, tile=TILE, workers=1)
        estimates = {n: estimate_cluster(plan, {"workers": n, "memory_limit": "4GiB"}) for n in _WORKERS}
        runs: dict[tuple[str, int], list[dict[str, float]]] = {each: [] for each in product(ways, _WORKERS)}
        timed(model, inputs[: 2 * TILE], path)
        for _ in range(options.repeats):
            for (way, workers), found in runs.items():
                found.append(ways[way](workers, model, inputs, path))
                print(f"{way}, {workers}: {found[-1]['blocks']:.2f} s", flush=True)
    for workers, estimate in estimates.items():
        whole = statistics.median(run["whole"] for run in runs["Dask processes", workers])
        print(f"{workers} processes, from call to end {whole:.1f} s; planned {estimate.seconds:.1f} s")
    for way in ways:
        one, two = (statistics.median(run["blocks"] for run in runs[way, workers]) for workers in _WORKERS)
        pairs = list(zip(*(runs[way, workers] for workers in _WORKERS), strict=True))
        ratio = statistics.median(a["blocks"] / b["blocks"] for a, b in pairs)
        products = statistics.median(b["products"] / a["products"] for a, b in pairs)
        print(
            f"{way}: one {one:.2f} s, two {two:.2f} s, {ratio:.2f} × as fast; at matrix products alone "
            f"{products:.2f} ×: {ratio / products:.2f} of that"
        )


if __name__ == "__main__":
    main()
