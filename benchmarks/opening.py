"""Opening a store and reading a tile, in a new process, against importing torch.

python benchmarks/opening.py [--repeats 7]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from time import perf_counter

import numpy as np
import torch

import ntkpipe

READ = "import sys, ntkpipe; ntkpipe.open_kernel(sys.argv[1]).train[:10, :10]"


def seconds(program: str, *arguments: str) -> float:
    start = perf_counter()
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    inputs = np.random.default_rng(0).random((256, 8), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/kernel.zarr"
        ntkpipe.compute_kernel(torch.nn.Linear(8, 2).eval(), inputs, store=path, progress=False)
        pairs = [(seconds(READ, path), seconds("import torch")) for _ in range(options.repeats)]
    reading, importing = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    print(f"open and read {reading:.2f} s, import torch {importing:.2f} s, median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
