"""Progress on a terminal and elsewhere: items pass unchanged, counts are true, and the end is always shown."""

import io
from itertools import count
from time import monotonic

import numpy as np
import pytest

from ntkpipe.base import progress
from ntkpipe.base.progress import Passes, Phase, Ticks, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(num_items: int, stream: io.StringIO, *, done: int = 0) -> list[int]:
    records = show_progress(
        iter(range(num_items)), total=done + num_items, done=done, what="pntk", unit="tile", stream=stream
    )
    return list(records)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("num_items", [0, 1, 7])
def test_items_pass_unchanged(stream, num_items):
    assert show(num_items, stream()) == list(range(num_items))


def test_elsewhere_the_end_is_one_line():
    stream = io.StringIO()
    show(5, stream, done=3)
    assert stream.getvalue().splitlines() == [stream.getvalue().rstrip("\n")]
    assert stream.getvalue().startswith("pntk: 8 of 8 tiles, ")
    assert stream.getvalue().rstrip().endswith(" 0 s left")


def test_elsewhere_a_line_appears_now_and_then_with_rate_and_time_left(monkeypatch):
    seconds = count(0, 4)  # an item each 4 s, so a line at least each 8 s
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(seconds)))
    stream = io.StringIO()
    show(7, stream)
    assert stream.getvalue().splitlines() == [
        "pntk: 2 of 7 tiles, 4.0 s/tile, 20 s left",
        "pntk: 4 of 7 tiles, 4.0 s/tile, 12 s left",
        "pntk: 6 of 7 tiles, 4.0 s/tile, 4 s left",
        "pntk: 7 of 7 tiles, 4.0 s/tile, 0 s left",
    ]


def test_on_a_terminal_the_bar_counts_what_was_done_before():
    stream = Terminal()
    show(5, stream, done=3)
    assert "8/8" in stream.getvalue()
    assert "pntk" in stream.getvalue()


def test_an_error_of_the_work_passes_through_and_the_bar_closes():
    def work():
        yield 1
        raise ArithmeticError

    stream = Terminal()
    records = show_progress(work(), total=9, done=0, what="pntk", unit="tile", stream=stream)
    with pytest.raises(ArithmeticError):
        list(records)
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is shown again


def test_ticks_move_the_bar(capsys):
    with Ticks(3, what="verify", unit="chunk", enabled=True) as ticks:
        for _ in range(3):
            ticks.tick()
    assert "verify: 3 of 3 chunks" in capsys.readouterr().err


def test_ticks_that_are_switched_off_show_nothing(capsys):
    with Ticks(3, what="verify", unit="chunk", enabled=False) as ticks:
        ticks.tick()
    assert capsys.readouterr().err == ""


def test_more_ticks_than_were_foreseen_do_no_harm(capsys):
    with Ticks(1, what="verify", unit="chunk", enabled=True) as ticks:
        ticks.tick()
        ticks.tick()
    assert "1 of 1" in capsys.readouterr().err


def run_passes(stream: io.StringIO, residuals: list[float | None], target: float) -> None:
    with Passes("eigsh", enabled=True, stream=stream) as shown:
        for number, residual in enumerate(residuals, 1):
            shown.show(number, residual, target)


def test_passes_elsewhere_are_lines_now_and_then_with_the_time_left(monkeypatch):
    seconds = count(0, 3)  # a pass each 3 s, so each second one has a line
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(seconds)))
    stream = io.StringIO()
    run_passes(stream, [None, *(10.0**-power for power in range(1, 6))], 1e-6)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "eigsh: 2 passes, 6 s, residual 1.0e-01 of 1e-06"
    # A digit a pass, and one is left.
    assert lines[-1] == "eigsh: 6 passes, 18 s, residual 1.0e-05 of 1e-06, about 3 s left"


def test_a_share_of_work_that_is_left_falls_evenly(monkeypatch):
    seconds = count(0, 10)
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(seconds)))
    stream = io.StringIO()
    run_passes(stream, [0.8, 0.6, 0.4, 0.2], 0.0)
    assert stream.getvalue().splitlines()[-1] == "eigsh: 4 passes, 40 s, 80% done, about 10 s left"


@pytest.mark.parametrize("residuals", [[None], [float("nan")] * 5, [1e-3] * 6, [1e-3, 1e-2, 1e-1, 1.0, 2.0]])
def test_no_time_is_promised_where_nothing_falls(residuals):
    stream = Terminal()
    run_passes(stream, residuals, 1e-6)
    assert "left" not in stream.getvalue()


def test_work_that_counts_nothing_speaks_all_the_same(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.02)
    stream, silent, terminal = io.StringIO(), io.StringIO(), Terminal()
    with Phase("eigh", enabled=True, stream=stream), Phase("eigh", enabled=False, stream=silent):
        deadline = monotonic() + 60
        while stream.getvalue().count("eigh: at work for ") < 3 and monotonic() < deadline:
            np.linalg.eigh(np.eye(50))
    lines = stream.getvalue()
    assert lines.count("\n") >= 3
    assert not silent.getvalue()
    with Phase("eigh", enabled=True, stream=terminal):
        pass
    assert "eigh" in terminal.getvalue()


def test_passes_that_are_not_shown_print_nothing():
    stream = Terminal()
    with Passes("eigsh", enabled=False, stream=stream) as shown:
        shown.show(1, 0.1, 1e-6)
    assert stream.getvalue() == ""
