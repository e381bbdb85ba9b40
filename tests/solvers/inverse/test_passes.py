"""The inverse in little memory: runs of columns, forms of second order, honest verdicts."""

import numpy as np
import pytest
from regressions import features

from ntkpipe import gaussian_process
from ntkpipe.base.config import Budget
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.inverse.contract import Verdict
from ntkpipe.solvers.inverse.passes import ByPasses, vectors_that_fit
from ntkpipe.solvers.result import ignore

RIDGE = 0.1


def inverse_of(kernel: np.ndarray, tol: float, memory_limit: int | None = None) -> ByPasses:
    return ByPasses(DenseOperator(kernel), tol=tol, seed=0, budget=Budget(memory_limit), monitor=ignore)


@pytest.fixture
def kernel(rng: np.random.Generator) -> np.ndarray:
    return features(rng, num_train=200, size=300)[0]


def test_columns_are_solved_a_few_at_a_time(rng: np.random.Generator, kernel: np.ndarray) -> None:
    few, many = inverse_of(kernel, 1e-12, memory_limit=1), inverse_of(kernel, 1e-12)
    assert few.columns_at_once < 7 < many.columns_at_once
    block, verdict = rng.standard_normal((200, 7)), Verdict()
    exact = np.linalg.solve(kernel + RIDGE * np.eye(200), block)
    for inverse in (few, many):
        np.testing.assert_allclose(inverse.times(block, RIDGE, verdict), exact, atol=1e-9)
    assert verdict.status == "converged"
    assert verdict.worst <= 1e-12
    assert few.times(block, RIDGE, verdict, start=exact).shape == exact.shape


@pytest.mark.parametrize("width", [1, 2])
def test_forms_are_of_second_order_in_the_residual(rng: np.random.Generator, kernel: np.ndarray, width: int) -> None:
    tol = 1e-3
    inverse, verdict = inverse_of(kernel, tol, memory_limit=1), Verdict()
    block = rng.standard_normal((200, 6))
    found = inverse.forms(block, RIDGE, width, verdict)
    parts = block.T.reshape(-1, width, 200)
    exact = parts @ np.linalg.solve(kernel + RIDGE * np.eye(200), parts.transpose(0, 2, 1))
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))
    sizes = np.linalg.norm(block, axis=0).reshape(-1, width)
    gaps = np.diagonal(exact - found, axis1=1, axis2=2)
    assert (gaps >= -1e-9 * np.diagonal(exact, axis1=1, axis2=2)).all()
    assert (gaps <= (verdict.worst * sizes) ** 2 / RIDGE).all()
    assert verdict.worst > 1e-5
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()


def test_the_data_fit_is_too(rng: np.random.Generator, kernel: np.ndarray) -> None:
    targets = rng.standard_normal((200, 2))
    exact = gaussian_process(kernel, targets, ridge=RIDGE)
    found = gaussian_process(kernel, targets, ridge=RIDGE, method="streamed", tol=1e-4)
    assert found.residual > 1e-6
    assert found.data_fit == pytest.approx(exact.data_fit, rel=1e-7)


def test_what_is_not_solved_is_said(rng: np.random.Generator) -> None:
    singular, verdict = features(rng, size=5)[0], Verdict()
    inverse_of(singular, 1e-8).times(rng.standard_normal((30, 2)), 0.0, verdict)
    assert verdict.status != "converged"
    assert "λ = 0" in verdict.messages[0]


def test_the_least_memory_is_a_tenth_of_a_float32_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkpipe.base.config.process_memory", lambda: 0)
    assert vectors_that_fit(4000, Budget(1)) == 200
    assert vectors_that_fit(400, Budget(1)) == 64
    assert vectors_that_fit(10**6, Budget(1)) == 768
    assert vectors_that_fit(1000, Budget(8_000_000)) == 900
