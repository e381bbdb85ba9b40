"""Transfer between host and device: samples in through pinned memory, finished tiles out on a stream of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrival = Callable[[], NDArray[Any]]  # waits in any thread until values are on the host, and returns them
NUM_BUFFERS = 2  # one tile is computed while the previous one is copied and written


def tile_buffers(device: torch.device, rows: int, dtype: np.dtype[Any]) -> "HostTiles | DeviceTiles":
    """Tile memory of one worker, of at most (rows, rows); at most ``NUM_BUFFERS - 1`` tiles sent are still in use."""
    return HostTiles(rows, dtype) if device.type == "cpu" else DeviceTiles(SideStream(device), rows, dtype)


class HostTiles:
    """Tiles computed in place on a CPU."""

    def __init__(self, rows: int, dtype: np.dtype[Any]) -> None:
        self._buffers = cycle([np.empty((rows, rows), dtype) for _ in range(NUM_BUFFERS)])
        self._tile: NDArray[Any] = np.empty(0, dtype)

    def take(self, shape: tuple[int, int], place: NDArray[Any] | None) -> Tensor:
        """Uninitialised memory for the next tile, in the dtype of the store."""
        self._tile = next(self._buffers)[: shape[0], : shape[1]] if place is None else place
        return torch.from_numpy(self._tile)

    def send(self) -> Arrival:
        """Send the tile that was taken last to the host, after all work queued so far."""
        tile = self._tile
        return lambda: tile

    def fetch(self, values: Tensor) -> Arrival:
        """Send any other values to the host."""
        return values.numpy


class SideStream:
    """A stream for copies, beside the current stream of the calling thread, which computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor on the device."""
        return torch.empty(count, dtype=dtype, device=self._device)

    def allocate_pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor in pinned host memory."""
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """Copy to pinned memory after all work queued so far; returns at once."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            # Blocking: the waiting thread sleeps instead of spinning on a core.
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._stream)
        # Otherwise the allocator might hand out the source's memory again before it has been read.
        source.record_stream(self._stream)
        return copied

    def hold(self, event: torch.cuda.Event) -> None:
        """Make work queued from now on wait for the event."""
        computing: Any = torch.cuda.current_stream(self._device)
        computing.wait_event(event)


@dataclass
class _Slot:
    device: Tensor  # where it is computed
    pinned: Tensor  # where it arrives
    copied: torch.cuda.Event | None = None  # end of the copy


class DeviceTiles:
    """Tiles computed on a GPU, each with its own device memory and pinned memory."""

    # Both are flat and viewed in the shape of the tile: copies of non-contiguous tensors go through pageable memory.

    def __init__(self, stream: SideStream, rows: int, dtype: np.dtype[Any]) -> None:
        self._stream = stream
        size = rows * rows, torch.from_numpy(np.empty(0, dtype)).dtype
        slots = [_Slot(stream.allocate(*size), stream.allocate_pinned(*size)) for _ in range(NUM_BUFFERS)]
        self._slots, self._slot = cycle(slots), slots[0]
        self._tile = slots[0].device
        self._place: NDArray[Any] | None = None

    def take(self, shape: tuple[int, int], place: NDArray[Any] | None) -> Tensor:
        """Uninitialised memory for the next tile, in the dtype of the store."""
        self._slot, self._place = next(self._slots), place
        if self._slot.copied is not None:
            self._stream.hold(self._slot.copied)
        self._tile = _view(self._slot.device, shape)
        return self._tile

    def send(self) -> Arrival:
        """Send the tile that was taken last to the host, after all work queued so far."""
        pinned = _view(self._slot.pinned, self._tile.shape)
        self._slot.copied = self._stream.copy(self._tile, pinned)
        return partial(_arrived, self._slot.copied, pinned, self._place)

    def fetch(self, values: Tensor) -> Arrival:
        """Send any other values to the host."""
        pinned = _view(self._stream.allocate_pinned(values.numel(), values.dtype), values.shape)
        return partial(_arrived, self._stream.copy(values.contiguous(), pinned), pinned, None)


def _arrived(copied: torch.cuda.Event, pinned: Tensor, place: NDArray[Any] | None) -> NDArray[Any]:
    copied.synchronize()
    values: NDArray[Any] = pinned.numpy()
    if place is None:
        return values
    place[...] = values
    return place


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[: torch.Size(shape).numel()].view(shape)


def to_host_tensor(values: NDArray[Any], device: torch.device) -> Tensor:
    """A contiguous copy of an array, for a GPU in pinned memory."""
    # Always a copy: strides, which may be negative, would reach the model and change its last bits.
    if device.type == "cpu":
        return torch.from_numpy(np.array(values, order="C"))
    dtype = torch.from_numpy(np.empty(0, values.dtype)).dtype
    pinned = torch.empty(values.shape, dtype=dtype, pin_memory=True)
    pinned.numpy()[...] = values
    return pinned
