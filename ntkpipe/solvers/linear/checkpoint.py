"""The checkpoint of a running solve: its preconditioner, the state of its iteration, and what they have cost."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import numpy as np

from ntkpipe.base.operator import Work
from ntkpipe.solvers.checkpoint import Journal, Stages, as_work
from ntkpipe.solvers.linear.cg import IterationState
from ntkpipe.solvers.linear.preconditioner import Preconditioner
from ntkpipe.store.results import Checkpoint, as_integer, as_number

# Conjugate gradients are running; were given up for a factor; or run since a factor was of no use.
Stage = Literal["iterating", "given up", "no factor"]
_METHODS = ("rpcholesky", "nystrom")
_ARRAYS = ("vectors", "values")
_PROGRESS = ("solution", "history", "checks", "check_residuals")


class SystemCheckpoint:
    """The state of one system and its checkpoint, if there is one; an earlier state is read at once."""

    def __init__(self, checkpoint: Checkpoint | None, decides: Mapping[str, Any], shape: tuple[int, int]) -> None:
        self._journal = Journal(checkpoint, decides)
        self._number = 0
        self.preconditioner: Preconditioner | None = None  # made here, not given
        self.progress: IterationState | None = None
        self.stage: Stage | None = None
        self.why = ""
        self.work, self.seconds, self.made = Work(), 0.0, Work()
        if self._journal.earlier is not None:
            with self._journal.reading():
                self._read(self._journal.earlier, shape)

    def _read(self, state: Mapping[str, Any], shape: tuple[int, int]) -> None:
        if state["stage"] not in get_args(Stage) or not isinstance(state["why"], str):
            raise ValueError(f"its stage is {str(state['stage'])[:40]!r}")
        self.stage, self.why = cast(Stage, state["stage"]), state["why"]
        self.work, self.seconds, self.made = as_work(state["work"]), as_number(state["seconds"]), as_work(state["made"])
        if (made := state["preconditioner"]) is not None:
            arrays = {name: f"preconditioner-{name}" for name in _ARRAYS}
            rank = as_integer(made["rank"])
            vectors = self._journal.get(arrays["vectors"], (shape[0], rank))
            values = self._journal.get(arrays["values"], (rank,))
            self.preconditioner = preconditioner_from({**made, "vectors": vectors, "values": values})
        if (at := state["progress"]) is not None:
            self._number, columns = as_integer(at["number"]), shape[1]
            iterations, num_checks = as_integer(at["iterations"]), as_integer(at["num_checks"])
            get, prefix = self._journal.get, f"progress-{self._number}"
            self.progress = IterationState(
                solution=get(f"{prefix}-solution", shape),
                # NaN in columns that have overflowed.
                history=get(f"{prefix}-history", (iterations, columns), allow_nan=True),
                checks=get(f"{prefix}-checks", (num_checks,), dtype=np.int64),
                check_residuals=get(f"{prefix}-check_residuals", (num_checks, columns)),
                replacements=as_integer(at["replacements"]),
                passes=as_integer(at["passes"]),
            )

    def save(self, stage: Stage, why: str, work: Work, seconds: float, progress: IterationState | None = None) -> None:
        """Replace the state, and that of the iteration if one is given."""
        self.stage, self.why = stage, why
        if progress is not None:
            # With new names, since arrays of the committed state must stay until the next state is committed.
            self.progress, self._number = progress, self._number + 1
        state: dict[str, Any] = {"stage": stage, "why": why, "work": work, "seconds": seconds, "made": self.made}
        state |= {"preconditioner": None, "progress": None}
        arrays: dict[str, Any] = {}
        if (made := self.preconditioner) is not None:
            state["preconditioner"] = numbers_of(made)
            arrays |= {f"preconditioner-{name}": getattr(made, name) for name in _ARRAYS}
        if (at := self.progress) is not None:
            sizes = {"number": self._number, "iterations": at.iterations, "num_checks": len(at.checks)}
            state["progress"] = {**sizes, "replacements": at.replacements, "passes": at.passes}
            arrays |= {f"progress-{self._number}-{name}": getattr(at, name) for name in _PROGRESS}
        self._journal.save(state, arrays)


def numbers_of(made: Preconditioner) -> dict[str, Any]:
    """What is saved of a preconditioner beside its arrays."""
    return {name: getattr(made, name) for name in ("rank", "tail", "shift", "method", "work", "seconds")}


def preconditioner_from(saved: Mapping[str, Any]) -> Preconditioner:
    """Restore a preconditioner from its numbers and arrays, which anybody may have written."""
    vectors, values, work, method = (saved[name] for name in ("vectors", "values", "work", "method"))
    numbers = {name: as_number(saved[name]) for name in ("tail", "shift", "seconds")}
    is_finite = bool(np.isfinite(vectors).all() and np.isfinite(values).all())
    if method not in _METHODS or numbers["tail"] < 0.0 or not is_finite or (values < 0.0).any():
        raise ValueError("its preconditioner is not positive definite")
    work = work if isinstance(work, Work) else as_work(work)
    return Preconditioner(vectors=vectors, values=values, ridge=0.0, method=method, work=work, **numbers)


def preconditioner_once(stages: Stages, num_rows: int, make: Callable[[], Preconditioner]) -> Preconditioner:
    """Make a preconditioner as a stage of a calculation, which is saved."""

    def compute() -> Mapping[str, Any]:
        made = make()
        return {**numbers_of(made), "vectors": made.vectors, "values": made.values}

    found = stages.once("preconditioner", compute)
    with stages.journal.reading():
        if found["vectors"].shape != (num_rows, len(found["values"])):
            raise ValueError(f"its preconditioner has shape {found['vectors'].shape}")
        return preconditioner_from(found)
