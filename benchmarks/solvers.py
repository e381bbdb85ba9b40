"""Solvers and the passes that they are made of, against others, side by side.

Four parts, each printed as a table with the targets that it is held to:

passes      a pass over a made-up stored kernel (float32, 36 tiles) against raw ``readinto`` of the same files, the page
            cache dropped before each, and against float64 products with BLAS's threads; threads and Dask workers
            against one; peak memory of a process against its limit
eigenpairs  ``eigsh`` against ARPACK and LOBPCG of scipy through the same operator, and Dask's randomised SVD
regression  ``solve`` against conjugate gradients of scipy through the same operator, sklearn and LAPACK
logdet      ``cholesky`` in files against detkit within the same memory, and in memory against LAPACK and Dask

Eigenpairs and regression take the pNTK of the mnist5k workflow (4,000 samples), from ``runs`` where that was made
before, else it is computed first. Seconds are medians of runs that take turns, of at most ``--repeats``; what takes
more than eight seconds runs once. Nothing else should run on the machine.

    pip install -e '.[compute,cluster,examples,bench]'
    python benchmarks/solvers.py [--parts passes,eigenpairs,regression,logdet] [--repeats 3] [--scale 1]
"""

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from solving import determinant, eigenpairs, passes, regression
from solving.stores import mnist5k

from ntkpipe.base.resources import num_cores

_PARTS = ("passes", "eigenpairs", "regression", "logdet")
_ROWS_OF_PASSES = 16_384
_ROWS_OF_LOGDET = 8_192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(_PARTS), help="of " + ", ".join(_PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the rows of made-up kernels, for a quick look")
    parser.add_argument("--folder", type=Path, help="of a disk to measure; default that of temporary files")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(_PARTS):
        parser.error(f"{', '.join(sorted(set(parts) - set(_PARTS)))}: unknown; known are {', '.join(_PARTS)}")
    print(f"{num_cores()} cores, load {os.getloadavg()[0]:.2f} at the beginning, numpy {np.__version__}", flush=True)
    start = perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "passes" in parts:
            passes.compare(folder, options.repeats, round(options.scale * _ROWS_OF_PASSES))
        if {"eigenpairs", "regression"} & set(parts):
            store = mnist5k(folder)
        if "eigenpairs" in parts:
            eigenpairs.compare(store, options.repeats)
        if "regression" in parts:
            regression.compare(store, options.repeats)
        if "logdet" in parts:
            determinant.compare(folder, options.repeats, round(options.scale * _ROWS_OF_LOGDET))
    print(f"\n{perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.2f} at the end")


if __name__ == "__main__":
    main()
