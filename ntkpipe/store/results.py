"""Results and checkpoints as plain Zarr that other programs can read: JSON attributes of a group, and arrays."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import NtkpipeError, StoreError
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.documents import DOCUMENT, group_attributes, group_document, parse
from ntkpipe.store.layout import MOST_CHUNK_BYTES, MOST_CHUNKS, ArrayLayout
from ntkpipe.store.media.medium import Medium, writing
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.store import Store, create_groups, groups_below

_CHUNK_BYTES = 16 * 2**20
_DTYPES = ("float64", "float32", "int64", "uint8")
_MOST_AXES = 8
# What reading untrusted JSON raises where a value is missing or of another type.
_WRONG_VALUES = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)


class ArrayFolder:
    """A Zarr group of arrays and attributes, in a store or elsewhere; attributes are replaced atomically."""

    def __init__(self, medium: Medium, name: str) -> None:
        self._medium, self._name = medium, name

    def __repr__(self) -> str:
        return f"<ArrayFolder {self.address}>"

    @property
    def address(self) -> str:
        """Path or URL."""
        return str(self._medium.address(self._name))

    def _below(self, name: str) -> str:
        return f"{self._name}/{name}"

    def write_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Replace the attributes atomically."""
        create_groups(self._medium, [self._name], root=True)
        with writing(self._medium):
            self._medium.put(self._below(DOCUMENT), group_document(dict(attributes)))

    def read_attributes(self) -> dict[str, Any] | None:
        """Read the attributes; None if there is no such group."""
        name = self._below(DOCUMENT)
        try:
            data = self._medium.get(name)
        except FileNotFoundError:
            return None
        return group_attributes(data, str(self._medium.address(name)), allow_nan=True)

    def write_array(self, name: str, values: NDArray[Any]) -> None:
        """Write an array of float or integer numbers, replacing one of the same name."""
        self.delete(name)
        array = self._array(name, values.shape, values.dtype)
        create_groups(self._medium, [self._name], root=True)
        array.create()
        for index in array.layout.indices():
            array.write(index, values[array.layout.region(index)])

    def read_array(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Read an array and verify its checksums; memory is the array plus one chunk."""
        where = f"{self._below(name)}/{DOCUMENT}"
        address = str(self._medium.address(where))
        try:
            document = parse(self._medium.get(where), address)
        except FileNotFoundError:
            raise StoreError(f"{address} is missing") from None
        array = self._array(name, *_shape_and_dtype(document, address))
        if shape is not None and array.layout.shape != shape:
            raise StoreError(f"{address} describes an array of shape {array.layout.shape}; needed {shape}")
        array.check_metadata()
        values = np.empty(array.layout.shape, array.layout.dtype)
        for index in array.layout.indices():
            values[array.layout.region(index)] = array.read(index)
        return values

    def array_names(self) -> list[str]:
        """Names of the complete arrays."""
        return sorted(groups_below(self._medium, self._name))

    def delete(self, array: str | None = None) -> None:
        """Delete an array, or the group with all its arrays; its ``zarr.json`` first."""
        name = self._name if array is None else self._below(array)
        with writing(self._medium):
            self._medium.delete(f"{name}/{DOCUMENT}")
            self._medium.delete_below(name)

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> StoredArray:
        row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
        chunks = (max(1, min(shape[0], _CHUNK_BYTES // row_bytes)), *(max(1, size) for size in shape[1:]))
        dimensions = tuple(f"axis_{axis}" for axis in range(len(shape)))
        return StoredArray(self._medium, ArrayLayout(self._below(name), shape, chunks, dtype, dimensions))


def _shape_and_dtype(document: Any, where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an untrusted array document, checked before anything is allocated."""
    fields = document if isinstance(document, dict) else {}
    sizes = shape if isinstance(shape := fields.get("shape"), list) else []
    is_shape = 1 <= len(sizes) <= _MOST_AXES and all(type(size) is int and 0 <= size < 2**48 for size in sizes)
    if not is_shape or fields.get("data_type") not in _DTYPES:
        raise StoreError(f"{where} is damaged, or describes an array that results do not have")
    dtype = np.dtype(fields["data_type"])
    row_bytes = math.prod(sizes[1:]) * dtype.itemsize
    if row_bytes > MOST_CHUNK_BYTES or row_bytes * sizes[0] > MOST_CHUNKS * _CHUNK_BYTES:
        raise StoreError(f"{where} describes an array of {row_bytes * sizes[0]} bytes; no result is as large")
    return tuple(sizes), dtype


class Checkpoint:
    """The state of one calculation: arrays that are written once, and a small JSON document that names the valid ones.

    A process may be killed at any moment: everything that the last :meth:`commit` named exists.

    Parameters
    ----------
    where
        Path or URL of a folder, in which the checkpoint becomes a Zarr group; or a store.
    name
        Name of the calculation; it must identify everything that decides the result.
    """

    def __init__(self, where: str | Path | Store, name: str) -> None:
        inside = isinstance(where, Store)
        medium = where.medium if isinstance(where, Store) else medium_at(where)
        self._folder = ArrayFolder(medium, f"results/checkpoints/{name}" if inside else name)

    def __repr__(self) -> str:
        return f"<Checkpoint in {self._folder.address}>"

    def load(self) -> dict[str, Any] | None:
        """Read the state of the last :meth:`commit`, or None if there is none; raises StoreError if it is damaged."""
        with self.reading():
            attributes = self._folder.read_attributes()
            return None if attributes is None else as_mapping(attributes["state"])

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Context in which to read a state, whose content is untrusted: missing or wrong values raise StoreError."""
        # Read values with `as_integer` and its like, and arrays with `get` and the needed shape: numpy would broadcast
        # a smaller array.
        try:
            yield
        except (StoreError, *_WRONG_VALUES) as error:
            if isinstance(error, NtkpipeError) and not isinstance(error, StoreError):
                raise
            why = str(error) if isinstance(error, StoreError) else repr(error)
            raise StoreError(
                f"{self!r} cannot be read: it is damaged, or of another version ({why}); delete it to begin anew"
            ) from error

    def put(self, name: str, values: NDArray[Any]) -> None:
        """Write an array, under a name that no committed state uses."""
        self._folder.write_array(name, values)

    def get(
        self, name: str, shape: tuple[int, ...], *, dtype: type[Any] = np.float64, allow_nan: bool = False
    ) -> NDArray[Any]:
        """Read an array; raises StoreError if it is damaged, of another shape or dtype, or not finite."""
        values = self._folder.read_array(name, shape)
        if values.dtype != dtype or not (allow_nan or np.isfinite(values).all()):
            raise StoreError(
                f"{name} has dtype {values.dtype}, or holds NaN or infinity; needed finite numbers of {np.dtype(dtype)}"
            )
        return values

    def commit(self, state: Mapping[str, Any], keep: set[str]) -> None:
        """Make this the state, and delete every array that is not in ``keep``."""
        self._folder.write_attributes({"state": json.loads(json.dumps(dict(state)))})
        for name in self._folder.array_names():
            if name not in keep:
                self._folder.delete(name)

    def clear(self) -> None:
        """Delete the checkpoint, once the result is safe."""
        self._folder.delete()


def as_mapping(value: Any) -> dict[str, Any]:
    """Check that a JSON value is an object."""
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:40]!r} is not a JSON object")
    return value


def as_integer(value: Any, *, low: int = 0) -> int:
    """Check that a JSON value is an integer of at least ``low``."""
    if type(value) is not int or value < low:
        raise ValueError(f"{str(value)[:40]!r} is not an integer of at least {low}")
    return value


def as_number(value: Any) -> float:
    """Check that a JSON value is a finite number."""
    if type(value) not in {int, float} or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]!r} is not a finite number")
    return float(value)


def as_numbers(value: Any, shape: tuple[int, ...], *, allow_nan: bool = False) -> NDArray[np.float64]:
    """Check that nested JSON lists are numbers of this shape."""
    found = np.array(value)
    if found.size == 0 and math.prod(shape) == 0 and isinstance(value, list):
        return np.zeros(shape)
    if found.shape != shape or found.dtype.kind not in "fi" or not (allow_nan or np.isfinite(found).all()):
        raise ValueError(f"{str(value)[:40]!r} are not numbers of shape {shape}")
    return found.astype(np.float64)


def save_result(store: Store, name: str, result: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Save a result below ``results/name`` with the digest of the store's manifest, replacing an older one."""
    folder = ArrayFolder(store.medium, f"results/{name}")
    folder.delete()
    for key, values in arrays.items():
        folder.write_array(key, values)
    store.write_result(name, result)  # last: the result is valid once its attributes exist


def load_result(store: Store, name: str) -> dict[str, Any] | None:
    """Read values and arrays of a result below ``results/name`` by name; None if this manifest has no such result."""
    found = store.read_result(name)
    if found is None:
        return None
    folder = ArrayFolder(store.medium, f"results/{name}")
    return {**found, **{array: folder.read_array(array) for array in folder.array_names()}}


@contextlib.contextmanager
def reading_results(root: Path | str) -> Iterator[None]:
    """Context in which to use results, whose content is untrusted: missing or wrong values raise StoreError."""
    try:
        yield
    except NtkpipeError:
        raise
    except _WRONG_VALUES as error:
        raise StoreError(
            f"a result in {root} is damaged, or of another version ({error!r}); delete its folder below results, and "
            "run or verify again"
        ) from error
