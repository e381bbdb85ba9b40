"""What callers give as arrays: the one door, which takes whatever holds numbers and says what to give instead."""

import math
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, NonFiniteError, TileError
from ntkpipe.base.paths import said

# What puts entries into memory that are a tensor's, computed later, or sparse.
OF_TENSORS = ("detach", "cpu", "resolve_conj", "resolve_neg")
_INTO_MEMORY = (*OF_TENSORS, "to_dense", "compute", "toarray")
_SMALL_DTYPE = re.compile(r"torch\.(bfloat|float[48])")  # which NumPy does not have
_MOST_NAMED = 8  # chunks in a message
_ROWS_AT_ONCE = 256
_MOST_ROUNDING = 5e-3  # of a symmetric matrix in float16, relative to its largest entry


def plain_value(value: Any) -> Any:
    """Numbers and arrays of other libraries as Python's numbers and lists, also those in a list."""
    if hasattr(value, "tolist") and hasattr(value, "ndim") and not isinstance(value, type):
        return value.tolist()
    return [plain_value(one) for one in value] if isinstance(value, list | tuple | range) else value


def as_array(name: str, given: Any) -> NDArray[Any]:
    """An array in memory, of numbers or labels; ConfigError for what is none, and where entries are masked."""
    require_opened(name, given)
    if is_in_slices(given):
        return read_slices(name, given, *(slice(0, size) for size in given.shape))
    try:
        values = narrowed(np.asanyarray(in_memory(given)))
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        what = f"{name}: a {type(given).__name__} that NumPy does not take as an array ({said(error)})"
        raise ConfigError(f"{what}; convert it to one of real numbers") from None
    if count := int(np.count_nonzero(np.ma.getmaskarray(values))) if isinstance(values, np.ma.MaskedArray) else 0:
        raise ConfigError(f"{name}: {count} entries are masked; fill them, or leave out the samples that have them")
    found = np.asarray(values)
    if found.dtype.kind == "O" and not found.ndim:
        has_products = hasattr(given, "shape") and hasattr(given, "__matmul__")
        advice = f", which is its product with a unit matrix, numpy.eye({given.shape[-1]})" if has_products else ""
        raise ConfigError(f"{name}: a {type(given).__name__}; needed an array{advice}")
    return found


def narrowed(values: NDArray[Any]) -> NDArray[Any]:
    """Objects that are all real numbers, or rows of those, as such; integers that NumPy does not hold stay objects."""
    if values.dtype.kind != "O" or not values.ndim or isinstance(values, np.ma.MaskedArray):
        return values
    found = np.array(values.tolist())
    if found.dtype.kind == "O" and all(isinstance(one, Real | Decimal) for one in found.reshape(-1).tolist()):
        is_whole = found.ndim == 1 and all(isinstance(one, int) for one in found.tolist())
        found = found if is_whole else found.astype(np.float64)
    return found if found.dtype.kind in "fiub" else values


def in_memory(given: Any, methods: Sequence[str] = _INTO_MEMORY) -> Any:
    """What NumPy takes as an array, of a tensor, or what is computed later, or sparse."""
    for method in methods:
        if hasattr(type(given), method):
            given = getattr(given, method)()
    if _SMALL_DTYPE.match(str(getattr(given, "dtype", ""))):
        given = given.float()
    has_masks = isinstance(given, list | tuple) and any(isinstance(one, np.ma.MaskedArray) for one in given)
    return np.ma.array(given) if has_masks else given


def as_real(name: str, given: Any) -> NDArray[Any]:
    """The same of real numbers that float64 holds: integers and truth values become float64."""
    values = as_array(name, given)
    dtype = real_dtype(name, values.shape, values.dtype)
    with np.errstate(over="ignore"):  # what float64 does not hold is infinite, and refused as such
        found = values.astype(dtype, copy=False)
    if values.dtype.itemsize > 8 and values.any() and not found.any():
        raise ConfigError(f"{name} of dtype {values.dtype} holds numbers that are zero in float64; use other units")
    return found


def real_dtype(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype, not wider than float64, that real numbers of another one are taken in."""
    if dtype.kind in "iub" or (dtype.kind == "f" and dtype.itemsize > 8):
        return np.dtype(np.float64)
    if dtype.kind != "f":
        advice = "; give .real, if imaginary parts are zero" if dtype.kind == "c" else ""
        raise ConfigError(f"{name} of shape {shape} and dtype {dtype}; needed real numbers{advice}")
    return dtype


def dtype_of(array: Any) -> np.dtype[Any]:
    """The dtype of what is not in memory; float64 where it has none that NumPy knows."""
    try:
        return np.dtype(getattr(array, "dtype", None))
    except TypeError:
        return np.dtype(np.float64)


def require_square(name: str, shape: tuple[int, ...]) -> None:
    """Refuse a shape that no kernel of samples with themselves has."""
    if len(shape) == 2 and shape[0] == shape[1] and shape[0]:
        return
    advice = ""
    if len(shape) == 4:
        advice = (
            ", row = sample * O + output: of an array (N, O, N, O) that is .reshape(N * O, N * O), and (N, N, O, O) "
            "needs .transpose(0, 2, 1, 3) before it"
        )
    raise ConfigError(f"{name} of shape {shape}; needed (n, n), samples with themselves{advice}")


def require_symmetric(name: str, values: NDArray[Any]) -> float:
    """Check that a matrix is finite, and symmetric up to rounding; returns its largest absolute entry."""
    largest, gap = 0.0, 0.0
    for first in range(0, len(values), _ROWS_AT_ONCE):
        rows, columns = values[first : first + _ROWS_AT_ONCE], values[:, first : first + _ROWS_AT_ONCE].T
        size = float(np.abs(rows).max())
        if not np.isfinite(size):
            raise NonFiniteError(f"{name} holds NaN or infinity")
        largest, gap = max(largest, size), max(gap, float(np.abs(rows - columns).max()))
    require_mirror(name, gap, largest, values.dtype)
    return largest


def require_mirror(name: str, gap: float, largest: float, dtype: np.dtype[Any]) -> None:
    """Refuse entries that differ from their mirror images by more than rounding."""
    if not gap <= min(100 * float(np.finfo(dtype).eps), _MOST_ROUNDING) * largest:
        raise ConfigError(
            f"{name} is not symmetric: an entry and its mirror differ by {gap:.3g}, entries are up to "
            f"{largest:.3g}. Of one that has a triangle alone, give K + K.T - np.diag(K.diagonal())"
        )


def require_opened(name: str, given: Any) -> None:
    """Refuse what is not yet an array: a path, or a collection of arrays."""
    if isinstance(given, str | bytes | os.PathLike):
        raise ConfigError(
            f"{name}: {given!r} is text or a path; open it, and give the array: ntkpipe.open_kernel(path).train of a "
            'store, zarr.open_array(path), numpy.load(path, mmap_mode="r"), or h5py.File(path)[name]'
        )
    if hasattr(given, "keys") and not hasattr(given, "shape"):
        names = ", ".join(sorted(map(str, given.keys()))[:_MOST_NAMED])
        raise ConfigError(f"{name}: a {type(given).__name__} of arrays, {names}; give one of them, by its name")


def is_in_slices(given: Any) -> bool:
    """Whether entries are read where they are needed: of a memory map, or an array of Zarr, HDF5 or Dask."""
    return isinstance(given, np.memmap) or (hasattr(given, "chunks") and hasattr(given, "shape"))


def read_slices(name: str, array: Any, *parts: slice) -> NDArray[Any]:
    """Read a part of an array, a slice for each axis; TileError where it cannot be read, or was perhaps not written."""
    try:
        part = np.asanyarray(in_memory(array[parts]))
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        rows = f"rows {parts[0].start} to {parts[0].stop - 1}"
        raise TileError(f"{name}: {rows} of a {type(array).__name__} cannot be read: {said(error)}") from error
    values = as_array(name, np.asarray(part) if isinstance(part, np.memmap) else part)
    # Zarr says how many chunks were written, HDF5 by its lower interface.
    if values.size and (hasattr(array, "nchunks_initialized") or hasattr(getattr(array, "id", None), "get_num_chunks")):
        _require_written(name, array, values, parts)
    return values


def _may_lack_chunks(array: Any) -> bool:
    if getattr(array, "shards", None) is not None:
        return True  # a shard that is there may lack chunks
    if hasattr(array, "nchunks_initialized"):
        return bool(array.nchunks_initialized < array.nchunks)
    if array.chunks is None:
        return not array.id.get_storage_size()
    return bool(array.id.get_num_chunks() < math.prod(map(math.ceil, np.divide(array.shape, array.chunks))))


def _require_written(name: str, array: Any, values: NDArray[Any], parts: tuple[slice, ...]) -> None:
    """Refuse chunks that read as the fill value throughout, unless all chunks of the array are there.

    Zarr leaves such chunks out by default, so whether they were written is not known.
    """
    sizes = array.chunks or array.shape  # HDF5 may have one part alone
    given = getattr(array, "fill_value", getattr(array, "fillvalue", None))
    fill = np.asarray(0 if given is None else given, values.dtype)
    first = [np.arange(part.start // size, -(-part.stop // size)) for part, size in zip(parts, sizes, strict=True)]
    corners = [np.maximum(at * size - part.start, 0) for at, size, part in zip(first, sizes, parts, strict=True)]
    alike = np.argwhere(_equals(values[np.ix_(*corners)], fill))
    if not len(alike) or not _may_lack_chunks(array):
        return
    unsure = []
    for place in alike:
        index = tuple(int(at[number]) for at, number in zip(first, place, strict=True))
        whole = tuple(slice(at * size, (at + 1) * size) for at, size in zip(index, sizes, strict=True))
        if _equals(np.asarray(array[whole]), fill).all():
            unsure.append(index)
    if unsure:
        can_keep = hasattr(array, "nchunks_initialized") and getattr(array, "shards", None) is None
        rewrite = ', or write it with config={"write_empty_chunks": True}' if can_keep else ""
        more = f" and {len(unsure) - _MOST_NAMED} more" if len(unsure) > _MOST_NAMED else ""
        raise TileError(
            f"{name}: chunks {', '.join(map(str, unsure[:_MOST_NAMED]))}{more} of {array!r} read as the fill value "
            f"{fill} throughout: they were never written, or left out since they hold nothing else. Write them; if the "
            f"fill value is meant, give the array in memory, array[...]{rewrite}"
        )


def _equals(values: NDArray[Any], fill: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(np.isnan(values) if fill.dtype.kind == "f" and math.isnan(fill) else values == fill)
