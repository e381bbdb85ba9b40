"""Steps of regression: they take what the store has, and keep what the functions find."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from regressions import NUM_OUTPUTS, NUM_TEST, make_store

import ntkpipe
from ntkpipe.base.errors import ConfigError
from ntkpipe.steps.registry import read_result
from ntkpipe.steps.run import run_step


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {kind: Path(make_store(folder / f"{kind}.zarr", kind=kind).path) for kind in ("pntk", "ntk", "diagonal")}


@pytest.fixture
def opened(stores: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> ntkpipe.KernelStore:
    shutil.copytree(stores[request.param], tmp_path / "k.zarr")
    return ntkpipe.open_kernel(tmp_path / "k.zarr")


@pytest.mark.parametrize("opened", ["pntk", "ntk"], indirect=True)
@pytest.mark.parametrize("centre", [None, "initial_outputs"])
def test_regression_is_the_path_of_what_is_stored(opened: ntkpipe.KernelStore, centre: Any) -> None:
    found = run_step(opened, "regression", centre=centre, progress=False)
    initial = {"initial_outputs": opened.outputs, "test_initial_outputs": opened.test_outputs} if centre else {}
    test = {"test_kernel": opened.test_train, "test_targets": opened.test_targets}
    expected = ntkpipe.ridge_path(opened.train, opened.targets, **test, **initial)
    kept = read_result(opened, "regression")
    assert kept is not None
    for name in ("ridges", "leave_one_out_loss", "test_loss", "test_accuracy", "generalised_cross_validation"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9)
        np.testing.assert_array_equal(getattr(kept, name), getattr(found, name))


@pytest.mark.parametrize("opened", ["pntk", "ntk"], indirect=True)
def test_a_gaussian_process_leaves_its_calibration(opened: ntkpipe.KernelStore) -> None:
    found = run_step(opened, "gaussian_process", ridge=1e-2, progress=False)
    options = {"test_kernel": opened.test_train, "test_diagonal": opened.test_diagonal}
    ridge = 1e-2 * float(opened.train.diagonal().mean())
    expected = ntkpipe.gaussian_process(opened.train, opened.targets, ridge=ridge, **options)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-10)
    np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-9)
    judged = ntkpipe.calibration(expected, opened.test_targets, scale="likelihood")
    kept = read_result(opened, "calibration")
    assert kept is not None
    np.testing.assert_allclose(kept.coverage, judged.coverage)
    assert kept.scale == pytest.approx(expected.scale)
    assert read_result(opened, "gaussian_process").log_marginal_likelihood == found.log_marginal_likelihood


@pytest.mark.parametrize("opened", ["pntk"], indirect=True)
def test_influence_is_kept(opened: ntkpipe.KernelStore) -> None:
    found = run_step(opened, "influence", ridge=0.1, top=3, centre="initial_outputs", progress=False)
    model = ntkpipe.KernelRegression(0.1, ridge_scale="mean_diagonal", centre="initial_outputs").fit(opened)
    np.testing.assert_array_equal(found.predicted, model.predict_outputs(opened).argmax(axis=1))
    kept = read_result(opened, "influence")
    assert kept is not None
    assert kept.top_samples.shape == (NUM_TEST, 3)


@pytest.mark.parametrize("opened", ["diagonal"], indirect=True)
def test_another_kernel_of_the_store(opened: ntkpipe.KernelStore) -> None:
    found = run_step(opened, "regression", array="kernel/output_1/train", ridges=[0.5], progress=False)
    one = opened.output(1)
    test = {"test_kernel": one.test_train, "test_targets": opened.test_targets}
    expected = ntkpipe.ridge_path(one.train, opened.targets, ridges=[0.5], **test)
    np.testing.assert_allclose(found.test_loss, expected.test_loss)
    posterior = run_step(opened, "gaussian_process", array="kernel/output_1/train", progress=False)
    assert posterior.mean.shape == (NUM_TEST, NUM_OUTPUTS)
    assert posterior.variance.shape == (NUM_TEST, 1)


@pytest.mark.parametrize("opened", ["pntk"], indirect=True)
def test_wrong_options_are_named(opened: ntkpipe.KernelStore) -> None:
    with pytest.raises(ConfigError, match="centre='mean'"):
        run_step(opened, "regression", centre="mean", progress=False)
