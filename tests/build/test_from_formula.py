"""Stores of networks of infinite width: the same bits whatever happens, certified, and of use to everything."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damage import forge
from distributed import Client
from forks import FORKS, slowly
from small import NETWORK, Allowance, chunks, compute, compute_infinite, inputs, mlp, times

import ntkpipe
from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import (
    ConfigError,
    DataError,
    Interrupted,
    NonFiniteError,
    ResourceError,
    StoreMismatchError,
)
from ntkpipe.build import formula_source
from ntkpipe.executors.connect import connect
from ntkpipe.infinite import (
    Activation,
    Conv,
    Convolutional,
    Dense,
    FullyConnected,
    GlobalAveragePool,
    Sequential,
)

TRAIN, TEST = inputs(), inputs(7, seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store that nobody changes."""
    return compute_infinite(tmp_path_factory.mktemp("made") / "k").path


@pytest.fixture
def store(tmp_path) -> Path:
    return compute_infinite(tmp_path / "k").path


@pytest.mark.parametrize("tile", [1, 7, 16, 18])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_has_the_bits_of_the_matrix_in_memory_whatever_its_tiles_and_workers(tmp_path, tile, workers):
    found = compute_infinite(tmp_path / "k", tile=tile, workers=workers)
    for number, kernels in enumerate((found.group("nngp"), found)):
        pairs = ((TRAIN, None), (TEST, TRAIN), (TEST, None))
        square, cross, own = (ntkpipe.infinite_kernel_matrix(NETWORK, *pair) for pair in pairs)
        np.testing.assert_array_equal(kernels.train[:], square[number])
        np.testing.assert_array_equal(kernels.test_train[:], cross[number])
        np.testing.assert_array_equal(kernels.test_diagonal[:, 0, 0], own[number].diagonal())
    assert found.manifest.num_outputs == 3
    np.testing.assert_array_equal(found.outputs, np.zeros((18, 3)))


IMAGES = np.random.default_rng(5).standard_normal((11, 2, 4, 4))
NETWORKS = [
    (
        FullyConnected(hidden=3, W_std=1.4, b_std=0.1, bias_init=0.5, parametrisation="standard", widths=(8, 9, 10)),
        TRAIN,
    ),
    (FullyConnected(activation="tanh", W_std=(1.0, 1.2), b_std=0.3, trained="last"), TRAIN),
    (Convolutional(hidden=2, W_std=1.4, b_std=0.1), IMAGES),
    (Sequential([Conv(W_std=1.3), Activation("gelu"), Conv(b_std=0.2), GlobalAveragePool(), Dense()]), IMAGES),
]


@pytest.mark.parametrize(("net", "x"), NETWORKS)
def test_any_network_has_the_bits_of_its_matrix_and_a_certificate_by_the_slow_path(tmp_path, net, x):
    kept = compute_infinite(tmp_path / "k", net=net, inputs=x, targets=None, test_inputs=None, tile=3)
    nngp, ntk = ntkpipe.infinite_kernel_matrix(net, x)
    np.testing.assert_array_equal(kept.train[:], ntk)
    np.testing.assert_array_equal(kept.group("nngp").train[:], nngp)
    report = ntkpipe.verify(kept, net, progress=False)
    assert report.is_good
    assert all(each["slow_entries"] >= -(-len(x) // 3) for each in report.certificates)
    assert max(each["error"] for each in report.certificates) < 1e-12


def test_memory_cuts_tiles_into_strips_and_changes_no_bit(tmp_path, made, monkeypatch):
    monkeypatch.setattr("ntkpipe.build.formula_strips._PIECE_FLOPS", 1.0)  # pieces of one sample
    assert chunks(compute_infinite(tmp_path / "k").path) == chunks(made)


def test_a_float32_store_has_the_rounded_entries(tmp_path, made):
    found, whole = compute_infinite(tmp_path / "k", store_dtype="float32"), ntkpipe.open_kernel(made)
    np.testing.assert_array_equal(found.train[:], whole.train[:].astype(np.float32))
    np.testing.assert_array_equal(found.group("nngp").train[:], whole.group("nngp").train[:].astype(np.float32))


@pytest.fixture(scope="module")
def client():
    with connect("local", RunSpec(workers=2, memory_limit=2 * 2**30)) as joined:
        yield joined


def test_workers_of_a_cluster_write_the_same_bits(tmp_path, made, client: Client):
    assert chunks(compute_infinite(tmp_path / "k", client=client).path) == chunks(made)


@pytest.mark.parametrize("tiles", [0, 1, 17])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, made, monkeypatch, tiles):
    with monkeypatch.context() as patch:
        Allowance(patch, tiles, KeyboardInterrupt())
        with pytest.raises(Interrupted, match=f"{tiles} of 50 tiles are in"):
            compute_infinite(tmp_path / "k")
    before = times(tmp_path / "k")
    compute_infinite(tmp_path / "k", workers=1, tile=None)  # the tile is that of the store
    assert chunks(tmp_path / "k") == chunks(made)
    assert before.items() <= times(tmp_path / "k").items()


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, made):
    FORKS.set_forkserver_preload(["ntkpipe.build.from_formula", "small"])
    child = FORKS.Process(target=slowly, args=(tmp_path / "k", 0.02, compute_infinite))
    child.start()
    while child.exitcode is None and len(times(tmp_path / "k")) < 20:
        time.sleep(0.002)
    assert child.exitcode is None
    child.kill()
    child.join()
    compute_infinite(tmp_path / "k")
    assert chunks(tmp_path / "k") == chunks(made)


@pytest.mark.parametrize(("train", "test"), [(11, 3), (18, 2), (5, 7), (10, None)])
def test_a_store_that_grew_is_one_that_was_made_at_once(tmp_path, made, train, test):
    few = {"inputs": TRAIN[:train], "targets": (np.arange(18) % 3)[:train], "tile": 4}
    compute_infinite(tmp_path / "k", **few, test_inputs=None if test is None else TEST[:test])
    compute_infinite(tmp_path / "k", grow=True)
    assert chunks(tmp_path / "k") == chunks(made)


NAMES = ("kernel/train", "groups/nngp/kernel/train", "kernel/test_train", "groups/nngp/kernel/test_train")


def shrunk(values: np.ndarray) -> None:
    """Symmetric, finite, and within every bound."""
    values *= 0.999


@pytest.mark.parametrize("name", [name.replace("nngp/kernel", "nngp") for name in NAMES])
@pytest.mark.parametrize("index", [(0, 2), (1, 4)])
def test_a_certificate_finds_a_wrong_tile_anywhere_and_repair_restores_its_bits(store, made, name, index):
    kept = ntkpipe.open_kernel(store).store
    forge(kept, name, index, shrunk)
    assert ntkpipe.verify(store, progress=False).is_good
    report = ntkpipe.verify(store, NETWORK, progress=False)
    assert {finding.array for finding in report.findings} == {name}
    assert ntkpipe.repair(store, NETWORK, progress=False).is_good
    assert chunks(store) == chunks(made)


def test_a_good_store_is_certified_by_the_slow_path_too(made, monkeypatch):
    report = ntkpipe.verify(made, NETWORK, progress=False)
    assert [each["array"] for each in report.certificates] == ["kernel/train", "kernel/test_train", *report_names()]
    assert report.is_good
    assert max(each["error"] for each in report.certificates) < 1e-13

    def wrong(net: FullyConnected, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        nngp, ntk = ntkpipe.infinite_kernel_matrix(net, x[None], y[None]).ravel() * (1 + 1e-6)
        return nngp, ntk

    monkeypatch.setattr(FullyConnected, "slow", wrong)
    assert not any(each["is_good"] for each in ntkpipe.verify(made, NETWORK, progress=False).certificates)


def report_names() -> list[str]:
    return ["groups/nngp/train", "groups/nngp/test_train"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"W_std": 1.4}, "source.network.layers.0.W_std: stored 1.3 → asked 1.4"),
        ({"activation": "relu"}, "source.network.layers.1.function: stored 'erf' → asked 'relu'"),
        ({"hidden": 1}, "source.network.layers"),
        ({"first_layer": "sum"}, "source.network.first_layer: stored 'mean' → asked 'sum'"),
    ],
)
def test_another_network_is_refused_with_the_option_that_differs(made, changes, words):
    with pytest.raises(StoreMismatchError, match=words):
        compute_infinite(made, net=replace(NETWORK, **changes))
    with pytest.raises(StoreMismatchError, match=words):
        ntkpipe.verify(made, replace(NETWORK, **changes))


def test_networks_and_models_are_not_taken_for_each_other(tmp_path, made):
    with pytest.raises(StoreMismatchError, match="was made of 5 layers of infinite width, and Sequential was given"):
        ntkpipe.verify(made, mlp())
    with pytest.raises(StoreMismatchError, match="model"):
        compute(made)
    compute(tmp_path / "model")
    with pytest.raises(StoreMismatchError, match="43 parameters, and FullyConnected was given"):
        ntkpipe.verify(tmp_path / "model", NETWORK)
    with pytest.raises(ConfigError, match="compute_infinite_kernel alone"):
        compute(tmp_path / "other", kind="infinite_ntk")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"net": mlp()}, ConfigError, "net is Sequential; needed a network of ntkpipe.infinite"),
        ({"inputs": {"x": TRAIN}, "test_inputs": None}, DataError, "is a dict"),
        ({"inputs": np.where(np.arange(72).reshape(18, 4) == 21, np.inf, TRAIN)}, NonFiniteError, "sample 5"),
        ({"inputs": np.where(np.arange(72).reshape(18, 4) == 21, np.nan, TRAIN)}, NonFiniteError, "sample 5"),
        ({"inputs": TRAIN + 1j}, DataError, "complex"),
        ({"net": replace(NETWORK, activation="relu", W_std=1e60, hidden=4)}, ConfigError, r"layer \d of 9"),
        ({"test_inputs": TEST[:, :3]}, DataError, r"\(3,\)"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_anything_is_written(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        compute_infinite(tmp_path / "k", **changes)
    assert not (tmp_path / "k").exists()


def test_a_run_of_days_is_refused_with_its_time_unless_it_is_forced(tmp_path, monkeypatch):
    monkeypatch.setattr(formula_source, "_MOST_SECONDS", 0.0)
    with pytest.raises(ResourceError, match=r"takes about [\d.]+ s on 2 workers .*force=True"):
        compute_infinite(tmp_path / "k")
    assert not (tmp_path / "k").exists()
    assert compute_infinite(tmp_path / "k", force=True).progress.is_complete


def test_a_plan_says_what_a_run_does_and_needs(made, tmp_path):
    x = np.zeros((60_000, 784), np.float32)
    plan = ntkpipe.plan_infinite_kernel(NETWORK, x, store=tmp_path / "k", workers=2, memory_limit="16GiB")
    assert plan.workload.num_tiles == 2 * 30 * 31 / 2
    text = str(plan)
    assert "NTK and NNGP" in text
    assert "Jacobian" not in text
    small = ntkpipe.plan_infinite_kernel(NETWORK, x, store=tmp_path / "k", workers=2, memory_limit="1MiB")
    assert "memory" in small.problems[0]
    done = ntkpipe.plan_infinite_kernel(NETWORK, TRAIN, store=made, targets=np.arange(18) % 3, test_inputs=TEST)
    assert (done.tiles_done, done.bytes_to_write) == (50, 0)


def test_solvers_analyses_and_reports_work_on_it(store, tmp_path):
    kept = ntkpipe.open_kernel(store)
    matrix = kept.train[:]
    found = ntkpipe.eigsh(kept.train, k=3)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(matrix)[::-1][:3], rtol=1e-10)
    solved = ntkpipe.solve(kept.group("nngp").train, np.ones(18), ridge=0.1)
    wanted = np.linalg.solve(kept.group("nngp").train[:] + 0.1 * np.eye(18), np.ones(18))
    np.testing.assert_allclose(solved.coefficients.ravel(), wanted, rtol=1e-8)
    labels = np.eye(3)[np.arange(18) % 3]
    fitted = ntkpipe.KernelRegression(ridge=0.1).fit(kept)
    outputs = kept.test_train[:] @ np.linalg.solve(matrix + 0.1 * np.eye(18), labels)
    np.testing.assert_array_equal(fitted.predict(kept.test_train), outputs.argmax(axis=1))
    assert ntkpipe.run_step(kept, "spectrum").is_good
    compute(tmp_path / "model", kind="trace", targets=np.arange(18) % 3)
    compared = ntkpipe.compare_kernels(tmp_path / "model", store, k=3)
    assert {"model", "source"} <= {name.partition(".")[0] for name in compared.differs}
    report = ntkpipe.write_report(kept, tmp_path / "page.html")
    page = Path(report.path).read_text()
    assert "5 layers of infinite width" in page
    assert "how their Jacobians were held" not in page
