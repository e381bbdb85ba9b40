"""Repeats that take turns, targets, tables, and children that measure their own memory."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from ntkpipe.base.operator import Operator

# A run that takes longer is not repeated.
_LONG_SECONDS = 8.0

Times = dict[str, list[float]]


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = perf_counter()
    run()
    return perf_counter() - start


def in_turns(
    runs: Mapping[str, Callable[[], object]], repeats: int, before: Mapping[str, Callable[[], object]] = {}
) -> Times:
    """Seconds of each run, one a repeat; what comes before some of them is not timed."""
    seconds: Times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if not seconds[name] or seconds[name][-1] < _LONG_SECONDS:
                before.get(name, lambda: None)()
                seconds[name].append(timed(run))
    return seconds


def watched(
    operator: Operator, runs: Mapping[str, Callable[[], Any]]
) -> tuple[dict[str, Callable[[], None]], dict[str, float], dict[str, Any]]:
    """The same runs, keeping passes over an operator and what they return; with where that is kept."""
    passes: dict[str, float] = {}
    results: dict[str, Any] = {}

    def watch(name: str, run: Callable[[], Any]) -> Callable[[], None]:
        def step() -> None:
            start = operator.work
            results[name] = run()
            passes[name] = (operator.work - start).passes

        return step

    return {name: watch(name, run) for name, run in runs.items()}, passes, results


def median(seconds: Sequence[float]) -> float:
    return float(statistics.median(seconds))


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of runs that were beside each other."""
    return median([one / other for one, other in zip(above, below, strict=False)])


def judge(what: str, found: float, target: float, *, at_most: bool = False) -> None:
    """Print a number beside its target."""
    met = found <= target if at_most else found >= target
    sign = "at most" if at_most else "at least"
    print(f"  {'met   ' if met else 'MISSED'}  {what}: {found:.2f}, target {sign} {target:g}", flush=True)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print Markdown, aligned."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    sys.stdout.flush()


def in_child(task: str, *arguments: object) -> dict[str, Any]:
    """What a task of ``solving.child`` finds in a process of its own; ``failure`` if it fails.

    What a child prints before its last line is not looked at: libraries print, too.
    """
    command = [sys.executable, "-m", "solving.child", task, *map(str, arguments)]
    folder = Path(__file__).parents[1]
    places = [str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)}, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failure": lines[-1][:160]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
