"""Defaults work on kernels of every size, from one row on."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

import ntkpipe
from ntkpipe.base.errors import ConfigError
from ntkpipe.solvers.linear.preconditioner import nystrom, randomly_pivoted_cholesky

SIZES = (1, 2, 3, 10, 60)


def kernel(num_rows: int, dtype: str = "f8"):
    spectrum = power_law(num_rows, condition=1e3, largest=10.0) if num_rows > 1 else [3.0]
    return matrix_with_spectrum(spectrum).astype(dtype)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("num_rows", SIZES)
def test_solvers(num_rows, dtype):
    matrix = kernel(num_rows, dtype)
    dense = matrix.astype(np.float64)
    values, right = np.linalg.eigvalsh(dense)[::-1], np.random.default_rng(1).standard_normal(num_rows)
    found = ntkpipe.eigsh(matrix)
    assert found.is_converged
    assert found.options["k"] == num_rows
    for eigenvalues in (found.eigenvalues, ntkpipe.eigh(matrix).eigenvalues, ntkpipe.eigvalsh(matrix).eigenvalues):
        np.testing.assert_allclose(eigenvalues, values, rtol=0, atol=1e-12)
    least = ntkpipe.smallest(matrix)
    assert least.is_converged
    np.testing.assert_allclose(least.eigenvalues, values[-1:], rtol=1e-8)
    wanted = np.linalg.solve(dense + 0.1 * np.eye(num_rows), right)
    for method in ("auto", "pcg"):
        solved = ntkpipe.solve(matrix, right, ridge=0.1, tol=1e-13, method=method)
        np.testing.assert_allclose(solved.coefficients, wanted, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ntkpipe.logdet(matrix).value, np.log(values).sum(), rtol=1e-12, atol=1e-12)
    for preconditioner in (randomly_pivoted_cholesky(matrix), nystrom(matrix)):
        assert 1 <= preconditioner.rank <= max(1, num_rows // 10)


@pytest.mark.parametrize("num_rows", SIZES)
def test_estimates(num_rows):
    """They never blame the number of steps, or the matrix, where the whole space is there."""
    matrix = kernel(num_rows)
    values = np.linalg.eigvalsh(matrix)
    counted, logarithm = ntkpipe.density(matrix), ntkpipe.slq_logdet(matrix)
    assert counted.status in ("converged", "not converged")
    assert logarithm.status in ("converged", "not converged")
    for level in (counted.floor, values[-1] / 2):
        counts = counted.count_above(level)
        # Four standard errors of Monte Carlo, and what truncation leaves open.
        bound = 4 * counts.standard_errors[0] + counts.truncation_errors[0] + 1e-9
        assert abs(counts.values[0] - (values > level).sum()) <= bound
    bound = 4 * logarithm.standard_error + logarithm.truncation_error + 1e-6
    assert abs(logarithm.value - np.log(values).sum()) <= bound
    if num_rows == 1:
        assert counted.is_converged
        assert logarithm.is_converged


@pytest.mark.parametrize("targets", ["real", "labels"])
@pytest.mark.parametrize("num_rows", SIZES)
def test_learning_and_analysis(num_rows, targets):
    rng = np.random.default_rng(2)
    matrix, cross = kernel(num_rows), rng.standard_normal((4, num_rows)) / num_rows**0.5
    y = np.arange(num_rows) % 2 if targets == "labels" else rng.standard_normal(num_rows)
    columns = np.eye(2)[y][:, : min(num_rows, 2)] if targets == "labels" else y[:, None]
    wanted = cross @ np.linalg.solve(matrix + 0.1 * np.eye(num_rows), columns)
    model = ntkpipe.KernelRegression(0.1, tol=1e-13).fit(matrix, y)
    np.testing.assert_allclose(model.predict_outputs(cross), wanted, rtol=0, atol=1e-10)
    posterior = ntkpipe.gaussian_process(matrix, y, ridge=0.1, test_kernel=cross, test_diagonal=np.full(4, 30.0))
    np.testing.assert_allclose(posterior.mean, wanted, rtol=0, atol=1e-10)
    for result in (
        ntkpipe.spectrum(matrix),
        ntkpipe.spectrum(matrix, method="streamed"),
        ntkpipe.alignment(matrix, y),
        ntkpipe.alignment(matrix, y, method="streamed"),
        ntkpipe.generalisation(matrix, y),
        ntkpipe.ridge_path(matrix, y),
        ntkpipe.compare_kernels(matrix, matrix, targets=y),
        ntkpipe.influence(model, cross),
        ntkpipe.dynamics(matrix, y, times=[1.0, np.inf]),
    ):
        assert result.is_converged, result
    if num_rows > 1:
        assert ntkpipe.learning_curve(matrix, y).is_converged


def test_what_no_size_can_give_is_said():
    with pytest.raises(ConfigError, match="at least two samples: train sets are compared with the samples"):
        ntkpipe.learning_curve(np.eye(1), [1.0])
    with pytest.raises(ConfigError, match="k=61; needed a number from 1 to 60"):
        ntkpipe.eigsh(kernel(60), 61)


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_a_preconditioner_of_full_rank_leaves_nothing_unknown(num_rows):
    matrix = kernel(num_rows)
    found = ntkpipe.slq_logdet(matrix, rank=num_rows)
    assert found.is_converged
    np.testing.assert_allclose(found.value, np.linalg.slogdet(matrix)[1], rtol=0, atol=1e-5)
