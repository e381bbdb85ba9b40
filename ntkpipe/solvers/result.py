"""What solvers return: frozen values that say how far to trust them, print as a short table, and are saved as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.operator import Work
from ntkpipe.base.resources import format_bytes

Status = Literal["converged", "stagnated", "indefinite at storage precision", "step limit", "not converged"]
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Step:
    """How far a solver is, after one pass."""

    work: Work  # what it has cost up to now
    # The largest of what is to become small, relative as `target` is; none where there is no such number yet
    residual: float | None
    target: float  # where it stops


# Called after each pass, in the thread of the caller. What it raises ends the solver.
Monitor = Callable[[Step], None]


def ignore(step: Step) -> None:
    """The monitor that does nothing."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of all results. Arrays are read-only. Fields whose names begin with an underscore are not told."""

    status: Status  # whether the result is what was asked for. Numbers are there in any case.
    message: str  # one sentence: why it stopped, and what to do if that was too early
    work: Work  # passes, bytes and seconds in products with the matrix
    seconds: float  # of the whole call
    options: Mapping[str, Any]  # what was asked for, defaults filled in
    matrix: str  # identity of the operator: for a stored kernel the digest of its manifest and the array

    def __post_init__(self) -> None:
        for values in self.arrays().values():
            values.flags.writeable = False

    @property
    def is_converged(self) -> bool:
        """Whether the status is ``converged``."""
        return self.status == "converged"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Attributes that are arrays, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)}

    def to_json(self) -> dict[str, Any]:
        """Everything else, as JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
        plain = {name: value for name, value in found.items() if not isinstance(value, np.ndarray)}
        work = {"passes": self.work.passes, "bytes_read": self.work.bytes_read, "seconds": self.work.seconds}
        return {**plain, "work": work, "options": dict(self.options)}

    def rows(self) -> Rows:
        """The result as (quantity, value) in words."""
        return [("status", f"{self.status}: {self.message}"), *self._rows(), ("cost", self._cost())]

    def _rows(self) -> Rows:
        """What a kind of result has beside the common rows."""
        return []

    def _cost(self) -> str:
        read = f", {format_bytes(self.work.bytes_read)} read" if self.work.bytes_read else ""
        return f"{self.work.passes:,.4g} passes{read}, {self.seconds:,.3g} s"

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())
