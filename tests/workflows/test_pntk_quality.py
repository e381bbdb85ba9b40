"""The study of pNTKs: a small run of it by its own command, and what its claims are judged by."""

import csv
import json
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import ntkpipe
from ntkpipe.base.imports import import_object

FOLDER = Path(__file__).parents[2] / "workflows" / "pntk_quality"
ARGUMENTS = ["--seeds", "1", "--num-train", "8", "--num-test", "4", "--steps", "2"]


def command(folder: Path, *arguments: str) -> str:
    """What the command prints; it is run in this process, which has torch already."""
    modules = ("claims", "factories", "figures", "study")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.syspath_prepend(FOLDER)
        patch.setattr(sys, "argv", ["run.py", "--folder", str(folder), *ARGUMENTS, *arguments])
        for name in modules:
            patch.setitem(sys.modules, name, ModuleType(name))  # so that what is there comes back
            del sys.modules[name]
        try:
            runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
        except SystemExit as end:
            if end.code != 1:  # so small a study need not show every claim
                raise
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quality")
    return folder, command(folder, "--widths", "4", "16")


def test_the_command_leaves_a_table_figures_and_verdicts(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    rows = json.loads((folder / "table.json").read_text())
    cases = {(row["network"], row["width"], row["state"]) for row in rows}
    assert cases == {(n, w, s) for n in ("mlp", "convnet") for w in (4, 16) for s in ("init", "trained")}
    with (folder / "table.csv").open(encoding="utf-8") as file:
        assert [float(row["relative_difference"]) for row in csv.DictReader(file)] == [
            row["relative_difference"] for row in rows
        ]
    for name in ("frobenius", "spectrum", "regression"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text(encoding="utf-8")
    verdicts = json.loads((folder / "claims.json").read_text())
    assert {verdict["network"] for verdict in verdicts} == {"mlp", "convnet"}
    assert printed.count("shown") == len(verdicts)
    assert not (folder / "stores").exists()


def test_rows_are_those_of_the_whole_kernels(finished: tuple[Path, str]) -> None:
    rows = json.loads((finished[0] / "table.json").read_text())
    row = next(r for r in rows if (r["network"], r["width"], r["state"]) == ("mlp", 16, "init"))
    data = import_object("factories:data", FOLDER)(8, 4, seed=0)
    model = import_object("factories:mlp", FOLDER)(16, 0)
    full = ntkpipe.kernel_matrix(model, data["inputs"], kind="ntk", compute_dtype="float64")
    pseudo = np.kron(ntkpipe.kernel_matrix(model, data["inputs"], kind="pntk", compute_dtype="float64"), np.eye(10))
    expected = np.linalg.norm(pseudo - full) / np.linalg.norm(full)
    assert row["relative_difference"] == pytest.approx(expected, rel=1e-9)
    of_pseudo, of_full = np.linalg.eigvalsh(pseudo), np.linalg.eigvalsh(full)
    assert row["largest_eigenvalue_ratio"] == pytest.approx(of_pseudo[-1] / of_full[-1], rel=1e-9)


def test_rows_that_are_there_are_not_computed_again(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    path = folder / "table.json"
    rows = json.loads(path.read_text())
    rows[0]["relative_difference"] = 123.0
    path.write_text(json.dumps(rows))
    command(folder, "--widths", "4", "16", "--networks", "mlp")
    assert json.loads(path.read_text())[0]["relative_difference"] == 123.0


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import claims

    return claims


def row_of(width: int, seed: int, power: float) -> dict[str, Any]:
    away = width**power
    return {
        "network": "mlp",
        "width": width,
        "seed": seed,
        "state": "init",
        "relative_difference": away,
        "largest_eigenvalue_ratio": 1 - 0.5 * away,
        "smallest_eigenvalue_ratio": 1 + away,
        "condition_number_ratio": (1 - 0.5 * away) / (1 + away),
        **{f"prediction_difference{suffix}": away for suffix in ("", "_ridge")},
        **{f"test_accuracy_pntk{suffix}": 0.5 + away for suffix in ("", "_ridge")},
        **{f"test_accuracy_ntk{suffix}": 0.5 for suffix in ("", "_ridge")},
    }


def test_claims_are_judged_by_what_the_table_says(claims: ModuleType) -> None:
    rows = [row_of(width, seed, -0.5) for width in (16, 64, 256) for seed in (0, 1)]
    verdicts = claims.judge(rows)
    assert all(verdict.is_shown for verdict in verdicts)
    root = next(verdict for verdict in verdicts if "√width" in verdict.claim)
    assert root.found == "width^-0.50"
    slow = {verdict.claim: verdict.is_shown for verdict in claims.judge([row_of(w, 0, -0.1) for w in (16, 64)])}
    assert not slow["init: it falls about as 1 / √width"]
    growing = claims.judge([row_of(width, 0, 0.05) for width in (16, 64)])
    assert not any(verdict.is_shown for verdict in growing)


def test_what_is_below_the_floor_is_left_out(claims: ModuleType) -> None:
    rows = [row_of(width, 0, -0.5) for width in (16, 64)]
    rows[0]["smallest_eigenvalue_ratio"] = None
    verdict = next(v for v in claims.judge(rows) if "λ_min" in v.claim)
    assert (verdict.is_shown, verdict.found) == (False, "not known: at the storage floor")
