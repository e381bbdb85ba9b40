"""Results of solvers: frozen values that say how far to trust them, print as a short table, and are saved as data."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Any, Literal, Self, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from ntkpipe.base.operator import Work
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import TableRows, as_table

Status = Literal["converged", "stagnated", "indefinite at storage precision", "step limit", "not converged"]


@dataclass(frozen=True)
class Step:
    """Progress of a solver after one pass."""

    work: Work  # up to now
    residual: float | None  # the largest relative one; none where there is none yet
    target: float  # residual at which the solver stops


# Called after each pass, in the thread of the caller. An exception that it raises ends the solver.
Monitor = Callable[[Step], None]


def ignore(step: Step) -> None:
    """Monitor that does nothing."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of all results. Arrays are read-only; fields with a leading underscore are neither printed nor saved."""

    status: Status  # whether the result is as good as requested; there are numbers in any case
    message: str  # one sentence: why the solver stopped, and what to do if that was too early
    # The rest is written by :func:`ntkpipe.solvers.recording.recorded`.
    work: Work = field(default_factory=Work)  # passes, bytes and seconds in products with the matrix
    seconds: float = 0.0  # of the whole call
    options: Mapping[str, Any] = field(default_factory=dict)  # of the call, defaults filled in
    matrix: str = ""  # identity of the operator: for a stored kernel the digest of its manifest and the array

    def __post_init__(self) -> None:
        for values in self.arrays().values():
            values.flags.writeable = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def is_converged(self) -> bool:
        """Whether the status is ``converged``."""
        return self.status == "converged"

    @property
    def is_good(self) -> bool:
        """The same, as everything that a step returns has it."""
        return self.is_converged

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Attributes that are arrays, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)}

    def to_json(self) -> dict[str, Any]:
        """All other attributes, as JSON."""
        public = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
        plain = {name: value for name, value in public.items() if not isinstance(value, np.ndarray)}
        return {name: asdict(value) if isinstance(value, Work) else value for name, value in plain.items()}

    @classmethod
    def needed(cls) -> set[str]:
        """Names of the public fields without a default: what a saved result must have."""
        public = (f for f in fields(cls) if not f.name.startswith("_"))
        return {f.name for f in public if f.default is MISSING and f.default_factory is MISSING}

    @classmethod
    def is_of(cls, values: Mapping[str, Any]) -> bool:
        """Whether saved values have all fields that JSON holds. If only arrays are missing, the result is damaged."""
        return all(f.name in values or _dtype_of(f.type) is not None for f in fields(cls) if f.name in cls.needed())

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """Restore a result from what :meth:`to_json` and :meth:`arrays` gave. Values may be anybody's, and are checked.

        Raises ValueError or KeyError, also where a value has another type than its field.
        """
        known = [f for f in fields(cls) if not f.name.startswith("_") and f.name in {*values, *cls.needed()}]
        return cls(**{f.name: _restored(f.type, values[f.name]) for f in known})

    def rows(self) -> TableRows:
        """Rows of the printed table: quantity and value."""
        read = f", {format_bytes(self.work.bytes_read)} read" if self.work.bytes_read else ""
        cost = f"{self.work.passes:,.4g} passes{read}, {self.seconds:,.3g} s"
        return [("status", f"{self.status}: {self.message}"), *self._rows(), ("cost", cost)]

    def _rows(self) -> TableRows:
        """Rows of a subclass, beside the common ones."""
        return []

    def __str__(self) -> str:
        return as_table(self.rows())


def _restored(annotation: Any, value: Any) -> Any:
    """A value of a field as its annotation says."""
    dtype = _dtype_of(annotation)
    if dtype is None:
        return _adapter(annotation).validate_python(value)
    if value is None and type(None) in get_args(annotation):
        return None
    if not isinstance(value, np.ndarray) or (dtype is not Any and value.dtype != dtype):
        raise ValueError(f"{str(value)[:40]!r} is no array of {dtype}")
    return value


def _dtype_of(annotation: Any) -> Any:
    """The dtype of an annotation of arrays; None of another one."""
    arrays = [one for one in (annotation, *get_args(annotation)) if get_origin(one) is np.ndarray]
    return get_args(get_args(arrays[0])[1])[0] if arrays else None


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)
