"""Doubles of CUDA streams."""

import threading

import torch


class LateEvent:
    """The end of a copy that happens as late as it may: when somebody waits for it."""

    def __init__(self, stream, source, target):
        self.stream, self.source, self.target, self.is_done = stream, source, target, False

    def synchronize(self):
        with self.stream.lock:
            for event in self.stream.events:  # copies of one stream happen in order
                if not event.is_done:
                    event.target.copy_(event.source)
                    event.is_done = True
                if event is self:
                    return


class LateStream:
    """A double of the side stream; what "the device" computes is there at once, copies are late."""

    def __init__(self):
        self.lock, self.events = threading.Lock(), []

    def allocate(self, count, dtype):
        return torch.full((count,), torch.nan, dtype=dtype)

    allocate_pinned = allocate

    def copy(self, source, target):
        assert target.is_contiguous()
        assert source.is_contiguous()
        self.events.append(LateEvent(self, source, target))
        return self.events[-1]

    def hold(self, event):
        event.synchronize()
