"""Eigenvalues on the sphere: reference values, what is proved of them, and matrices of points."""

from pathlib import Path

import numpy as np
import pytest

from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite import Convolutional, Dense, FullyConnected, Sequential, sphere_spectrum
from ntkpipe.infinite.matrix import infinite_kernel_matrix

SPHERE = np.load(Path(__file__).parents[1] / "reference" / "sphere.npz")


def relu(hidden: int, b_std: float | None) -> FullyConnected:
    return FullyConnected(hidden, "relu", W_std=2**0.5, b_std=b_std, first_layer="sum")


@pytest.mark.parametrize("dimension", [2, 3, 5, 10])
@pytest.mark.parametrize("hidden", [1, 2, 4])
@pytest.mark.parametrize("b_std", [None, 0.5])
def test_eigenvalues_are_those_of_the_reference(dimension: int, hidden: int, b_std: float | None) -> None:
    case = f"d{dimension}/relu/h{hidden}/b{b_std or 0:g}"
    found = sphere_spectrum(relu(hidden, b_std), dimension, SPHERE["degrees"])
    # Theirs at t = 1 has half of the digits: p and s differ by rounding there, and the angle is of their difference.
    np.testing.assert_allclose(found.trace, SPHERE[f"{case}/at_one"], rtol=1e-7)
    for values, expected, trace in zip((found.nngp, found.ntk), SPHERE[case], found.trace, strict=True):
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-13 * trace)
    np.testing.assert_allclose(found.multiplicity, SPHERE[f"d{dimension}/multiplicity"], rtol=1e-13)


@pytest.mark.parametrize("dimension", [2, 3, 5, 1000])
@pytest.mark.parametrize("radius", [0.3, 2.0])
def test_a_linear_kernel_has_degrees_up_to_one(dimension: int, radius: float) -> None:
    """Of W² x·x'/d + b² these are b² and W² r²/d², d times."""
    found = sphere_spectrum(Sequential([Dense(1.5, 0.5)]), dimension, 6, radius=radius)
    expected = [0.25, (1.5 * radius / dimension) ** 2, 0, 0, 0, 0]
    np.testing.assert_allclose(found.ntk, expected, rtol=0, atol=1e-14 * found.trace[1])
    assert found.trace[1] == pytest.approx(0.25 + (1.5 * radius) ** 2 / dimension, rel=1e-13)


@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize(("dimension", "slack"), [(2, 0.1), (3, 0.15), (5, 0.25)])
def test_eigenvalues_of_relu_networks_fall_like_powers(hidden: int, dimension: int, slack: float) -> None:
    """NTK k^-d, NNGP k^-(d + 2), whatever the depth (Bietti, Bach 2021); the next term is smaller by about d/k."""
    degrees = np.arange(20, 200, 2)
    found = sphere_spectrum(relu(hidden, 0.1), dimension, degrees)
    for values, power in ((found.ntk, dimension), (found.nngp, dimension + 2)):
        slope = np.polyfit(np.log(degrees), np.log(values), 1)[0]
        assert slope == pytest.approx(-power, abs=slack)


def test_eigenvalues_of_erf_networks_fall_faster_than_powers() -> None:
    net = FullyConnected(1, "erf", W_std=1.5, b_std=0.1, first_layer="sum")
    found = sphere_spectrum(net, 3, 17)
    ratios = found.ntk[3::2] / found.ntk[1:-2:2]
    assert (found.ntk > 0).all()
    assert (ratios < 0.3).all()  # of a power they tend to one


@pytest.mark.parametrize("dimension", [2, 3, 10])
def test_odd_degrees_are_zero_without_biases_and_with_one_hidden_layer(dimension: int) -> None:
    bare, deep, biased = (sphere_spectrum(relu(*net), dimension, 8) for net in ((1, None), (2, None), (1, 0.1)))
    np.testing.assert_allclose(bare.ntk[3::2] / bare.trace[1], 0, atol=1e-15)
    for found in (deep, biased):
        assert (found.ntk > 1e-12 * found.trace[1]).all()


@pytest.mark.parametrize(("hidden", "b_std", "zeros"), [(1, None, 8), (1, 0.1, 0), (2, None, 0), (2, 0.1, 0)], ids=str)
def test_antipodal_pairs_are_singular_in_that_case_alone(hidden, b_std, zeros, rng) -> None:
    """Of 12 antipodal pairs in R⁴ the odd part of the kernel has rank 4, where only degree one is odd."""
    x = rng.standard_normal((12, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(infinite_kernel_matrix(relu(hidden, b_std), np.concatenate([x, -x]))[1])
    assert (values < 1e-12 * values[-1]).sum() == zeros
    if zeros:
        assert values[zeros] > 1e-3 * values[-1]


def test_matrices_of_points_on_the_circle_have_these_eigenvalues() -> None:
    """Of n equally spaced points n μ_k, twice each, and what lies beyond n/2 is folded onto them, here that up to 2n.

    The rest is 2 Σ μ_(jn) from j = 3 on, at most 3.2 μ_(2n) where μ falls at least like k^-2.
    """
    count, angle = 512, 2 * np.pi * np.arange(512) / 512
    kernels = infinite_kernel_matrix(relu(2, 0.5), np.stack([np.cos(angle), np.sin(angle)], axis=1))
    found = sphere_spectrum(relu(2, 0.5), 2, 3 * count)
    for matrix, mu in zip(kernels, (found.nngp, found.ntk), strict=True):
        folded = mu[:8] + sum(mu[turn * count - np.arange(8)] + mu[turn * count + np.arange(8)] for turn in (1, 2))
        expected = np.sort(count * np.concatenate([folded, folded[1:]]))[::-1]
        values = np.linalg.eigvalsh(matrix)[::-1][: len(expected)]
        assert (values > expected - 1e-12 * values[0]).all()
        np.testing.assert_allclose(values, expected, rtol=0, atol=3.3 * count * mu[2 * count] + 1e-12 * values[0])


def test_it_prints_and_takes_degrees_by_name() -> None:
    some = sphere_spectrum(relu(1, 0.5), 3, [4, 0, 2])
    every = sphere_spectrum(relu(1, 0.5), 3, 30)
    np.testing.assert_allclose(some.ntk, every.ntk[[4, 0, 2]], rtol=1e-12)
    assert some.degrees == (4, 0, 2)
    assert "in 3 dimensions" in str(every)
    assert "18 degrees more" in str(every)
    assert "9 times" in str(some)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((relu(1, None), 1, 5), "2 dimensions"),
        ((relu(1, None), 3.5, 5), "dimension=3.5; needed an integer"),
        ((relu(1, None), 20_000, 5), "needed a number from 0 to 10000"),
        ((relu(1, None), 3, []), "at least one degree"),
        ((relu(1, None), 3, 0), "at least one degree"),
        ((relu(1, None), 3, [1, -1]), "a degree=-1"),
        ((relu(1, None), 3, [1.5]), "a degree=1.5; needed an integer"),
        ((relu(1, None), 3, 5, 0.0), "radius=0.0"),
        ((relu(1, None), 3, 5, np.nan), "radius=nan"),
        (("relu", 3, 5), "needed a network of ntkpipe.infinite"),
        ((Convolutional(1, "relu"), 3, 5), "needed images"),
        ((FullyConnected(50, "relu", W_std=1e4), 3, 5), "layer 7[89] of 101"),
    ],
)
def test_bad_arguments_are_refused(arguments, words) -> None:
    net, dimension, degrees, *radius = arguments
    with pytest.raises(ConfigError, match=words):
        sphere_spectrum(net, dimension, degrees, **dict(zip(["radius"], radius, strict=False)))
