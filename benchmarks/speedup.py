"""Two workers of a local Dask cluster against one: pNTK of an MLP 784-1024-1024-10 on 16,384 inputs.

Timed from the first block to the last tile, as the workers record it; repeats are interleaved, each on a cluster of its
own that has done a smaller run before, so that torch is loaded. Beside it, how much faster than one the same two
workers multiply matrices and do nothing else, which is what the machine allows; and what the plan said before anything
ran, from call to end.

    python benchmarks/speedup.py [--samples 16384] [--repeats 5]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from distributed import Client
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


def timed(client: Client, model: nn.Module, inputs: np.ndarray, path: Path) -> dict[str, float]:
    """Seconds of a run, from call to end and from the first block to the last."""
    start = perf_counter()
    ntkpipe.compute_kernel(
        model, inputs, store=path, mode="w", tile=TILE, self_check=False, client=client, progress=False
    )
    whole = perf_counter() - start
    (lines,) = path.glob("results/runs/*/blocks.jsonl")
    blocks = [json.loads(line) for line in lines.read_text().splitlines()]
    first, last = min(b["started"] for b in blocks), max(b["started"] + b["seconds"] for b in blocks)
    return {"whole": whole, "blocks": last - first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, inputs = mlp(), np.random.default_rng(0).random((options.samples, 784), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.zarr"
        plan, _ = ntkpipe.plan_kernel(model, inputs, store=path, tile=TILE, workers=1)
        estimates = {n: estimate_cluster(plan, {"workers": n, "memory_limit": "4GiB"}) for n in _WORKERS}
        runs: dict[int, list[dict[str, float]]] = {workers: [] for workers in _WORKERS}
        for repeat in range(options.repeats):
            for workers in _WORKERS:
                with connect("local", RunSpec(workers=workers)) as client:
                    timed(client, model, inputs[: 2 * TILE], path)
                    products = sum(client.run(multiply).values())
                    runs[workers].append({**timed(client, model, inputs, path), "products": products})
            one, two = (runs[workers][-1]["blocks"] for workers in _WORKERS)
            print(f"run {repeat + 1}: one worker {one:.2f} s, two {two:.2f} s, {one / two:.2f} ×", flush=True)
    for workers, estimate in estimates.items():
        whole = statistics.median(run["whole"] for run in runs[workers])
        print(f"{workers} workers, from call to end {whole:.1f} s; planned {estimate.seconds:.1f} s")
    one, two = (statistics.median(run["blocks"] for run in runs[workers]) for workers in _WORKERS)
    pairs = list(zip(*runs.values(), strict=True))
    ratio = statistics.median(a["blocks"] / b["blocks"] for a, b in pairs)
    products = statistics.median(b["products"] / a["products"] for a, b in pairs)
    print(f"{options.samples} samples, medians: one worker {one:.2f} s, two {two:.2f} s")
    print(f"two are {ratio:.2f} × as fast; at matrix products alone {products:.2f} ×")


if __name__ == "__main__":
    main()
