"""Stored kernels as lazy xarray objects with named dimensions; only what is indexed is read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends.common import BackendArray
from xarray.core.indexing import (
    ExplicitIndexer,
    IndexingSupport,
    LazilyIndexedArray,
    VectorizedIndexer,
    explicit_indexing_adapter,
)

from ntkpipe.base.kinds import get_kind
from ntkpipe.base.planes import array_of, prefix_of
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.manifest import Manifest

Indices = NDArray[np.int64]
Matrix = Any  # a Kernel, whose module imports this one


class _Lazy(BackendArray):
    """Backend array of xarray; subclasses read entries of several planes, the first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, key: ExplicitIndexer) -> Any:
        if isinstance(key, VectorizedIndexer) and all(isinstance(part, np.ndarray) for part in key.tuple):
            indices = [np.asarray(part, np.int64) for part in key.tuple]
            # One by one if the points, as those of a diagonal, are few of the product of their indices.
            if np.broadcast(*indices).size < np.prod([np.unique(part).size for part in indices], dtype=float):
                return self._points(*np.broadcast_arrays(*indices))
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self._outer)

    def _outer(self, key: tuple[Any, ...]) -> NDArray[Any]:
        picked = [np.asarray(np.arange(size)[part]) for size, part in zip(self.shape, key, strict=True)]
        shape = [size for part in picked for size in part.shape]
        if 0 in shape:
            return np.empty(shape, self.dtype)
        return self._product(*(np.atleast_1d(part) for part in picked)).reshape(shape)

    def _product(self, planes: Indices, *indices: Indices) -> NDArray[Any]:
        parts = [self._read(int(plane), *np.ix_(*indices)) for plane in planes]
        return parts[0][None] if len(parts) == 1 else np.stack(parts)  # which copies

    def _points(self, planes: Indices, *indices: Indices) -> NDArray[Any]:
        values = np.empty(planes.shape, self.dtype)
        for plane in np.unique(planes):
            at = planes == plane
            values[at] = self._read(int(plane), *(part[at] for part in indices))
        return values

    def _read(self, plane: int, *indices: Indices) -> NDArray[Any]:
        """Read entries of one plane by indices along its axes: vectors of equal length, or those of ``numpy.ix_``."""
        raise NotImplementedError


class _LazyKernel(_Lazy):
    """Kernels of one shape as (kernel, row sample, row covector, column sample, column covector)."""

    def __init__(self, kernels: Sequence[Matrix]) -> None:
        self._kernels = tuple(kernels)
        width, (rows, columns) = kernels[0].num_covectors, kernels[0].shape
        self.shape = (len(kernels), rows // width, width, columns // width, width)
        self.dtype = kernels[0].dtype

    def _read(self, plane: int, *indices: Indices) -> NDArray[Any]:
        return np.asarray(self._kernels[plane].read_entries(*indices))


class _LazySamples(_Lazy):
    """Arrays of one shape, chunked by samples, as (array, sample, …); reads the range of samples."""

    def __init__(self, arrays: Sequence[StoredArray]) -> None:
        self._arrays = tuple(arrays)
        self.shape = (len(arrays), *arrays[0].layout.shape)
        self.dtype = arrays[0].layout.dtype

    def _read(self, plane: int, *indices: Indices) -> NDArray[Any]:
        samples, *rest = indices
        first = int(samples.min())
        values = self._arrays[plane].read_samples(first, int(samples.max()) + 1).astype(self.dtype)
        return np.asarray(values[(samples - first, *rest)])


def _variable(array: _Lazy, dimensions: Sequence[str | None]) -> xr.Variable:
    """Wrap an array, and drop the axes without a name, which have one entry."""
    whole = xr.Variable([name or f"_{axis}" for axis, name in enumerate(dimensions)], LazilyIndexedArray(array))
    return whole.isel({f"_{axis}": 0 for axis, name in enumerate(dimensions) if name is None})


def to_dataarray(kernel: Matrix) -> xr.DataArray:
    """See :meth:`ntkpipe.store.kernel.Kernel.to_xarray`."""
    short = kernel.name.rpartition("/")[2]
    attributes = {"array": kernel.name, "identity": kernel.identity}
    return xr.DataArray(_kernel_variable([kernel], short, apart=False), name=short, attrs=attributes)


def to_dataset(
    manifest: Manifest,
    arrays: Mapping[str, StoredArray],
    as_kernel: Callable[[StoredArray], Matrix],
    group: str | None,
    output: int | None,
) -> xr.Dataset:
    """See :meth:`ntkpipe.store.kernel_store.KernelSet.to_xarray`."""
    apart = get_kind(manifest.kind).pairs == "same" and output is None
    prefixes = [prefix_of(group, number) for number in (range(manifest.num_outputs) if apart else [output])]

    def named(name: str) -> list[StoredArray]:
        return [arrays[array_of(prefix, name)] for prefix in prefixes if array_of(prefix, name) in arrays]

    found: dict[str, xr.Variable] = {}
    for short in ("train", "test_train"):
        if kernels := [as_kernel(array) for array in named(f"kernel/{short}")]:
            found[short] = _kernel_variable(kernels, short, apart)
    if blocks := named("kernel/test_diagonal"):
        pair = ("output", "output_") if manifest.num_covectors > 1 else (None, None)
        found["test_diagonal"] = _variable(_LazySamples(blocks), ("output" if apart else None, "test_sample", *pair))
    coordinates: dict[str, xr.Variable] = {}
    for split, prefix in (("train", ""), ("test", "test_")):
        if (outputs := arrays.get(f"outputs/{split}")) is not None:
            found[f"{prefix}outputs"] = _variable(_LazySamples([outputs]), (None, f"{prefix}sample", "output"))
        if (targets := arrays.get(f"targets/{split}")) is not None:
            names = [f"target_axis_{axis}" for axis in range(1, len(targets.layout.shape))]
            names = ["output"] if targets.layout.shape[1:] == (manifest.num_outputs,) else names
            coordinates[f"{prefix}target"] = _variable(_LazySamples([targets]), (None, f"{prefix}sample", *names))
            if split == "train":
                columns = [f"{name}_" for name in names]
                coordinates["target_"] = _variable(_LazySamples([targets]), (None, "sample_", *columns))
    return xr.Dataset(found, coordinates, _attributes(manifest, group, output))


def _kernel_variable(kernels: Sequence[Matrix], name: str, apart: bool) -> xr.Variable:
    rows = "test_sample" if name == "test_train" else "sample"
    pair = ("output", "output_") if kernels[0].num_covectors > 1 else (None, None)
    return _variable(_LazyKernel(kernels), ("output" if apart else None, rows, pair[0], "sample_", pair[1]))


def _attributes(manifest: Manifest, group: str | None, output: int | None) -> dict[str, Any]:
    """Attributes, all numbers or texts, which every file format can store."""
    picked = {"group": group, "picked_output": output}
    same = ("kind", "convention", "compute_dtype", "accumulate_dtype", "store_dtype")
    return {
        **{name: getattr(manifest, name) for name in same},
        "model": manifest.model.name,
        "num_parameters": manifest.model.num_parameters,
        "manifest_digest": manifest.digest(),
        **{name: value for name, value in picked.items() if value is not None},
    }
