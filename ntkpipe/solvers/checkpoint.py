"""What long calculations save in a checkpoint: a state in JSON, and arrays; those of other calculations are refused."""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Work
from ntkpipe.solvers.result import Result
from ntkpipe.store.results import Checkpoint, as_integer, as_mapping, as_number

R = TypeVar("R", bound=Result)


class Journal:
    """The checkpoint of one calculation, if there is one; :attr:`earlier` is the state that it had at the beginning.

    Raises ConfigError if that is of another calculation than ``decides`` describes, which is saved under ``key``.
    """

    def __init__(self, checkpoint: Checkpoint | None, decides: Mapping[str, Any], *, key: str = "decides") -> None:
        self.checkpoint, self._key, self._decides = checkpoint, key, as_json(decides)
        self._written: set[str] = set()
        self.earlier = None if checkpoint is None else checkpoint.load()
        found = self._decides if self.earlier is None else self.earlier.get(key)
        if found != self._decides:
            known = found if isinstance(found, dict) else {}
            names = [name for name in {**self._decides, **known} if known.get(name) != self._decides.get(name)]
            shown = [(name, *(repr(each.get(name))[:40] for each in (known, self._decides))) for name in names]
            differ = ", ".join(f"{name}={before} (now {now})" for name, before, now in shown)
            raise ConfigError(f"{checkpoint!r} is of another calculation: {differ}; give another one, or clear it")

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the earlier state is read; see :meth:`Checkpoint.reading`."""
        return contextlib.nullcontext() if self.checkpoint is None else self.checkpoint.reading()

    def get(
        self, name: str, shape: tuple[int, ...], *, dtype: Any = np.float64, allow_nan: bool = False
    ) -> NDArray[Any]:
        """Read an array of the earlier state."""
        self._written.add(name)
        if self.checkpoint is None or 0 in shape:
            return np.zeros(shape, dtype)
        return self.checkpoint.get(name, shape, dtype=dtype, allow_nan=allow_nan)

    def getter(self, prefix: str) -> "Get":
        """What reads arrays whose names begin with a prefix."""
        return lambda name, shape: self.get(f"{prefix}{name}", shape)

    def save(self, state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], keep: Iterable[str] = ()) -> None:
        """Replace the state. Arrays whose names were read or saved before are the same; ``keep`` names further ones."""
        if self.checkpoint is None:
            return
        for name, values in arrays.items():
            if name not in self._written and values.size:
                self.checkpoint.put(name, values)
        self._written = {*arrays, *keep}
        self.checkpoint.commit({self._key: self._decides, **as_json(state)}, set(self._written))


class Stages:
    """Parts of a long calculation, each saved in a checkpoint once it is done; without a checkpoint each is computed.

    Raises ConfigError if the checkpoint is of another calculation than ``decides`` describes.
    """

    def __init__(self, checkpoint: Checkpoint | None, decides: Mapping[str, Any]) -> None:
        self.journal = Journal(checkpoint, decides)
        self._done: dict[str, Any] = {}
        self._parts: dict[str, Any] = {}  # states of solvers under way, and names of their arrays
        if self.journal.earlier is not None:
            with self.journal.reading():
                self._done, self._parts = (as_mapping(self.journal.earlier[name]) for name in ("stages", "parts"))
                self._names()

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def once(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """What ``compute`` returns, or returned in an earlier call: JSON values, arrays of numbers, :class:`Work`."""
        if name in self._done:
            with self.journal.reading():
                return self._read(name)
        found = compute()
        arrays = {key: value for key, value in found.items() if isinstance(value, np.ndarray)}
        work = {key: value for key, value in found.items() if isinstance(value, Work)}
        values = as_json({key: value for key, value in found.items() if key not in {*arrays, *work}})
        if self.journal.checkpoint is not None:
            shapes = {key: [str(array.dtype), *array.shape] for key, array in arrays.items()}
            self._done[name] = {"values": values, "work": as_json(work), "arrays": shapes}
            self._parts.pop(name, None)
            self.save({f"{name}-{key}": array for key, array in arrays.items()})
        return {**values, **work, **arrays}

    def result(self, name: str, kind: type[R], compute: Callable[[], R]) -> R:
        """What ``compute`` returns, or returned in an earlier call: a result of this kind."""

        def saved() -> Mapping[str, Any]:
            found = compute()
            return {**found.to_json(), **found.arrays()}

        found = self.once(name, saved)
        with self.journal.reading():
            return kind.from_saved(found)

    def part(self, name: str) -> Checkpoint | None:
        """A checkpoint for a solver that runs within the stage of this name; it is dropped once the stage is done."""
        return None if self.journal.checkpoint is None else _Part(self, self._parts, name, self.journal.checkpoint)

    def save(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Save everything up to now, with new arrays."""
        self.journal.save({"stages": self._done, "parts": self._parts}, arrays, self._names())

    def _names(self) -> set[str]:
        found = {f"{name}-{key}" for name, stage in self._done.items() for key in as_mapping(stage["arrays"])}
        return found | {f"{name}-part-{key}" for name, part in self._parts.items() for key in part["arrays"]}

    def _read(self, name: str) -> Mapping[str, Any]:
        stage = as_mapping(self._done[name])
        found = dict(as_mapping(stage["values"]))
        found |= {key: as_work(value) for key, value in as_mapping(stage["work"]).items()}
        for key, (dtype, *shape) in stage["arrays"].items():
            sizes = tuple(map(as_integer, shape))
            found[key] = self.journal.get(f"{name}-{key}", sizes, dtype=np.dtype(str(dtype)), allow_nan=True)
        return found


class _Part(Checkpoint):
    """The checkpoint of a solver within that of a calculation of several stages."""

    def __init__(self, stages: Stages, parts: dict[str, Any], name: str, whole: Checkpoint) -> None:
        self._stages, self._parts, self._of, self._whole = stages, parts, name, whole

    def __repr__(self) -> str:
        return f"{self._whole!r} for {self._of}"

    def load(self) -> dict[str, Any] | None:
        with self.reading():
            return as_mapping(self._parts[self._of]["state"]) if self._of in self._parts else None

    def put(self, name: str, values: NDArray[Any]) -> None:
        self._whole.put(f"{self._of}-part-{name}", values)

    def get(
        self, name: str, shape: tuple[int, ...], *, dtype: type[Any] = np.float64, allow_nan: bool = False
    ) -> NDArray[Any]:
        return self._whole.get(f"{self._of}-part-{name}", shape, dtype=dtype, allow_nan=allow_nan)

    def commit(self, state: Mapping[str, Any], keep: set[str]) -> None:
        self._parts[self._of] = {"state": dict(state), "arrays": sorted(keep)}
        self._stages.save({})


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: lists for tuples, ``[passes, bytes_read, seconds]`` for :class:`Work`."""
    found: dict[str, Any] = json.loads(json.dumps(dict(values), default=_plain))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Work):
        return [value.passes, value.bytes_read, value.seconds]
    return value.tolist()  # of numpy


def as_work(value: Any) -> Work:
    """Restore what :func:`as_json` made of the work."""
    passes, bytes_read, seconds = value
    return Work(as_number(passes), as_integer(bytes_read), as_number(seconds))


Get = Callable[[str, tuple[int, ...]], FloatArray]  # reads an array of a name and a shape


class Pieces:
    """Where the columns of a growing basis came from, so that each is saved once: names, and columns where they end."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, int]] = []

    def arrays(self, basis: FloatArray, suffix: str = "") -> dict[str, FloatArray]:
        """The pieces of a basis by name."""
        starts = [0, *(end for _, end in self.ends)]
        return {f"{name}{suffix}": basis[:, start:end] for (name, end), start in zip(self.ends, starts, strict=False)}

    def restore(self, state: Any, get: Get, bases: Mapping[str, FloatArray]) -> int:
        """Read the pieces of bases, given by the suffixes of their names; return the number of columns."""
        self.ends, start = [(str(name), as_integer(end)) for name, end in state], 0
        for name, end in self.ends:
            for suffix, basis in bases.items():
                if not start < end <= basis.shape[1]:
                    raise ValueError(f"columns {start} to {end} of a basis of {basis.shape[1]}")
                basis[:, start:end] = get(f"{name}{suffix}", (len(basis), end - start))
            start = end
        return start
