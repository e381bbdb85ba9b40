"""Reports of small stores: what is on the page, where it is from, what is said where something is missing."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reports import make_store
from sklearn.kernel_ridge import KernelRidge

import ntkpipe
from ntkpipe.app import workflow
from ntkpipe.app.cli import main
from ntkpipe.base.errors import ArgumentError, ConfigError, ResourceError, StoreError
from ntkpipe.report import report
from ntkpipe.report.gather import choose
from ntkpipe.report.report import write_report
from ntkpipe.steps.registry import saved_result
from ntkpipe.steps.run import run_step
from ntkpipe.store.results import save_result

SECTIONS = [
    "Notation",
    "What was computed",
    "Verification and certificate",
    "The kernel",
    "Spectrum and density",
    "Alignment of kernel and targets",
    "Ridge regression",
    "Predicted against measured risk",
    "Gaussian process and its calibration",
    "Most influential training points",
    "Timings",
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures have tests of their own, and take most of the time."""
    monkeypatch.setattr("ntkpipe.report.compose.render", lambda plot: "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("made") / "small.zarr").path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> ntkpipe.KernelStore:
    return ntkpipe.open_kernel(shutil.copytree(made, tmp_path / "small.zarr"))


def text_of(path: str | Path) -> str:
    """Words of a page, without tags."""
    body = re.sub(r"<style>.*?</style>", "", Path(path).read_text(), flags=re.DOTALL)
    body = re.sub(r"</?strong>", "", body)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def write(store: ntkpipe.KernelStore, **options: Any) -> tuple[report.Report, str]:
    written = write_report(store, progress=False, **options)
    return written, text_of(written.path)


def test_the_page_says_what_was_computed_how_it_was_checked_and_what_it_is_good_for(store, tmp_path) -> None:
    written, text = write(store)
    assert written.path == str(tmp_path / "small.html")
    assert Path(written.path).stat().st_size == written.num_bytes < 5e6
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", Path(written.path).read_text())
    assert titles == SECTIONS
    assert written.missing == ()
    manifest = store.manifest
    environment = [value for name, value in manifest.environment.items() if name != "created"]
    for fact in (manifest.convention, manifest.digest(), manifest.model.state_digest, "60 × 60", *environment):
        assert fact in text
    certificate = store.store.read_result("certificate")
    assert certificate is not None
    worst = max(kernel["error"] for kernel in certificate["kernels"])
    assert f"Verified: yes; certificate {worst:.1e}" in text
    assert written.verdict in text


def test_the_accuracy_of_the_header_is_that_of_the_ridge_that_leave_one_out_chooses(store) -> None:
    written, text = write(store, ridges=(1e-3, 0.1, 10.0, 1e3))
    kernel, classes = store.train.to_numpy().astype(float), store.targets
    one_hot = np.eye(3)[classes]
    losses = {}
    for ridge in (1e-3, 0.1, 10.0, 1e3):
        errors = []
        for out in range(60):
            kept = np.delete(np.arange(60), out)
            fit = KernelRidge(alpha=ridge, kernel="precomputed").fit(kernel[np.ix_(kept, kept)], one_hot[kept])
            errors.append(np.mean((fit.predict(kernel[out : out + 1, kept])[0] - one_hot[out]) ** 2))
        losses[ridge] = np.mean(errors)
    best = min(losses, key=lambda ridge: losses[ridge])
    fit = KernelRidge(alpha=best, kernel="precomputed").fit(kernel, one_hot)
    predicted = fit.predict(store.test_train.to_numpy().astype(float)).argmax(axis=1)
    accuracy = np.mean(predicted == store.test_targets)
    said = f"ridge regression {100 * accuracy:.1f}% of 20 test images right (λ = {best:.3g}"
    assert said in written.verdict
    assert f"{losses[best]:,.4g}" in text


def test_saved_results_are_taken_and_new_ones_are_saved(store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = write(store)
    for name in ("spectrum", "alignment", "regression", "generalisation"):
        assert ntkpipe.read_result(store, name) is not None

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(report, "run_step", refuse)
    _, second = write(store)
    assert numbers_of(first) == numbers_of(second)
    with pytest.raises(AssertionError, match="computed again"):
        write(store, ridges=(0.5,))


def numbers_of(text: str) -> str:
    """Without what differs from time to time: dates and durations."""
    return text[: text.index("Timings Wall time") if "Timings Wall time" in text else text.rindex("Timings")]


def test_saved_only_computes_nothing(store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    with monkeypatch.context() as patch:
        patch.setattr(report, "run_step", refuse)
        written, _ = write(store, saved_only=True)
    assert "--saved-only" in dict(written.missing)["Ridge regression"]
    assert write(store)[0].missing == ()
    monkeypatch.setattr(report, "run_step", refuse)
    assert write(store, saved_only=True)[0].missing == ()


def test_results_of_another_kernel_are_not_taken(store) -> None:
    write(store)
    found = store.store.read_result("spectrum")
    assert found is not None
    store.store.write_result("spectrum", {**found, "matrix": "another", "largest": 123456.0})
    _, text = write(store)
    assert "123,456" not in text
    assert store.store.read_result("spectrum")["matrix"] == store.train.identity


def test_a_damaged_result_is_named(store) -> None:
    write(store)
    found = store.store.read_result("spectrum")
    for damage in ({"largest": "much"}, {"ridges": [[0.1]]}, {"seconds": "long"}):
        store.store.write_result("spectrum", {**found, **damage})
        if "ridges" in damage:
            (Path(store.path) / "results/spectrum/ridges/zarr.json").unlink()
        with pytest.raises(StoreError, match=r"a result in .* is damaged"):
            write(store)


def test_samples_that_do_not_exist_are_damage(store) -> None:
    write(store)
    found = saved_result(store, "influence")
    wrong = replace(found, top_samples=np.full_like(found.top_samples, 60))
    save_result(store.store, "influence", wrong.to_json(), wrong.arrays())
    with pytest.raises(StoreError, match="damaged"):
        write(store)


def test_results_of_all_steps_have_sections(store) -> None:
    results = {"eigsh": {"k": 3}, "logdet": {"ridge": 1.0}, "learning_curve": {"sizes": [20], "ridges": [1.0]}}
    found = {name: run_step(store, name, progress=False, **options) for name, options in results.items()}
    written, text = write(store)
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", Path(written.path).read_text())
    assert titles == [*SECTIONS[:-1], *(f"Result of {name}" for name in results), SECTIONS[-1]]
    for result in found.values():
        for name, value in result.rows():
            assert f"{name} {value}" in text
    store.store.write_result("eigsh", {**store.store.read_result("eigsh"), "matrix": "another"})
    assert "Result of eigsh" not in write(store)[1]


def test_a_posterior_without_a_test_set_is_shown(tmp_path: Path, rng: np.random.Generator) -> None:
    inputs = rng.random((12, 5))
    store = ntkpipe.compute_kernel(
        torch.nn.Linear(5, 1).eval(), inputs, targets=inputs[:, 0], store=tmp_path / "k.zarr", progress=False
    )
    found = run_step(store, "gaussian_process", progress=False)
    written, text = write(store)
    assert "no test set" in dict(written.missing)["Gaussian process and its calibration"]
    assert f"log marginal likelihood {dict(found.rows())['log marginal likelihood']}" in text


def test_influence_and_posterior_are_taken_at_the_ridge_that_training_chooses(store) -> None:
    for name in ("gaussian_process", "influence"):
        run_step(store, name, ridge=10.0, ridge_scale="mean_diagonal", progress=False)
    write(store)
    chosen = choose(saved_result(store, "regression")).ridge
    assert saved_result(store, "gaussian_process").noise == chosen
    assert saved_result(store, "influence").options["ridge"] == chosen
    # Also in other units.
    mean = float(store.train.diagonal().astype(np.float64).mean())
    write(store, ridges=(0.1,), ridge_scale="mean_diagonal")
    for name in ("gaussian_process", "influence"):
        run_step(store, name, ridge=0.1, ridge_scale="mean_diagonal", progress=False)
    assert saved_result(store, "gaussian_process").noise == 0.1 * mean
    assert write(store, ridges=(0.1,), ridge_scale="mean_diagonal", saved_only=True)[0].missing == ()
    written, text = write(store, ridges=(0.2,), ridge_scale="mean_diagonal", saved_only=True)
    assert "No step has saved this at these ridges" in dict(written.missing)["Ridge regression"]
    assert "Result of regression" in text


def test_a_store_with_a_wrong_chunk_is_not_good(store) -> None:
    assert write(store)[0].is_good
    found = store.store.read_result("verification")
    store.store.write_result("verification", {**found, "is_good": False, "num_findings": 1})
    written, text = write(store)
    assert not written.is_good
    assert "something is wrong" in text
    assert written.to_json()["is_good"] is False
    assert "something is wrong" in str(written)


@pytest.mark.parametrize(
    ("labels", "names"), [([1, 2, 3], ("1", "2", "3")), ([-1, 1], ("-1", "1")), ([False, True], ("False", "True"))]
)
def test_any_labels_are_classes(tmp_path: Path, labels: list[Any], names: tuple[str, ...]) -> None:
    store = make_store(tmp_path / "small.zarr", labels=labels)
    written, text = write(store)
    assert written.missing == ()
    assert f"Targets were taken as {len(labels)} classes, one-hot." in text
    assert "Mean kernel entry of each pair of classes" in text
    for name in names:
        assert f"class {name} predicted {name}" in text


def test_a_page_takes_targets_for_what_a_saved_step_took_them(tmp_path: Path) -> None:
    store = make_store(tmp_path / "small.zarr", labels=[-1, 1])
    run_step(store, "regression", task="binary", progress=False)
    _, text = write(store)
    assert "Targets were taken as 2 classes, as ±1." in text
    assert "one-hot." not in text
    for name in ("regression", "alignment", "generalisation", "gaussian_process", "influence"):
        assert saved_result(store, name).targets == "2 classes, as ±1"


def test_words_of_a_result_stay_words(store) -> None:
    write(store)
    found = store.store.read_result("spectrum")
    store.store.write_result("spectrum", {**found, "method": "streamed", "why": "<script>alert(1)</script>\x1b[31m"})
    written, text = write(store)
    assert "<script" not in Path(written.path).read_text()
    assert "<script>alert(1)</script>\\x1b[31m" in text


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path, rng: np.random.Generator) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2).eval()
    inputs = rng.random((12, 5))
    store = ntkpipe.compute_kernel(model, inputs, store=tmp_path / "bare.zarr", kind="pntk", progress=False)
    written, text = write(store)
    assert written.verdict == "Not verified yet."
    missing = dict(written.missing)
    assert set(missing) == set(SECTIONS) - {
        "Notation",
        "What was computed",
        "The kernel",
        "Spectrum and density",
        "Timings",
    }
    assert "ntkpipe verify STORE --workflow FILE" in missing["Verification and certificate"]
    for title in ("Alignment of kernel and targets", "Ridge regression", "Predicted against measured risk"):
        assert "give targets to compute_kernel" in missing[title]
    assert all(why in text for why in missing.values())


def test_without_a_test_set_there_is_leave_one_out(tmp_path: Path, rng: np.random.Generator) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).eval()
    inputs = rng.random((12, 5))
    store = ntkpipe.compute_kernel(
        model, inputs, targets=inputs[:, :2], store=tmp_path / "k.zarr", kind="ntk", progress=False
    )
    written, text = write(store)
    assert "compute the kernel with test_inputs" in dict(written.missing)["Ridge regression"]
    assert "no labels of classes" in text
    assert "leave-one-out" in text
    assert "24 × 24" in text


def test_what_does_not_fit_is_streamed_and_says_so(store, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise ResourceError("too large")

    exact = make_text(store)
    monkeypatch.setattr("ntkpipe.solvers.inverse.choice.eigh", too_large)
    monkeypatch.setattr("ntkpipe.analysis.spectrum.eigvalsh", too_large)
    monkeypatch.setattr("ntkpipe.solvers.inverse.choice.bytes_of_cholesky", lambda *_: math.inf)
    for name in ("spectrum", "alignment", "generalisation"):
        (Path(store.path) / "results" / name / "zarr.json").unlink()
    # Eigenpairs that are known stay with the open store.
    streamed = make_text(ntkpipe.open_kernel(store.path))
    assert "Computed: exactly, in memory" in exact
    assert "Computed: streamed, since" in streamed


def make_text(store: ntkpipe.KernelStore) -> str:
    return write(store)[1]


def test_a_store_that_cannot_be_written_has_a_report_all_the_same(store, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ntkpipe.store.media.folder.Folder.is_writable", lambda self: False)
    before = sorted(Path(store.path).rglob("*"))
    written, text = write(store, path=tmp_path / "other.html")
    assert sorted(Path(store.path).rglob("*")) == before
    assert written.missing == ()
    assert "Ridge regression" in text


def test_only_reports_are_replaced(store, tmp_path: Path) -> None:
    write(store)
    write(store)
    page = tmp_path / "notes.html"
    page.write_text("<!DOCTYPE html><p>my own page")
    with pytest.raises(ConfigError, match=r"notes\.html is no report of ntkpipe"):
        write(store, path=page)
    assert page.read_text().endswith("my own page")
    with pytest.raises(ConfigError, match="is a folder"):
        write(store, path=tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        write(store, path=tmp_path / "nowhere/a.html")
    assert [path for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_wrong_options_are_refused_before_anything_is_computed(store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ridges=-1"):
        write(store, ridges=(-1.0,))
    with pytest.raises(ConfigError, match="has no array 'trian'"):
        write(store, array="trian")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"install ntkpipe\[report\]"):
        write(store)


def test_wrong_arguments_are_named(store) -> None:
    with pytest.raises(ConfigError, match=r"ridges=\['0.1'\]; needed a list of numbers"):
        write(store, ridges=["0.1"])
    with pytest.raises(ConfigError, match=r"ridge_scale='mean'; needed 'mean_diagonal' or None"):
        write(store, ridge_scale="mean")
    with pytest.raises(ArgumentError, match="the nearest is 'saved_only'"):
        write(store, save_only=True)


def test_the_command_and_the_step_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "small.zarr")
    page = tmp_path / "page.html"
    main(["report", str(tmp_path / "small.zarr"), "--output", str(page), "--ridge", "0.1", "--ridge", "1", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["path"] == str(page)
    assert printed["is_good"] is True
    assert re.search(r"\(λ = (0\.1|1), chosen by", printed["verdict"])
    main(["report", str(tmp_path / "small.zarr"), "--ridge-scale", "mean_diagonal", "--memory-limit", "8GiB"])
    assert "small.html" in capsys.readouterr().out
    digits = Path(__file__).parents[2] / "workflows/digits/pntk.yaml"
    step = f"steps=[{{step: report, options: {{path: {tmp_path / 'digits.html'}}}}}]"
    loaded = workflow.load(digits, [f"store={tmp_path / 'd.zarr'}", "model.arguments.width=8", step])
    results = list(workflow.run(loaded, progress=False))
    assert [result.step for result in results] == ["kernel", "report"]
    assert "test images right" in text_of(tmp_path / "digits.html")


def test_a_step_without_the_libraries_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    digits = Path(__file__).parents[2] / "workflows/digits/pntk.yaml"
    with pytest.raises(ConfigError, match=r"install ntkpipe\[report\]"):
        workflow.load(digits, [f"store={tmp_path / 'd.zarr'}", "steps=[{step: report}]"])


def test_nothing_heavy_is_loaded_before_a_page_is_drawn() -> None:
    heavy = ("torch", "matplotlib", "jinja2")
    code = f"import sys, ntkpipe; ntkpipe.write_report; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_kernel_of_a_group_has_a_report_of_its_own(tmp_path: Path) -> None:
    store = make_store(tmp_path / "small.zarr", groups={"head": "2.*"})
    _, text = write(store, array="groups/head/train")
    assert "groups/head/train, 60 × 60" in text
    assert ntkpipe.read_result(store, "spectrum-groups-head-train") is not None
    assert ntkpipe.read_result(store, "spectrum") is None
    assert saved_result(store, "spectrum", "groups/head/train").matrix.endswith("groups/head/train")
