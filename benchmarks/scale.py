"""The real planner, driver and Dask scheduler with workers that only sleep: pNTK of an MLP on a million samples.

Each worker is a distributed.Worker with one thread, many of them in one process; a task sleeps for as long as the plan
says that its block takes, tile by tile, and returns the records that a real one would. The rate of a worker is chosen
so that a whole block takes --block-seconds. Nothing is sped up: a run takes --waves times that, and then stops.

    python benchmarks/scale.py [--workers 8 64 256 512] [--block-seconds 30] [--waves 8]

"busy" is the share of all workers' time in which they sleep for a task: from the first start to the last end, and, as
"steady", while there are keys left to hand out and every worker has had its first one. Scheduler time is the CPU time
of its process, less what it uses when idle (heartbeats), a task; memory is the largest resident size.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, sleep, time
from typing import Any

import dask
import numpy as np
import psutil
import torch
from distributed import Client, Worker
from samples.generated import Generated

import ntkpipe
from ntkpipe.base.resources import peak_process_memory
from ntkpipe.build.estimate import ClusterEstimate, estimate_cluster
from ntkpipe.build.plan import BlockTask, Plan
from ntkpipe.build.records import BlockRecord, TileRecord
from ntkpipe.executors.dask import ClusterExecutor

IDLE_SECONDS = 10.0
# Of many workers in one process only what a scheduler sees is wanted: no profiles, no pages, few looks at the machine.
CHEAP = {
    "distributed.worker.profile.enabled": False,
    "distributed.worker.http.routes": [],
    "distributed.worker.memory.monitor-interval": "60s",
    "distributed.admin.system-monitor.interval": "60s",
    "logging": {"distributed": "critical"},
}


@dataclass(frozen=True)
class SleepJob:
    """Takes the time of a block, and does nothing."""

    plan: Plan
    pair_seconds: float

    def session(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def shrunk(self) -> "SleepJob":
        return self

    def close(self) -> None:
        pass

    def open(self, pause: Any, folder: Path | None = None) -> Any:
        return lambda task: self.run(task, pause)

    def run(self, task: BlockTask, pause: Any) -> Iterator[TileRecord | BlockRecord]:
        started, began, planned, tiles = time(), perf_counter(), 0.0, 0
        grid, block = self.plan.workload.grids[task.array], task.block
        for row, column in itertools.product(block.rows(), block.columns()):
            if grid.is_stored(row, column):
                rows, columns = len(grid.rows.samples(row)), len(grid.columns.samples(column))
                planned += self.pair_seconds * (rows * (rows + 1) / 2 if row == column else rows * columns)
                sleep(max(0.0, began + planned - perf_counter()))
                pause()
                tiles += 1
                yield TileRecord(task.array, (row, column), self.plan.batch, self.plan.subtile)
        yield BlockRecord(
            array=task.array,
            rows=(block.row_start, block.row_stop),
            columns=(block.column_start, block.column_stop),
            tiles=tiles,
            started=started,
            seconds=perf_counter() - began,
            flops=0.0,
            num_bytes=tiles * self.plan.workload.tile_bytes,
            peak_memory_bytes=0,
            batch=self.plan.batch,
            subtile=self.plan.subtile,
            host="simulated",
            process=os.getpid(),
            device="cpu",
            arithmetic="",
        )


def planned(num_samples: int, tile: int, workers: int, block_seconds: float) -> ClusterEstimate:
    """The plan for so many workers, of a rate at which a whole block takes ``block_seconds``."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10)]
    model = torch.nn.Sequential(*layers).eval()
    plan, _ = ntkpipe.plan_kernel(model, Generated(num_samples), store="unwritten.zarr", tile=tile)
    described = {"workers": workers, "memory_limit": "8GiB"}
    for tiles in range(256, 0, -1):
        rate = tiles * tile**2 * plan.workload.cost.pair_flops / block_seconds
        found = estimate_cluster(plan, {**described, "flops_per_second": rate})
        if found.plan.height * found.plan.width == tiles:
            # Jacobians take a little more.
            return estimate_cluster(plan, {**described, "flops_per_second": rate * found.block_seconds / block_seconds})
    raise SystemExit(f"no block takes {block_seconds} s")


def drive(options: argparse.Namespace) -> None:
    """The driver of a run, in a process of its own; prints a line of JSON."""
    workers, block_seconds = options.workers[0], options.block_seconds
    found = planned(options.samples, options.tile, workers, block_seconds)
    num_pairs = sum(grid.num_pairs for grid in found.plan.workload.grids.values())
    job = SleepJob(found.plan, found.compute_seconds / num_pairs)
    before = peak_process_memory()
    blocks, tiles = [], 0
    with Client(options.address) as client:
        client.wait_for_workers(workers, timeout=120)
        scheduler = psutil.Process(options.scheduler)
        # The scheduler imports what a task is made of once, as workers do.
        list(ClusterExecutor(client, name="first").run(replace(job, pair_seconds=0.0), [next(found.plan.tasks())]))
        at_rest = cpu_seconds(scheduler)
        sleep(IDLE_SECONDS)
        idle = (cpu_seconds(scheduler) - at_rest) / IDLE_SECONDS
        start, used = perf_counter(), cpu_seconds(scheduler)
        tasks = itertools.islice(found.plan.tasks(), options.waves * workers or None)
        for record in ClusterExecutor(client, name="pntk").run(job, tasks):
            if isinstance(record, BlockRecord):
                blocks.append((record.started, record.started + record.seconds))
            else:
                tiles += 1
        wall, used = perf_counter() - start, cpu_seconds(scheduler) - used
    answer = {
        "workers": workers,
        "block": f"{found.plan.height} × {found.plan.width}",
        "block_seconds": found.block_seconds,
        "blocks": len(blocks),
        "blocks_planned": found.plan.num_tasks,
        "tiles": tiles,
        "wall_seconds": wall,
        "busy": busy(blocks, workers, min(s for s, _ in blocks), max(e for _, e in blocks)),
        "steady": steady(blocks, workers),
        "scheduler_share": used / wall,
        "scheduler_idle_share": idle,
        "scheduler_seconds_a_task": (used - idle * wall) / len(blocks),
        "scheduler_bytes": scheduler.memory_info().rss,
        "driver_bytes": peak_process_memory(),
        "driver_bytes_before": before,
    }
    print(json.dumps(answer))


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def busy(blocks: list[tuple[float, float]], workers: int, start: float, stop: float) -> float:
    """Share of the workers' time between two moments that blocks take."""
    taken = sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in blocks)
    return taken / (workers * (stop - start))


def steady(blocks: list[tuple[float, float]], workers: int) -> float:
    """As :func:`busy`, from the start of the last worker's first block to that of the last block."""
    starts = sorted(begin for begin, _ in blocks)
    return busy(blocks, workers, starts[workers - 1], starts[-1])


async def host(address: str, num_workers: int) -> None:
    """Many workers in this process, until the scheduler goes."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            Worker(
                address,
                nthreads=1,
                memory_limit=None,
                dashboard=False,
                name=f"{os.getpid()}-{number}",
                local_directory=folder,
            )
            for number in range(num_workers)
        ]
        for first in range(0, num_workers, 16):
            await asyncio.gather(*workers[first : first + 16])
        await asyncio.gather(*(worker.finished() for worker in workers))


def measure(workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Scheduler, hosts of workers and driver as processes; what the driver found."""
    me = [sys.executable, __file__]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_the_end:
        file = Path(folder) / "scheduler.json"

        def start(command: list[str]) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=folder)
            at_the_end.callback(process.wait)
            at_the_end.callback(process.kill)
            return process

        scheduler = start(
            [
                *(sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"),
                *("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)),
            ]
        )
        while not file.exists() or not file.read_text().endswith("}"):
            sleep(0.1)
        address = json.loads(file.read_text())["address"]
        shares = [len(part) for part in np.array_split(np.arange(workers), options.hosts)]
        for share in shares:
            start([*me, "--host", address, "--workers", str(share)])
        command = [*me, "--drive", address, "--scheduler", str(scheduler.pid), "--workers", str(workers)]
        for name in ("samples", "tile", "block_seconds", "waves"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout
    return dict(json.loads(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256, 512])
    parser.add_argument("--block-seconds", type=float, default=30.0)
    parser.add_argument("--waves", type=int, default=8, help="blocks a worker, then stop; 0 does the whole plan")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--tile", type=int, default=4096)
    parser.add_argument("--hosts", type=int, default=2, help="processes that the workers live in")
    parser.add_argument("--host", dest="host", help=argparse.SUPPRESS)
    parser.add_argument("--drive", dest="address", help=argparse.SUPPRESS)
    parser.add_argument("--scheduler", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dask.config.set(CHEAP)
    if options.host:
        asyncio.run(host(options.host, options.workers[0]))
    elif options.address:
        drive(options)
    else:
        print("| workers | block | blocks | busy | steady | scheduler, a task | its CPU | its memory | driver |")
        print("|---|---|---|---|---|---|---|---|---|")
        for workers in options.workers:
            found = measure(workers, options)
            print(
                f"| {workers} | {found['block']} tiles, {found['block_seconds']:.0f} s "
                f"| {found['blocks']:,} of {found['blocks_planned']:,} | {found['busy']:.1%} | {found['steady']:.1%} "
                f"| {1e3 * found['scheduler_seconds_a_task']:.1f} ms | {found['scheduler_share']:.1%} "
                f"| {found['scheduler_bytes'] / 2**20:.0f} MiB | {found['driver_bytes'] / 2**20:.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
