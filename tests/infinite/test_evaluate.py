"""Entries have bits that depend on their two samples alone."""

import numpy as np
import pytest

import ntkpipe
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.infinite import Activation, Dense, FullyConnected, LayerNorm, Residual, Sequential
from ntkpipe.infinite.evaluate import product

RNG = np.random.default_rng(0)
PAIRS = RNG.integers(300, size=(20, 2))
NETS = {
    "relu": FullyConnected(3, "relu", 1.3, 0.1),
    "no bias": FullyConnected(2, "leaky_relu:0.2", 1.5),
    "erf": FullyConnected(2, "erf", 1.3, 0.1, bias_init=0.0),
    "gelu": FullyConnected(2, "gelu", 1.3, 0.1, parametrisation="standard", widths=(16, 8)),
    "sin": FullyConnected(2, "sin", 1.3, 0.1, trained="last"),
    "tanh": FullyConnected(1, "tanh", 1.3, 0.1),
    "blocks": Sequential(
        [Dense(1.1, 0.2), Residual(Activation("abs"), Dense(0.9)), LayerNorm(1e-6), Activation("relu"), Dense()]
    ),
}


def samples(count, features=37):
    x = RNG.standard_normal((count, features))
    x[5], x[7], x[9] = x[2], -x[3], 3.0 * x[4]  # a copy, and parallel ones
    return x


@pytest.mark.parametrize("name", NETS)
def test_a_tile_has_the_bits_of_the_whole_wherever_it_lies(name):
    net, x = NETS[name], samples(90 if name == "tanh" else 700)
    rows = net.prepare(x)
    whole = np.array(net.tile(rows, rows))
    assert np.array_equal(whole, whole.swapaxes(1, 2))
    assert np.array_equal(np.diagonal(whole, axis1=1, axis2=2), net.diagonal(rows))
    for _ in range(6):
        (a, b), (c, d) = (np.sort(RNG.choice(len(x) + 1, 2, replace=False)) for _ in range(2))
        assert np.array_equal(np.array(net.tile(rows[a:b], rows[c:d])), whole[:, a:b, c:d])
    order = RNG.permutation(len(x))
    assert np.array_equal(ntkpipe.infinite_kernel_matrix(net, x[order]), whole[:, order][:, :, order])
    assert np.array_equal(ntkpipe.infinite_kernel_matrix(net, x[:3], x), whole[:, :3])


def test_a_copy_of_a_sample_has_the_entries_of_the_sample():
    net, x = NETS["relu"], samples(40)
    found = ntkpipe.infinite_kernel_matrix(net, x)
    assert np.array_equal(found[:, 5], found[:, 2])
    assert np.array_equal(found[:, 5, 2], found[:, 2, 2])


@pytest.mark.parametrize("features", [1, 3, 20, 255, 256, 784, 4100, 5000])
def test_products_do_not_depend_on_place_or_side(features):
    left, right = RNG.standard_normal((300, features)), RNG.standard_normal((700, features))
    with single_threaded_blas():
        whole = product(left, right)
        assert np.array_equal(product(right, left), whole.T)
        assert np.array_equal(product(left[17:40], right[3:611]), whole[17:40, 3:611])
        order = RNG.permutation(700)
        assert np.array_equal(product(left, right[order]), whole[:, order])
        # One by one, in products of few rows; and of a matrix and itself, of which NumPy would take half.
        assert all(np.array_equal(product(left[i : i + 1], right[j : j + 1])[0, 0], whole[i, j]) for i, j in PAIRS)
        assert np.array_equal(product(left[:256], left[:256]), product(left, left.copy())[:256, :256])
    assert np.abs(whole - left @ right.T).max() <= features * 2.0**-52 * np.abs(left).max() * np.abs(right).max() * 2
