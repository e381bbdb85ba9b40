"""What users have arrays in: the same numbers in many hands, and what is not to be taken for an array."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import scipy.sparse
import torch
import xarray
import zarr
from numpy.typing import NDArray

Hold = Callable[[NDArray[np.float64]], Any]


class OnlySlices:
    """As an HDF5 dataset: a shape, a dtype, chunks, and slices that are arrays."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values, self.shape, self.dtype, self.chunks = values, values.shape, values.dtype, None

    def __getitem__(self, key: Any) -> NDArray[Any]:
        return self._values[key]


class OnlyArray:
    """As an array of another library: NumPy may ask for it."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._values, dtype)


class OwnArray(np.ndarray):
    """A subclass."""


def _mapped(values: NDArray[Any], dtype: str, order: Any) -> NDArray[Any]:
    path = Path(tempfile.mkdtemp()) / "mapped.bin"
    found = np.memmap(path, dtype, "w+", shape=values.shape, order=order)
    found[...] = values
    return found


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    found = values.copy()
    found.flags.writeable = False
    return found


def _strided(values: NDArray[Any]) -> NDArray[Any]:
    every_second = (slice(None, None, 2),) * values.ndim
    found = np.full([2 * size for size in values.shape], np.nan)
    found[every_second] = values
    return found[every_second]


def _in_zarr(values: NDArray[Any], **options: Any) -> Any:
    return zarr.create_array({}, data=values, chunks=(4,) * values.ndim, **options)


# The same float64 numbers, whatever their holder. All are taken.
HOLDERS: dict[str, Hold] = {
    "list": lambda values: values.tolist(),
    "rows in a tuple": tuple,
    "Fortran order": np.asfortranarray,
    "strided view": _strided,
    "read-only": _read_only,
    "big-endian": lambda values: values.astype(">f8"),
    "long double": lambda values: values.astype(np.longdouble),
    "objects": lambda values: values.astype(object),
    "subclass": lambda values: values.view(OwnArray),
    "nothing masked": np.ma.array,
    "mask of no entry": lambda values: np.ma.array(values, mask=np.zeros(values.shape, bool)),
    "tensor": torch.tensor,
    "tensor with gradient": lambda values: torch.tensor(values, requires_grad=True),
    "parameter": lambda values: torch.nn.Parameter(torch.tensor(values)),
    "other library's": OnlyArray,
    "DataArray": xarray.DataArray,
    "DataArray in chunks": lambda values: xarray.DataArray(values).chunk(5),
    "dask": lambda values: dask.array.from_array(values, chunks=5),
    "memory map": lambda values: _mapped(values, "f8", "C"),
    "Fortran memory map": lambda values: _mapped(values, "f8", "F"),
    "big-endian memory map": lambda values: _mapped(values, ">f8", "C"),
    "zarr": _in_zarr,
    "zarr of version 2": lambda values: _in_zarr(values, zarr_format=2),
    "sharded zarr": lambda values: _in_zarr(values, shards=(8,) * values.ndim),
    "as HDF5": OnlySlices,
    "sparse": scipy.sparse.coo_array,
    "sparse tensor": lambda values: torch.tensor(np.asarray(values)).to_sparse(),
}


def _masked(values: NDArray[Any]) -> NDArray[Any]:
    return np.ma.array(values, mask=np.arange(values.size).reshape(values.shape) == 1)


def _not_all_written(values: NDArray[Any]) -> Any:
    found = zarr.create_array({}, shape=values.shape, dtype=values.dtype, chunks=(4,) * values.ndim)
    found[:4] = values[:4]
    return found


# What is refused by ConfigError or TileError, and words of its message.
REFUSED: dict[str, tuple[Hold, str]] = {
    "masked": (_masked, "1 entries are masked"),
    "list of masked": (lambda values: list(_masked(np.atleast_2d(values))), "1 entries are masked"),
    "masked in dask": (lambda values: dask.array.from_array(_masked(values), chunks=5), "masked"),
    "text": (lambda values: "kernel.zarr", r"'kernel\.zarr' is text or a path.*open_kernel"),
    "path": (lambda values: Path("kernel.npy"), r"path.*numpy\.load"),
    "bytes": (lambda values: b"kernel.h5", "path.*h5py"),
    "group of zarr": (lambda values: _grouped(values), "a Group of arrays, first, second; give one"),
    "dict": (lambda values: {"K": values}, "a dict of arrays, K; give one"),
    "Dataset": (lambda values: xarray.Dataset({"K": xarray.DataArray(values)}), "a Dataset of arrays, K"),
    "generator": (lambda values: (row for row in values), "a generator; needed an array"),
    "function": (lambda values: values.dot, "a builtin_function_or_method; needed an array"),
    "None": (lambda values: None, "NoneType|no targets"),
    "complex": (lambda values: values + 0j, "complex128"),
    "complex zarr": (lambda values: _in_zarr(values + 0j), "complex128"),
    "structured": (lambda values: values.astype([("entry", "f8")]), "needed real numbers"),
    "dates": (lambda values: values.astype("i8").astype("M8[s]"), "real numbers"),
    "tensor without data": (lambda values: torch.tensor(values).to("meta"), "Tensor that NumPy does not take"),
    "chunks not written": (_not_all_written, r"chunks \(1.*fill value"),
    "ragged": (lambda values: [[1.0], [1.0, 2.0]], "list that NumPy does not take"),
}


def _grouped(values: NDArray[Any]) -> Any:
    group = zarr.open_group({}, mode="w")
    for name in ("first", "second"):
        group.create_array(name, data=values)
    return group
