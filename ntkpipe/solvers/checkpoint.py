"""Checkpoints of Krylov spaces: each step is written once, and a small state says which steps count."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Work
from ntkpipe.store.results import Checkpoint, as_integer, as_mapping, as_number


class Space(Protocol):
    """A Krylov space that can be written one step at a time."""

    @property
    def num_steps(self) -> int:
        """Number of steps taken."""

    @property
    def max_steps(self) -> int:
        """Largest number of steps."""

    def write_step(self, checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
        """Write the arrays of the last step, and return the state."""

    def names(self, prefix: str) -> set[str]:
        """Names of all arrays of the steps taken."""

    def read_steps(self, checkpoint: Checkpoint, prefix: str, state: Mapping[str, Any]) -> None:
        """Restore all steps of a state."""


class Journal:
    """Saves the spaces of one calculation in a checkpoint, if there is one; what it holds is restored at once."""

    def __init__(self, checkpoint: Checkpoint | None, decides: Mapping[str, Any], spaces: Mapping[str, Space]) -> None:
        self._checkpoint = checkpoint
        self._decides = json.loads(json.dumps(dict(decides)))
        self._spaces = dict(spaces)
        self._written = dict.fromkeys(spaces, 0)
        self._states: dict[str, Any] = {}
        found = None if checkpoint is None else checkpoint.load()
        if checkpoint is None or found is None:
            return
        if found.get("decides") != self._decides:
            raise ConfigError(
                f"{checkpoint!r} is of {found.get('decides')}; this is {self._decides}: give another name"
            )
        with checkpoint.reading():
            self._read(checkpoint, found)

    def _read(self, checkpoint: Checkpoint, found: Mapping[str, Any]) -> None:
        for name, state in as_mapping(found["spaces"]).items():
            space, num_steps = self._spaces[name], as_integer(state["num_steps"])
            if num_steps > space.max_steps:
                raise ConfigError(
                    f"{checkpoint!r} has {num_steps} steps, and {space.max_steps} are allowed; raise max_passes, "
                    "num_steps or memory_limit"
                )
            space.read_steps(checkpoint, f"{name}_", state)
            self._written[name], self._states[name] = num_steps, state

    def save(self) -> None:
        """Write what was added since the last call, at most one step of each space."""
        if self._checkpoint is None:
            return
        for name, space in self._spaces.items():
            if space.num_steps > self._written[name]:
                self._states[name] = space.write_step(self._checkpoint, f"{name}_")
                self._written[name] = space.num_steps
        keep: set[str] = set().union(*(space.names(f"{name}_") for name, space in self._spaces.items()))
        self._checkpoint.commit({"decides": self._decides, "spaces": self._states}, keep)


def as_work(value: Any) -> Work:
    """Restore what was saved as ``[passes, bytes_read, seconds]``."""
    passes, bytes_read, seconds = value
    return Work(as_number(passes), as_integer(bytes_read), as_number(seconds))
