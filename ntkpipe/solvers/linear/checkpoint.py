"""The checkpoint of a running solve: its preconditioner, the state of its iteration, and what they have cost."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Work
from ntkpipe.solvers.checkpoint import as_work
from ntkpipe.solvers.linear.preconditioner import Preconditioner
from ntkpipe.solvers.linear.residual_replacement import IterationState
from ntkpipe.store.results import Checkpoint, as_integer, as_number

# Conjugate gradients are running; were given up for a factor; or run since a factor was of no use.
Stage = Literal["iterating", "given up", "no factor"]
_METHODS = ("rpcholesky", "nystrom")


class SystemCheckpoint:
    """The state of one system and its checkpoint, if there is one; an earlier state is read at once."""

    def __init__(self, checkpoint: Checkpoint | None, decides: Mapping[str, Any], shape: tuple[int, int]) -> None:
        self._checkpoint = checkpoint
        self._decides = json.loads(json.dumps(dict(decides)))
        self._preconditioner_state: dict[str, Any] | None = None
        self._progress_state: dict[str, Any] | None = None
        self._number = 0
        self.preconditioner: Preconditioner | None = None
        self.progress: IterationState | None = None
        self.stage: Stage | None = None
        self.why = ""
        self.work, self.seconds, self.made = Work(), 0.0, Work()
        state = None if checkpoint is None else checkpoint.load()
        if checkpoint is None or state is None:
            return
        if (found := state.get("decides")) != self._decides:
            known = found if isinstance(found, dict) else {}
            names = [name for name, value in self._decides.items() if known.get(name) != value]
            differ = [f"{at}={str(known.get(at))[:40]!r} (now {str(self._decides[at])[:40]!r})" for at in names]
            raise ConfigError(
                f"{checkpoint!r} is of another calculation: {', '.join(differ)}; give another one, or clear it"
            )
        with checkpoint.reading():
            self._read(checkpoint, state, shape)

    def _read(self, checkpoint: Checkpoint, state: Mapping[str, Any], shape: tuple[int, int]) -> None:
        if state["stage"] not in get_args(Stage) or not isinstance(state["why"], str):
            raise ValueError(f"its stage is {str(state['stage'])[:40]!r}")
        self.stage, self.why = cast(Stage, state["stage"]), state["why"]
        self.work, self.seconds, self.made = as_work(state["work"]), as_number(state["seconds"]), as_work(state["made"])
        self._preconditioner_state, self._progress_state = state["preconditioner"], state["progress"]
        if self._preconditioner_state is not None:
            self.preconditioner = _preconditioner(checkpoint, self._preconditioner_state, shape[0])
        if self._progress_state is not None:
            self.progress = _progress(checkpoint, self._progress_state, shape)
            self._number = as_integer(self._progress_state["number"])

    def save_preconditioner(self, made: Preconditioner) -> None:
        """Write a preconditioner; :meth:`save` must follow."""
        self.preconditioner = replace(made, ridge=0.0)
        if self._checkpoint is None:
            return
        _put(self._checkpoint, _arrays_of_preconditioner(made))
        numbers = {"rank": made.rank, "tail": made.tail, "shift": made.shift, "method": made.method}
        cost = {"work": list(vars(made.work).values()), "seconds": made.seconds}
        self._preconditioner_state = {**numbers, **cost}

    def save_progress(self, progress: IterationState) -> None:
        """Write the state of the iteration; :meth:`save` must follow."""
        self.progress = progress
        if self._checkpoint is None:
            return
        # Each has a new name, since arrays of the committed state must stay until the next state is committed.
        self._number += 1
        _put(self._checkpoint, _arrays_of_progress(progress, self._number))
        sizes = {"number": self._number, "iterations": progress.iterations, "num_checks": len(progress.checks)}
        self._progress_state = {**sizes, "replacements": progress.replacements, "passes": progress.passes}

    def save(self, stage: Stage, why: str, work: Work, seconds: float) -> None:
        """Commit the state."""
        self.stage, self.why = stage, why
        if self._checkpoint is None:
            return
        keep: set[str] = set()
        if self._preconditioner_state is not None and self.preconditioner is not None:
            keep |= _arrays_of_preconditioner(self.preconditioner).keys()
        if self._progress_state is not None and self.progress is not None:
            keep |= _arrays_of_progress(self.progress, self._number).keys()
        cost = {"work": list(vars(work).values()), "seconds": seconds, "made": list(vars(self.made).values())}
        parts = {"preconditioner": self._preconditioner_state, "progress": self._progress_state}
        self._checkpoint.commit({"decides": self._decides, "stage": stage, "why": why, **cost, **parts}, keep)


def _arrays_of_preconditioner(made: Preconditioner) -> dict[str, NDArray[Any]]:
    return {f"preconditioner-{name}": getattr(made, name) for name in ("vectors", "values")}


def _arrays_of_progress(progress: IterationState, number: int) -> dict[str, NDArray[Any]]:
    names = ("solution", "history", "checks", "check_residuals")
    return {f"progress-{number}-{name}": getattr(progress, name) for name in names}


def _put(checkpoint: Checkpoint, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the arrays that have entries."""
    for name, values in arrays.items():
        if values.size:
            checkpoint.put(name, values)


def _get(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], *, dtype: type[Any] = np.float64, allow_nan: bool = False
) -> NDArray[Any]:
    return checkpoint.get(name, shape, dtype=dtype, allow_nan=allow_nan) if 0 not in shape else np.zeros(shape, dtype)


def _preconditioner(checkpoint: Checkpoint, state: Mapping[str, Any], num_rows: int) -> Preconditioner:
    rank, tail, shift = as_integer(state["rank"]), as_number(state["tail"]), as_number(state["shift"])
    values = _get(checkpoint, "preconditioner-values", (rank,))
    if state["method"] not in _METHODS or tail < 0.0 or (values < 0.0).any():
        raise ValueError("its preconditioner is not positive definite")
    return Preconditioner(
        vectors=_get(checkpoint, "preconditioner-vectors", (num_rows, rank)),
        values=values,
        tail=tail,
        ridge=0.0,
        method=state["method"],
        shift=shift,
        work=as_work(state["work"]),
        seconds=as_number(state["seconds"]),
    )


def _progress(checkpoint: Checkpoint, state: Mapping[str, Any], shape: tuple[int, int]) -> IterationState:
    prefix, columns = f"progress-{as_integer(state['number'])}", shape[1]
    iterations, num_checks = as_integer(state["iterations"]), as_integer(state["num_checks"])
    return IterationState(
        solution=_get(checkpoint, f"{prefix}-solution", shape),
        # NaN in columns that have overflowed.
        history=_get(checkpoint, f"{prefix}-history", (iterations, columns), allow_nan=True),
        checks=_get(checkpoint, f"{prefix}-checks", (num_checks,), dtype=np.int64),
        check_residuals=_get(checkpoint, f"{prefix}-check_residuals", (num_checks, columns)),
        replacements=as_integer(state["replacements"]),
        passes=as_integer(state["passes"]),
    )
