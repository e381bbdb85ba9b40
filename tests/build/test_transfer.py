"""Tiles on their way to the host: nobody reads or overwrites memory that a copy is still under way to or from."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from streams import LateStream

from ntkpipe.build import transfer
from ntkpipe.build.transfer import NUM_BUFFERS, DeviceTiles, HostTiles, SideStream, tile_buffers, to_host_tensor

F32 = np.dtype("float32")


def test_a_late_copy_takes_what_was_sent_and_not_what_came_later():
    tiles, arrivals = DeviceTiles(LateStream(), 4, F32), []
    for number in range(7):
        shape = (4, 4) if number % 3 else (2, 3)
        tiles.take(shape, None).fill_(number)
        arrivals.append((shape, number, tiles.send()))
        if len(arrivals) >= NUM_BUFFERS:
            shape, wanted, arrive = arrivals.pop(0)
            np.testing.assert_array_equal(arrive(), np.full(shape, wanted))


def test_the_double_notices_device_memory_that_is_taken_too_early():
    stream = LateStream()
    stream.hold = lambda event: None
    tiles = DeviceTiles(stream, 2, F32)
    tiles.take((2, 2), None).fill_(0)
    first = tiles.send()
    for number in (1, 2):
        tiles.take((2, 2), None).fill_(number)
        tiles.send()
    assert (first() == 2).all()  # overwritten before it was copied


def test_tiles_land_in_their_place_and_in_the_dtype_of_the_store():
    tiles, matrix = DeviceTiles(LateStream(), 3, F32), np.zeros((6, 6), F32)
    tile = tiles.take((3, 2), matrix[1:4, 2:4])
    assert tile.dtype == torch.float32
    tile.copy_(torch.arange(6, dtype=torch.float64).view(3, 2) / 3)
    arrive = tiles.send()
    assert not matrix.any()
    assert np.shares_memory(arrive(), matrix)
    np.testing.assert_array_equal(matrix[1:4, 2:4], (np.arange(6.0).reshape(3, 2) / 3).astype(F32))
    assert np.count_nonzero(matrix) == 5


def test_other_values_are_fetched_into_memory_of_their_own():
    tiles = DeviceTiles(LateStream(), 2, F32)
    values = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    arrivals = [tiles.fetch(values.T), tiles.fetch(values)]
    np.testing.assert_array_equal(arrivals[0](), values.T)
    np.testing.assert_array_equal(arrivals[1](), values)


def test_tiles_of_a_cpu_are_computed_where_they_are_written_from():
    tiles, matrix = tile_buffers(torch.device("cpu"), 3, F32), np.zeros((4, 4), F32)
    assert isinstance(tiles, HostTiles)
    tiles.take((2, 2), matrix[:2, 2:]).fill_(7)
    assert np.shares_memory(tiles.send()(), matrix)
    assert matrix.sum() == 28
    found = []
    for number in range(3):
        tiles.take((3, 2), None).fill_(number)
        found.append(tiles.send()())
        assert found[-1].shape == (3, 2)
    assert np.shares_memory(found[0], found[2])
    assert not np.shares_memory(found[0], found[1])


class Calls(list):
    """A fake ``torch.cuda`` that notes the order of what is asked of it."""

    def Stream(self, device):  # noqa: N802
        return FakeStream(self, "side")

    def current_stream(self, device):
        return FakeStream(self, "computing")

    def Event(self, *, blocking):  # noqa: N802
        assert blocking
        return FakeEvent(self)

    @contextmanager
    def stream(self, stream):
        self.append(("enter", stream.name))
        yield
        self.append(("leave", stream.name))


class FakeStream:
    def __init__(self, calls, name):
        self.calls, self.name = calls, name

    def wait_stream(self, other):
        self.calls.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.calls.append((self.name, "waits for the event"))


class FakeEvent:
    def __init__(self, calls):
        self.calls = calls

    def record(self, stream):
        self.calls.append(("event on", stream.name))


class Source:
    def __init__(self, calls):
        self.calls = calls

    def record_stream(self, stream):
        self.calls.append(("memory is used by", stream.name))


class Target:
    def __init__(self, calls):
        self.calls = calls

    def copy_(self, source, *, non_blocking):
        assert non_blocking
        self.calls.append(("copy",))


def test_a_side_stream_copies_after_what_was_computed_and_says_when_it_is_done(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(transfer.torch, "cuda", calls)
    stream = SideStream(torch.device("cuda:0"))
    event = stream.copy(Source(calls), Target(calls))
    stream.hold(event)
    assert calls == [
        ("side", "waits for", "computing"),
        ("enter", "side"),
        ("copy",),
        ("event on", "side"),
        ("leave", "side"),
        ("memory is used by", "side"),
        ("computing", "waits for the event"),
    ]


def test_samples_for_a_gpu_go_straight_to_pinned_memory(monkeypatch):
    original, pinned = torch.empty, []

    def empty(*args, pin_memory=False, **options):
        pinned.append(pin_memory)
        return original(*args, **options)

    monkeypatch.setattr(transfer.torch, "empty", empty)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)[::-1, ::2]
    found = to_host_tensor(values, torch.device("cuda:0"))
    assert pinned == [True]
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.numpy(), values)


@pytest.mark.parametrize("strides", [np.s_[:], np.s_[::-1], np.s_[:, ::2]])
def test_samples_for_a_cpu_are_a_plain_copy(strides):
    values = np.arange(12.0).reshape(3, 4)[strides]
    found = to_host_tensor(values, torch.device("cpu"))
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.numpy(), values)
    assert not np.shares_memory(found.numpy(), values)
