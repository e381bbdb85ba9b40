"""Tasks in a process of their own, so that memory is theirs: ``python -m solving.child TASK ARGUMENTS`` prints JSON."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from comparison.peak import peak_memory, reset_peak

import ntkpipe
from ntkpipe.base.resources import num_cores, process_memory


def passes(path: str, allowance: str, columns: str) -> dict[str, Any]:
    """Memory of three passes with so many columns, where tiles may take so many bytes."""
    kernel = ntkpipe.open_kernel(path).train
    block = np.ones((len(kernel), int(columns)))
    before = process_memory()
    limit = before + int(allowance)
    operator = ntkpipe.as_operator(kernel, memory_limit=limit)
    for _ in range(3):
        operator @ block
    return {"before": before, "limit": limit, "peak": peak_memory(), "share_kept": operator.share_kept}


def determinant(method: str, path: str, allowance: str) -> dict[str, Any]:
    """Seconds and growth of memory of a log-determinant, from the stored kernel to the number."""
    run = {
        "ntkpipe": _ours,
        "ntkpipe, in memory": _ours_in_memory,
        "detkit": _detkit,
        "LAPACK": _lapack,
        "Dask": _dask,
    }[method]
    step = run(path, int(allowance))
    np.ones((256, 256)) @ np.ones((256, 256))  # BLAS starts its threads before
    reset_peak()
    before, start = process_memory(), perf_counter()
    found = step()
    return {"logdet": float(found), "seconds": perf_counter() - start, "grown": peak_memory() - before}


def _ours(path: str, allowance: int) -> Callable[[], float]:
    cholesky = ntkpipe.cholesky  # imports it
    kernel = ntkpipe.open_kernel(path).train

    def step() -> float:
        with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
            limit = process_memory() + allowance
            return cholesky(kernel, path=f"{folder}/factor.zarr", memory_limit=limit).logdet

    return step


def _ours_in_memory(path: str, allowance: int) -> Callable[[], float]:
    del allowance
    cholesky, kernel = ntkpipe.cholesky, ntkpipe.open_kernel(path).train
    return lambda: cholesky(kernel).logdet


def _detkit(path: str, allowance: int) -> Callable[[], float]:
    import zarr

    # Takes over SIGINT, SIGTSTP and SIGTERM, hence not in the process of the benchmark.
    from detkit import memdet

    # Upper tiles are what is stored.
    upper = zarr.open_array(f"{path}/kernel/train", mode="r")
    scratch = str(Path(path).parent)
    return lambda: memdet(upper, max_mem=allowance, assume="spd", triangle="u", scratch_dir=scratch)[0]


def _lapack(path: str, allowance: int) -> Callable[[], float]:
    del allowance
    kernel = ntkpipe.open_kernel(path).train
    return lambda: np.linalg.slogdet(kernel[:, :].astype(np.float64))[1]


def _dask(path: str, allowance: int) -> Callable[[], float]:
    del allowance
    import dask.array as da
    from threadpoolctl import threadpool_limits

    kernel = ntkpipe.open_kernel(path).train

    def step() -> float:
        with threadpool_limits(1):  # as Dask advises, whose threads are the cores already
            lower = da.linalg.cholesky(kernel.to_dask().astype(np.float64), lower=True)
            return 2 * float(da.log(da.diag(lower)).sum().compute(num_workers=num_cores()))

    return step


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    print(json.dumps({"passes": passes, "determinant": determinant}[task](*arguments)))
