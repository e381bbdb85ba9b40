"""What an analysis found, now or in an earlier step: values by name, checked when taken; and the ridge they choose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import StoreError
from ntkpipe.solvers.result import Result

T = TypeVar("T")


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
        return self._list_of(name, bool)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        return self._list_of(name, str)

    def _list_of(self, name: str, kind: type[T]) -> tuple[T, ...]:
        found = self.values.get(name)
        if not isinstance(found, list | tuple) or not all(isinstance(one, kind) for one in found):
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
            return np.nan
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


@dataclass(frozen=True)
class Chosen:
    """The ridge that training data alone would choose, and how it does on the test set."""

    index: int  # among the ridges
    ridge: float  # λ
    criterion: str  # what it was chosen by, in words
    test_loss: float  # test_loss, test_accuracy: NaN where not known
    test_accuracy: float


def choose(found: Findings) -> Chosen:
    """By leave-one-out loss, or where that is not known by cross-validation; of equal ones the largest ridge."""
    ridges, left_out, crossed = found.arrays("ridges", "leave_one_out_loss", "generalised_cross_validation")
    is_left_out = bool(np.isfinite(left_out).any())
    losses = np.where(np.isfinite(losses := left_out if is_left_out else crossed), losses, np.inf)
    solved = np.array([status == "converged" for status in found.texts("statuses")])
    if len(solved) == len(losses) and (solved & np.isfinite(losses)).any():
        losses = np.where(solved, losses, np.inf)
    index = min(range(len(ridges)), key=lambda place: (losses[place], -ridges[place]))
    loss, accuracy = (float(found.array(name)[index]) for name in ("test_loss", "test_accuracy"))
    criterion = "leave-one-out loss" if is_left_out else "generalised cross-validation"
    return Chosen(index, float(ridges[index]), criterion, loss, accuracy)
