"""Layers on images: against sums pixel by pixel in scalars, and with bits that depend on two samples alone."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from ntkpipe import infinite_kernel_matrix
from ntkpipe.base.errors import ConfigError, DataError, ResourceError
from ntkpipe.infinite import (
    Activation,
    AveragePool,
    Conv,
    Convolutional,
    Dense,
    Flatten,
    GlobalAveragePool,
    LayerNorm,
    Residual,
    Sequential,
    images,
)
from ntkpipe.infinite.layers import Layer

REFERENCE = Path(__file__).parent.parent / "reference"


def samples(n: int, channels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, channels, height, width))


def conv(**options) -> Conv:
    return Conv(**{"W_std": 1.3, "b_std": 0.4, **options})


RELU, GELU, LAST = Activation("relu"), Activation("gelu"), Dense(1.1, 0.3)
NETWORKS: dict[str, list[Layer]] = {
    "padding in numbers": [conv(padding=1, strides=2), RELU, conv(padding=2), GELU, Flatten(), LAST],
    "sides of a filter": [
        conv(filter=(2, 3), strides=(1, 2)),
        RELU,
        conv(filter=(3, 1)),
        RELU,
        GlobalAveragePool(),
        LAST,
    ],
    "around, with steps": [conv(padding="circular", strides=2), RELU, conv(padding="circular"), RELU, Flatten(), LAST],
    "valid": [conv(padding="valid"), RELU, conv(padding="valid", filter=2), RELU, GlobalAveragePool(), LAST],
    "pools between": [conv(), RELU, AveragePool(2), conv(), RELU, AveragePool((2, 1)), Flatten(), LAST],
    "pools that overlap": [
        conv(padding="valid"),
        RELU,
        AveragePool(2, 1),
        conv(bias_init=0.0),
        GELU,
        GlobalAveragePool(),
        RELU,
        LAST,
    ],
    "residual": [conv(), Residual(RELU, conv()), Residual(LayerNorm(), GELU, conv(filter=1)), RELU, Flatten(), LAST],
    "normalised": [
        conv(),
        LayerNorm(0.1),
        RELU,
        AveragePool(2),
        LayerNorm(0.1),
        conv(),
        RELU,
        GlobalAveragePool(),
        LAST,
    ],
    "series": [conv(filter=(4, 3), padding="valid"), Activation("tanh"), AveragePool(2), Flatten(), LAST],
    "dense on pixels": [Dense(1.2, 0.2), RELU, conv(trained=False), RELU, Flatten(is_mean=False), LAST, RELU, LAST],
    "standard": [
        conv(parametrisation="standard", width=8, strides=2),
        RELU,
        conv(parametrisation="standard", width=5, b_std=None),
        RELU,
        Flatten(),
        Dense(1.1, 0.3, parametrisation="standard"),
    ],
}


@pytest.mark.parametrize("size", [(6, 6), (5, 4)], ids=["even", "odd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_are_those_of_sums_pixel_by_pixel(name: str, size: tuple[int, int]) -> None:
    net = Sequential(NETWORKS[name])
    left, right = samples(2, 3, *size), samples(2, 3, *size, seed=1)
    right[1] = -2 * left[1]
    rows, columns = net.prepare(left), net.prepare(right)
    own = [np.sqrt(np.multiply.outer(*each)) for each in zip(net.diagonal(rows), net.diagonal(columns), strict=True)]
    expected = np.moveaxis([[net.slow(x, y) for y in right] for x in left], -1, 0)
    # An angle near zero or π of entries whose rounding is 10⁻¹⁶ is known to 10⁻⁸.
    assert_allclose(np.stack(net.tile(rows, columns)) / own, expected / own, rtol=0, atol=1e-9)
    assert_allclose(net.diagonal(rows), np.moveaxis([net.slow(x, x) for x in left], -1, 0), rtol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_bits_depend_on_two_images_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, values = Sequential(NETWORKS[name]), samples(9, 2, 6, 5)
    values[7] = values[2]
    rows = net.prepare(values)
    whole = np.stack(net.tile(rows, rows))
    assert_array_equal(whole, whole.swapaxes(1, 2))
    assert_array_equal(whole[:, 7], whole[:, 2])
    assert_array_equal(np.stack(net.diagonal(rows)), np.diagonal(whole, axis1=1, axis2=2))
    assert_array_equal(infinite_kernel_matrix(net, values), whole)
    assert_array_equal(infinite_kernel_matrix(net, values[:2], values), whole[:, :2])
    draw = np.random.default_rng(0)
    for entries, strip in ((1, 1), (1 << 11, 1 << 7), (1 << 12, 1 << 13)):
        monkeypatch.setattr(images, "_ENTRIES", entries)
        monkeypatch.setattr(images, "_STRIP", strip)
        again = net.prepare(values)
        (a, b), (c, d) = np.sort(draw.choice(10, (2, 2), replace=False), axis=1)
        assert_array_equal(np.stack(net.tile(again[a:b], rows[c:d])), whole[:, a:b, c:d])
        assert_array_equal(np.stack(net.tile(net.prepare(values[c:d]), again)), whole[:, c:d])


def test_residual_images_are_those_of_neural_tangents() -> None:
    inputs, found = np.load(REFERENCE / "inputs.npz"), np.load(REFERENCE / "others.npz")
    root2, bias = 2**0.5, 0.1
    block = Residual(RELU, Conv(root2, bias))
    net = Sequential([Conv(root2, bias), block, block, RELU, GlobalAveragePool(), Dense(root2, bias)])
    rows, columns = (net.prepare(np.moveaxis(inputs[name], -1, 1)) for name in ("images", "other_images"))
    assert_allclose(net.tile(rows, rows), found["residual/conv"], rtol=1e-10)
    assert_allclose(net.tile(rows, columns), found["residual/conv/cross"], rtol=1e-10)


def test_pixels_of_zeros_have_no_covariance() -> None:
    net = Sequential([conv(b_std=None), RELU, conv(b_std=None), RELU, GlobalAveragePool(), Dense(1.1)])
    values = samples(3, 1, 6, 6)
    values[:, :, :4] = 0.0
    values[2] = 0.0
    rows = net.prepare(values)
    nngp, ntk = net.tile(rows, rows)
    assert np.isfinite(nngp).all()
    assert np.isfinite(ntk).all()
    assert_array_equal(nngp[2], 0.0)
    assert_array_equal(ntk[2], 0.0)
    assert_allclose((nngp[0, 1], ntk[0, 1]), net.slow(values[0], values[1]), rtol=1e-12)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (
            [conv(padding="valid"), RELU, conv(padding="valid", filter=4), Flatten(), LAST],
            r"layer 3 of 5 \(Conv\).* 4 .* 3 ",
        ),
        ([conv(), RELU, AveragePool(6), Flatten(), LAST], r"layer 3 of 5 \(AveragePool\).* 6 .* 5 "),
        ([Flatten(), conv(), LAST], r"layer 2 of 3 \(Conv\): there are no pixels"),
        ([Flatten(), GlobalAveragePool(), LAST], r"layer 2 of 3 \(GlobalAveragePool\): there are no pixels"),
        ([conv(), Residual(RELU, conv(strides=2)), Flatten()], r"layer 2 of 3 \(Residual\).* 5 × 5 pixels into 3 × 3"),
        ([conv(), RELU], "ends with pixels; needed Flatten or GlobalAveragePool"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_layer(layers: list[Layer], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        Sequential(layers).prepare(samples(2, 1, 5, 5))


def test_what_leaves_float64_is_refused_by_layer_and_sample() -> None:
    values = samples(3, 1, 4, 4)
    values[1] *= 1e3
    with pytest.raises(ConfigError, match=r"layer [45] of 8 .*: the covariance of sample 1 "):
        Convolutional(hidden=3, W_std=1e51, head="gap").prepare(values)
    values[2, 0, 1, 1] = np.nan
    with pytest.raises(DataError, match="sample 2"):
        Convolutional().prepare(values)
    with pytest.raises(ConfigError, match="there are no pixels"):
        Convolutional().prepare(values[:2, 0, 0])


def test_operations_count_what_strides_and_pools_leave() -> None:
    def count(*layers: Layer) -> float:
        return Sequential([*layers, LAST]).operations((1, 8, 8))

    flat, pooled = count(conv(), RELU, Flatten()), count(conv(), RELU, GlobalAveragePool())
    assert 50 < pooled / flat <= 64
    first = count(conv(), GlobalAveragePool())
    assert count(conv(), AveragePool(2), conv(), GlobalAveragePool()) < 1.5 * first
    assert count(conv(), conv(), GlobalAveragePool()) > 1.5 * first


def test_days_of_pairs_of_pixels_are_refused_with_their_time() -> None:
    net = Convolutional(hidden=3, head="gap")
    values = np.zeros((6000, 3, 32, 32), np.float32)
    with pytest.raises(ResourceError, match=r"18,003,000 pairs .* about \d+\.\d h of one core: .* 1,048,576 numbers"):
        infinite_kernel_matrix(net, values)
    net.require_time((3, 32, 32), 18e6, force=True)
    net.require_time((3, 8, 8), 18e6, force=False)
    Convolutional(hidden=3).require_time((3, 32, 32), 18e6, force=False)
