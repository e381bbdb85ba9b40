"""Networks of infinite width beside the least that their kernels take: a product, a root and an angle a layer.

python benchmarks/infinite.py [--rows 20000] [--repeats 5]

`bare` multiplies the inputs in bands of 256 rows, and then takes for each entry and hidden layer one square root and
one angle by NumPy, `sqrt` and `arccos`, on strips of 64 KiB: it makes no kernel. `half` does so for the upper half
alone, as ours does, which then writes both halves of both kernels, 32 bytes an entry of the upper half. All run on as
many threads; seconds are of the CPU, interleaved, medians. neural-tangents is timed beside them where it is installed:
it needs jax 0.4, which has no wheels for this project's numpy, so it is in none of the extras.
"""

import argparse
import contextlib
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


def neural_tangents(x: np.ndarray, hidden: int) -> Callable[[], Any] | None:
    """Both kernels of the same network by neural-tangents, if it is there."""
    with contextlib.suppress(ImportError):
        import jax
        from neural_tangents import stax

        jax.config.update("jax_enable_x64", True)
        layers = [layer for _ in range(hidden) for layer in (stax.Dense(1, 2**0.5, 0.1), stax.Relu())]
        kernel = jax.jit(
            lambda values: stax.serial(*layers, stax.Dense(1, 2**0.5, 0.1))[2](values, None, ("nngp", "ntk"))
        )
        return lambda: jax.block_until_ready(kernel(x).ntk)
    return None


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
            "bare": lambda: bare(x, given.hidden, kernels[0], pool, is_half=False),
            "half": lambda: bare(x, given.hidden, kernels[0], pool, is_half=True),
            "product alone": lambda: bare(x, 0, kernels[0], pool, is_half=True),
        }
        if other := neural_tangents(x, given.hidden):
            methods["neural-tangents"] = other
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(given.repeats):
            for name, method in methods.items():
                start = time.process_time()
                method()
                seconds[name].append(time.process_time() - start)
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    for name, found in middle.items():
        ratios = f"{found / middle['bare']:.2f} × bare, {found / middle['half']:.2f} × half"
        print(f"{name}: {found:.2f} s of CPU, {found / given.rows**2 * 1e9:.1f} ns an entry, {ratios}")


if __name__ == "__main__":
    main()
