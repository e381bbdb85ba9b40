"""Series of activations: their bound, the plane where they are too slow, and what is refused."""

import numpy as np
import pytest

from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.activations import plane
from ntkpipe.infinite.activations.catalogue import SERIES, dual_of
from ntkpipe.infinite.activations.hermite import TERMS, Series
from ntkpipe.infinite.state import State

EPS = 2.0**-52
GAIN = 1.0


def pairs_of(count, seed=0, least=0.05, most=4.0):
    """Variances, and cosines that are mostly large, where series are slow."""
    rng = np.random.default_rng(seed)
    p, q = rng.uniform(least, most, (2, count))
    c = rng.uniform(-1.0, 1.0, count)
    return p, q, np.sign(c) * np.abs(c) ** 0.2


def in_plane(dual, p, q, c):
    functions = (dual.function, dual.derivative)
    if dual.kinks:
        return plane.kinked(functions, dual.kinks, p, q, c)
    return plane.smooth(functions, p, q, c, 0.04)


@pytest.mark.parametrize("name", ["tanh", "elu"])
def test_the_bound_of_a_series_is_above_its_error_and_near_it(name):
    dual, count = dual_of(name, (), 1e-13, None), 1000 if name == "tanh" else 60
    p, q, c = pairs_of(count)
    left, right = dual.keep(p, GAIN), dual.keep(q, GAIN)
    ratios = []
    for at in range(count):
        truth = in_plane(dual, p[at], q[at], c[at])
        for which, expected in enumerate(truth):
            square, rest, terms = (3 + 3 * which + part for part in range(3))
            found = np.polynomial.polynomial.polyval(c[at], left[terms][at] * right[terms][at])
            size = np.sqrt(left[square][at] * right[square][at])
            error, bound = abs(found - expected), left[rest][at] * right[rest][at] * abs(c[at]) ** TERMS
            assert error <= bound + 16 * EPS * size
            if error > 1000 * EPS * size:
                ratios.append(bound / error)
    assert len(ratios) > count / 10
    assert np.median(ratios) < 10


@pytest.mark.parametrize("name", SERIES)
def test_a_tile_is_the_series_where_it_converges_and_the_plane_elsewhere(name):
    dual = dual_of(name, (), 1e-13, None)
    p, q, c = pairs_of(6, seed=1)
    s = c[0] * np.sqrt(np.multiply.outer(p, q))
    s[2] *= np.sign(s[2]) * 0.99999 / abs(c[0])  # near the largest covariance, where series are slow
    state = State(s.copy(), np.ones_like(s), is_own=False, fan_in=1)
    dual.apply(state, dual.keep(p, GAIN), dual.keep(q, GAIN), GAIN)
    for at in np.ndindex(s.shape):
        expected = dual.slow(s[at], p[at[0]], q[at[1]])
        sizes = [
            np.sqrt(dual.slow(p[at[0]], p[at[0]], p[at[0]])[k] * dual.slow(q[at[1]], q[at[1]], q[at[1]])[k])
            for k in (0, 1)
        ]
        assert abs(state.s[at] - expected[0]) <= 2e-13 * sizes[0]
        assert abs(state.theta[at] - expected[1]) <= 2e-13 * sizes[1]


def test_a_sample_with_itself_has_its_own_variance_to_the_last_bit():
    dual = dual_of("tanh", (), 1e-13, None)
    p = np.array([0.3, 1.7, 30.0, 0.3])
    kept = dual.keep(p, GAIN)
    state = State(np.sqrt(np.multiply.outer(p, p)), np.ones((4, 4)), is_own=False, fan_in=1)
    np.fill_diagonal(state.s, p)
    dual.apply(state, kept, kept, GAIN)
    assert np.array_equal(np.diagonal(state.s), kept[3])
    assert np.array_equal(np.diagonal(state.theta), kept[6])
    assert np.array_equal(state.s, state.s.T)


def test_polynomials_are_exact():
    """E[u² v²] = pq + 2s², E[2u 2v] = 4s."""
    dual = Series("square", np.square, lambda x: 2.0 * x, (), 1e-13)
    p, q = np.array([0.5, 2.0]), np.array([1.5, 0.0, 40.0])
    s = 0.7 * np.sqrt(np.multiply.outer(p, q))
    state = State(s.copy(), np.ones_like(s), is_own=False, fan_in=1)
    dual.apply(state, dual.keep(p, GAIN), dual.keep(q, GAIN), GAIN)
    np.testing.assert_allclose(state.s, np.multiply.outer(p, q) + 2 * s * s, rtol=1e-13)
    np.testing.assert_allclose(state.theta, 4 * s, rtol=1e-13)


def test_declared_kinks_are_integrated_around():
    """Of ReLU by its functions and its kink is what the closed form says, also of nearly parallel samples."""
    dual = Series("given", lambda x: np.maximum(x, 0.0), lambda x: (x > 0.0) * 1.0, (0.0,), 1e-13)
    relu = dual_of("relu", (), 1e-13, None)
    for c in (0.3, -0.8, 0.99, -0.9999, 1.0 - 1e-6):
        p, q = 0.7, 2.3
        s = c * np.sqrt(p * q)
        state = State(np.array([[s]]), np.ones((1, 1)), is_own=False, fan_in=1)
        dual.apply(state, dual.keep(np.array([p]), GAIN), dual.keep(np.array([q]), GAIN), GAIN)
        value, slope = relu.slow(s, p, q)
        assert abs(state.s[0, 0] - value) <= 1e-12
        assert abs(state.theta[0, 0] - slope) <= 1e-12


def test_derivatives_that_jump_know_multiples_of_a_sample():
    """E of the slopes' product of x and −x is that of x with itself, though √p √p is not p to the last bit."""
    dual, p = dual_of("hardtanh", (), 1e-13, None), np.geomspace(0.1, 1000.0, 40)
    state, kept = State(-p, np.ones(40), is_own=True, fan_in=1), dual.keep(p, GAIN)
    dual.apply(state, kept, kept, GAIN)
    np.testing.assert_allclose(state.s, -kept[3], rtol=1e-13)
    np.testing.assert_allclose(state.theta, kept[6], rtol=1e-13)
    for name in ("abs", "hardtanh"):  # by the other path, which certificates take
        dual = dual_of(name, (), 1e-13, None)
        for one in p:
            same, other = (dual.slow(sign * one * 3.0, one, one * 9.0 * (1.0 + EPS)) for sign in (1.0, -1.0))
            np.testing.assert_allclose(np.abs(same), np.abs(other), rtol=1e-12)
    assert np.isfinite(dual_of("elu", (), 1e-13, None).slow(0.0, 0.0, 1.0)).all()


@pytest.mark.parametrize(
    ("function", "derivative", "kinks", "words"),
    [
        (np.abs, np.sign, (), "kinks=\\(0.0,\\)"),
        (lambda x: np.abs(x - 0.3), lambda x: np.sign(x - 0.3), (0.0,), "does not name"),
        (np.tanh, np.tanh, (), "not the derivative"),
        (np.sign, np.zeros_like, (0.0,), "jumps"),
        (lambda x: np.tanh(1e5 * x), lambda x: 1e5 / np.cosh(np.minimum(np.abs(1e5 * x), 300.0)) ** 2, (), "steep"),
        (np.sum, np.sum, (), "a finite number for each"),
        (lambda x: x + 1j, np.ones_like, (), "real numbers"),
        (lambda x: 1.0 / x, lambda x: -1.0 / x**2, (0.5,), "a finite number for each|do not converge"),
    ],
)
def test_what_does_not_converge_or_fit_is_refused(function, derivative, kinks, words):
    dual = Series("given", function, derivative, kinks, 1e-13)
    with pytest.raises(ConfigError, match=words), np.errstate(divide="ignore"):
        dual.keep(np.array([1.3]), GAIN)
