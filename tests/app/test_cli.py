"""The command line as a user runs it: output, exit codes, error messages."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ntkpipe.app.cli import main
from ntkpipe.base import tables as printing

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "workflows" / "digits" / "pntk.yaml"
SMALL = ("--set", "model.arguments.width=16", "--set", "kernel.tile=256")


@dataclass(frozen=True)
class Answer:
    returncode: int
    stdout: str
    stderr: str


def ntkpipe(*arguments: str | Path, cwd: Path) -> Answer:
    """Run the command line in this process; a new one for each call would import torch each time."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    return Answer(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the digits workflow has run at small width, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    answer = ntkpipe("run", DIGITS, *SMALL, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return folder, answer.stdout


def test_run_prints_what_was_computed(finished: tuple[Path, str]) -> None:
    _, printed = finished
    for word in (
        "1,500 × 1,500",
        "GFLOP/s",
        "certificate train",
        "eigenvalues",
        "kernel-target alignment",
        "samples right",
    ):
        assert word in printed


def test_a_second_run_resumes_and_computes_nothing(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    tiles = sorted((folder / "runs/digits-pntk.zarr/kernel").rglob("c/*/*"))
    before = [tile.stat().st_mtime_ns for tile in tiles]
    assert ntkpipe("run", DIGITS, *SMALL, cwd=folder).returncode == 0
    assert [tile.stat().st_mtime_ns for tile in tiles] == before


def test_another_kernel_at_the_same_path_is_refused(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    answer = ntkpipe("run", DIGITS, *SMALL, "--set", "kernel.kind=ntk", cwd=folder)
    assert answer.returncode == 2
    assert "kind: stored 'pntk' → asked 'ntk'" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_info_reads_no_tile_and_loads_no_torch(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    answer = ntkpipe("info", "runs/digits-pntk.zarr", "--json", cwd=folder)
    described = json.loads(answer.stdout)
    assert described["progress"]["is_complete"]
    assert described["manifest"]["kind"] == "pntk"
    assert described["verification"]["is_good"]
    assert [kernel["is_good"] for kernel in described["certificate"]["kernels"]] == [True, True]
    program = (
        "import sys; from ntkpipe.app.cli import main; main(['info', sys.argv[1]]); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, "runs/digits-pntk.zarr"]
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 0


def test_plan_shows_the_numbers(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    answer = ntkpipe("plan", DIGITS, *SMALL, "--json", cwd=folder)
    numbers = json.loads(answer.stdout)
    assert answer.returncode == 0
    assert numbers["tiles"] == numbers["tiles_done"] == 21 + 12
    assert numbers["bytes_to_write"] == 0
    printed = ntkpipe("plan", DIGITS, *SMALL, cwd=folder).stdout
    for word in ("tiles", "blocks", "to write", "operations", "memory bound", "recompute factor", "free"):
        assert word in printed


def test_plan_shows_what_a_described_cluster_takes(tmp_path: Path) -> None:
    cluster = ("--set", "cluster.workers=64", "--set", "cluster.price=0.5", "--set", "cluster.currency=EUR")
    # This machine is out of the question, but nobody asks about it.
    ask = (DIGITS, *SMALL, *cluster, "--set", "run.memory_limit=50MiB", "--set", "cluster.memory_limit=8GiB")
    answer = ntkpipe("plan", *ask, cwd=tmp_path)
    assert answer.returncode == 0
    words = " ".join(answer.stdout.split())
    assert "plan for this machine" in words
    assert re.search(r"estimate for the described cluster workers 64 on cpu.* bound by \w+ cost [\d.]+ EUR", words)
    found = json.loads(ntkpipe("plan", *ask, "--json", cwd=tmp_path).stdout)
    assert (found["cluster"]["workers"], found["cluster"]["currency"], found["cluster"]["problems"]) == (64, "EUR", [])
    assert found["problems"]
    answer = ntkpipe("plan", *ask, "--set", "cluster.memory_limit=60MiB", cwd=tmp_path)
    assert answer.returncode == 1
    assert "the limit is 51.0 MiB" in " ".join(answer.stdout.split())


def test_plan_shows_how_jacobians_are_found_and_held(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    printed = ntkpipe("plan", DIGITS, *SMALL, cwd=folder).stdout
    assert re.search(r"linear +(pairwise|dense|late) +\d+ +[\d,]+ +[\d.]+ +\d+\.\d%", printed)
    assert "0.weight" not in printed
    assert "in the fallback" not in printed
    listed = ntkpipe("plan", DIGITS, *SMALL, "--parameters", cwd=folder).stdout
    assert re.search(r"0\.weight .*linear .*64 × 16 +1 ", listed)
    numbers = json.loads(ntkpipe("plan", DIGITS, *SMALL, "--json", cwd=folder).stdout)["jacobians"]
    described = json.loads(ntkpipe("info", "runs/digits-pntk.zarr", "--json", cwd=folder).stdout)
    held = {each["name"]: f"{each['rule']}:{each['representation']}" for each in numbers}
    assert held == described["manifest"]["choices"]["representations"]
    for found in numbers:
        assert found["representation"] in printed


@pytest.mark.parametrize("options", [(), ("--parameters",)])
def test_plan_lists_the_fallback_with_its_reason(tmp_path: Path, options: tuple[str, ...]) -> None:
    answer = ntkpipe("plan", DIGITS, *SMALL, "--set", "kernel.jacobian=fallback", *options, cwd=tmp_path)
    assert re.search(r"structure was switched off +0\.weight, 0\.bias, ", answer.stdout)
    assert "plain torch.func, the samples of a batch at once" in answer.stdout


def test_tables_keep_whole_names_at_any_width(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    name = "a.very.long.name." * 9 + "weight"
    monkeypatch.setattr(printing, "Console", partial(Console, force_terminal=True))
    monkeypatch.setenv("TERM", "xterm")
    for width in (60, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        printing.print_table(
            "title", ("parameters", "rule", "KiB"), [(name, "conv_transpose2d", "1,234.5")], num_texts=2
        )
        printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        assert max(map(len, printed.splitlines())) <= width
        assert "conv_transpose2d" in printed
        assert "1,234.5" in printed
        folded = "".join(line.split()[0] for line in printed.splitlines()[2:])
        assert folded == name


def test_a_plan_that_does_not_fit_says_so_with_both_numbers(tmp_path: Path) -> None:
    answer = ntkpipe("plan", DIGITS, *SMALL, "--set", "run.memory_limit=50MiB", cwd=tmp_path)
    assert answer.returncode == 1
    assert "does not fit" in answer.stdout
    assert "the limit is 50.0 MiB" in " ".join(answer.stdout.split())
    answer = ntkpipe("run", DIGITS, *SMALL, "--set", "run.memory_limit=50MiB", cwd=tmp_path)
    assert answer.returncode == 1
    assert "the limit is 50.0 MiB" in answer.stderr
    assert not (tmp_path / "runs").exists()


def test_verify_finds_a_flipped_byte_and_names_the_tile(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    store = Path("runs/digits-pntk.zarr")
    assert ntkpipe("verify", store, cwd=folder).returncode == 0
    assert ntkpipe("verify", store, "--workflow", DIGITS, *SMALL, cwd=folder).returncode == 0
    tile = folder / store / "kernel/train/c/1/2"
    whole = tile.read_bytes()
    try:
        tile.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        answer = ntkpipe("verify", store, cwd=folder)
    finally:
        tile.write_bytes(whole)
    assert answer.returncode == 1
    assert "kernel/train (1, 2)" in answer.stdout
    assert "crc32c" in answer.stdout


def test_verify_repair_computes_the_bad_tile_again(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    store = Path("runs/digits-pntk.zarr")
    tile, stray = folder / store / "kernel/train/c/1/2", folder / store / "kernel/train/c/2/1"
    whole = tile.read_bytes()
    tile.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    stray.write_bytes(b"stray")
    answer = ntkpipe("verify", store, "--repair", cwd=folder)
    assert answer.returncode == 1
    assert "kernel/train (2, 1): removed: it did not belong to the array" in answer.stdout
    assert "the chunks above need the model and the data: give --workflow FILE as well" in answer.stdout
    answer = ntkpipe("verify", store, "--repair", "--workflow", DIGITS, *SMALL, "--json", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["actions"] == [{"array": "kernel/train", "index": [1, 2], "done": "computed again"}]
    assert found["is_good"]
    assert tile.read_bytes() == whole
    answer = ntkpipe("verify", store, "--repair", cwd=folder)
    assert answer.returncode == 0
    assert re.search(r"repaired +nothing", answer.stdout)


def test_run_grow_adds_samples(tmp_path: Path) -> None:
    few = (*SMALL, "--set", "kernel.tile=64", "--set", "data.arguments.num_train=100", "--set", "steps=[]")
    assert ntkpipe("run", DIGITS, *few, cwd=tmp_path).returncode == 0
    more = (*few, "--set", "data.arguments.num_train=150")
    answer = ntkpipe("run", DIGITS, *more, cwd=tmp_path)
    assert answer.returncode == 2
    assert "With grow=True (run --grow) samples are added" in answer.stderr
    planned = json.loads(ntkpipe("plan", DIGITS, *more, "--grow", "--json", cwd=tmp_path).stdout)
    assert (planned["tiles"], planned["tiles_done"]) == (6 + 3 * 5, 1 + 5)
    answer = ntkpipe("run", DIGITS, *more, "--grow", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    printed = ntkpipe("info", "runs/digits-pntk.zarr", cwd=tmp_path).stdout
    assert re.search(r"grown from +100 train, 297 test samples", printed)
    assert ntkpipe("verify", "runs/digits-pntk.zarr", "--workflow", DIGITS, *more, cwd=tmp_path).returncode == 0


def test_export_writes_the_full_matrix(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    answer = ntkpipe("export", "runs/digits-pntk.zarr", tmp_path / "k.npy", cwd=folder)
    assert answer.returncode == 0
    assert "kernel/train, 1,500 × 1,500 float32" in answer.stdout
    matrix = np.load(tmp_path / "k.npy", mmap_mode="r")
    assert np.array_equal(matrix, matrix.T)
    answer = ntkpipe("export", "runs/digits-pntk.zarr", tmp_path / "k.npy", cwd=folder)
    assert answer.returncode == 2
    assert "exists; choose another path" in answer.stderr


def test_verify_with_another_model_is_refused(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    answer = ntkpipe(
        "verify", "runs/digits-pntk.zarr", "--workflow", DIGITS, "--set", "model.arguments.seed=1", *SMALL, cwd=folder
    )
    assert answer.returncode == 2
    assert "another model" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "nowhere.yaml"], "cannot read the workflow file nowhere.yaml"),
        (["run", str(DIGITS), "--set", "kernel.compute_dtpe=float64"], "nearest known key is 'compute_dtype'"),
        (["run", str(DIGITS), "--set", "kernel"], "not of the form a.b=value"),
        (["info", "nowhere.zarr"], "does not exist"),
        (["verify", "nowhere.zarr"], "does not exist"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_use_is_exit_code_2_with_a_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    answer = ntkpipe(*arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_interrupt_leaves_a_store_that_resumes(tmp_path: Path) -> None:
    slow = (*SMALL, "--set", "kernel.tile=8", "--set", "run.workers=1")
    command = [sys.executable, "-m", "ntkpipe", "run", str(DIGITS), *slow]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    tiles = tmp_path / "runs/digits-pntk.zarr/kernel/train/c"
    while process.poll() is None and len(list(tiles.glob("*/*"))) < 5:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "the same call or command resumes" in printed
    answer = json.loads(ntkpipe("info", "runs/digits-pntk.zarr", "--json", cwd=tmp_path).stdout)
    assert 0 < answer["progress"]["tiles_done"] < answer["progress"]["tiles_total"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("eigsh", "-k", "4", "--tol", "1e-5"), ("converged: 4 of 4", "4 leading", "orthogonality")),
        (("solve", "--ridge", "1e-2", "--ridge-scale", "mean_diagonal"), ("converged", "method", "residual")),
        (("logdet", "--ridge", "0.1"), ("log det", "pivots", "storage floor")),
        (("density", "--probes", "4", "--tol", "0.5"), ("Monte Carlo", "truncation", "probes")),
    ],
)
def test_solvers_print_a_short_table_and_keep_their_result(finished, command, words):
    folder, _ = finished
    name, *options = command
    answer = ntkpipe(name, "runs/digits-pntk.zarr", *options, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    for word in (f"{name} runs/digits-pntk.zarr", "status", "cost", *words):
        assert word in answer.stdout, word
    kept = json.loads((folder / "runs/digits-pntk.zarr/results" / name / "zarr.json").read_text())
    assert kept["attributes"]["result"]["status"] == "converged"
    assert re.search(rf"{name} +converged, [\d.]+ passes", ntkpipe("info", "runs/digits-pntk.zarr", cwd=folder).stdout)
    printed = ntkpipe(name, "runs/digits-pntk.zarr", *options, "--json", cwd=folder)
    assert json.loads(printed.stdout)["status"] == "converged"


def test_what_does_not_converge_is_a_finding(finished):
    folder, _ = finished
    answer = ntkpipe("eigsh", "runs/digits-pntk.zarr", "-k", "30", "--max-passes", "2", cwd=folder)
    assert answer.returncode == 1
    assert "step limit" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("eigsh", "-k", "0"), "k=0; needed an integer from 1 on"),
        (("solve", "--ridge", "-1"), "ridge=-1.0"),
        (("eigsh", "--memory-limit", "much"), "memory_limit='much'; needed a number of bytes, or text such as 8GiB"),
        (("eigsh", "--array", "tain"), "did you mean 'train'"),
        (("logdet", "--probes", "3"), "no option of method='cholesky'"),
    ],
)
def test_wrong_options_of_solvers_are_named(finished, arguments, words):
    folder, _ = finished
    name, *options = arguments
    answer = ntkpipe(name, "runs/digits-pntk.zarr", *options, cwd=folder)
    assert answer.returncode == 2
    assert words in answer.stderr


def test_solvers_are_steps_of_a_workflow(finished):
    folder, _ = finished
    options = "{ridge: 1e-2, ridge_scale: mean_diagonal, memory_limit: 4GiB}"
    steps = f"[{{step: eigsh, options: {{k: 3}}}}, {{step: solve, options: {options}}}]"
    answer = ntkpipe("run", DIGITS, *SMALL, "--set", f"steps={steps}", cwd=folder)
    assert answer.returncode == 0, answer.stderr
    assert "3 leading" in answer.stdout
    assert answer.stdout.index("eigsh") < answer.stdout.index("solve")
    wrong = ntkpipe("run", DIGITS, "--set", "steps=[{step: eigsh, options: {kk: 3}}]", cwd=folder)
    assert "no option 'kk'; the nearest is 'k'" in wrong.stderr
    unknown = ntkpipe("run", DIGITS, "--set", "steps=[{step: eigs}]", cwd=folder)
    assert "the nearest is 'eigsh'" in unknown.stderr


INFINITE = DIGITS.with_name("infinite.yaml")


def test_a_network_of_infinite_width_is_run_planned_verified_and_repaired(tmp_path: Path) -> None:
    few = ("--set", "data.arguments.num_train=300", "--set", "kernel.tile=128", "--set", "steps=[{step: verify}]")
    planned = ntkpipe("plan", INFINITE, *few, cwd=tmp_path)
    assert "NTK and NNGP of each" in planned.stdout
    assert "Jacobian" not in planned.stdout
    assert json.loads(ntkpipe("plan", INFINITE, *few, "--json", cwd=tmp_path).stdout)["tiles"] == 2 * (6 + 9)
    answer = ntkpipe("run", INFINITE, *few, cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, answer.stderr)
    assert "infinite_ntk of 7 layers of infinite width" in answer.stdout
    assert "rows at random by the formulas (" in answer.stdout
    store = tmp_path / "runs/digits-infinite.zarr"
    tile = store / "groups/nngp/test_train/c/1/0"
    kept = tile.read_bytes()
    tile.unlink()
    assert ntkpipe("verify", store, cwd=tmp_path).returncode == 1
    repaired = ntkpipe("verify", store, "--repair", "--workflow", INFINITE, *few, cwd=tmp_path)
    assert repaired.returncode == 0, repaired.stdout
    assert tile.read_bytes() == kept
    other = ntkpipe("run", INFINITE, *few, "--set", "model.arguments.b_std=0.2", cwd=tmp_path)
    assert (other.returncode, "layers.0.b_std: stored 0.1 → asked 0.2" in other.stderr) == (2, True)
    wrong = ntkpipe("run", INFINITE, *few, "--set", "kernel.kind=ntk", cwd=tmp_path)
    assert (wrong.returncode, "infinite width has no key 'kind'" in wrong.stderr) == (2, True)
