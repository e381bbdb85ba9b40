"""The first look: against scikit-learn, and formulas written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

import ntkpipe
from ntkpipe.analysis.alignment import alignments
from ntkpipe.analysis.summary import summarize
from ntkpipe.base.errors import ConfigError
from ntkpipe.operators.dense import DenseOperator


def make_store(
    path: Path, rng: np.random.Generator, *, kind: str = "pntk", targets: str = "classes"
) -> ntkpipe.KernelStore:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).eval()
    inputs, test_inputs = rng.standard_normal((40, 6)), rng.standard_normal((15, 6))
    directions = rng.standard_normal((6, 3))
    made = {"classes": lambda x: (x @ directions).argmax(axis=1), "real": lambda x: x @ directions}[targets]
    return ntkpipe.compute_kernel(
        model,
        inputs,
        targets=made(inputs),
        test_inputs=test_inputs,
        test_targets=made(test_inputs),
        store=path,
        kind=kind,
        compute_dtype="float64",
        tile=16,
        progress=False,
    )


def test_alignment_is_the_cosine_of_kernel_and_targets(rng: np.random.Generator) -> None:
    factor, targets = rng.standard_normal((9, 4)), rng.standard_normal((9, 2))
    kernel, wanted = factor @ factor.T, targets @ targets.T
    cosine = np.sum(kernel * wanted) / np.sqrt(np.sum(kernel**2) * np.sum(wanted**2))
    assert alignments(DenseOperator(kernel), targets)[0] == pytest.approx(cosine, rel=1e-12)
    assert alignments(DenseOperator(wanted), targets)[0] == pytest.approx(1.0, rel=1e-12)


def test_summary_of_a_store_equals_the_dense_formulas(tmp_path: Path, rng: np.random.Generator) -> None:
    store = make_store(tmp_path / "k.zarr", rng)
    found = summarize(store, ridge=1e-2)
    kernel, labels = store.train.to_numpy(), store.targets
    assert labels is not None
    assert found.eigenvalues == pytest.approx(np.linalg.eigvalsh(kernel)[::-1][:5], rel=1e-10)
    assert found.trace == pytest.approx(np.trace(kernel), rel=1e-12)
    assert found.ridge == pytest.approx(1e-2 * np.trace(kernel) / 40, rel=1e-12)
    one_hot = np.eye(labels.max() + 1)[labels]
    model = KernelRidge(alpha=found.ridge, kernel="precomputed").fit(kernel, one_hot)
    predicted = model.predict(store.test_train.to_numpy())
    assert found.accuracy == np.mean(predicted.argmax(axis=1) == store.test_targets)
    wanted = np.eye(labels.max() + 1)[store.test_targets]
    assert found.mean_squared_error == pytest.approx(np.mean((predicted - wanted) ** 2), rel=1e-8)
    centre = np.eye(40) - 1 / 40
    for measured, of_kernel, of_targets in (
        (found.alignment, kernel, one_hot),
        (found.centred_alignment, centre @ kernel @ centre, centre @ one_hot),
    ):
        norms = np.linalg.norm(of_kernel) * np.linalg.norm(of_targets.T @ of_targets)
        assert measured == pytest.approx(np.sum(of_targets * (of_kernel @ of_targets)) / norms, rel=1e-10)


def test_full_ntk_regression_fits_real_targets(tmp_path: Path, rng: np.random.Generator) -> None:
    store = make_store(tmp_path / "k.zarr", rng, kind="ntk", targets="real")
    found = summarize(store, ridge=1e-6)
    assert found.num_rows == 120
    assert found.accuracy is None
    assert store.test_targets is not None
    assert found.mean_squared_error is not None
    # A network whose features hold the linear functions predicts them far better than their mean does.
    assert found.mean_squared_error < 0.1 * np.var(store.test_targets)


def test_leading_samples_and_their_limits(tmp_path: Path, rng: np.random.Generator) -> None:
    store = make_store(tmp_path / "k.zarr", rng)
    found = summarize(store, samples=10)
    assert found.num_rows == 10
    assert found.trace == pytest.approx(np.trace(store.train[:10, :10]), rel=1e-12)
    with pytest.raises(ConfigError, match="samples=41"):
        summarize(store, samples=41)
    with pytest.raises(ConfigError, match="ridge=-1"):
        summarize(store, ridge=-1.0)
