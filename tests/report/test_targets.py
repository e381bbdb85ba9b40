"""A page takes targets for one thing throughout, says for what, and has classes by the names of the fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from reports import make_store

import ntkpipe
from ntkpipe.app.cli import cli
from ntkpipe.base.targets import encode
from ntkpipe.report.gather import Gathered, arrange
from ntkpipe.report.report import write_report
from ntkpipe.steps.registry import saved_result
from ntkpipe.steps.run import run_step
from ntkpipe.store.documents import DOCUMENT

ALONE = "Their values alone said so"
STEPS = ("regression", "alignment", "generalisation", "gaussian_process", "influence")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures have tests of their own, and take most of the time."""
    monkeypatch.setattr("ntkpipe.report.compose.render", lambda plot: "")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, one_class = tmp_path_factory.mktemp("stores"), {"num_train": 30, "num_test": 6}
    return {
        "signs": Path(make_store(folder / "signs.zarr", labels=[-1, 1], **one_class).path),
        "from 1": Path(make_store(folder / "ones.zarr", labels=[1, 2, 3], **one_class).path),
        "ages": Path(make_store(folder / "ages.zarr", labels=range(18, 57), **one_class).path),
    }


@pytest.fixture
def store(stores: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> ntkpipe.KernelStore:
    return ntkpipe.open_kernel(shutil.copytree(stores[request.param], tmp_path / "k.zarr"))


def write(store: ntkpipe.KernelStore, **options: Any) -> str:
    return Path(write_report(store, progress=False, **options).path).read_text()


def words(store: ntkpipe.KernelStore) -> set[str]:
    return {getattr(saved_result(store, name), "targets", "") for name in STEPS}


@pytest.mark.parametrize("store", ["signs"], indirect=True)
def test_the_page_says_what_decided(store: ntkpipe.KernelStore) -> None:
    guessed = write(store)
    assert guessed.count(ALONE) == guessed.count("Targets were taken as 2 classes, one-hot.") == len(STEPS)
    told = write(store, task="regression")
    assert ALONE not in told
    assert told.count("Targets were taken as 1 real target.") == len(STEPS)
    assert words(store) == {"1 real target"}
    assert "no labels of classes" in told


@pytest.mark.parametrize("store", ["signs"], indirect=True)
@pytest.mark.parametrize("first", STEPS[:4])
def test_saved_results_of_another_task_are_not_mixed(store: ntkpipe.KernelStore, first: str) -> None:
    run_step(store, first, task="binary", progress=False)
    for name in {*STEPS} - {first}:
        run_step(store, name, progress=False)
    assert len(words(store)) == 2
    assert len({line for line in write(store).split(".") if "Targets were taken as" in line}) == 1
    assert len(words(store)) == 1
    # What is not to be computed is missing, with the reason.
    run_step(store, "alignment", task="regression", progress=False)
    found = write_report(store, task="classification", saved_only=True, progress=False)
    assert "for targets that are taken for the same" in dict(found.missing)["Alignment of kernel and targets"]


@pytest.mark.parametrize("store", ["ages"], indirect=True)
def test_numbers_by_the_command_line(store: ntkpipe.KernelStore) -> None:
    found = CliRunner().invoke(cli, ["report", str(store.path), "--task", "regression"], catch_exceptions=False)
    assert found.exit_code == 0
    assert words(store) == {"1 real target"}


@pytest.mark.parametrize("store", ["from 1"], indirect=True)
def test_a_posterior_of_an_older_version_is_judged_by_the_classes_of_the_store(store: ntkpipe.KernelStore) -> None:
    run_step(store, "gaussian_process", progress=False)
    options = {"array": "train", "across": {}, "run": None, "progress": False}
    right = [one.mean_accuracy for one in Gathered(store, **options).calibrations]
    path = Path(str(store.path)) / "results" / "gaussian_process" / DOCUMENT
    document = json.loads(path.read_text())
    for name in ("classes", "is_binary", "targets"):
        del document["attributes"]["result"][name]
    path.write_text(json.dumps(document))
    old = Gathered(ntkpipe.open_kernel(store.path), **options)
    assert old.results["gaussian_process"].classes is None
    posterior, codes = old.results["gaussian_process"], store.test_targets - 1
    truth = np.mean(posterior.mean.argmax(axis=1) == codes)
    assert [one.mean_accuracy for one in old.calibrations] == right == [truth, truth]


def test_classes_without_a_sample_are_not_in_the_picture() -> None:
    codes = np.array([0, 2, 2, 0, 2])
    found = arrange(encode(codes, num_outputs=4), 5)
    assert (found.names, found.bounds) == (("0", "2"), (2,))
    assert found.classes is not None
    assert found.classes.tolist() == [0, 1, 1, 0, 1]


def test_a_full_ntk_of_fewer_classes_has_a_page(tmp_path: Path) -> None:
    store = make_store(tmp_path / "k.zarr", labels=[0, 1], num_train=20, num_test=6, kind="ntk")
    text = write(store)
    assert text.count("Targets were taken as 3 classes, one-hot.") == len(STEPS)
    for name in ("0", "1"):
        assert f"predicted {name}" in text


def test_samples_are_named_by_what_targets_were_taken_for(tmp_path: Path) -> None:
    columns = np.eye(3, dtype=np.float32)
    store = make_store(tmp_path / "k.zarr", labels=columns, num_train=20, num_test=6)
    text = write(store, task="classification")
    codes = store.test_targets.argmax(axis=1)
    assert "class 0" in text
    shown = saved_result(store, "influence")
    assert shown is not None
    assert shown.classes == (0, 1, 2)
    sample = 0
    assert f"test sample no. {sample}, class {codes[sample]}, predicted {shown.predicted[sample]}" in text
