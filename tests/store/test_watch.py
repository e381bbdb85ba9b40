"""Watching a run that has not begun."""

import shutil
from pathlib import Path

import pytest
import small

from ntkpipe.store.watch import watch


def test_it_says_once_that_it_waits_for_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.compute(tmp_path / "made.zarr")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            shutil.move(tmp_path / "made.zarr", tmp_path / "a.zarr")

    assert watch(tmp_path / "a.zarr", pause=pause).progress.is_complete
    assert capsys.readouterr().err.count("waiting until there is one") == 1
    assert len(pauses) == 3
