"""Sums over eigenvalues: what more steps could change is bracketed, what is known is not estimated."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

import ntkpipe
from ntkpipe.analysis.spectrum import _radau, sum_of_density, sum_of_values
from ntkpipe.solvers.spectral.density import density

NUM_ROWS, NUM_PROBES = 120, 5


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return power_law(NUM_ROWS, condition=1e4)


def share(values: np.ndarray) -> np.ndarray:
    return values / (values + 3.0)


@pytest.mark.parametrize("function", [share, lambda x: -x * np.log(np.where(x > 0, x, 1.0))])
@pytest.mark.parametrize("num_steps", [4, 9, 20])
def test_each_probe_lies_between_its_two_rules(values, function, num_steps):
    matrix = matrix_with_spectrum(values)
    found = density(matrix, num_probes=NUM_PROBES, num_steps=num_steps, seed=6)
    probes = np.random.default_rng(6).choice([-1.0, 1.0], (NUM_ROWS, NUM_PROBES))
    ascending, vectors = np.linalg.eigh(matrix)
    exact = ((vectors.T @ probes) ** 2 * function(ascending)[:, None]).sum(axis=0)
    nodes, weights = _radau(found)
    gauss, radau = (found.weights * function(found.nodes)).sum(axis=1), (weights * function(nodes)).sum(axis=1)
    rounding = 1e-9 * np.abs(exact)
    assert np.all(np.minimum(gauss, radau) <= exact + rounding)
    assert np.all(exact <= np.maximum(gauss, radau) + rounding)
    np.testing.assert_allclose(weights.sum(axis=1), NUM_ROWS, rtol=1e-12)
    np.testing.assert_allclose(nodes[:, 0], 0.0, atol=1e-9 * values[0])


def test_quadratic_functions_are_known_and_not_estimated(values):
    matrix = matrix_with_spectrum(values)
    found = density(matrix, num_probes=2, num_steps=3)
    total = sum_of_density(found, lambda x: 2 - 3 * x + x**2, values.sum(), (values**2).sum())
    assert total.value == pytest.approx((2 - 3 * values + values**2).sum(), rel=1e-10)
    assert total.error < 1e-9 * total.value


def test_errors_hold_and_all_pairs_leave_none(values):
    matrix = matrix_with_spectrum(values)
    found = density(matrix, num_probes=20, num_steps=25, top=ntkpipe.eigsh(matrix, 10))
    total = sum_of_density(found, share, values.sum(), (values**2).sum())
    assert abs(total.value - share(values).sum()) < 3 * total.error
    assert 0 < total.error < 0.02 * total.value
    whole = density(matrix, num_probes=2, num_steps=2, top=ntkpipe.eigh(matrix))
    exact = sum_of_density(whole, share, values.sum(), (values**2).sum())
    assert exact.value == pytest.approx(sum_of_values(values, share).value, rel=1e-10)
    assert exact.error == 0
