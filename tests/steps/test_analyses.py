"""Analyses of a store: the right kernels and targets, results that are read back, steps of a workflow."""

from pathlib import Path

import numpy as np
import pytest
import small

import ntkpipe
from ntkpipe.base.errors import ConfigError, Interrupted
from ntkpipe.steps import run
from ntkpipe.steps.registry import read_result
from ntkpipe.steps.run import run_step
from ntkpipe.store.kernel_store import KernelStore

CLASSES = np.arange(60) % 3


def make(folder: Path, **options: object) -> KernelStore:
    chosen = {
        "model": small.mlp(width=40),
        "inputs": small.inputs(60),
        "targets": CLASSES,
        "test_inputs": small.inputs(21, seed=5),
        "test_targets": np.arange(21) % 3,
        "tile": 16,
        "compute_dtype": "float64",
        **options,
    }
    small.compute(folder, **chosen)
    return ntkpipe.open_kernel(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    return make(tmp_path_factory.mktemp("analysing") / "a.zarr", groups={"first": "0.*"})


def test_results_are_those_of_the_functions_and_are_kept(store):
    matrix = store.train.to_numpy()
    found = run_step(store, "spectrum", ridges=[0.5], progress=False)
    assert found.effective_dimension == pytest.approx(ntkpipe.spectrum(matrix, ridges=[0.5]).effective_dimension)
    kept = read_result(store, "spectrum")
    assert kept.effective_rank == found.effective_rank
    np.testing.assert_array_equal(kept.eigenvalues, found.eigenvalues)
    aligned = run_step(store, "alignment", progress=False)
    assert aligned.alignment == pytest.approx(ntkpipe.alignment(matrix, CLASSES).alignment)
    assert read_result(store, "alignment").centred_alignment == aligned.centred_alignment
    general = run_step(store, "generalisation", ridges=[1e-2, 1.0], ridge_scale="mean_diagonal", progress=False)
    kept = read_result(store, "generalisation")
    np.testing.assert_array_equal(kept.kare, general.kare)
    assert tuple(kept.kare_is_trusted) == general.kare_is_trusted
    assert len(kept.reasons) == 2


def test_learning_curves_are_kept(store):
    found = run_step(store, "learning_curve", sizes=[10], ridges=[0.5], progress=False)
    assert read_result(store, "learning_curve").eigenlearning == pytest.approx(found.eigenlearning)
    whole = ntkpipe.learning_curve(store.train.to_numpy(), CLASSES, sizes=[10], ridges=[0.5])
    assert found.population_loss == pytest.approx(whole.population_loss, rel=1e-9)


def test_a_group_is_tested_with_its_own_test_kernel(store):
    found = run_step(store, "generalisation", array="groups/first/train", ridges=[0.3], progress=False)
    group = store.group("first")
    coefficients = np.linalg.solve(group.train.to_numpy() + 0.3 * np.eye(60), np.eye(3)[CLASSES])
    predicted = group.test_train.to_numpy() @ coefficients
    assert found.test_loss == pytest.approx([np.mean((predicted - np.eye(3)[store.test_targets]) ** 2)], rel=1e-8)
    assert read_result(store, "generalisation-groups-first-train") is not None


def test_steps_on_one_open_store_share_their_eigenpairs(store, monkeypatch):
    calls = []
    original = ntkpipe.eigh
    monkeypatch.setattr("ntkpipe.solvers.inverse.choice.eigh", lambda *a, **k: calls.append(1) or original(*a, **k))
    opened = ntkpipe.open_kernel(store.path)
    expected = ntkpipe.alignment(store.train.to_numpy(), CLASSES)
    calls.clear()
    run_step(opened, "generalisation", ridges=[0.5], progress=False)
    assert run_step(opened, "alignment", progress=False).alignment == pytest.approx(expected.alignment)
    assert run_step(opened, "regression", ridges=[0.5], progress=False).method == "eigh"
    run_step(opened, "learning_curve", progress=False)
    assert run_step(opened, "spectrum", progress=False).why == "60 eigenpairs were given"
    assert len(calls) == 1
    # Another kernel of the store has its own.
    group = run_step(opened, "alignment", array="groups/first/train", method="exact", progress=False)
    assert len(calls) == 2
    assert group.alignment == pytest.approx(ntkpipe.alignment(store.group("first").train.to_numpy(), CLASSES).alignment)


def test_full_kernel_of_a_store(tmp_path):
    store = make(tmp_path / "full.zarr", kind="ntk")
    found = run_step(store, "generalisation", ridges=[0.3], progress=False)
    target = np.eye(3)[CLASSES].reshape(-1, 1)
    coefficients = np.linalg.solve(store.train.to_numpy() + 0.3 * np.eye(180), target)
    predicted = (store.test_train.to_numpy() @ coefficients).reshape(21, 3)
    assert found.test_loss == pytest.approx([np.mean((predicted - np.eye(3)[store.test_targets]) ** 2)], rel=1e-8)
    assert run_step(store, "alignment", progress=False).num_outputs == 1


def test_without_targets_or_test_samples(tmp_path):
    bare = make(tmp_path / "bare.zarr", targets=None, test_inputs=None, test_targets=None)
    assert run_step(bare, "spectrum", progress=False).is_converged
    with pytest.raises(ConfigError, match="has no targets"):
        run_step(bare, "alignment", progress=False)
    with pytest.raises(ConfigError, match="needed two numbers"):
        run_step(bare, "spectrum", tail_ranks=[3], progress=False)
    alone = make(tmp_path / "alone.zarr", test_inputs=None, test_targets=None)
    assert np.isnan(run_step(alone, "generalisation", progress=False).test_loss).all()


def test_interrupted_it_says_that_it_begins_again(store, monkeypatch):
    def interrupt(self, done, residual, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Passes, "show", interrupt)
    with pytest.raises(Interrupted, match="spectrum was interrupted; the same command begins again"):
        run_step(ntkpipe.open_kernel(store.path), "spectrum", progress=False)
