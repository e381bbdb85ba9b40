"""The inverse applied to blocks of columns: what is asked of it, how far solutions can be trusted."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ntkpipe.base.arrays import FloatArray
from ntkpipe.solvers.result import Status


@dataclass
class Verdict:
    """How far solutions can be trusted, all together."""

    status: Status = "converged"  # of the first that did not converge
    worst: float = 0.0  # the largest relative residual
    messages: list[str] = field(default_factory=list)  # of those that did not converge

    def add(self, status: Status, residual: float, message: str) -> None:
        """Of one more."""
        self.worst = max(self.worst, residual)
        if status != "converged":
            if self.status == "converged":
                self.status = status
            self.messages.append(message)


class Inverse(Protocol):
    """``(K + λI)^-1`` for any λ."""

    @property
    def columns_at_once(self) -> int:
        """Columns that memory has room for."""

    def times(
        self,
        block: FloatArray,
        ridge: float,
        verdict: Verdict,
        initial: FloatArray | None = None,
        tol: float | None = None,
    ) -> FloatArray:
        """``(K + λI)^-1 B``, shape (n, c)."""

    def quadratic(
        self, block: FloatArray, ridge: float, width: int, verdict: Verdict, tol: float | None = None
    ) -> FloatArray:
        """``B_i' (K + λI)^-1 B_i`` for each run of ``width`` columns, shape (c / width, width, width)."""


def runs(count: int, most: int) -> Iterator[slice]:
    """Runs of at most so many of ``count``."""
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))
