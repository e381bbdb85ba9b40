"""Progress display: a live bar on a terminal, elsewhere a line every few seconds, also where nothing is counted."""

import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite, log
from time import monotonic
from typing import Any, Self, TextIO, TypeVar

from rich import progress as bars
from rich.console import Console

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 5.0
_SILENT_SECONDS = 3.0
_FEWEST_FOR_FORECAST = 4


@contextmanager
def note_if_slow(words: str, *, after: float = _SILENT_SECONDS) -> Iterator[None]:
    """Print a line if what is inside takes more than a few seconds, and again every few seconds."""
    start, ended = monotonic(), threading.Event()

    def speak() -> None:
        pause, passed = after, ""
        while not ended.wait(pause):
            print(f"{words}{passed}", file=sys.stderr, flush=True)
            pause = _SECONDS_BETWEEN_LINES - 1
            passed = f" ({monotonic() - start + pause:.0f} s)"

    threading.Thread(target=speak, name="note", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _rate(speed: float, unit: str) -> str:
    if speed <= 0:
        return f"- {unit}s/s"
    return f"{speed:.1f} {unit}s/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit}"


class _Display:
    """A line that is live on a terminal, and printed every few seconds elsewhere; shown inside ``with``."""

    def __init__(self, what: str, live: bars.Progress, *, enabled: bool, **task: Any) -> None:
        self._what, self._live = what, live
        self._is_live = enabled and live.console.file.isatty()
        self._prints = enabled and not self._is_live
        self._task = live.add_task(what, **{"total": None, **task})
        self._start = self._last = monotonic()
        self._num_lines, self._ended = 0, threading.Event()

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        elif self._prints:
            threading.Thread(target=self._speak, name=f"progress of {self._what}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._is_live:
            self._live.stop()

    def _speak(self) -> None:
        """Say that work goes on where it says nothing itself, as in LAPACK, which takes minutes in one call."""
        before = self._num_lines
        while not self._ended.wait(_SECONDS_BETWEEN_LINES / 2):
            if self._num_lines == before:
                now = monotonic()
                self._print(f"at work for {now - self._start:.0f} s", now, is_due=True)
            before = self._num_lines

    def _print(self, words: str, now: float, *, is_due: bool = False) -> None:
        if self._prints and (is_due or now - self._last >= _SECONDS_BETWEEN_LINES):
            self._last, self._num_lines = now, self._num_lines + 1
            print(f"{self._what}: {words}", file=self._live.console.file, flush=True)


class Phase(_Display):
    """Work that does not say how far it is."""

    def __init__(self, what: str, *, enabled: bool, stream: TextIO | None = None) -> None:
        columns = bars.SpinnerColumn(), "{task.description}", bars.TimeElapsedColumn()
        live = bars.Progress(*columns, console=Console(file=stream or sys.stderr), transient=True)
        super().__init__(what, live, enabled=enabled)


class Ticks(_Display):
    """Progress of work of known size: call :meth:`tick` after each step."""

    def __init__(
        self, total: int, *, what: str, unit: str, enabled: bool = True, done: int = 0, stream: TextIO | None = None
    ) -> None:
        counts = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn(), f"{unit}s", "{task.fields[rate]}")
        times = (bars.TimeElapsedColumn(), "elapsed,", bars.TimeRemainingColumn(), "left")
        live = bars.Progress(*counts, *times, console=Console(file=stream or sys.stderr))
        super().__init__(what, live, enabled=enabled, total=total, completed=done, rate="")
        self._total, self._done, self._unit, self._count = total, done, unit, 0

    def tick(self) -> None:
        """Count one step."""
        now, self._count = monotonic(), self._count + 1
        done, speed = self._done + self._count, self._count / max(now - self._start, 1e-9)
        rate, left = _rate(speed, self._unit), (self._total - done) / speed
        self._live.update(self._task, advance=1, rate=rate)
        words = f"{done} of {self._total} {self._unit}s, {rate}, {left:.0f} s left"
        self._print(words, now, is_due=done == self._total)


def show_progress(
    items: Iterable[Item], *, total: int, done: int, what: str, unit: str, stream: TextIO | None = None
) -> Generator[Item, None, None]:
    """Yield ``items`` and show their count."""
    with Ticks(total, what=what, unit=unit, done=done, stream=stream) as ticks:
        for item in items:
            ticks.tick()
            yield item


class Passes(Phase):
    """Progress of an iteration: passes, residual, time left."""

    def __init__(self, what: str, *, enabled: bool, stream: TextIO | None = None) -> None:
        super().__init__(what, enabled=enabled, stream=stream)
        self._live.update(self._task, description=f"{what}: first pass")
        self._seen: list[tuple[float, float]] = []

    def show(self, passes: float, residual: float | None, target: float) -> None:
        """Show the state after another pass."""
        now = monotonic()
        words = f"{passes:,.4g} passes, {now - self._start:.0f} s"
        if residual is not None and isfinite(residual):
            self._seen.append((now - self._start, residual))
            words += f", residual {residual:.1e} of {target:.0e}" if target else f", {1 - residual:.0%} done"
        if (left := _seconds_left(self._seen, target)) is not None:
            words += f", about {left:.0f} s left"
        self._live.update(self._task, description=f"{self._what}: {words}")
        self._print(words, now)


def _seconds_left(seen: Sequence[tuple[float, float]], target: float) -> float | None:
    """Forecast from the later half: exponential decay of the residual to the target, or linear decay to zero."""
    if len(seen) < _FEWEST_FOR_FORECAST:
        return None
    (before, first), (now, last) = seen[len(seen) // 2], seen[-1]
    if target > 0:
        first, last = log(max(first, target) / target), log(max(last, target) / target)
    return last * (now - before) / (first - last) if last < first else None
