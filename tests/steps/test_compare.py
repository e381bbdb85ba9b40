"""Comparing stores: the step, the command, and what both leave."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored

import ntkpipe
from ntkpipe.app import cli
from ntkpipe.base.errors import ConfigError
from ntkpipe.steps.registry import read_result
from ntkpipe.steps.run import run_step

Pair = tuple[str, str, Any, Any]


@pytest.fixture
def pair(tmp_path: Path, rng: np.random.Generator) -> Pair:
    factor = rng.standard_normal((30, 50))
    a, b = factor @ factor.T, (factor + 0.1) @ (factor + 0.1).T
    paths = str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")
    for path, matrix, tile in zip(paths, (a, b), (8, 5), strict=True):
        stored.store_matrix(matrix, path, tile=tile)
    return *paths, a, b


def test_the_step_keeps_what_it_found_in_the_first_store(pair: Pair) -> None:
    first, second, a, b = pair
    found = run_step(ntkpipe.open_kernel(first), "compare", other=second, k=3, progress=False)
    kept = read_result(first, "compare")
    assert kept is not None
    assert kept.relative_difference == found.relative_difference
    assert kept.relative_difference == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-12)
    np.testing.assert_array_equal(kept.principal_angles, found.principal_angles)
    assert read_result(second, "compare") is None
    with pytest.raises(ConfigError, match="needs other"):
        run_step(ntkpipe.open_kernel(first), "compare", progress=False)


def test_the_command_prints_a_table_or_json(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, a, b = pair
    cli.main(["compare", first, second, "-k", "3"])
    words = capsys.readouterr().out
    for name in (
        "‖A − B‖ / ‖B‖",
        "alignment",
        "λ_max, A / B",
        "condition number",
        "leading eigenspaces",
        "no test kernels",
    ):
        assert name in words
    cli.main(["compare", first, second, "--json", "--no-smallest"])
    found = json.loads(capsys.readouterr().out)
    assert found["alignment"] == pytest.approx(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert found["smallest_eigenvalue_note"] == "not asked for"
    cli.main(["info", first])
    assert "compare" in capsys.readouterr().out


def test_kernels_of_other_samples_end_with_a_message(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored.store_matrix(np.eye(20), tmp_path / "c.zarr", tile=8)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", pair[0], str(tmp_path / "c.zarr")])
    assert stopped.value.code == 2
    assert "train.num_samples is 30 in a and 20 in b" in capsys.readouterr().err
