"""Closed forms against quadrature in the plane, and against the same by the angle of two sides."""

import math

import numpy as np
import pytest

from ntkpipe.infinite.activations import plane
from ntkpipe.infinite.activations.catalogue import CLOSED, dual_of
from ntkpipe.infinite.state import State

NAMES = [*CLOSED, "leaky_relu:0.3", "leaky_relu:-2.5"]
ERF = np.vectorize(math.erf)


def kinked(slope):
    return (lambda x: np.where(x > 0, x, slope * x)), (lambda x: np.where(x > 0, 1.0, slope)), (0.0,)


FUNCTIONS = {
    "relu": kinked(0.0),
    "leaky_relu": kinked(0.01),
    "leaky_relu:0.3": kinked(0.3),
    "leaky_relu:-2.5": kinked(-2.5),
    "abs": kinked(-1.0),
    "erf": (ERF, lambda x: 2.0 / math.sqrt(math.pi) * np.exp(-x * x), ()),
    "gelu": (
        lambda x: 0.5 * x * (1.0 + ERF(x / math.sqrt(2.0))),
        lambda x: 0.5 * (1.0 + ERF(x / math.sqrt(2.0))) + x * np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi),
        (),
    ),
    "sin": (np.sin, np.cos, ()),
    "cos": (np.cos, lambda x: -np.sin(x), ()),
    "identity": (lambda x: x, np.ones_like, ()),
}


def applied(dual, s, p, q, gain=1.0):
    """V and V̇ of all pairs."""
    state = State(s.copy(), np.ones_like(s), is_own=False, fan_in=1)
    dual.apply(state, dual.keep(p, gain), dual.keep(q, gain), gain)
    return state.s, state.theta


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_form_is_the_integral(name):
    dual, (function, derivative, kinks) = dual_of(name, (), 1e-13, None), FUNCTIONS[name]
    rng = np.random.default_rng(2)
    p, q = rng.uniform(0.1, 3.0, (2, 3))
    s = rng.uniform(-0.99, 0.99, (3, 3)) * np.sqrt(np.multiply.outer(p, q))
    value, slope = applied(dual, s, p, q)
    for at in np.ndindex(3, 3):
        one, other = p[at[0]], q[at[1]]
        c = s[at] / math.sqrt(one * other)
        functions = (function, derivative)
        expected = (
            plane.kinked(functions, kinks, one, other, c) if kinks else plane.smooth(functions, one, other, c, 0.08)
        )
        np.testing.assert_allclose((value[at], slope[at]), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_form_is_the_slow_one_over_many_sizes(name):
    dual, rng = dual_of(name, (), 1e-13, None), np.random.default_rng(3)
    most = 1.0 if name in {"sin", "cos"} else 4.0
    p, q = 10.0 ** rng.uniform(-4.0, most, (2, 12))
    s = rng.uniform(-0.999, 0.999, (12, 12)) * np.sqrt(np.multiply.outer(p, q))
    value, slope = applied(dual, s, p, q, gain=1.7)
    own = [np.array([dual.slow(each, each, each) for each in side]) for side in (p, q)]
    expected = np.array([[dual.slow(s[i, j], p[i], q[j]) for j in range(12)] for i in range(12)])
    for found, which in ((value, 0), (slope, 1)):
        size = np.sqrt(np.multiply.outer(own[0][:, which], own[1][:, which]))
        assert (np.abs(found / 1.7 - expected[:, :, which]) <= 1e-11 * size).all()


@pytest.mark.parametrize("name", ["relu", "leaky_relu:0.3", "abs"])
def test_parallel_samples_have_the_angle_zero_or_pi(name):
    """Also where a multiple is rounded."""
    dual, rng = dual_of(name, (), 1e-13, None), np.random.default_rng(4)
    p = rng.uniform(0.1, 10.0, 200)
    for factor in (1.0, 3.0, 1e-3, -1.0, -0.7):
        q = p * factor * factor
        state = State(p * factor, np.ones(200), is_own=True, fan_in=1)
        dual.apply(state, dual.keep(p, 1.0), dual.keep(q, 1.0), 1.0)
        slope = 1.0 - dual.slope
        angle = math.pi if factor > 0 else 0.0
        np.testing.assert_allclose(state.theta, dual.slope + slope**2 * angle / (2 * math.pi), rtol=1e-15, atol=1e-16)
        value = p * factor * (dual.slope + (slope**2 / 2 if factor > 0 else 0.0))
        np.testing.assert_allclose(state.s, value, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("name", ["relu", "abs", "erf", "gelu", "sin"])
def test_a_row_of_zeros_makes_no_nan(name):
    dual, p = dual_of(name, (), 1e-13, None), np.array([0.0, 1.0])
    s = np.array([[0.0, 0.0], [0.0, 0.5]])
    value, slope = applied(dual, s, p, p)
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()
    assert (value[0] == 0.0).all()
    by_other_path = np.array([[dual.slow(s[i, j], p[i], p[j]) for j in (0, 1)] for i in (0, 1)])
    np.testing.assert_allclose(np.stack([value, slope], axis=-1), by_other_path, rtol=1e-14)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_variances_near_the_least_number_make_no_nan(name):
    dual, p = dual_of(name, (), 1e-13, None), np.array([1e-320, 1e-305, 1.0])
    with np.errstate(all="raise", under="ignore"):
        value, slope = applied(dual, np.diag(p), p, p)
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()
