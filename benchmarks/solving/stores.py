"""Kernels to measure on: a made-up one of any size, and the pNTK of the mnist5k workflow."""

import importlib.util
import os
from pathlib import Path

import numpy as np

import ntkpipe
from ntkpipe.base.kinds import KINDS
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.manifest import ArrayRecord, Choices, DataRecord, Manifest, ModelRecord
from ntkpipe.store.store import Store

_ROOT = Path(__file__).parents[2]
_RANK = 64


def made_up(path: Path, num_rows: int, tile: int) -> Kernel:
    """I + Z Z' / 64 for random Z of 64 columns, in float32, as ntkpipe stores a kernel."""
    array = Store.create(path, _manifest(num_rows, tile)).arrays["kernel/train"]
    factor = np.random.default_rng(0).standard_normal((num_rows, _RANK)).astype(np.float32) / np.float32(_RANK**0.5)
    for row, column in array.layout.grid.tiles():
        left, right = (factor[number * tile : (number + 1) * tile] for number in (row, column))
        entries = left @ right.T
        if row == column:
            entries = (entries + entries.T) / 2
            entries[np.diag_indices_from(entries)] += 1
        array.write((row, column), entries)
    return ntkpipe.open_kernel(path).train


def _manifest(num_rows: int, tile: int) -> Manifest:
    """That of a pNTK which nobody has computed."""
    train = DataRecord(
        num_samples=num_rows,
        inputs={"input": ArrayRecord(shape=(1,), dtype="float32")},
        is_mapping=False,
        inputs_digest="0" * 64,
        targets=None,
        targets_digest=None,
    )
    return Manifest(
        format=1,
        kind="pntk",
        convention=KINDS["pntk"].convention,
        num_outputs=1,
        num_covectors=KINDS["pntk"].num_covectors(1),
        tile=tile,
        compute_dtype="float32",
        accumulate_dtype="float32",
        store_dtype="float32",
        model=ModelRecord(
            name="made up",
            state_digest="0" * 64,
            structure_digest="0" * 64,
            parameters=("weight",),
            num_parameters=1,
        ),
        train=train,
        test=None,
        choices=Choices(
            strip=tile, subtile=tile, batch=tile, representations={"weight": "none"}, device="cpu", arithmetic="none"
        ),
        environment={},
    )


def mnist5k(folder: Path) -> KernelStore:
    """The store of the workflow, from ``runs`` where it is, else computed into ``folder``."""
    ready = _ROOT / "runs" / "mnist5k-pntk.zarr"
    if ready.exists() and ntkpipe.open_kernel(ready).progress.is_complete:
        return ntkpipe.open_kernel(ready)
    specification = importlib.util.spec_from_file_location("factories", _ROOT / "workflows/mnist5k/factories.py")
    factories = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(factories)
    data, path = factories.data(), folder / "mnist5k-pntk.zarr"
    return ntkpipe.compute_kernel(
        factories.mlp(), data["inputs"], targets=data["targets"], store=path, kind="pntk", progress=False
    )


def files_of(kernel_path: Path) -> list[Path]:
    """Files of the tiles, in order."""
    return sorted(path for path in (kernel_path / "kernel" / "train" / "c").rglob("*") if path.is_file())


def drop_cache(files: list[Path]) -> None:
    """Let the next reads come from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
