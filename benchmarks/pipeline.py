"""The pipeline against the same arithmetic in a bare loop: pNTK of an MLP 784-1024-1024-10 on 16,384 inputs.

The bare loop knows the network: it differentiates the three layers by hand, holds all factors in memory, contracts the
upper tiles in pieces that stay in the cache on the same number of threads, and keeps the result in memory. It checks
nothing, writes nothing and could not be stopped. The ratio is what tracing, planning, checking, checksums and files
cost, less what the engine's halving of diagonal blocks saves.

    python benchmarks/pipeline.py [--samples 16384] [--repeats 3]
"""

import argparse
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

import ntkpipe

TILE, PIECE = 2048, 512


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers).eval()


def factors(model: nn.Sequential, batch: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(inputs, cotangents) of the three layers for the covector 1/sqrt(10) * (1, ..., 1), by hand."""
    first, second, third = model[0], model[2], model[4]
    with torch.no_grad():
        h1 = first(batch).relu_()
        h2 = second(h1).relu_()
        d3 = torch.full((len(batch), 10), 10**-0.5)
        d2 = (d3 @ third.weight) * (h2 > 0)
        d1 = (d2 @ second.weight) * (h1 > 0)
    return [(batch, d1), (h1, d2), (h2, d3)]


def bare_loop(model: nn.Sequential, inputs: Tensor, num_threads: int) -> tuple[float, dict[tuple[int, int], Tensor]]:
    """Seconds, and the upper tiles."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    starts = range(0, len(inputs), TILE)
    start = perf_counter()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pieces = [inputs[i : i + PIECE] for i in range(0, len(inputs), PIECE)]
        held = list(pool.map(lambda piece: factors(model, piece), pieces))
        keys = [(row, column) for row in starts for column in starts if row <= column]
        tiles = dict(zip(keys, pool.map(lambda key: bare_tile(held, *key), keys), strict=True))
    seconds = perf_counter() - start
    torch.set_num_threads(previous)
    return seconds, tiles


def bare_tile(held: list[list[tuple[Tensor, Tensor]]], row: int, column: int) -> Tensor:
    tile = torch.empty(TILE, TILE)
    a, d = torch.empty(PIECE, PIECE), torch.empty(PIECE, PIECE)
    for i in range(TILE // PIECE):
        for j in range(i if row == column else 0, TILE // PIECE):
            entries = torch.zeros(PIECE, PIECE)
            for (a1, d1), (a2, d2) in zip(held[row // PIECE + i], held[column // PIECE + j], strict=True):
                torch.mm(a1, a2.T, out=a).add_(1.0)
                torch.mm(d1, d2.T, out=d)
                entries.addcmul_(a, d)
            tile[i * PIECE : (i + 1) * PIECE, j * PIECE : (j + 1) * PIECE] = entries
            if row == column:
                tile[j * PIECE : (j + 1) * PIECE, i * PIECE : (i + 1) * PIECE] = entries.T
    return tile


def pipeline(
    model: nn.Sequential, inputs: Tensor, path: Path, threads: int
) -> tuple[float, float, ntkpipe.KernelStore]:
    """Seconds from first block to last tile, seconds of everything before, the store."""
    start = perf_counter()
    store = ntkpipe.compute_kernel(model, inputs, store=path, mode="w", tile=TILE, workers=threads, progress=False)
    whole = perf_counter() - start
    (run,) = store.store.read_results("runs")
    return run["seconds"], whole - run["seconds"], store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16_384, help=f"a multiple of {TILE}")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.samples % TILE:
        parser.error(f"--samples must be a multiple of {TILE}")
    model = mlp()
    inputs = torch.from_numpy(np.random.default_rng(0).random((options.samples, 784), dtype=np.float32))
    threads = torch.get_num_threads()
    ratios, ours, bare, before = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            seconds, start_up, store = pipeline(model, inputs, Path(folder) / "kernel.zarr", threads)
            reference, tiles = bare_loop(model, inputs, threads)
            gap = max(float(abs(tiles[0, 0] - torch.from_numpy(store.train[:TILE, :TILE])).max()), 0.0)
            ratios.append(seconds / reference)
            ours.append(seconds)
            bare.append(reference)
            before.append(start_up)
            print(
                f"run {repeat + 1}: pipeline {seconds:.2f} s (+ {start_up:.2f} s before), bare loop {reference:.2f} s, "
                f"ratio {seconds / reference:.3f}; largest gap of the first tile {gap / float(tiles[0, 0].max()):.1e}"
            )
            del tiles
    print(
        f"{options.samples} samples, {threads} threads, medians: pipeline {statistics.median(ours):.2f} s, bare loop "
        f"{statistics.median(bare):.2f} s, ratio {statistics.median(ratios):.3f}; start-up and self-check "
        f"{statistics.median(before):.2f} s"
    )


if __name__ == "__main__":
    main()
