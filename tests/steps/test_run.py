"""Solvers on a store: right answers below results/, for any Zarr reader; interrupted, the same call goes on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import zarr
from regressions import make_store

import ntkpipe
from ntkpipe.base.errors import ConfigError, Interrupted, NotConvergedWarning, StoreError
from ntkpipe.steps import run
from ntkpipe.steps.registry import read_result
from ntkpipe.steps.run import run_step
from ntkpipe.store.kernel_store import KernelStore

CLASSES = np.arange(90) % 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solving") / "a.zarr"
    small.compute(
        folder,
        model=small.mlp(width=40),
        inputs=small.inputs(90),
        targets=CLASSES,
        test_inputs=None,
        tile=16,
        compute_dtype="float64",
        groups={"first": "0.*"},
    )
    return folder


@pytest.fixture
def store(path: Path) -> KernelStore:
    return ntkpipe.open_kernel(path)


def matrix(store: KernelStore) -> np.ndarray:
    return store.train.to_numpy()


def attributes(path: Path, name: str) -> dict:
    return json.loads((path / "results" / name / "zarr.json").read_text())["attributes"]


def test_eigenpairs_are_kept_and_read_by_plain_zarr(path, store):
    found = run_step(store, "eigsh", k=5, progress=False)
    exact = np.linalg.eigvalsh(matrix(store))[::-1][:5]
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=1e-9)
    saved = zarr.open_group(path / "results" / "eigsh", mode="r")
    np.testing.assert_array_equal(saved["eigenvalues"][:], found.eigenvalues)
    np.testing.assert_array_equal(saved["eigenvectors"][:], found.eigenvectors)
    result = saved.attrs["result"]
    assert (result["status"], result["options"]["k"]) == ("converged", 5)
    assert saved.attrs["manifest_digest"] == store.manifest.digest()
    assert result["matrix"].startswith(store.manifest.digest())
    assert result["work"]["passes"] == found.work.passes > 0


def test_what_is_kept_is_read_back(store):
    run_step(store, "eigsh", k=3, progress=False)
    found = read_result(store, "eigsh")
    assert found is not None
    assert found.eigenvectors.shape == (90, 3)
    assert found.is_converged
    assert read_result(store.path, "nothing") is None


@pytest.mark.parametrize("method", ["pcg", "block_cg", "cholesky"])
def test_regression_solves_for_the_stored_classes(path, store, method):
    found = run_step(store, "solve", ridge=1e-2, ridge_scale="mean_diagonal", method=method, tol=1e-8, progress=False)
    kernel = matrix(store)
    ridge = 1e-2 * kernel.diagonal().mean()
    exact = np.linalg.solve(kernel + ridge * np.eye(90), np.eye(3)[CLASSES])
    np.testing.assert_allclose(found.coefficients, exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    assert attributes(path, "solve")["result"]["ridge"] == pytest.approx(ridge)


def test_log_determinants(store):
    exact = np.linalg.slogdet(matrix(store) + 0.5 * np.eye(90))[1]
    assert run_step(store, "logdet", ridge=0.5, progress=False).value == pytest.approx(exact, rel=1e-12)
    found = run_step(store, "logdet", ridge=0.5, method="slq", num_probes=32, progress=False)
    assert abs(found.value - exact) <= 4 * found.standard_error + found.truncation_error


def test_density_counts_stored_pairs_exactly(store):
    pairs = run_step(store, "eigsh", k=6, progress=False)
    found = run_step(store, "density", num_probes=4, progress=False)
    between = float(pairs.eigenvalues[2:4].mean())
    counts = found.count_above([between])
    assert counts.values[0] == pytest.approx(3)


def test_a_kernel_of_a_group_has_results_of_its_own(store):
    found = run_step(store, "eigsh", array="groups/first/train", k=2, progress=False)
    exact = np.linalg.eigvalsh(store.group("first").train.to_numpy())[::-1][:2]
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=1e-9)
    assert read_result(store, "eigsh-groups-first-train") is not None


@pytest.mark.parametrize("solver", ["eigsh", "density"])
def test_interrupted_it_goes_on_from_the_checkpoint_to_the_same_bits(store, monkeypatch, solver):
    options = {"eigsh": {"k": 20, "block": 8, "seed": 3}, "density": {"num_steps": 9, "seed": 3}}[solver]
    straight = run_step(store, solver, progress=False, **options)
    passes = []

    def interrupt(self, done, residual, target):
        passes.append(done)
        if len(passes) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Passes, "show", interrupt)
    with pytest.raises(Interrupted, match="the same command goes on"):
        run_step(store, solver, progress=False, **options)
    before = len(passes)
    resumed = run_step(store, solver, progress=False, **options)
    assert resumed.arrays().keys() == straight.arrays().keys()
    for name, values in resumed.arrays().items():
        np.testing.assert_array_equal(values, straight.arrays()[name])
    assert len(passes) - before < straight.work.passes  # what was done is not done again
    assert not list(Path(store.path).glob("results/checkpoints/*/zarr.json"))


def test_results_of_a_store_that_is_not_complete_name_the_tile(tmp_path):
    store = small.compute(tmp_path / "a.zarr")
    next((tmp_path / "a.zarr" / "kernel" / "train" / "c").rglob("1/2")).unlink()
    with pytest.raises(StoreError, match=r"tile \(1, 2\) of kernel/train"):
        run_step(store, "eigsh", k=2, progress=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"array": "test"}, "no array 'test'"),
        ({"array": "targets/train"}, "no kernel of samples with themselves"),
        ({"ridge": 1.0, "ridge_scale": "trace"}, "ridge_scale='trace'; needed 'mean_diagonal' or None"),
        ({"ridge": -1.0, "ridge_scale": "mean_diagonal"}, "ridge=-1.0"),
    ],
)
def test_wrong_options_are_named(store, options, words):
    with pytest.raises(ConfigError, match=words):
        run_step(store, "solve", progress=False, **options)


def test_a_store_without_targets_says_what_to_do(tmp_path):
    store = small.compute(tmp_path / "a.zarr", targets=None)
    with pytest.raises(ConfigError, match="has no targets; give targets= to compute_kernel"):
        run_step(store, "solve", progress=False)


def test_a_full_kernel_has_a_row_for_each_output(tmp_path):
    store = small.compute(tmp_path / "a.zarr", kind="ntk", targets=np.arange(18) % 3)
    found = run_step(store, "solve", ridge=0.1, method="cholesky", progress=False)
    exact = np.linalg.solve(store.train.to_numpy() + 0.1 * np.eye(54), np.eye(3)[np.arange(18) % 3].ravel())
    np.testing.assert_allclose(found.coefficients, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    other = small.compute(tmp_path / "b.zarr", kind="ntk", targets=np.arange(18) % 5)
    with pytest.raises(ConfigError, match=r"labels of 5 classes .* for 3 outputs"):
        run_step(other, "solve", ridge=0.1, progress=False)


def test_killed_in_mid_search_the_same_call_goes_on_from_the_checkpoint(path, store):
    """``kill -9`` of a driver after its third pass, which it waits in."""
    straight = run_step(store, "eigsh", k=12, block=4, seed=5, progress=False)
    script = (
        "import sys, time, ntkpipe\n"
        "from ntkpipe.steps import run\n"
        "def show(self, passes, residual, target):\n"
        "    if passes >= 3:\n"
        "        print('third', flush=True)\n"
        "        time.sleep(60)\n"
        "run.Passes.show = show\n"
        "run.run_step(sys.argv[1], 'eigsh', k=12, block=4, seed=5, progress=False)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "third\n"
        driver.kill()
    resumed = run_step(store, "eigsh", k=12, block=4, seed=5, progress=False)
    for name, values in resumed.arrays().items():
        np.testing.assert_array_equal(values, straight.arrays()[name])
    assert resumed.history.shape == straight.history.shape


def test_a_step_says_what_its_inputs_took_and_how_good_they_were(tmp_path):
    store = make_store(tmp_path / "k.zarr")
    with pytest.warns(NotConvergedWarning):
        found = run_step(store, "influence", ridge=1e-6, method="pcg", tol=0.0, progress=False, memory_limit="4GiB")
    assert not found.is_converged
    assert found.work.passes > 0
    assert (found.options["ridge"], found.options["memory_limit"]) == (1e-6, 4 * 2**30)
    judged = run_step(store, "calibration", ridge=0.5, progress=False)
    assert (judged.options["ridge"], judged.options["ridge_scale"]) == (0.5, "mean_diagonal")
    assert judged.work.passes > 0


def test_a_posterior_is_safe_before_it_is_judged(tmp_path):
    store = make_store(tmp_path / "k.zarr")
    with pytest.warns(UserWarning, match="there is no calibration beside the result: .*10000000"):
        found = run_step(store, "gaussian_process", bins=10**7, progress=False)
    assert read_result(store, "gaussian_process").log_marginal_likelihood == found.log_marginal_likelihood
    assert read_result(store, "calibration") is None


@pytest.mark.parametrize(
    ("options", "words"), [({"array": 3}, "array=3; needed text"), ({"memory_limit": "lots"}, "lots")]
)
def test_what_every_step_takes_is_checked(store, options, words):
    with pytest.raises(ConfigError, match=words):
        run_step(store, "eigsh", k=2, progress=False, **options)
