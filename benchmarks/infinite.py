"""Networks of infinite width beside the least that their kernels take: a product, a root and an angle a layer.

python benchmarks/infinite.py [--rows 20000] [--repeats 5]

`full` multiplies the inputs in bands of 256 rows, and then takes for each entry and hidden layer one square root and
one angle by NumPy, `sqrt` and `arccos`, on strips of 64 KiB: it makes no kernel. `half` does so for the bands from the
diagonal on alone, as ours does, and is the strict baseline: ours also prepares samples, runs the recursion, and writes
both halves of both kernels, 32 bytes an entry of the upper half. All run on as many threads, interleaved; seconds are
of the CPU, medians, and a ratio is the median of those of the repeats. Two kernels of 20,000 rows take 6.4 GB.
"""

import argparse
import operator
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ntkpipe.base.arrays import runs
from ntkpipe.base.blas import Pool
from ntkpipe.base.resources import num_cores
from ntkpipe.infinite import FullyConnected

_BAND, _STRIP = 256, 8192


def bare(x: np.ndarray, hidden: int, into: np.ndarray, pool: Pool, *, is_half: bool) -> None:
    """The product alone (no hidden layers), or with a root and an angle for each entry and layer."""
    cosines = np.random.default_rng(0).uniform(-1.0, 1.0, _STRIP)
    squares = cosines * cosines

    def work(rows: slice) -> None:
        first = rows.start if is_half else 0
        block = into[rows, first:]
        np.matmul(x[rows], x[first:].T, out=block)
        scratch = np.empty(_STRIP)
        for part in runs(block.size, _STRIP):
            for _ in range(hidden):
                np.sqrt(squares[: part.stop - part.start], out=scratch[: part.stop - part.start])
                np.arccos(cosines[: part.stop - part.start], out=scratch[: part.stop - part.start])

    pool.each(work, runs(len(x), _BAND))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--features", type=int, default=784)
    parser.add_argument("--hidden", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_cores())
    given = parser.parse_args()
    x = np.random.default_rng(0).random((given.rows, given.features))
    net = FullyConnected(given.hidden, "relu", 2**0.5, 0.1)
    kernels = np.zeros((2, given.rows, given.rows))
    with Pool.open(given.threads) as pool:

        def ours() -> None:
            rows = net.prepare(x)
            net.fill(rows, rows, kernels, pool)

        methods: dict[str, Callable[[], Any]] = {
            "both kernels": ours,
            "full": lambda: bare(x, given.hidden, kernels[0], pool, is_half=False),
            "half": lambda: bare(x, given.hidden, kernels[0], pool, is_half=True),
            "product alone": lambda: bare(x, 0, kernels[0], pool, is_half=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(given.repeats):
            for name, method in methods.items():
                start = time.process_time()
                method()
                seconds[name].append(time.process_time() - start)
    for name, found in seconds.items():
        ratios = [statistics.median(map(operator.truediv, found, seconds[other])) for other in ("half", "full")]
        middle = statistics.median(found)
        print(f"{name}: {middle:.2f} s of CPU, {ratios[0]:.2f} × half, {ratios[1]:.2f} × full")


if __name__ == "__main__":
    main()
