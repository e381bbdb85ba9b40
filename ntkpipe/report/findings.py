"""What an analysis found, whether just now or in an earlier step: values by name, each checked when it is taken."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import StoreError
from ntkpipe.solvers.result import Result


@dataclass(frozen=True)
class Missing:
    """An analysis that was not done."""

    why: str  # one sentence: what is missing, and how to get it


@dataclass(frozen=True)
class Findings:
    """A result."""

    name: str  # of the result below `results/`
    values: Mapping[str, Any]  # its numbers, words and arrays; a store's may be anybody's
    is_saved: bool  # whether an earlier step found it

    @classmethod
    def of(cls, name: str, result: Result) -> "Findings":
        """One that was computed just now."""
        return cls(name, {**result.to_json(), **result.arrays()}, is_saved=False)

    def _wrong(self, name: str) -> StoreError:
        return StoreError(
            f"results/{self.name} is damaged, or of another version ({name}); delete that folder, and it is computed "
            "again"
        )

    def array(self, name: str, *, axes: int = 1) -> FloatArray:
        """An array of numbers; NaN where something is not known."""
        try:
            found = np.asarray(self.values[name])
        except (KeyError, ValueError) as error:
            raise self._wrong(name) from error
        if found.ndim != axes or found.dtype.kind not in "fiub":
            raise self._wrong(name)
        return found.astype(np.float64)

    def optional_numbers(self, name: str) -> FloatArray:
        """A list of numbers; NaN where there is none."""
        found = self.values.get(name)
        if not isinstance(found, list | tuple) or any(isinstance(one, str | bool | list | dict) for one in found):
            raise self._wrong(name)
        return np.array([np.nan if one is None else float(one) for one in found])

    def flags(self, name: str) -> tuple[bool, ...]:
        """A list of truth values."""
        found = self.values.get(name)
        if not isinstance(found, list | tuple) or any(not isinstance(one, bool) for one in found):
            raise self._wrong(name)
        return tuple(found)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        found = self.values.get(name)
        if not isinstance(found, list | tuple) or any(not isinstance(one, str) for one in found):
            raise self._wrong(name)
        return tuple(found)

    def arrays(self, *names: str) -> tuple[FloatArray, ...]:
        """Arrays of one axis and the same length."""
        found = tuple(self.array(name) for name in names)
        if len({len(values) for values in found}) > 1:
            raise self._wrong(", ".join(names))
        return found

    def indices(self, name: str, *, below: int, axes: int = 1) -> NDArray[np.int64]:
        """Numbers of samples or outputs, all less than ``below``."""
        found = self.array(name, axes=axes)
        if found.size and not (found.min() >= 0 and found.max() < below and (found == np.floor(found)).all()):
            raise self._wrong(name)
        return found.astype(np.int64)

    def number(self, name: str) -> float:
        """A number; NaN where it is none."""
        found = self.values.get(name)
        if found is None and name in self.values:
            return float("nan")
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self._wrong(name)
        return float(found)

    def words(self, name: str) -> str:
        """A text."""
        found = self.values.get(name)
        if not isinstance(found, str):
            raise self._wrong(name)
        return found

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A JSON object."""
        found = self.values.get(name)
        if not isinstance(found, Mapping):
            raise self._wrong(name)
        return found

    @property
    def seconds(self) -> float:
        """What it took."""
        return self.number("seconds")

    @property
    def is_converged(self) -> bool:
        """Whether it is what was asked for."""
        return self.words("status") == "converged"
