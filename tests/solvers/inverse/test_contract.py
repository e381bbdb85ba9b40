"""The contract of inverses: three implementations against dense formulas in float64, and verdicts that say no more."""

from typing import Any

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

from ntkpipe.base.config import Budget
from ntkpipe.base.errors import IndefiniteError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.inverse.contract import INDEFINITE, Fit, Inverse, Question, Verdict, WithError, as_fields
from ntkpipe.solvers.inverse.exact import ByEigenpairs, ByFactors
from ntkpipe.solvers.inverse.passes import ByPasses
from ntkpipe.solvers.result import ignore

N, COLUMNS, TOL = 24, 3, 1e-11
EPS = float(np.finfo(np.float64).eps)
METHODS = ("eigh", "cholesky", "streamed")
RIDGES = (1e-2, 0.3, 20.0)


def inverse_of(kernel: np.ndarray, method: str, tol: float = TOL) -> Inverse:
    operator, how = DenseOperator(kernel), {"budget": Budget(), "monitor": ignore, "why": "asked for"}
    if method == "eigh":
        return ByEigenpairs.of(operator, **how)
    return ByFactors(operator, tol, **how) if method == "cholesky" else ByPasses(operator, tol=tol, seed=0, **how)


def kernel_of(seed: int) -> np.ndarray:
    return matrix_with_spectrum(power_law(N, condition=1e3, largest=10.0), seed=seed)


def blocks_of(matrix: np.ndarray, width: int) -> np.ndarray:
    return np.stack([matrix[i : i + width, i : i + width] for i in range(0, len(matrix), width)])


def refits(kernel: np.ndarray, targets: np.ndarray, ridge: float, width: int) -> np.ndarray:
    """What each sample is missed by without it; without a ridge by the solution of smallest norm."""
    found = np.empty_like(targets)
    for first in range(0, len(kernel), width):
        out = np.arange(first, first + width)
        rest = np.delete(np.arange(len(kernel)), out)
        shifted = kernel[np.ix_(rest, rest)] + ridge * np.eye(len(rest))
        inverse = np.linalg.inv(shifted) if ridge else np.linalg.pinv(shifted, rcond=1e-10, hermitian=True)
        found[out] = targets[out] - kernel[np.ix_(out, rest)] @ inverse @ targets[rest]
    return found


def assert_within(found: WithError, exact: float, rel: float = 1e-7) -> None:
    """An estimate is within six of its standard errors, and an exact number exact."""
    assert found.error >= 0.0
    assert abs(found.value - exact) <= 6 * found.error + rel * abs(exact)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ridge", [0.0, *RIDGES])
@pytest.mark.parametrize("method", METHODS)
def test_products_forms_and_logdets_are_the_dense_ones(method: str, ridge: float, seed: int) -> None:
    kernel, rng, verdict = kernel_of(seed), np.random.default_rng(seed), Verdict()
    inverse, shifted = inverse_of(kernel, method), kernel + ridge * np.eye(N)
    block = rng.standard_normal((N, 6))
    exact = np.linalg.solve(shifted, block)
    # Condition numbers are at most 1e3.
    np.testing.assert_allclose(inverse.times(block, ridge, verdict), exact, rtol=0, atol=1e-7 * np.abs(exact).max())
    for width in (1, 2):
        parts = block.T.reshape(-1, width, N)
        forms = parts @ np.linalg.solve(shifted, parts.transpose(0, 2, 1))
        found = inverse.forms(block, ridge, width, verdict)
        assert found.shape == (6 // width, width, width)
        np.testing.assert_allclose(found, forms, rtol=0, atol=1e-9 * np.abs(forms).max())
    # Of second order in what a solution is off by, if that is not exact.
    rough = exact * (1 + 1e-5) if method == "streamed" else exact
    assert inverse.data_fit(block, rough, ridge) == pytest.approx(np.sum(block * exact), rel=1e-9)
    assert_within(inverse.logdet(ridge, verdict), float(np.linalg.slogdet(shifted)[1]), rel=1e-10)
    assert (verdict.status, verdict.messages, verdict.message) == ("converged", [], "")
    assert verdict.worst <= TOL


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_fit_is_that_of_dense_formulas_and_refits(method: str, ridge: float, width: int) -> None:
    kernel, rng = kernel_of(width), np.random.default_rng(width)
    targets = rng.standard_normal((N, COLUMNS))
    inverse, dense = inverse_of(kernel, method), np.linalg.inv(kernel + ridge * np.eye(N))
    fit = inverse.fit(Question(targets, width, num_left_out=N, num_probes=64), ridge)
    assert fit.verdict.status == "converged"
    assert fit.verdict.worst <= TOL
    coefficients = dense @ targets
    scale = np.abs(coefficients).max()
    np.testing.assert_allclose(fit.coefficients, coefficients, rtol=0, atol=1e-7 * scale)
    np.testing.assert_allclose(fit.train_residuals, targets - kernel @ coefficients, rtol=0, atol=1e-7 * ridge * scale)
    assert fit.train_loss == pytest.approx(np.mean((targets - kernel @ coefficients) ** 2), rel=1e-6)
    left_out = refits(kernel, targets, ridge, width)
    np.testing.assert_array_equal(fit.samples, np.arange(N // width))
    np.testing.assert_allclose(fit.left_out, left_out, rtol=0, atol=1e-6 * np.abs(left_out).max())
    assert fit.leave_one_out_loss == (pytest.approx(np.mean(left_out**2), rel=1e-6), 0.0)
    assert_within(fit.trace, float(np.trace(dense)))
    assert fit.trace.error == 0.0
    assert_within(fit.squared_trace, float(np.sum(dense**2)))
    assert_within(fit.effective_dimension, float(np.trace(kernel @ dense)))
    wanted = np.mean((ridge * coefficients) ** 2) / (ridge * np.trace(dense) / N) ** 2
    assert_within(fit.generalised_cross_validation, wanted)


def test_the_next_fit_may_start_where_another_ended() -> None:
    kernel, targets = kernel_of(0), np.random.default_rng(0).standard_normal((N, COLUMNS))
    inverse, question = inverse_of(kernel, "streamed"), Question(targets, num_probes=4)
    before = inverse.fit(question, 0.3)
    after = inverse.fit(question, 0.25, before.solution)
    assert before.solution.shape == (N, COLUMNS + 4)
    np.testing.assert_allclose(after.coefficients, np.linalg.solve(kernel + 0.25 * np.eye(N), targets), atol=1e-8)


@pytest.mark.parametrize("width", [1, 2])
def test_some_samples_stand_for_all(width: int) -> None:
    kernel, targets = kernel_of(3), np.random.default_rng(3).standard_normal((N, 1))
    question = Question(targets, width, num_left_out=7)
    fit = inverse_of(kernel, "streamed").fit(question, 0.3)
    left_out = refits(kernel, targets, 0.3, width)
    np.testing.assert_array_equal(fit.samples, question.some_samples())
    assert len(np.unique(fit.samples)) == 7
    rows = (fit.samples[:, None] * width + np.arange(width)).reshape(-1)
    np.testing.assert_allclose(fit.left_out, left_out[rows], rtol=0, atol=1e-6)
    # The mean over all of what the mean block gives, and of the gaps of those that were left out.
    dense = np.linalg.inv(kernel + 0.3 * np.eye(N))
    mean = blocks_of(dense, width)[fit.samples].mean(axis=0)
    proxies = np.linalg.solve(mean, (dense @ targets).reshape(N // width, width, 1))
    gaps = np.mean(left_out[rows].reshape(7, -1) ** 2, axis=1) - np.mean(proxies[fit.samples, :, 0] ** 2, axis=1)
    assert fit.leave_one_out_loss.value == pytest.approx(np.mean(proxies**2) + gaps.mean(), rel=1e-6)
    spread = np.std(gaps, ddof=1) * ((1 - 7 * width / N) / 7) ** 0.5
    assert fit.leave_one_out_loss.error == pytest.approx(spread, rel=1e-5)
    # Some blocks say nothing of a trace, and there are no probes of one.
    assert np.isnan(fit.trace.value)
    assert np.isnan(fit.squared_trace.value)


def singular(rank: int, seed: int = 0) -> np.ndarray:
    return matrix_with_spectrum([*np.linspace(8.0, 1.0, rank), *np.zeros(N - rank)], seed=seed)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("rank", [N - 1, N // 2, 3])
def test_without_a_ridge_all_eigenpairs_give_the_smallest_norm(rank: int, width: int) -> None:
    kernel, targets = singular(rank, seed=width), np.random.default_rng(rank).standard_normal((N, COLUMNS))
    inverse, verdict, pseudo = inverse_of(kernel, "eigh"), Verdict(), np.linalg.pinv(kernel, 1e-10, hermitian=True)
    np.testing.assert_allclose(inverse.times(targets, 0.0, verdict), pseudo @ targets, atol=1e-10)
    parts = targets[:, :2].T.reshape(-1, width, N)
    forms = inverse.forms(targets[:, :2], 0.0, width, verdict)
    np.testing.assert_allclose(forms, parts @ pseudo @ parts.transpose(0, 2, 1), atol=1e-10)
    assert inverse.logdet(0.0, verdict) == (-np.inf, 0.0)
    assert verdict.status == "converged"
    fit = inverse.fit(Question(targets, width), 0.0)
    outside = targets - kernel @ pseudo @ targets
    np.testing.assert_allclose(fit.coefficients, pseudo @ targets, atol=1e-10)
    np.testing.assert_allclose(fit.train_residuals, outside, atol=1e-10)
    assert fit.effective_dimension == (pytest.approx(rank), 0.0)
    wanted = np.mean(outside**2) / ((N - rank) / N) ** 2
    assert fit.generalised_cross_validation.value == pytest.approx(wanted, rel=1e-8)
    left_out = refits(kernel, targets, 0.0, width)
    np.testing.assert_allclose(fit.left_out, left_out, rtol=0, atol=1e-7 * np.abs(left_out).max())


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("method", ["cholesky", "streamed"])
def test_others_say_of_a_singular_matrix_that_they_do_not_know(method: str, is_inside: bool) -> None:
    """Also where rounding makes all pivots positive, and targets are in the range so that residuals are small."""
    kernel, targets = singular(N - 1), np.random.default_rng(0).standard_normal((N, COLUMNS))
    kernel = kernel + 3 * N * EPS * 8.0 * np.eye(N)
    fit = inverse_of(kernel, method, tol=1e-6).fit(Question(kernel @ targets if is_inside else targets), 0.0)
    assert fit.verdict.status != "converged"
    assert fit.verdict.message


def test_a_ridge_that_rounding_hides_is_no_ridge() -> None:
    verdict = Verdict()
    inverse_of(singular(N // 2), "eigh").times(np.ones((N, 1)), 1e-16, verdict)
    assert verdict.status == INDEFINITE
    assert "ridge of at least" in verdict.message


def asked(inverse: Inverse, question: str, ridge: float) -> tuple[Any, Verdict]:
    """The answer to a question of two columns, and its verdict."""
    block, verdict = np.random.default_rng(1).standard_normal((N, 2)), Verdict()
    if question == "fit":
        fit: Fit = inverse.fit(Question(block, num_left_out=N, num_probes=4), ridge)
        return fit.coefficients, fit.verdict
    if question == "logdet":
        return inverse.logdet(ridge, verdict), verdict
    if question == "forms":
        return inverse.forms(block, ridge, 2, verdict), verdict
    return inverse.times(block, ridge, verdict), verdict


@pytest.mark.parametrize("question", ["times", "forms", "logdet", "fit"])
@pytest.mark.parametrize("method", METHODS)
def test_no_verdict_calls_an_indefinite_matrix_converged(method: str, question: str) -> None:
    kernel = matrix_with_spectrum([*np.linspace(9.0, 1.0, N - 3), -1.0, -2.0, -3.0])
    inverse = inverse_of(kernel, method)
    if method == "cholesky" and question != "fit":
        with pytest.raises(IndefiniteError):
            asked(inverse, question, 0.5)
        return
    answer, verdict = asked(inverse, question, 0.5)
    assert verdict.status != "converged"
    assert verdict.message
    if method == "cholesky":
        assert verdict.status == INDEFINITE
        assert np.isnan(answer).all()
    # A ridge beyond the smallest eigenvalue makes it definite.
    assert asked(inverse, question, 4.0)[1].status == "converged"


@pytest.mark.parametrize("method", ["cholesky", "streamed"])
def test_a_residual_that_was_not_reached_is_said(method: str) -> None:
    kernel = matrix_with_spectrum(power_law(N, condition=1e10, largest=1.0))
    answer, verdict = asked(inverse_of(kernel, method, tol=1e-18), "times", 0.0)
    left = np.random.default_rng(1).standard_normal((N, 2))
    residual = np.linalg.norm(left - kernel @ answer, axis=0) / np.linalg.norm(left, axis=0)
    assert verdict.status != "converged"
    # Each of both residuals is known to the rounding of a product.
    rounding = N * EPS * np.linalg.norm(answer, axis=0) / np.linalg.norm(left, axis=0)
    assert verdict.worst == pytest.approx(residual.max(), rel=1e-6, abs=2 * rounding.max())


def test_a_verdict_is_that_of_the_first_that_failed_and_the_worst_residual() -> None:
    verdict = Verdict()
    for status, residual, message in (("converged", 0.5, "fine"), ("stagnated", 0.1, "one"), (INDEFINITE, 0.9, "two")):
        verdict.add(status, residual, message)  # type: ignore[arg-type]
    assert verdict == Verdict("stagnated", 0.9, ["one", "two"])
    assert verdict.message == "one"


def test_numbers_stand_beside_their_errors() -> None:
    found = as_fields({"kare": WithError(2.0, 0.5), "loss": WithError(1.0)})
    assert found == {"kare": 2.0, "kare_error": 0.5, "loss": 1.0, "loss_error": 0.0}
