"""What a worker computes with: an engine of strips of samples, whose pieces become entries, and a cache of strips."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ntkpipe.build.scratch import StripKey
from ntkpipe.jacobian.representations.pieces import contract_diagonal_planes, contract_planes


class Strip(Protocol):
    """What is held of a run of samples: Jacobians, or what a formula needs of each."""

    @property
    def pieces(self) -> Sequence[Any]:
        """The strip cut into pieces; each has ``num_samples`` and a ``part`` of them."""

    @property
    def outputs(self) -> Tensor:
        """Outputs of each sample, shape (n, O)."""

    def num_bytes(self) -> int:
        """Bytes that it holds."""

    def require_finite(self, split: str, numbers: Sequence[int]) -> None:
        """Check samples with these numbers."""


class StripEngine(Protocol):
    """What makes strips; ``model`` turns arrays into batches and says what failed."""

    @property
    def model(self) -> Any:
        """Has ``tf32``, ``to_batch`` and ``failure``."""

    def moved(self, device: torch.device) -> Self:
        """The same on a device."""

    def copy(self) -> Self:
        """One for another thread."""

    def block(
        self, load: Callable[[int, int], Any], start: int, stop: int, *, subtile: int, batch: int
    ) -> tuple[Strip, int]:
        """The strip of samples ``start:stop`` in pieces, and the batch that memory had room for."""


@dataclass(frozen=True)
class Contraction:
    """How pieces become entries of every plane at once: two of them, and each sample of one with itself."""

    fill: Callable[..., None] = contract_planes
    diagonal: Callable[..., list[Tensor]] = contract_diagonal_planes


class StripCache:
    """Strips shared by the workers of one process; the least recently used is dropped first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used = 0
        self._strips: OrderedDict[StripKey, Strip] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[StripKey, threading.Lock] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return StripCache, (self._capacity,)  # strips stay in the process that computed them

    def get(self, key: StripKey, make: Callable[[], Strip]) -> Strip:
        """The strip, computed by ``make`` if it is not cached; two workers never compute the same one at once."""
        if self._capacity == 0:
            return make()
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._strips:
                    self._strips.move_to_end(key)
                    return self._strips[key]
            block = make()
            with self._lock:
                self._strips[key] = block
                self._used += block.num_bytes()
                while self._used > self._capacity:
                    _, dropped = self._strips.popitem(last=False)
                    self._used -= dropped.num_bytes()
            return block
