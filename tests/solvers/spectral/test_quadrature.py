"""Quadrature rules: exact for polynomials, on the right side for the logarithm, counts within their theorem."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, spectra

from ntkpipe.solvers.probe_lanczos import ProbeLanczos, QuadratureRule, gauss_rule, radau_rule


def measure(values, probes, *, steps, seed=0):
    """Lanczos coefficients and masses of probes, and the masses at all eigenvalues."""
    matrix = matrix_with_spectrum(values, seed=seed)
    lanczos = ProbeLanczos(probes, steps)
    for _ in range(steps):
        lanczos.absorb(matrix @ lanczos.block)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (*lanczos.coefficients(steps), lanczos.squared_norms), eigenvalues, (vectors.T @ probes) ** 2


@pytest.mark.parametrize(("rule", "degree"), [("gauss", 11), ("radau", 12)])
def test_rules_are_exact_for_polynomials_up_to_their_degree_and_no_further(rule, degree, rng):
    coefficients, values, masses = measure(np.linspace(0.5, 3.0, 60), rng.standard_normal((60, 3)), steps=6)
    found = gauss_rule(*coefficients) if rule == "gauss" else radau_rule(*coefficients, 0.4)
    for power in range(degree + 1):
        np.testing.assert_allclose(found.integrate(lambda x, p=power: x**p), values**power @ masses, rtol=1e-10)
    assert abs(found.integrate(lambda x: x ** (degree + 1)) / (values ** (degree + 1) @ masses) - 1).min() > 1e-9


def test_the_radau_rule_has_a_node_where_it_was_put(rng):
    coefficients, *_ = measure(np.linspace(0.5, 3.0, 60), rng.standard_normal((60, 3)), steps=6)
    np.testing.assert_allclose(radau_rule(*coefficients, 0.4).nodes[:, 0], 0.4)


@pytest.mark.parametrize("name", ["power_law_1e4", "power_law_1e8", "spiked", "clustered"])
@pytest.mark.parametrize("steps", [2, 5, 10, 30])
def test_the_logarithm_lies_between_radau_and_gauss(name, steps, rng):
    values = spectra(200)[name]
    coefficients, eigenvalues, masses = measure(values, rng.standard_normal((200, 4)), steps=steps)
    exact = np.log(eigenvalues) @ masses
    slack = 1e-9 * abs(exact)
    assert (gauss_rule(*coefficients).integrate(np.log) >= exact - slack).all()
    assert (radau_rule(*coefficients, 0.5 * values[-1]).integrate(np.log) <= exact + slack).all()


@pytest.mark.parametrize("name", ["power_law_1e4", "power_law_1e8", "indefinite", "spiked"])
@pytest.mark.parametrize("steps", [1, 3, 10, 40])
def test_what_a_probe_has_above_a_threshold_is_within_the_weights_next_to_it(name, steps, rng):
    coefficients, eigenvalues, masses = measure(spectra(300)[name], rng.standard_normal((300, 3)), steps=steps)
    rule = gauss_rule(*coefficients)
    thresholds = np.geomspace(1e-7, 1.1e5, 200)
    exact = np.stack([(eigenvalues > level) @ masses for level in thresholds], axis=1)
    found = rule.mass_above(thresholds)
    above, below = rule.unsettled(thresholds)
    assert (found - above <= exact + 5e-2).all()
    assert (found + below >= exact - 5e-2).all()


def test_counts_of_a_settled_node_are_certain_away_from_it_alone():
    rule = QuadratureRule(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), np.array([[1e-6, 0.5]]))
    thresholds = np.array([0.5, 1.0 + 1e-5, 1.5, 2.5])
    np.testing.assert_array_equal(rule.mass_above(thresholds), [[7, 4, 4, 0]])
    above, below = rule.unsettled(thresholds)
    np.testing.assert_array_equal(above, [[0, 4, 4, 0]])
    np.testing.assert_array_equal(below, [[0, 3, 0, 4]])


def test_the_weight_at_a_threshold_is_not_above_it():
    rule = QuadratureRule(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), np.zeros((1, 2)))
    np.testing.assert_array_equal(rule.mass_above(np.array([1.0, 2.0])), [[4, 0]])
