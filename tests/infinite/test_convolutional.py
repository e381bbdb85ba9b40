"""Convolutional networks: values of neural-tangents, the program of Arora et al., cases that are dense networks."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite import Convolutional, FullyConnected
from ntkpipe.infinite.networks import Network

REFERENCE = Path(__file__).parent.parent / "reference"
CASES = json.loads((REFERENCE / "cases.json").read_text())["convolutional"]
ROOT2 = 2**0.5


def images(n: int, channels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, channels, height, width))


def kernels(net: Network, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    rows = net.prepare(left)
    return np.stack(net.tile(rows, rows if right is None else net.prepare(right)))


def network(case: dict[str, Any]) -> Convolutional:
    """The network of a case of `cases.json`."""
    depth = len(case["strides"])
    return Convolutional(
        hidden=depth,
        activation=case["activation"],
        W_std=case["W_std"],
        b_std=case["b_std"],
        strides=case["strides"],
        padding=case["padding"].lower(),
        pool=(*(1,) * (depth - 1), 2 if case["pool"] else 1),
        head=case["head"],
        parametrisation=case["parametrisation"],
        channels=case["channels"],
    )


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_those_of_neural_tangents(name: str) -> None:
    case, net = CASES[name], network(CASES[name])
    inputs, found = np.load(REFERENCE / "inputs.npz"), np.load(REFERENCE / "convolutional.npz")
    # Where pixels are parallel and none are averaged with others, the reference has an angle of a rounded cosine.
    tolerance = 1e-7 if name.startswith("flatten/relu") else 1e-10
    left, right = (np.moveaxis(inputs[case[which] or case["inputs"]], -1, 1) for which in ("inputs", "cross"))
    rows = net.prepare(left)
    for key, columns in ((name, rows), (f"{name}/cross", net.prepare(right))):
        if key in found:
            own = [np.sqrt(np.multiply.outer(*each)) for each in zip(*map(net.diagonal, (rows, columns)), strict=True)]
            assert_allclose(np.stack(net.tile(rows, columns)) / own, found[key] / own, rtol=0, atol=tolerance)


@pytest.mark.parametrize("parametrisation", ["ntk", "standard"])
def test_images_of_one_pixel_make_a_dense_network(parametrisation: str) -> None:
    options = {"hidden": 3, "activation": "relu", "W_std": (1.2, 1.5, 0.9, 1.1), "b_std": (0.3, None, 0.1, 0.4)}
    options |= {"bias_init": 0.7, "trained": frozenset({0, 2, 3}), "parametrisation": parametrisation}
    values = images(5, 6, 1, 1)
    expected = kernels(FullyConnected(**options, widths=(8, 16, 4)), values[:, :, 0, 0])
    for head in ("flatten", "gap"):
        net = Convolutional(**options, filter=1, channels=(8, 16, 4), head=head)
        assert_allclose(kernels(net, values), expected, rtol=1e-12)


def test_constant_images_around_make_a_dense_network() -> None:
    values = images(4, 3, 1, 1) * np.ones((5, 4))
    expected = kernels(FullyConnected(hidden=2, W_std=1.3, b_std=0.2), values[:, :, 0, 0])
    for head in ("flatten", "gap"):
        net = Convolutional(hidden=2, W_std=1.3, b_std=0.2, padding="circular", strides=(1, 2), head=head)
        assert_allclose(kernels(net, values), expected, rtol=1e-12)


def test_an_average_over_all_pixels_sees_no_shift_of_an_image_around() -> None:
    values = images(4, 2, 5, 6)
    shifted = np.roll(values, (2, 3), axis=(2, 3))
    net = Convolutional(hidden=2, W_std=1.3, b_std=0.2, padding="circular", head="gap")
    assert_allclose(kernels(net, values, shifted), kernels(net, values), rtol=1e-13)
    flat = Convolutional(hidden=2, W_std=1.3, b_std=0.2, padding="circular")
    assert not np.allclose(kernels(flat, values, shifted), kernels(flat, values), rtol=1e-2)


def relu_dual(s: np.ndarray, p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cho, Saul 2009, Eqs. 3-6, of rows and columns with variances p and q."""
    sine = np.sqrt(np.maximum(np.multiply.outer(p, q) - s * s, 0))
    angle = np.pi - np.arctan2(sine, s)
    return (sine + angle * s) / (2 * np.pi), angle / (2 * np.pi)


def test_the_covariance_of_a_flat_head_is_that_of_weights_that_are_not_shared() -> None:
    """Locally connected layers: different pixels are independent, and each is a dense layer of its own patch."""
    values = images(3, 2, 4, 5)
    scaled = np.pad(values / 2**0.5, ((0, 0), (0, 0), (1, 1), (1, 1)))
    covariance = np.zeros((2, 4, 5, 3, 3))  # of layers, at pixels, of samples
    for a, b in np.ndindex(4, 5):
        patch = scaled[:, :, a : a + 3, b : b + 3].reshape(3, -1)
        covariance[0, a, b] = 1.3**2 * patch @ patch.T / 9 + 0.2**2
    after = np.zeros((6, 7, 3, 3))
    for a, b in np.ndindex(4, 5):
        own = np.diag(covariance[0, a, b])
        after[a + 1, b + 1] = relu_dual(covariance[0, a, b], own, own)[0]
    for a, b in np.ndindex(4, 5):
        covariance[1, a, b] = 1.3**2 * after[a : a + 3, b : b + 3].mean(axis=(0, 1)) + 0.2**2
    last = np.mean(
        [relu_dual(each, np.diag(each), np.diag(each))[0] for each in covariance[1].reshape(20, 3, 3)], axis=0
    )
    net = Convolutional(hidden=2, W_std=1.3, b_std=0.2)
    assert_allclose(kernels(net, values)[0], 1.3**2 * last + 0.2**2, rtol=1e-12)


def cntk(first: np.ndarray, second: np.ndarray, depth: int, *, is_pooled: bool, fixes_ends: bool) -> float:
    """The program of Arora et al. 2019, for images (C, H, W)."""
    channels, height, width = first.shape

    def sums(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values.reshape(height, width, height, width), 1)
        found = np.zeros((height, width, height, width))
        for d, e in np.ndindex(3, 3):
            found += padded[d : d + height, e : e + width, d : d + height, e : e + width]
        return found.reshape(height * width, height * width)

    def both(u: np.ndarray, v: np.ndarray, variances: list[Any] | None) -> tuple[np.ndarray, list[Any]]:
        sigma = sums(u.reshape(channels, -1).T @ v.reshape(channels, -1))
        theta = np.zeros_like(sigma) if fixes_ends else sigma
        kept = []
        for layer in range(depth - 1):
            kept.append(np.diag(sigma))
            p, q = (kept[-1], kept[-1]) if variances is None else (variances[0][layer], variances[1][layer])
            value, slope = relu_dual(sigma, p, q)
            sigma, theta = 2 * value / 9, 2 * slope / 9 * theta + 2 * value / 9
            if layer < depth - 2:
                sigma, theta = sums(sigma), sums(theta)
        return theta - sigma if fixes_ends else theta, kept

    own = [both(each, each, None)[1] for each in (first, second)]
    theta, _ = both(first, second, own)
    return float(theta.mean() if is_pooled else np.trace(theta))


@pytest.mark.parametrize("head", ["flatten", "gap"])
@pytest.mark.parametrize("fixes_ends", [False, True])
def test_the_preset_of_arora_is_their_program(head: str, fixes_ends: bool) -> None:
    values = images(3, 3, 4, 5)
    trained = {1, 2} if fixes_ends else "all"
    found = kernels(Convolutional(preset="arora", hidden=3, head=head, trained=trained), values)[1]
    expected = [[cntk(u, v, 4, is_pooled=head == "gap", fixes_ends=fixes_ends) for v in values] for u in values]
    assert_allclose(found, expected, rtol=1e-11)


def test_options_are_alike_however_they_are_given() -> None:
    net = Convolutional(hidden=2, W_std=[1.0, 2.0, 3.0], strides=[1, (2, 2)], filter=[3, 3], trained=[0, 2])
    same = Convolutional(hidden=2, W_std=(1.0, 2.0, 3.0), strides=(1, 2), filter=3, trained={2, 0})
    assert net.layers == same.layers
    assert net.canonical() == same.canonical()
    assert json.loads(json.dumps(net.canonical()))["layers"][2]["strides"] == [2, 2]
    assert Convolutional.arora(2) == Convolutional(hidden=2, preset="arora", head="gap")
    assert Convolutional(padding=0).layers == Convolutional(padding="valid").layers
    assert hash(Convolutional(hidden=2, W_std=[1.0, 2.0, 3.0])) == hash(Convolutional(hidden=2, W_std=(1.0, 2.0, 3.0)))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"hidden": 2, "W_std": (1.0, 2.0)}, "2 of W_std; needed 3 for hidden=2"),
        ({"hidden": 2, "strides": (1, 1, 1)}, "3 of strides; needed 2 for hidden=2"),
        ({"pool": (2, 2)}, "2 of pool; needed 1 for hidden=1"),
        ({"head": "mean"}, "head='mean'; needed 'flatten' or 'gap'"),
        ({"padding": "reflect"}, "padding='reflect'; needed 'same', 'valid' or 'circular' or an integer"),
        ({"padding": -1}, "padding=-1; needed an integer from 1"),
        ({"filter": 0}, "filter=0; needed an integer from 1 on"),
        ({"filter": (3, 3, 3)}, "filter=(3, 3, 3); needed one number, or two"),
        ({"strides": 1.5}, "strides=1.5; needed an integer"),
        ({"W_std": "2"}, "W_std='2'; needed a number"),
        ({"hidden": 0}, "hidden=0; needed an integer from 1 on"),
        ({"trained": {5}}, "trained={5}; needed numbers from 0 to 1"),
        ({"parametrisation": "standard"}, "needs channels="),
        ({"preset": "arora", "W_std": 2.0}, "preset='arora' decides W_std"),
        ({"preset": "lee"}, "preset='lee'; needed 'arora'"),
    ],
)
def test_options_that_are_wrong_are_named(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(found)):
        Convolutional(**options)
