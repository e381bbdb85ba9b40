"""Results of solvers: frozen values that say how they were found and how far to trust them, print, and are saved."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache, wraps
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, ParamSpec, Self, TypeVar, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from ntkpipe.base.arguments import ERRORS, bound, completed, options_of, parameters_of
from ntkpipe.base.config import Budget
from ntkpipe.base.operator import Work
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import TableRows, as_table
from ntkpipe.base.targets import Label
from ntkpipe.operators.opening import open_for_solver

P = ParamSpec("P")
R = TypeVar("R", bound="Result")

# First parameters that are opened as operators.
MATRICES = ("matrix", "kernel")

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
    # The rest is written by :func:`ntkpipe.solvers.result.recorded`.
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


@dataclass(frozen=True, kw_only=True)
class OfTargets(Result):
    """A result that depends on targets."""

    # What they were taken for, such as "10 classes, one-hot"; empty for coefficients, and in results of versions before
    targets: str = ""
    classes: tuple[Label, ...] | None = None  # labels of classes in the order of columns; none for real targets
    is_binary: bool = False  # whether two classes share a column, of -1 and +1

    @property
    def choice(self) -> str:
        """How to have targets taken for something else, where nothing but their values said what they are."""
        if self.options.get("task") != "auto" or not self.targets:
            return ""
        other = "'classification' takes labels" if "real target" in self.targets else "'regression' takes numbers"
        return f"by task='auto'; task={other}"

    def rows(self) -> TableRows:
        """See :meth:`Result.rows`."""
        status, *others = super().rows()
        said = self.targets + (f" ({self.choice})" if self.choice else "")
        return [status, *([("targets", said)] if said else []), *others]


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


def recorded(
    *, keep_tiles: bool | Callable[[Mapping[str, Any]], bool] = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a solver or an analysis: its arguments are checked, its matrix opened, its result says how it was found.

    A first parameter ``matrix`` or ``kernel`` arrives as an :class:`Operator`, and ``memory_limit`` as the
    :class:`Budget` that is left beside its tiles; ``keep_tiles``, which may depend on the arguments, says whether these
    are worth keeping for another pass.

    The matrix is refused if squares of its entries leave float64, see :meth:`Operator.require_range`.

    The function begins with ``operator: Operator = matrix`` and ``budget = Budget.of(memory_limit)``. ``options`` of
    its result become the plain arguments, updated by those that it returns; ``work`` and ``seconds`` are added to what
    it returns, such as those of an earlier process.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        first = next(iter(parameters_of(function)))

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            begin, given = perf_counter(), bound(function, args, kwargs)
            options = {name: _as_json(given[name]) for name in options_of(function)}
            if "memory_limit" in given:
                budget = Budget.of(given["memory_limit"])
                options["memory_limit"] = budget.limit
                given["memory_limit"] = budget
            operator = None
            if first in MATRICES:
                threads: Any = given.get("threads")
                keep = keep_tiles if isinstance(keep_tiles, bool) else keep_tiles(given)
                operator, budget = open_for_solver(given[first], budget, keep_tiles=keep, threads=threads)
                given |= {first: operator, "memory_limit": budget}
                before = operator.work
                operator.require_range()
            result = function(**given)  # type: ignore[call-arg]
            of_matrix: dict[str, Any] = {}
            if operator is not None:
                of_matrix = {"matrix": operator.identity(), "work": result.work + (operator.work - before)}
            seconds = result.seconds + perf_counter() - begin
            return replace(result, options={**options, **result.options}, seconds=seconds, **of_matrix)

        call.__doc__ = completed(function, ERRORS)
        return call

    return decorate


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
