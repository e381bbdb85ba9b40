"""Results of solvers: frozen values that say how far to trust them, print as a short table, and are saved as data."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.operator import Work
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import TableRows

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
    work: Work  # passes, bytes and seconds in products with the matrix
    seconds: float  # of the whole call
    options: Mapping[str, Any]  # options of the call, defaults filled in
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
        """All other attributes, as JSON."""
        public = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
        plain = {name: value for name, value in public.items() if not isinstance(value, np.ndarray)}
        return {**plain, "work": asdict(self.work), "options": dict(self.options)}

    def rows(self) -> TableRows:
        """Rows of the printed table: quantity and value."""
        read = f", {format_bytes(self.work.bytes_read)} read" if self.work.bytes_read else ""
        cost = f"{self.work.passes:,.4g} passes{read}, {self.seconds:,.3g} s"
        return [("status", f"{self.status}: {self.message}"), *self._rows(), ("cost", cost)]

    def _rows(self) -> TableRows:
        """Rows of a subclass, beside the common ones."""
        return []

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
