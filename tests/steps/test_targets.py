"""Steps on stores take targets for what they are told, and what they save says what the targets were."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import ntkpipe
from ntkpipe.analysis.summary import summarize
from ntkpipe.app.cli import cli
from ntkpipe.base.arguments import parameters_of
from ntkpipe.base.errors import ConfigError, StoreError
from ntkpipe.report.report import write_report
from ntkpipe.steps.inputs import options_of_step
from ntkpipe.steps.registry import REGISTRY, read_result
from ntkpipe.steps.run import run_step
from ntkpipe.store.documents import DOCUMENT

CODES = np.arange(24) % 3
SOME = np.array([1, 0, 1, 1, 0, 1, 0, 0])  # of test samples: one class is missing
OF_TARGETS = ("solve", "dynamics", "alignment", "regression", "generalisation", "gaussian_process", "calibration")
OF_TARGETS += ("solve_path", "influence", "learning_curve")
NEEDED: dict[str, dict[str, Any]] = {"dynamics": {"times": [1.0]}, "solve_path": {"ridges": [0.1]}}
NEEDED |= {"learning_curve": {"sizes": [8], "ridges": [0.1]}, "solve": {"ridge": 0.1}}


def make(path: Path, targets: Any, test_targets: Any, *, kind: str = "pntk", outputs: int = 3, **options: Any) -> Any:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, outputs)).double().eval()
    inputs, test_inputs = rng.standard_normal((40, 5))[: len(targets)], rng.standard_normal((8, 5))
    how = {"kind": kind, "tile": 16, "compute_dtype": "float64", "progress": False, **options}
    how |= {"targets": targets, "test_inputs": test_inputs, "test_targets": test_targets}
    return ntkpipe.compute_kernel(model, inputs, store=path, **how)


def outputs_of(store: Any, codes: Any, ridge: float, count: int = 3) -> Any:
    """Predictions of the test samples by dense algebra, (M, C)."""
    kernel, cross = store.train.to_numpy(), store.test_train.to_numpy()
    columns = (codes[:, None] == np.arange(count)).astype(float)
    rows = columns if len(kernel) == len(codes) else columns.reshape(-1, 1)
    return (cross @ np.linalg.solve(kernel + ridge * np.eye(len(kernel)), rows)).reshape(len(SOME), -1)


def test_each_step_of_targets_has_the_option() -> None:
    steps = {
        name
        for name, entry in REGISTRY.items()
        if {"targets", "rhs", "model", "posterior"} & {*parameters_of(entry.function)}
    }
    assert steps == {*OF_TARGETS, "compare"}
    for name in steps:
        assert "task" in options_of_step(REGISTRY[name])
    for function in (summarize, write_report):
        assert "task" in parameters_of(function)


@pytest.mark.parametrize("kind", ["pntk", "ntk"])
@pytest.mark.parametrize("labels", [(1, 2, 3), (2, 5, 9), (-4, 0, 1)])
def test_classes_are_saved_and_read_with_every_result(tmp_path: Path, kind: str, labels: Any) -> None:
    names = np.array(labels)
    store = make(tmp_path / "k.zarr", names[CODES], names[SOME], kind=kind)
    for name in OF_TARGETS:
        run_step(store, name, progress=False, **NEEDED.get(name, {}))
        found = read_result(tmp_path / "k.zarr", name)
        assert (found.classes, found.targets, found.is_binary) == (labels, "3 classes, one-hot", False)
        assert "task='regression' takes numbers" in str(found)
    posterior = read_result(store, "gaussian_process")
    right = np.mean(outputs_of(store, CODES, posterior.noise).argmax(axis=1) == SOME)
    assert read_result(store, "calibration").mean_accuracy == right
    assert ntkpipe.calibration(posterior, names[SOME]).mean_accuracy == right
    shown = read_result(store, "influence")
    predicted = outputs_of(store, CODES, shown.options["ridge"] * store.train.diagonal().mean()).argmax(axis=1)
    np.testing.assert_array_equal(np.array(shown.classes)[shown.predicted], names[predicted])


@pytest.mark.parametrize("labels", [[False, True], [-1, 1], [0, 1]])
def test_binary_and_booleans_stay_what_they_are(tmp_path: Path, labels: list[Any]) -> None:
    names, codes = np.array(labels), CODES % 2
    store = make(tmp_path / "k.zarr", names[codes], names[np.ones(8, int)])
    run_step(store, "gaussian_process", task="binary", progress=False)
    posterior = read_result(store, "gaussian_process")
    assert posterior.is_binary
    assert [*posterior.classes] == labels
    assert [type(one) for one in posterior.classes] == [type(one) for one in labels]
    kernel = store.train.to_numpy() + posterior.noise * np.eye(24)
    outputs = store.test_train.to_numpy() @ np.linalg.solve(kernel, 2.0 * codes - 1.0)
    np.testing.assert_allclose(posterior.mean[:, 0], outputs, atol=1e-10)
    assert ntkpipe.calibration(posterior, store.test_targets).mean_accuracy == np.mean(outputs > 0)


def test_an_old_result_without_classes_is_read_and_asks_for_them(tmp_path: Path) -> None:
    store = make(tmp_path / "k.zarr", CODES + 1, SOME + 1)
    run_step(store, "gaussian_process", progress=False)
    path = tmp_path / "k.zarr" / "results" / "gaussian_process" / DOCUMENT
    document = json.loads(path.read_text())
    for name in ("classes", "is_binary", "targets"):
        assert document["attributes"]["result"].pop(name, None) is not None
    path.write_text(json.dumps(document))
    old = read_result(tmp_path / "k.zarr", "gaussian_process")
    assert (old.classes, old.targets) == (None, "")
    with pytest.raises(ConfigError, match=r"older version.*classes="):
        ntkpipe.calibration(old, store.test_targets)
    right = np.mean(outputs_of(store, CODES, old.noise).argmax(axis=1) == SOME)
    assert ntkpipe.calibration(old, store.test_targets, classes=[1, 2, 3]).mean_accuracy == right


@pytest.mark.parametrize("classes", [[[1, 2], 3], {"a": 1}, 7])
def test_classes_of_a_damaged_result_are_refused(tmp_path: Path, classes: Any) -> None:
    store = make(tmp_path / "k.zarr", CODES, SOME)
    run_step(store, "gaussian_process", progress=False)
    path = tmp_path / "k.zarr" / "results" / "gaussian_process" / DOCUMENT
    document = json.loads(path.read_text())
    document["attributes"]["result"]["classes"] = classes
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="damaged"):
        read_result(tmp_path / "k.zarr", "gaussian_process")


@pytest.mark.parametrize("kind", ["pntk", "ntk"])
def test_rows_that_a_store_grows_by_may_bring_a_class(tmp_path: Path, kind: str) -> None:
    labels = np.concatenate([CODES % 2, np.full(8, 2)])
    store = make(tmp_path / "k.zarr", labels[:24], SOME + 1, kind=kind)
    found = run_step(store, "regression", ridges=[0.1], progress=False)
    outputs = outputs_of(store, labels[:24], 0.1, 2 if kind == "pntk" else 3)
    assert found.test_accuracy[0] == np.mean(outputs.argmax(axis=1) == SOME + 1)
    assert found.classes == ((0, 1) if kind == "pntk" else (0, 1, 2))
    assert "test samples" in found.message
    store = make(tmp_path / "k.zarr", labels, SOME + 1, kind=kind, grow=True)
    assert read_result(store, "regression") is None
    grown = run_step(store, "regression", ridges=[0.1], progress=False)
    assert grown.classes == (0, 1, 2)
    assert grown.test_accuracy[0] == np.mean(outputs_of(store, labels, 0.1).argmax(axis=1) == SOME + 1)
    assert "test samples" not in grown.message


def test_numbers_are_numbers_where_a_step_is_told(tmp_path: Path) -> None:
    ages = np.random.default_rng(3).integers(18, 56, 24)
    store = make(tmp_path / "k.zarr", ages, np.array([20, 21, 22, 20, 21, 22, 20, 21]), outputs=1)
    with pytest.warns(UserWarning, match="task='regression'"):
        run_step(store, "alignment", progress=False)
    for name in OF_TARGETS:
        found = run_step(store, name, task="regression", progress=False, **NEEDED.get(name, {}))
        assert (found.targets, found.classes) == ("1 real target", None)
        assert "task=" not in str(found)
    kernel = store.train.to_numpy() + 0.1 * np.eye(24)
    predicted = store.test_train.to_numpy() @ np.linalg.solve(kernel, ages)
    path = run_step(store, "regression", task="regression", ridges=[0.1], progress=False)
    assert path.test_loss[0] == pytest.approx(np.mean((predicted - store.test_targets) ** 2), rel=1e-8)
    found = CliRunner().invoke(cli, ["solve", str(tmp_path / "k.zarr"), "--ridge", "0.1", "--task", "regression"])
    assert found.exit_code == 0
    assert read_result(store, "solve").targets == "1 real target"


def test_a_first_look_says_what_targets_are_and_which_are_unknown(tmp_path: Path) -> None:
    store = make(tmp_path / "k.zarr", CODES % 2 + 1, SOME + 2)
    found = summarize(store, ridge=0.1, ridge_scale=None)
    outputs = outputs_of(store, CODES % 2, 0.1, 2)
    assert found.accuracy == np.mean(outputs.argmax(axis=1) == np.where(SOME == 1, -1, SOME + 1))
    assert found.targets == "2 classes, one-hot"
    assert found.note == "4 test samples of classes that training does not have count as wrong"
    assert summarize(store, task="regression").accuracy is None
