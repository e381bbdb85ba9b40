"""Between host and device: samples in through pinned memory, finished tiles out on a stream of their own.

On a CPU nothing is moved: a tile is computed where it is written from. On a GPU it is put together in device memory in
the dtype of the store, and copied to pinned memory by a side stream while the next one is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Waits until values are on the host, and returns them; from any thread.
Arrival = Callable[[], NDArray[Any]]

# One tile is computed while the one before it is copied and written.
NUM_BUFFERS = 2


class TileBuffers(Protocol):
    """Memory of the tiles of one worker.

    Of the tiles that were sent, at most ``NUM_BUFFERS - 1`` may still be waited for or read when the next is taken.
    """

    def take(self, shape: tuple[int, int], place: NDArray[Any] | None) -> Tensor:
        """Memory for the next tile, on the device, in the dtype of the store; its content is undefined."""
        ...

    def send(self) -> Arrival:
        """Send the tile that was taken last to the host, once everything that was asked for so far is computed."""
        ...

    def fetch(self, values: Tensor) -> Arrival:
        """Send any other values."""
        ...


def tile_buffers(device: torch.device, rows: int, dtype: np.dtype[Any]) -> TileBuffers:
    """The buffers of a worker for tiles of at most (rows, rows)."""
    if device.type == "cpu":
        return HostTiles(rows, dtype)
    return DeviceTiles(SideStream(device), rows, dtype)


class HostTiles:
    """Tiles that are computed on a CPU, in place."""

    def __init__(self, rows: int, dtype: np.dtype[Any]) -> None:
        self._shape = rows, rows
        self._buffers = [np.empty(0, dtype) for _ in range(NUM_BUFFERS)]
        self._turn = 0
        self._tile = self._buffers[0]

    def take(self, shape: tuple[int, int], place: NDArray[Any] | None) -> Tensor:
        """See :meth:`TileBuffers.take`."""
        if place is None:
            place = self._next()[: shape[0], : shape[1]]
        self._tile = place
        return torch.from_numpy(place)

    def _next(self) -> NDArray[Any]:
        """The buffer that is free, allocated when it is first needed."""
        number, self._turn = self._turn % NUM_BUFFERS, self._turn + 1
        if self._buffers[number].shape != self._shape:
            self._buffers[number] = np.empty(self._shape, self._buffers[number].dtype)
        return self._buffers[number]

    def send(self) -> Arrival:
        """See :meth:`TileBuffers.send`."""
        tile = self._tile
        return lambda: tile

    def fetch(self, values: Tensor) -> Arrival:
        """See :meth:`TileBuffers.fetch`."""
        return values.numpy


class Event(Protocol):
    """The end of a copy, as ``torch.cuda.Event``."""

    def synchronize(self) -> None:
        """Block the calling thread until the copy is done."""
        ...


class Stream(Protocol):
    """What :class:`DeviceTiles` needs of a GPU; :class:`SideStream`, or a double of it."""

    def allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor on the device."""
        ...

    def allocate_pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor on the host that the device can copy to without a stop."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> Event:
        """Copy to pinned memory once everything that was asked for so far is computed; returns at once."""
        ...

    def hold(self, event: Event) -> None:
        """Let what is asked for from now on be computed after the event."""
        ...


class SideStream:
    """A stream for copies beside the one that computes, the calling thread's current stream of the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        """See :meth:`Stream.allocate`."""
        return torch.empty(count, dtype=dtype, device=self._device)

    def allocate_pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """See :meth:`Stream.allocate_pinned`."""
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> Event:
        """See :meth:`Stream.copy`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            # Blocking: the thread that waits sleeps, instead of spinning on a core.
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._stream)
        # Else the allocator could give the source's memory to the computing stream before it has been read.
        source.record_stream(self._stream)
        return copied

    def hold(self, event: Event) -> None:
        """See :meth:`Stream.hold`."""
        computing: Any = torch.cuda.current_stream(self._device)
        computing.wait_event(event)


@dataclass
class _Slot:
    """One of the tiles that are under way: where it is computed, where it arrives, and when."""

    device: Tensor
    pinned: Tensor
    copied: Event | None = None


class DeviceTiles:
    """Tiles that are computed on a GPU; each has its own device memory and pinned memory.

    They are flat and viewed in the shape of the tile, since a copy of what is not contiguous goes through pageable
    memory.
    """

    def __init__(self, stream: Stream, rows: int, dtype: np.dtype[Any]) -> None:
        self._stream = stream
        self._count = rows * rows
        self._dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self._slots: list[_Slot] = []
        self._turn = 0
        self._shape = (0, 0)
        self._place: NDArray[Any] | None = None

    def take(self, shape: tuple[int, int], place: NDArray[Any] | None) -> Tensor:
        """See :meth:`TileBuffers.take`."""
        if len(self._slots) < NUM_BUFFERS:
            memory = self._stream.allocate(self._count, self._dtype)
            self._slots.append(_Slot(memory, self._stream.allocate_pinned(self._count, self._dtype)))
            self._turn = len(self._slots) - 1
        else:
            self._turn = (self._turn + 1) % NUM_BUFFERS
        slot = self._slots[self._turn]
        if slot.copied is not None:
            self._stream.hold(slot.copied)
        self._shape, self._place = shape, place
        return _view(slot.device, shape)

    def send(self) -> Arrival:
        """See :meth:`TileBuffers.send`."""
        slot, place = self._slots[self._turn], self._place
        pinned = _view(slot.pinned, self._shape)
        copied = slot.copied = self._stream.copy(_view(slot.device, self._shape), pinned)

        def arrive() -> NDArray[Any]:
            copied.synchronize()
            values: NDArray[Any] = pinned.numpy()
            if place is None:
                return values
            place[...] = values
            return place

        return arrive

    def fetch(self, values: Tensor) -> Arrival:
        """See :meth:`TileBuffers.fetch`."""
        pinned = _view(self._stream.allocate_pinned(values.numel(), values.dtype), values.shape)
        copied = self._stream.copy(values.contiguous(), pinned)

        def arrive() -> NDArray[Any]:
            copied.synchronize()
            found: NDArray[Any] = pinned.numpy()
            return found

        return arrive


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[: torch.Size(shape).numel()].view(shape)


def to_host_tensor(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an array, on its way to a device: contiguous, and for a GPU in pinned memory.

    Always a copy: strides, which may be negative, would reach the model and change its last bits.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.array(values, order="C"))
    dtype = torch.from_numpy(np.empty(0, values.dtype)).dtype
    pinned = torch.empty(values.shape, dtype=dtype, pin_memory=True)
    pinned.numpy()[...] = values
    return pinned
