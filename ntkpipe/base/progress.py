"""Progress display: a live bar on a terminal, a line every few seconds elsewhere."""

import sys
from collections.abc import Generator, Iterator, Sequence
from math import isfinite, log
from time import monotonic
from typing import TextIO, TypeVar

from rich import progress as bars
from rich.console import Console
from rich.text import Text

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 10.0
_FEWEST_FOR_FORECAST = 4


class _RateColumn(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        return Text(_rate(task.speed or 0.0, str(task.fields["unit"])))


def _rate(speed: float, unit: str) -> str:
    if speed <= 0:
        return f"- {unit}s/s"
    return f"{speed:.1f} {unit}s/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit}"


def show_progress(
    items: Iterator[Item], *, total: int, done: int, what: str, unit: str, stream: TextIO | None = None
) -> Generator[Item, None, None]:
    """Yield ``items`` and show their count."""
    stream = stream or sys.stderr
    show = _bar if stream.isatty() else _lines
    yield from show(items, total, done, what, unit, stream)


def _bar(items: Iterator[Item], total: int, done: int, what: str, unit: str, stream: TextIO) -> Iterator[Item]:
    counts = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn(), f"{unit}s", _RateColumn())
    times = (bars.TimeElapsedColumn(), "elapsed,", bars.TimeRemainingColumn(), "left")
    with bars.Progress(*counts, *times, console=Console(file=stream)) as progress:
        task = progress.add_task(what, total=total, completed=done, unit=unit)
        for item in items:
            progress.advance(task)
            yield item


def _lines(items: Iterator[Item], total: int, done: int, what: str, unit: str, stream: TextIO) -> Iterator[Item]:
    start = last = monotonic()
    for count, item in enumerate(items, 1):
        now = monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or done + count == total:
            speed = count / max(now - start, 1e-9)
            left = (total - done - count) / speed
            print(f"{what}: {done + count} of {total} {unit}s, {_rate(speed, unit)}, {left:.0f} s left", file=stream)
            last = now
        yield item


class Ticks:
    """Progress of work that reports by callback: inside ``with``, call :meth:`tick` after each step."""

    def __init__(self, total: int, *, what: str, unit: str, enabled: bool) -> None:
        steps = iter(range(total))
        self._steps = show_progress(steps, total=total, done=0, what=what, unit=unit) if enabled else None

    def __enter__(self) -> "Ticks":
        return self

    def __exit__(self, *_: object) -> None:
        if self._steps is not None:
            self._steps.close()

    def tick(self) -> None:
        """Count one step."""
        if self._steps is not None:
            next(self._steps, None)


class Passes:
    """Progress of an iteration: passes, residual, time left; live on a terminal, else a line every few seconds."""

    def __init__(self, what: str, *, enabled: bool, stream: TextIO | None = None) -> None:
        self._what = what
        self._stream = stream or sys.stderr
        is_live = enabled and self._stream.isatty()
        self._status = Console(file=self._stream).status(f"{what}: first pass") if is_live else None
        self._prints_lines = enabled and not is_live
        self._start = self._last = monotonic()
        self._seen: list[tuple[float, float]] = []

    def __enter__(self) -> "Passes":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, passes: float, residual: float | None, target: float) -> None:
        """Show the state after another pass."""
        now = monotonic()
        words = f"{self._what}: {passes:,.4g} passes, {now - self._start:.0f} s"
        if residual is not None and isfinite(residual):
            self._seen.append((now - self._start, residual))
            words += f", residual {residual:.1e} of {target:.0e}" if target else f", {1 - residual:.0%} done"
        if (left := _seconds_left(self._seen, target)) is not None:
            words += f", about {left:.0f} s left"
        if self._status is not None:
            self._status.update(words)
        elif self._prints_lines and now - self._last >= _SECONDS_BETWEEN_LINES:
            print(words, file=self._stream, flush=True)
            self._last = now


def _seconds_left(seen: Sequence[tuple[float, float]], target: float) -> float | None:
    """Forecast from the later half: exponential decay of the residual to the target, or linear decay to zero."""
    if len(seen) < _FEWEST_FOR_FORECAST:
        return None
    (before, first), (now, last) = seen[len(seen) // 2], seen[-1]
    if target > 0:
        first, last = log(max(first, target) / target), log(max(last, target) / target)
    return last * (now - before) / (first - last) if last < first else None
