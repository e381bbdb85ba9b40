"""Stored kernels as lazy xarray objects with named dimensions; only what is indexed is read."""

from collections.abc import Callable, Sequence
from functools import partial
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

from ntkpipe.base.kinds import array_of, get_kind, prefix_of
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.manifest import Manifest
from ntkpipe.store.store import Store

Matrix = Any  # a Kernel, whose module imports this one


class _Lazy(BackendArray):
    """Several planes, the first axis, of one shape.

    Each has a function that reads its entries by indices along the other axes: vectors of equal length, or those of
    ``numpy.ix_``.
    """

    def __init__(self, planes: Sequence[Callable[..., NDArray[Any]]], shape: tuple[int, ...], dtype: Any) -> None:
        self._planes, self.shape, self.dtype = planes, (len(planes), *shape), dtype

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
        planes, *indices = (np.atleast_1d(part) for part in picked)
        parts = [self._planes[plane](*np.ix_(*indices)) for plane in planes]
        return (parts[0] if len(parts) == 1 else np.stack(parts)).reshape(shape)  # the latter copies

    def _points(self, planes: NDArray[np.int64], *indices: NDArray[np.int64]) -> NDArray[Any]:
        values = np.empty(planes.shape, self.dtype)
        for plane in np.unique(planes):
            at = planes == plane
            values[at] = self._planes[plane](*(part[at] for part in indices))
        return values


def _lazy_samples(*arrays: StoredArray) -> _Lazy:
    """Arrays of one shape, chunked by samples, as (array, sample, …)."""
    layout = arrays[0].layout
    return _Lazy([partial(_read_samples, array) for array in arrays], layout.shape, layout.dtype)


def _read_samples(array: StoredArray, samples: NDArray[np.int64], *rest: NDArray[np.int64]) -> NDArray[Any]:
    """Read entries from the range of samples."""
    first = int(samples.min())
    values = array.read_samples(first, int(samples.max()) + 1).astype(array.layout.dtype)
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
    store: Store, as_kernel: Callable[[StoredArray], Matrix], group: str | None, output: int | None
) -> xr.Dataset:
    """See :meth:`ntkpipe.store.kernel_store.KernelSet.to_xarray`."""
    manifest, arrays = store.manifest, store.arrays
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
        found["test_diagonal"] = _variable(_lazy_samples(*blocks), ("output" if apart else None, "test_sample", *pair))
    coordinates: dict[str, xr.Variable] = {}
    for split, prefix in (("train", ""), ("test", "test_")):
        if (outputs := arrays.get(f"outputs/{split}")) is not None:
            found[f"{prefix}outputs"] = _variable(_lazy_samples(outputs), (None, f"{prefix}sample", "output"))
        if (targets := arrays.get(f"targets/{split}")) is not None:
            names = [f"target_axis_{axis}" for axis in range(1, len(targets.layout.shape))]
            names = ["output"] if targets.layout.shape[1:] == (manifest.num_outputs,) else names
            coordinates[f"{prefix}target"] = _variable(_lazy_samples(targets), (None, f"{prefix}sample", *names))
            if split == "train":
                columns = [f"{name}_" for name in names]
                coordinates["target_"] = _variable(_lazy_samples(targets), (None, "sample_", *columns))
    return xr.Dataset(found, coordinates, _attributes(manifest, group, output))


def _kernel_variable(kernels: Sequence[Matrix], name: str, apart: bool) -> xr.Variable:
    width, (rows, columns) = kernels[0].num_covectors, kernels[0].shape
    shape = (rows // width, width, columns // width, width)
    array = _Lazy([kernel.read_entries for kernel in kernels], shape, kernels[0].dtype)
    samples = "test_sample" if name == "test_train" else "sample"
    pair = ("output", "output_") if width > 1 else (None, None)
    return _variable(array, ("output" if apart else None, samples, pair[0], "sample_", pair[1]))


def _attributes(manifest: Manifest, group: str | None, output: int | None) -> dict[str, Any]:
    """Attributes, all numbers or texts, which every file format can store."""
    picked = {"group": group, "picked_output": output}
    same = ("kind", "convention", "compute_dtype", "accumulate_dtype", "store_dtype")
    return {
        **{name: getattr(manifest, name) for name in same},
        "model": manifest.maker if manifest.model is None else manifest.model.name,
        **({} if manifest.model is None else {"num_parameters": manifest.model.num_parameters}),
        "manifest_digest": manifest.digest(),
        **{name: value for name, value in picked.items() if value is not None},
    }
