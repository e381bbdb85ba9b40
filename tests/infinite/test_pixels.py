"""Sums over windows of pairs of pixels, against windows that torch and NumPy cut out."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.pixels import axis_of, pool_sum, total_sum, window_sum
from ntkpipe.infinite.state import Spare

SIZES = [(6, 6), (5, 4), (1, 1), (3, 7)]
WINDOWS = [(3, 3), (1, 1), (2, 3), (5, 5)]
STRIDES = [(1, 1), (2, 1), (2, 2), (3, 3)]


def random_pairs(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).standard_normal((height, width, height, width, 3))


def own(values: np.ndarray) -> np.ndarray:
    return np.einsum("abab...->ab...", values).copy()


def flipped(values: np.ndarray) -> np.ndarray:
    return values.transpose(2, 3, 0, 1, 4).copy()


def places(sizes, window, strides, padding) -> tuple[np.ndarray, tuple[int, ...]]:
    """The pixel that each place of a window reads at each output, or −1; the sizes of outputs."""
    numbers = np.arange(np.prod(sizes), dtype=np.float64).reshape(sizes) + 1
    if padding in ("same", "circular"):
        more = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sizes, window, strides, strict=True)]
        edges = [(each // 2, each - each // 2) for each in more]
        numbers = np.pad(numbers, edges, mode="wrap" if padding == "circular" else "constant")
    elif padding != "valid":
        numbers = np.pad(numbers, padding)
    outputs = tuple((n - k) // s + 1 for n, k, s in zip(numbers.shape, window, strides, strict=True))
    cut = torch.nn.functional.unfold(torch.from_numpy(numbers)[None, None], window, stride=strides)[0]
    return cut.numpy().astype(int) - 1, outputs


@pytest.mark.parametrize("padding", ["same", "valid", "circular", 1, 2])
@pytest.mark.parametrize("strides", STRIDES)
def test_a_window_sums_what_unfold_cuts_out(strides: tuple[int, int], padding: int | str) -> None:
    tried = 0
    for sizes in SIZES:
        values = random_pairs(*sizes)
        for window in WINDOWS:
            try:
                axes = tuple(axis_of(*each, padding) for each in zip(sizes, window, strides, strict=True))
            except ConfigError:
                continue
            tried += 1
            reads, outputs = places(sizes, window, strides, padding)
            flat = np.pad(values.reshape(*[np.prod(sizes)] * 2, 3), ((0, 1), (0, 1), (0, 0)))  # −1 reads zero
            expected = sum(flat[np.ix_(place, place)] for place in reads).reshape(*outputs, *outputs, 3)
            found = window_sum(values.copy(), axes, Spare())
            assert_allclose(found, expected, atol=1e-13)
            assert_array_equal(window_sum(own(values), axes, Spare()), own(found))
            assert_array_equal(window_sum(flipped(values), axes, Spare()), flipped(found))
    assert tried >= 8


def test_pools_and_totals_are_means_of_all_pairs_of_pixels_with_symmetric_bits() -> None:
    values = random_pairs(6, 5)
    expected = values[:, :4, :, :4].reshape(3, 2, 2, 2, 3, 2, 2, 2, 3).sum(axis=(1, 3, 5, 7))
    halves = (axis_of(6, 2, 2, "valid"), axis_of(5, 2, 2, "valid"))
    found = pool_sum(values, halves, keep_all=True)
    assert_allclose(found, expected, atol=1e-13)
    assert_array_equal(pool_sum(values, halves, keep_all=False), own(found))
    assert_array_equal(pool_sum(flipped(values), halves, keep_all=True), flipped(found))
    overlapping = pool_sum(values, (axis_of(6, 3, 1, "valid"), halves[1]), keep_all=True)
    assert_allclose(overlapping[1, 1, 3, 0], values[1:4, 2:4, 3:6, 0:2].sum(axis=(0, 1, 2, 3)), atol=1e-13)
    assert_allclose(total_sum(values), values.sum(axis=(0, 1, 2, 3)), atol=1e-12)
    assert_array_equal(total_sum(flipped(values)), total_sum(values))
    assert_allclose(total_sum(own(values)), own(values).sum(axis=(0, 1)), atol=1e-13)


@pytest.mark.parametrize(("size", "window", "padding"), [(2, 3, "valid"), (1, 5, 1)])
def test_windows_that_do_not_fit_are_refused(size: int, window: int, padding: int | str) -> None:
    with pytest.raises(ConfigError, match=f"window of {window} does not fit {size} pixels"):
        axis_of(size, window, 1, padding)
