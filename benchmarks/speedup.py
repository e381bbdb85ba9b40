"""Two workers of a local Dask cluster against one: pNTK of an MLP 784-1024-1024-10 on 16,384 inputs.

Timed from the first block to the last tile, as the workers record it; repeats are interleaved, and both clusters are
there throughout. Beside it, what the plan said of two such workers before anything ran, from call to end.

    python benchmarks/speedup.py [--samples 16384] [--repeats 5]
"""

import argparse
import contextlib
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
from ntkpipe.cluster import connect
from ntkpipe.estimate import estimate_cluster

TILE = 2048


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers).eval()


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
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "kernel.zarr"
        clients = {workers: stack.enter_context(connect("local", workers=workers)) for workers in (1, 2)}
        plan, _ = ntkpipe.plan_kernel(model, inputs, store=path, tile=TILE, workers=1)
        estimates = {n: estimate_cluster(plan, {"workers": n, "memory_limit": "4GiB"}) for n in clients}
        runs: dict[int, list[dict[str, float]]] = {workers: [] for workers in clients}
        for repeat in range(options.repeats):
            for workers, client in clients.items():
                runs[workers].append(timed(client, model, inputs, path))
            one, two = (runs[workers][-1]["blocks"] for workers in clients)
            print(f"run {repeat + 1}: one worker {one:.2f} s, two {two:.2f} s, {one / two:.2f} ×", flush=True)
    for workers, estimate in estimates.items():
        whole = statistics.median(run["whole"] for run in runs[workers])
        print(f"{workers} workers, from call to end {whole:.1f} s; planned {estimate.seconds:.1f} s")
    one, two = (statistics.median(run["blocks"] for run in runs[workers]) for workers in clients)
    ratio = statistics.median(a["blocks"] / b["blocks"] for a, b in zip(*runs.values(), strict=True))
    print(f"{options.samples} samples, medians: one worker {one:.2f} s, two {two:.2f} s, two are {ratio:.2f} × as fast")


if __name__ == "__main__":
    main()
