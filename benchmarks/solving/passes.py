"""A pass over a stored kernel against raw reading and plain products; its memory; threads and workers."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import numpy as np
from distributed import Client
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ntkpipe import as_operator
from ntkpipe.base.config import RunSpec
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import format_bytes, num_cores
from ntkpipe.executors.connect import connect
from ntkpipe.operators.on_dask.operator import WorkerGroup, WorkersOperator
from ntkpipe.operators.tiles import KernelTiles
from ntkpipe.store.kernel import Kernel
from solving.measuring import in_child, in_turns, judge, median, print_table, ratio
from solving.stores import drop_cache, files_of, made_up

_COLUMNS = (1, 64)
_WORKERS = (1, 2)
_TILE = 2048


def compare(folder: Path, repeats: int, num_rows: int) -> None:
    """Everything about a pass, printed."""
    path = folder / "made-up.zarr"
    tile = min(_TILE, num_rows // 8)
    kernel = made_up(path, num_rows, tile)
    files = files_of(path)
    num_bytes = sum(file.stat().st_size for file in files)
    print(f"\nA pass over {num_rows:,} rows in float32: {len(files)} files, {format_bytes(num_bytes)}", flush=True)
    _compare_on_this_machine(kernel, files, repeats)
    _compare_workers(kernel, repeats)
    _measure_memory(path, num_bytes)


def _compare_on_this_machine(kernel: Kernel, files: list[Path], repeats: int) -> None:
    """Threads, and what the disk and the processor can do, in turns."""
    cores, num_rows = num_cores(), len(kernel)
    num_bytes = sum(file.stat().st_size for file in files)
    several = sorted({1, cores})
    cold = {f"raw, {threads} at a time": _raw(files, threads) for threads in several}
    streaming = {threads: as_operator(kernel, threads=threads, keep_tiles=False) for threads in several}
    kept = {threads: as_operator(kernel, threads=threads) for threads in several}
    blocks = {columns: np.random.default_rng(0).standard_normal((num_rows, columns)) for columns in _COLUMNS}
    for threads, operator in streaming.items():
        cold |= {f"pass, {r} columns, {threads} threads": _product(operator, blocks[r]) for r in _COLUMNS}
    for operator in (*streaming.values(), *kept.values()):
        operator @ blocks[1]  # threads and memory are there before
    # After the cold ones, which have filled the page cache.
    warm = {
        f"from the page cache, {r} columns, {cores} threads": _product(streaming[cores], blocks[r]) for r in _COLUMNS
    }
    warm |= {
        f"kept in memory, {r} columns, {threads} threads": _product(operator, blocks[r])
        for threads, operator in kept.items()
        for r in _COLUMNS
    }
    products = {
        f"float64 product {size:,}² by {columns:,}": _plain_product(size, columns)
        for size, columns in ((_TILE, 64), (2 * _TILE, 64), (_TILE, _TILE))
    }
    for run, _ in products.values():
        run()
    # All in turns: what the processor does in a second changes with what others do on the host.
    runs = cold | warm | {name: run for name, (run, _) in products.items()}
    seconds = in_turns(runs, repeats, dict.fromkeys(cold, lambda: drop_cache(files)))
    rates = {name: [flops / found for found in seconds.pop(name)] for name, (_, flops) in products.items()}
    rows = []
    for name, found in seconds.items():
        columns = next((r for r in _COLUMNS if f" {r} columns" in name), None)
        flops = 0 if columns is None else 2.0 * num_rows**2 * columns / median(found)
        rows.append(
            (
                name,
                f"{median(found):.3f}",
                f"{num_bytes / median(found) / 1e9:.2f}",
                f"{flops / 1e9:.1f}" if flops else "",
            )
        )
    rows += [(name, "", "", f"{median(found) / 1e9:.1f}") for name, found in rates.items()]
    print_table(("", "seconds", "GB/s", "GFLOP/s"), rows)
    raw = min((seconds[f"raw, {threads} at a time"] for threads in several), key=median)
    many = f"64 columns, {cores} threads"
    judge(
        "1 column cold, share of the faster raw reading", ratio(raw, seconds[f"pass, 1 columns, {cores} threads"]), 0.8
    )
    for product, found in rates.items():
        for where in ("pass, ", "from the page cache, ", "kept in memory, "):
            shares = [
                2.0 * num_rows**2 * 64 / one / rate for one, rate in zip(seconds[where + many], found, strict=True)
            ]
            name = f"64 columns, {where.strip(', ')}, share of {product}"
            if product.endswith(f"by {_COLUMNS[-1]}"):
                judge(name, median(shares), 0.7)
            else:
                print(f"          {name}: {median(shares):.2f}")
    if cores > 1:
        for columns in _COLUMNS:
            name = f"kept in memory, {columns} columns"
            judge(
                f"{cores} threads against one, {name}",
                ratio(seconds[f"{name}, 1 threads"], seconds[f"{name}, {cores} threads"]),
                0.85 * cores,
            )
    for operator in (*streaming.values(), *kept.values()):
        operator.close()


def _raw(files: list[Path], threads: int) -> Callable[[], None]:
    """Read the files into reused memory, as many at a time as there are threads."""
    memory = [memoryview(bytearray(max(file.stat().st_size for file in files))) for _ in range(threads)]

    def read(share: list[Path], buffer: memoryview) -> None:
        for path in share:
            done = 0
            with FileIO(path) as file:
                while count := file.readinto(buffer[done:]):
                    done += count

    def run() -> None:
        work = [threading.Thread(target=read, args=(files[i::threads], memory[i])) for i in range(threads)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()

    return run


def _product(operator: Operator, block: NDArray[np.float64]) -> Callable[[], object]:
    return lambda: operator @ block


def _plain_product(size: int, columns: int) -> tuple[Callable[[], object], float]:
    """A float64 product with BLAS's own threads, repeated to a billion operations or more; and the operations."""
    left, right = np.ones((size, size)), np.ones((size, columns))
    out = np.empty((size, columns))
    times = max(1, round(1e10 / (2.0 * size**2 * columns)))

    def run() -> None:
        for _ in range(times):
            np.matmul(left, right, out=out)

    return run, 2.0 * size**2 * columns * times


def multiply(size: int = _TILE) -> None:
    """What a worker does in the comparison with plain products: two billions of operations, thirty times."""
    left, right = np.ones((size, size)), np.ones((size, 64))
    with threadpool_limits(1):
        for _ in range(30):
            left @ right


def _compare_workers(kernel: Kernel, repeats: int) -> None:
    """One and two single-threaded workers, on clusters of their own that are there at the same time."""
    with ExitStack() as stack:
        clients: dict[int, Client] = {}
        for count in _WORKERS:
            clients[count] = stack.enter_context(connect("local", RunSpec(workers=count, memory_limit=count * 2**31)))
            clients[count].wait_for_workers(count)
        plain = in_turns({str(count): _split_products(clients[count], count) for count in _WORKERS}, repeats)
        limits = ratio(plain["1"], plain["2"])
        print(f"  two workers at nothing but products: {limits:.2f} times as fast as one")
        for where, cache_bytes in (("kept by workers", 2**30), ("from the page cache", 0)):
            operators = {
                n: WorkersOperator(WorkerGroup(clients[n], KernelTiles(kernel), cache_bytes=cache_bytes))
                for n in _WORKERS
            }
            for columns in _COLUMNS:
                block = np.random.default_rng(0).standard_normal((len(kernel), columns))
                runs = {str(count): _product(operator, block) for count, operator in operators.items()}
                in_turns(runs, 1)
                seconds = in_turns(runs, repeats)
                print(f"  {where}, {columns} columns: {median(seconds['1']):.3f} and {median(seconds['2']):.3f} s")
                judge(f"two workers against one, {columns} columns, {where}", ratio(seconds["1"], seconds["2"]), 1.7)
            for operator in operators.values():
                operator.close()


def _split_products(client: Client, count: int) -> Callable[[], object]:
    """Twice :func:`multiply`, by one worker or by two."""
    addresses = list(client.nthreads())[:count]

    def run() -> None:
        futures = [client.submit(multiply, workers=[addresses[i % count]], pure=False) for i in range(2)]
        client.gather(futures)

    return run


def _measure_memory(path: Path, num_bytes: int) -> None:
    """Peak of a process that makes passes with a limit below what the kernel takes."""
    allowance = num_bytes // 2
    for columns in _COLUMNS:
        found = in_child("passes", path, allowance, columns)
        if "failure" in found:
            print(f"  failed: {found['failure']}")
            continue
        held = f"{found['share_kept']:.0%} of the tiles kept, {format_bytes(found['before'])} before"
        print(f"  {columns} columns, limit {format_bytes(found['limit'])}: peak {format_bytes(found['peak'])}; {held}")
        judge(f"peak over the limit, {columns} columns", found["peak"] / found["limit"], 1.0, at_most=True)
