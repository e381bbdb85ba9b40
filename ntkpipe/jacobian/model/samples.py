"""Samples: arrays of any library, dicts of them or map-style data sets, read in runs and never copied whole."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntkpipe.base.errors import DataError, NonFiniteError
from ntkpipe.base.given import OF_TENSORS, in_memory, narrowed
from ntkpipe.base.paths import said
from ntkpipe.base.targets import as_values
from ntkpipe.store.manifest import ArrayRecord, DataRecord
from ntkpipe.store.store import Store

Arrays = dict[str, NDArray[Any]]

_SINGLE = "input"  # name of the array where samples are not dicts
_SCAN_BYTES = 32 * 2**20
_SHOWN_SAMPLES = 8
_REREAD = 5  # samples that are read twice
_MOST_PATTERNS = 64  # of infinite entries
_MOST_PARTS = 3  # of a tuple that is (inputs, targets, weights) rather than samples
_HOW = "pass an array of real numbers, samples padded to one shape (.toarray() or .to_dense() of what is sparse)"


@dataclass(frozen=True)
class ArraySource:
    """Samples in arrays, in memory or wherever what is cut into chunks has them."""

    arrays: dict[str, Any]
    num_samples: int  # may be fewer than there are

    def read(self, start: int, stop: int) -> Arrays:
        """Samples ``start:stop`` by array name, first axis the sample; those in memory without a copy."""
        return {
            name: values[start:stop]
            if isinstance(values, np.ndarray)
            else _to_array(values[start:stop], f"inputs[{name!r}]")
            for name, values in self.arrays.items()
        }


@dataclass(frozen=True)
class DatasetSource:
    """Samples of a map-style torch data set, loaded when they are read."""

    dataset: Any  # `dataset[i]` is a sample, or a tuple of a sample and perhaps its target
    num_samples: int  # may be fewer than there are
    has_targets: bool  # whether an item is a pair

    def read(self, start: int, stop: int) -> Arrays:
        """Load and stack samples ``start:stop``."""
        samples = [self._sample(i) for i in range(start, stop)]
        shapes = [{name: values.shape for name, values in sample.items()} for sample in samples]
        first = shapes[0]
        for number, sample in enumerate(shapes, start):
            for name in [*first, *sample]:
                if sample.get(name) != first.get(name):
                    raise DataError(
                        f"{name!r} of sample {number} has shape {sample.get(name)}, of sample {start} "
                        f"{first.get(name)}; samples must have equal arrays: pad or crop them"
                    )
        return {name: np.stack([sample[name] for sample in samples]) for name in first}

    def read_targets(self, count: int) -> NDArray[Any]:
        """The targets of the first ``count`` samples."""
        targets = [_to_array(self._item(i)[1], "targets") for i in range(count)]
        for i, target in enumerate(targets):
            if target.shape != targets[0].shape:
                raise DataError(f"the target of sample {i} has shape {target.shape}, of sample 0 {targets[0].shape}")
        return np.stack(targets)

    def _item(self, i: int) -> Any:
        return _item(self.dataset, i)

    def _sample(self, i: int) -> dict[str, NDArray[Any]]:
        item = self._item(i)
        sample = item[0] if isinstance(item, tuple) else item
        mapping = sample if _has_names(sample) else {_SINGLE: sample}
        return {name: _to_array(value, f"inputs[{name!r}]") for name, value in mapping.items()}


@dataclass(frozen=True)
class StoredSource:
    """Samples of a store, with checksums verified; safe to read from any thread."""

    store: Store
    split: str
    num_samples: int

    def read(self, start: int, stop: int) -> Arrays:
        """Samples ``start:stop``, read from the chunks that hold them."""
        prefix = f"samples/{self.split}/"
        arrays = {k[len(prefix) :]: a for k, a in self.store.arrays.items() if k.startswith(prefix)}
        return {name: array.read_samples(start, stop) for name, array in arrays.items()}


Source = ArraySource | DatasetSource | StoredSource


@dataclass(frozen=True)
class Samples:
    """Samples and their targets."""

    source: Source
    is_mapping: bool  # whether the model takes a dict of arrays, or one tensor
    given_targets: NDArray[Any] | None  # first axis the sample; None if there are none, or the data set has them
    with_targets: bool  # whether a data set's own targets are wanted
    label: str  # name of the inputs in messages
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)  # of frames among the arrays
    # One sample of each arrangement of infinite entries, as `inspect` finds them.
    infinite: list[int] = field(default_factory=list, compare=False)

    @cached_property
    def targets(self) -> NDArray[Any] | None:
        """First axis the sample, or None; read from a data set when they are first needed."""
        values = self._first_targets(self.num_samples)
        bad = [] if values is None else _where(~np.isfinite(values))
        if bad:
            raise NonFiniteError(f"targets of {self.label}: NaN or infinite entries in {show_samples(bad)}")
        return values

    def _first_targets(self, count: int) -> NDArray[Any] | None:
        if self.given_targets is not None:
            return self.given_targets[:count]
        if self.with_targets and isinstance(self.source, DatasetSource) and self.source.has_targets:
            return self.source.read_targets(count)
        return None

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.source.num_samples

    def first(self, count: int) -> "Samples":
        """The first ``count`` of these samples, with their targets."""
        if count == self.num_samples:
            return self
        source = replace(self.source, num_samples=count)
        return replace(self, source=source, given_targets=self._first_targets(count), infinite=[])

    def spans(self) -> Iterator[tuple[int, int]]:
        """Runs of about 32 MiB that cover all samples."""
        one = sum(values.nbytes for values in self.source.read(0, 1).values())
        size = max(1, min(self.num_samples, _SCAN_BYTES // max(1, one)))
        for start in range(0, self.num_samples, size):
            yield start, min(start + size, self.num_samples)

    def describe(self) -> DataRecord:
        """The record of these samples without fingerprints, from the first one; a plan needs no more."""
        first, targets = self.source.read(0, 1), self._first_targets(1)
        return DataRecord(
            num_samples=self.num_samples,
            inputs={name: ArrayRecord(shape=v.shape[1:], dtype=str(v.dtype)) for name, v in first.items()},
            is_mapping=self.is_mapping,
            inputs_digest="",
            targets=None if targets is None else ArrayRecord(shape=targets.shape[1:], dtype=str(targets.dtype)),
            targets_digest=None,
        )

    def inspect(self, label: str) -> DataRecord:
        """Read every sample once to check that nothing is NaN, find infinite entries, and fingerprint all."""
        described = self.describe()
        chosen = {int(i) for i in np.linspace(0, self.num_samples - 1, _REREAD)}
        before = {i: self.source.read(i, i + 1) for i in chosen}
        digests = {name: hashlib.sha256() for name in described.inputs}
        bad: set[int] = set()
        patterns: dict[bytes, int] = {}
        for start, stop in self.spans():
            for name, values in self.source.read(start, stop).items():
                record = ArrayRecord(shape=values.shape[1:], dtype=str(values.dtype))
                first = described.inputs.get(name)
                if first != record:
                    raise DataError(f"{label}: {name!r} of samples {start}:{stop} is {record}, of sample 0 {first}")
                digests[name].update(np.ascontiguousarray(values).data)
                if values.dtype.kind == "f" and not np.isfinite(values).all():
                    bad |= {start + i for i in _where(np.isnan(values))}
                    for i in _where(np.isinf(values)) if len(patterns) < _MOST_PATTERNS else []:
                        signs = np.sign(values[i]) * np.isinf(values[i])
                        patterns.setdefault(name.encode() + hashlib.sha256(signs.data).digest(), start + i)
        if bad:
            raise NonFiniteError(f"{label}: NaN entries in {show_samples(sorted(bad))}; fill or drop them")
        self.infinite[:] = sorted(set(patterns.values()))[:_MOST_PATTERNS]
        for i, sample in before.items():
            again = self.source.read(i, i + 1)
            if any(not np.array_equal(values, again[name]) for name, values in sample.items()):
                raise DataError(
                    f"{label}: sample {i} differs each time it is read; switch random augmentation off, or pass arrays"
                )
        digest = hashlib.sha256()
        for name, record in sorted(described.inputs.items()):
            digest.update(f"{name}|{record}|{digests[name].hexdigest()}|".encode())
        found = {"inputs_digest": digest.hexdigest()}
        if self.targets is not None:
            found["targets_digest"] = hashlib.sha256(np.ascontiguousarray(self.targets).data).hexdigest()
        return described.model_copy(update=found)


def _where(marks: NDArray[np.bool_]) -> list[int]:
    """Samples with a mark."""
    return [int(i) for i in np.flatnonzero(marks.reshape(len(marks), -1).any(axis=1))] if marks.any() else []


def show_samples(numbers: Sequence[int]) -> str:
    """``samples 3, 7 and 12 more``."""
    shown = ", ".join(map(str, numbers[:_SHOWN_SAMPLES]))
    more = f" and {len(numbers) - _SHOWN_SAMPLES} more" if len(numbers) > _SHOWN_SAMPLES else ""
    return f"{'sample' if len(numbers) == 1 else 'samples'} {shown}{more}"


def as_samples(inputs: object, targets: object = None, *, label: str = "inputs", with_targets: bool = True) -> Samples:
    """Samples from an array, a frame, a dict of those or a map-style data set."""
    source, is_mapping = _as_source(inputs, label)
    if source.num_samples == 0:
        raise DataError(f"{label} holds no samples; needed at least one")
    values = None if targets is None else _to_array(as_values(targets), f"targets of {label}")
    if values is not None and (values.ndim == 0 or len(values) != source.num_samples):
        raise DataError(f"{label} holds {source.num_samples} samples, its targets have shape {values.shape}")
    parts = inputs if isinstance(inputs, Mapping) else {_SINGLE: inputs}
    columns = {name: list(found) for name, each in parts.items() if (found := _columns(each)) is not None}
    samples = Samples(source, is_mapping, values, with_targets, label, columns)
    if values is not None:
        _ = samples.targets  # checked at once; those of a data set when they are read
    return samples


def require_same_arrays(train: Samples, test: Samples, label: str) -> None:
    """Check that two sets of samples have the same arrays, shapes and dtypes, and frames the same columns."""
    # Real numbers of all dtypes become the compute dtype; integers and truth values are another thing to a model.
    every = [each.source.read(0, 1).items() for each in (train, test)]
    kinds = [{name: (v.shape[1:], v.dtype if v.dtype.kind != "f" else "f") for name, v in each} for each in every]
    if kinds[0] != kinds[1] or train.is_mapping != test.is_mapping:
        shown = [", ".join(f"{name}: {v.shape[1:]} {v.dtype}" for name, v in each) for each in every]
        words = ["a dict of " if samples.is_mapping else "" for samples in (train, test)]
        raise DataError(f"{label} has samples {words[1]}{shown[1]}; {train.label} has {words[0]}{shown[0]}")
    for name in train.columns.keys() & test.columns.keys():
        one, other = train.columns[name], test.columns[name]
        if one != other and list(range(len(one))) not in (one, other):  # those say nothing
            raise DataError(f"{label} has the columns {other}, {train.label} {one}; pass them in one order")


def _columns(value: object) -> Collection[object] | None:
    found = getattr(value, "columns", None) if hasattr(value, "__array__") else None
    return found if isinstance(found, Collection) else None


def _as_source(inputs: Any, label: str) -> tuple[Source, bool]:
    if _has_names(inputs):
        inputs = {name: inputs[name] for name in inputs.keys()}  # noqa: SIM118
        if not inputs:
            raise DataError(f"{label} is an empty dict; needed name → array")
        _require_keys(inputs, label)
        arrays = {name: _to_values(values, f"{label}[{name!r}]") for name, values in inputs.items()}
        found = {name: getattr(values, "dims", None) for name, values in inputs.items()}
        dims = {name: each for name, each in found.items() if isinstance(each, tuple) and each}
        for name, (first, *_) in dims.items():
            if late := [other for other, each in dims.items() if first in each[1:]]:
                raise DataError(
                    f"{label} has the dimension {first!r} first in {name!r} and later in {late[0]!r}; the first axis "
                    f"of each is the sample: {label}[{late[0]!r}].transpose({first!r}, ...)"
                )
        lengths = {values.shape[:1] for values in arrays.values()}
        if len(lengths) > 1 or () in lengths:
            shown = ", ".join(f"{name}: {values.shape}" for name, values in arrays.items())
            raise DataError(f"{label} has arrays of unequal lengths ({shown}); the first axis is the sample")
        return ArraySource(arrays, next(iter(arrays.values())).shape[0]), True
    if hasattr(inputs, "__array__") or isinstance(inputs, memoryview):
        values = _to_values(inputs, label)
        if not values.shape:
            raise DataError(f"{label} is a scalar; needed an array whose first axis is the sample")
        return ArraySource({_SINGLE: values}, values.shape[0]), False
    if (
        isinstance(inputs, torch.utils.data.IterableDataset | str | bytes | bytearray)
        or not (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__"))
        or hasattr(inputs, "__dataframe__")
    ):
        raise DataError(
            f"{label} is {type(inputs).__name__}; needed a tensor, an array, a dict of arrays, or a map-style data set "
            "(with len() and [i]), as is the .dataset of a DataLoader; of a table its values, as an array"
        )
    if isinstance(inputs, tuple) and (len(inputs) <= _MOST_PARTS or hasattr(inputs, "_fields")):
        raise DataError(
            f"{label} is a tuple of {len(inputs)}; pass inputs and targets by name, several inputs of a model as a "
            "dict of arrays, or samples as a list"
        )
    try:
        size = len(inputs)
    except TypeError as error:
        raise DataError(f"{label} is {type(inputs).__name__}, without a length ({said(error)}); {_HOW}") from error
    if size == 0:
        raise DataError(f"{label} holds no samples; needed at least one")
    first = _item(inputs, 0)
    parts = first if isinstance(first, tuple) else (first,)
    if len(parts) not in {1, 2}:
        raise DataError(
            f"items of {label} have {len(parts)} parts; needed a sample, or a pair (sample, target). Several inputs: a "
            "dict of arrays"
        )
    is_mapping = _has_names(parts[0])
    if is_mapping:
        _require_keys(parts[0].keys(), label)
    return DatasetSource(inputs, size, has_targets=len(parts) == 2), is_mapping


def _has_names(value: object) -> bool:
    """Whether a value is a mapping of arrays, as groups of Zarr are, too, though not by their type."""
    return isinstance(value, Mapping) or (callable(getattr(value, "keys", None)) and not hasattr(value, "__array__"))


def _item(dataset: Any, i: int) -> Any:
    try:
        return dataset[i]
    except Exception as error:
        raise DataError(
            f"the data set ({type(dataset).__name__}) raised {type(error).__name__} at item {i}: {said(error)}; its "
            "[i] must be a sample for i from 0 to len() - 1"
        ) from error


def _require_keys(names: Iterable[Any], label: str) -> None:
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise DataError(f"{label} has the key {name!r}; keys become keyword arguments of the model")


def _to_values(value: Any, label: str) -> Any:
    """An array; what is cut into chunks (HDF5, Zarr, Dask) is left where it is."""
    shape = getattr(value, "shape", ()) if hasattr(value, "__array__") and hasattr(value, "chunks") else ()
    return value if shape and isinstance(shape[0], int) else _to_array(value, label)


def _to_array(value: object, label: str) -> NDArray[Any]:
    if np.ma.is_masked(value):
        raise DataError(f"{label} has masked entries, which are no data; fill them, or leave those samples out")
    if _has_names(value):
        raise DataError(f"{label} is {type(value).__name__}, which is no array; {_HOW}")
    try:
        # Objects are rows, and frames whose columns differ in dtype.
        array = narrowed(np.asarray(in_memory(value, OF_TENSORS)))
    except Exception as error:  # sparse tensors and ragged lists, and what other libraries raise
        raise DataError(f"{label} ({type(value).__name__}) cannot be made an array: {said(error)}; {_HOW}") from error
    if array.dtype.kind not in "fiub":
        raise DataError(_why_not_numbers(array, value, label))
    if 0 in array.shape[1:]:
        raise DataError(f"{label} has shape {array.shape}: its samples are empty")
    native = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return array.astype(native, copy=False)


def _why_not_numbers(array: NDArray[Any], value: object, label: str) -> str:
    found = f"{label} has dtype {array.dtype}"
    if array.dtype.names:
        name = array.dtype.names[0]
        return f"{found}; pass a dict of its fields, as in {{{name!r}: array[{name!r}]}}, or one array of all columns"
    if array.dtype.kind == "O" and array.ndim == 0:
        return f"{label} is {type(value).__name__}, which is no array; {_HOW}"
    entries = np.ndenumerate(array) if array.dtype.kind == "O" else ()
    is_number = Real | np.bool_ | np.ndarray | Tensor
    place, entry = next(((place, each) for place, each in entries if not isinstance(each, is_number)), ((), None))
    if place:
        found += f" for {entry!s:.40} ({type(entry).__name__}) in row {place[0]}"
    found += "; needed real numbers, integers or booleans"
    if isinstance(entry, str) or array.dtype.kind in "UTS":
        return f"{found}; a store has labels as numbers: np.unique(labels, return_inverse=True)"
    return found + ("; fill, convert or drop such entries" if place else "")
