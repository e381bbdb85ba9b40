"""Stores of the version that ``data/make_old_stores.py`` names are read, resumed and verified to the same bits."""

import json
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from old_model import NUM_OUTPUTS, data, described, model, readable

import ntkpipe
from ntkpipe.app.cli import main
from ntkpipe.app.workflow import load, run
from ntkpipe.solvers.result import Result

DATA = Path(__file__).parent / "data"
OLD = DATA / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text())
RESULTS, RUNS, SOLVES = (EXPECTED[name] for name in ("results", "interrupted_run", "interrupted_solve"))

# Kernels of small integers have the same bits there, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*agree to rounding, not to the last bit:UserWarning")


def unpack(archive: str, folder: Path, *parts: str) -> Path:
    """The folder, with all of an archive or these parts of it."""
    with tarfile.open(OLD / f"{archive}.tar.xz") as opened:
        members = [member for member in opened if not parts or member.name.split("/")[0] in parts]
        opened.extractall(folder, members, filter="data")
    return folder


def text(result: Mapping[str, Any]) -> str:
    """NaN of one result is not equal to NaN of another, but its text is."""
    return json.dumps(described(result), sort_keys=True)


def values(result: Any) -> dict[str, Any]:
    """What a result holds, by name."""
    return {**result.to_json(), **result.arrays()} if isinstance(result, Result) else result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete stores, which nobody changes."""
    return unpack("results", tmp_path_factory.mktemp("results"))


@pytest.fixture(autouse=True)
def warnings_are_shown_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line shows them in its own way."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def chunks(path: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every chunk of a store, or of a factor."""
    files = (file for file in path.glob("*/**/c/**/*") if file.is_file() and file.suffix != ".partial")
    kept = (file for file in files if file.relative_to(path).parts[0] not in {"growth", "results"})
    return {str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns) for file in kept}


def is_certified(path: Path) -> bool:
    report = ntkpipe.verify(path, model(), device="cpu", progress=False)
    return report.is_good and len(report.certificates) > 0


@pytest.mark.parametrize("name", RESULTS)
def test_kernels_are_read_to_the_last_bit(results: Path, name: str) -> None:
    assert described(readable(ntkpipe.open_kernel(results / name))) == RESULTS[name]["arrays"]


@pytest.mark.parametrize(
    ("name", "result"), [(name, result) for name in RESULTS for result in RESULTS[name]["results"]]
)
def test_results_are_what_was_saved(results: Path, name: str, result: str) -> None:
    found = ntkpipe.read_result(results / name, result)
    assert found is not None
    expected = RESULTS[name]["results"][result]
    assert expected.keys() <= values(found).keys()
    assert text({key: values(found)[key] for key in expected}) == text(expected)


@pytest.mark.parametrize("name", RESULTS)
def test_stores_are_certified_and_keep_their_results(tmp_path: Path, name: str) -> None:
    path = unpack("results", tmp_path, name) / name
    before = chunks(path)
    assert is_certified(path)
    assert chunks(path) == before
    for result in set(RESULTS[name]["results"]) - {"verification", "certificate"}:
        assert ntkpipe.read_result(path, result) is not None


def test_the_commands_read_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = unpack("results", tmp_path, "pntk") / "pntk"
    main(["info", str(path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["progress"]["is_complete"]
    assert len(found["runs"]) == 2
    for result in ("verification", "certificate", "self_check", "summary", "driver", "eigsh", "compare"):
        assert text(found[result]) == text(without_arrays(RESULTS["pntk"]["results"][result]))
    main(["info", str(path)])
    main(["verify", str(path)])
    assert "good" in capsys.readouterr().out


def without_arrays(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if not (isinstance(value, dict) and "sha256" in value)}


def test_a_chunk_that_is_repaired_gets_its_bits(tmp_path: Path) -> None:
    path = unpack("results", tmp_path, "ntk") / "ntk"
    before = chunks(path)
    (path / "groups/last/train/c/0/1").unlink()
    report = ntkpipe.repair(path, model(), device="cpu", workers=1, progress=False)
    assert report.is_good
    assert report.num_computed == 1
    assert {name: content for name, (content, _) in chunks(path).items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_a_report_shows_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing takes most of the time.
    monkeypatch.setattr("ntkpipe.report.compose.render", lambda plot: "")
    path = unpack("results", tmp_path, "grown") / "grown"
    written = ntkpipe.write_report(path, progress=False, saved_only=True)
    # Posterior and calibration were one result of the page's own.
    missing = [section for section, why in written.missing if "No step has saved this" in why]
    assert missing == ["Gaussian process and its calibration"]
    assert ntkpipe.open_kernel(path).manifest.digest() in Path(written.path).read_text()


@pytest.mark.parametrize("name", ["run", "growth", "growth_begun"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    expected, path = RUNS[name], unpack("interrupted_run", tmp_path, name) / name
    before = chunks(path)
    assert 0 < ntkpipe.open_kernel(path).progress.tiles_done == expected["tiles_done"]
    samples = data(*expected["sizes"])
    options = {"grow": True, "device": "cpu", "progress": False, **expected["kernel"], **samples}
    store = ntkpipe.compute_kernel(model(), store=path, **options)
    assert described(readable(store)) == expected["arrays"]
    assert before.items() <= chunks(path).items()
    assert is_certified(path)
    assert not [*path.rglob("*.partial"), *path.glob("growth")]


def test_a_growth_that_was_cut_short_is_undone(tmp_path: Path) -> None:
    path = unpack("interrupted_run", tmp_path, "growth_begun") / "growth_begun"
    ntkpipe.repair(path, progress=False)
    assert described(readable(ntkpipe.open_kernel(path))) == RUNS["before"]


def test_a_workflow_goes_on_with_a_killed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, path = RUNS["run"], unpack("interrupted_run", tmp_path, "run") / "run"
    num_train, num_test = expected["sizes"]
    described_run = {
        "store": str(path),
        "model": {"factory": "old_model:model"},
        "data": {"factory": "old_model:data", "arguments": {"num_train": num_train, "num_test": num_test}},
        "kernel": expected["kernel"],
        "run": {"device": "cpu"},
        "steps": [{"step": "verify"}],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(described_run))
    before = chunks(path)
    main(["run", str(tmp_path / "run.yaml")])
    assert "verdict" in capsys.readouterr().out
    assert described(readable(ntkpipe.open_kernel(path))) == expected["arrays"]
    assert before.items() <= chunks(path).items()


def test_a_workflow_file_runs_with_all_its_steps_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load(OLD / "workflow.yaml")
    asked = {step.step: set(step.options) for step in loaded.workflow.steps}
    assert {"verify", "summary", "eigsh", "compare", "gaussian_process", "learning_curve"} <= set(asked)
    found = {result.step: result for result in run(loaded, progress=False)}
    assert found.keys() == {"kernel", *asked}
    assert [step for step, result in found.items() if not result.is_good] == []
    for step in asked.keys() - {"verify"}:
        assert ntkpipe.read_result("k.zarr", step) is not None
    assert ntkpipe.read_result("k.zarr", "calibration").scale == pytest.approx(  # type: ignore[union-attr]
        ntkpipe.read_result("k.zarr", "gaussian_process").scale  # type: ignore[union-attr]
    )


def tolerance(solver: str, store: ntkpipe.KernelStore) -> float:
    """How far two good answers may be from each other."""
    options = SOLVES[solver]["options"]
    size = float(np.linalg.norm(store.train.to_numpy(), 2))
    length = float(np.linalg.norm(np.eye(NUM_OUTPUTS)[store.targets], axis=0).max())
    rounding = 1e3 * len(store.train) * np.finfo(np.float64).eps
    return {
        "eigsh": 2 * options.get("tol", 0.0) * size,
        "solve": 2 * options.get("tol", 0.0) * length / options.get("ridge", 1.0),
        "dynamics": 2 * options.get("tol", 0.0) * length**2,
    }.get(solver, rounding * size)


def assert_found(solver: str, found: dict[str, Any], store: ntkpipe.KernelStore) -> None:
    for name, expected in SOLVES[solver]["values"].items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=tolerance(solver, store), err_msg=name)


def checkpoint_of(solver: str, folder: Path) -> ntkpipe.Checkpoint:
    if solver in {"slq_logdet", "dynamics"}:
        return ntkpipe.Checkpoint(folder / "checkpoints", solver)
    (found,) = (folder / "store/results/checkpoints").glob(f"{solver}-*")
    return ntkpipe.Checkpoint(folder / "store", f"results/checkpoints/{found.name}")


def test_the_store_of_interrupted_solvers_has_its_bits(tmp_path: Path) -> None:
    path = unpack("interrupted_solve", tmp_path) / "store"
    assert described(readable(ntkpipe.open_kernel(path))) == SOLVES["store"]["arrays"]
    assert is_certified(path)


@pytest.mark.parametrize("solver", ["eigsh", "solve", "density", "slq_logdet", "dynamics"])
def test_interrupted_solvers_go_on_from_their_checkpoints(tmp_path: Path, solver: str) -> None:
    expected = SOLVES[solver]
    store = ntkpipe.open_kernel(unpack("interrupted_solve", tmp_path) / "store")
    arguments = [np.eye(NUM_OUTPUTS)[store.targets]] if solver in {"solve", "dynamics"} else []
    steps: list[Any] = []
    found = getattr(ntkpipe, solver)(
        store.train,
        *arguments,
        **expected["options"],
        checkpoint=checkpoint_of(solver, tmp_path),
        monitor=steps.append,
    )
    assert_found(solver, vars(found), store)
    # Conjugate gradients look for new directions.
    assert 0 < len(steps) <= expected["whole_passes"] - expected["passes"] / (2 if solver == "solve" else 1)


COMMANDS = {
    "eigsh": "-k 6 --block 3 --tol 1e-10 --seed 3",
    "solve": "--ridge 10 --method block_cg --tol 1e-10 --rank 8 --seed 3",
    "density": "--probes 4 --steps 9 --seed 3",
}


@pytest.mark.parametrize("solver", COMMANDS)
def test_interrupted_commands_find_their_checkpoints(
    tmp_path: Path, solver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ntkpipe.open_kernel(unpack("interrupted_solve", tmp_path) / "store")
    before = set((tmp_path / "store/results/checkpoints").iterdir())
    try:
        main([solver, str(store.path), *COMMANDS[solver].split(), "--json"])
    except SystemExit:
        assert solver == "density"  # as few steps as that are no good estimate, which is a finding
    assert json.loads(capsys.readouterr().out)["matrix"].startswith(store.manifest.digest())
    result = ntkpipe.read_result(store, solver)
    assert result is not None
    assert_found(solver, values(result), store)
    (used,) = before - set((tmp_path / "store/results/checkpoints").iterdir())
    assert used.name.startswith(f"{solver}-")


def test_half_of_a_factor_is_completed(tmp_path: Path) -> None:
    expected, store = SOLVES["cholesky"], ntkpipe.open_kernel(unpack("interrupted_solve", tmp_path) / "store")
    before = chunks(tmp_path / "factor")
    steps: list[Any] = []
    found = ntkpipe.cholesky(store.train, path=tmp_path / "factor", monitor=steps.append, **expected["options"])
    assert found.resumed == expected["panels"] == found.num_panels - len(steps)
    assert before.items() < chunks(tmp_path / "factor").items()
    assert_found("cholesky", {"logdet": found.logdet}, store)
    assert found.solve(np.eye(NUM_OUTPUTS)[store.targets], refine=0, tol=1e-9).is_converged
