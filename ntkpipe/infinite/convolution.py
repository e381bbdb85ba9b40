"""Layers on pixels: convolutions and pools (Novak et al. 2019, arXiv 1810.05148; Garriga-Alonso et al. 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.images import Images
from ntkpipe.infinite.layers import Dense, Layer
from ntkpipe.infinite.pixels import Axis, Padding, axis_of, pool_sum, total_sum, window_sum
from ntkpipe.infinite.state import Kept, State

Pair = int | Sequence[int]  # one number for height and width, or both


def as_pair(value: Pair, name: str = "") -> tuple[int, int]:
    """Numbers for height and width."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2:
        raise ConfigError(f"{name}={value}; needed one number, or two of height and width")
    return pair[0], pair[1]


def settle_padding(options: Any) -> None:
    """No zeros are valid padding."""
    if options.padding == 0 and options.padding is not False:
        object.__setattr__(options, "padding", "valid")


def _settle_pairs(layer: Layer, *names: str) -> None:
    for name in names:
        object.__setattr__(layer, name, as_pair(getattr(layer, name), f"{layer.prints()}(): {name}"))


@dataclass(frozen=True)
class Conv(Dense):
    """A convolution: what :class:`Dense` does to the mean over the filter of Σ[a + δ, a' + δ] and Θ[a + δ, a' + δ].

    ``padding`` is zeros: ``"same"`` and ``"valid"`` as in TensorFlow and JAX, a number on either side as in torch; or
    ``"circular"``. All places of the filter count in the mean, those in the padding, too.
    """

    filter: Pair = 3
    strides: Pair = 1
    padding: Padding = "same"

    def __post_init__(self) -> None:
        settle_padding(self)
        super().__post_init__()
        _settle_pairs(self, "filter", "strides")

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """See :meth:`Layer.apply`; Σ̇ was multiplied in before, by the activation."""
        assert isinstance(state, Images)
        axes, has_theta = self._axes(state.s.shape[:2]), state.theta.any()  # none before the first layer
        state.s = window_sum(state.s, axes, state.room)
        state.theta = window_sum(state.theta, axes, state.room) if has_theta else np.zeros_like(state.s)
        super().apply(state, left, right)

    @property
    def gain(self) -> float:
        """W² over the places of the filter."""
        return super().gain / prod(as_pair(self.filter))

    def _axes(self, sizes: tuple[int, ...]) -> tuple[Axis, Axis]:
        filters, strides = as_pair(self.filter), as_pair(self.strides)
        height, width = (axis_of(*each, self.padding) for each in zip(sizes, filters, strides, strict=True))
        return height, width

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """See :meth:`Layer.sizes`."""
        return tuple(axis.outputs for axis in self._axes(_pixels(sizes)))

    def operations(self, entries: int) -> float:
        """See :meth:`Layer.operations`: additions of one direction after the other, of Σ and of Θ."""
        return super().operations(entries) + 2.0 * entries * (sum(as_pair(self.filter)) + 1)


@dataclass(frozen=True)
class AveragePool(Layer):
    """The mean over windows of pixels, side by side unless strides say otherwise; a rest at the edge is dropped."""

    window: Pair = 2
    strides: Pair | None = None  # default the window

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strides is None:
            object.__setattr__(self, "strides", self.window)
        _settle_pairs(self, "window", "strides")

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """See :meth:`Layer.apply`: the mean over all pairs of pixels of two windows."""
        assert isinstance(state, Images)
        state.pools -= 1
        axes, area = self._axes(state.s.shape[:2]), prod(as_pair(self.window)) ** 2
        state.s, state.theta = (
            pool_sum(each, axes, keep_all=state.pools > 0) / area for each in (state.s, state.theta)
        )

    def _axes(self, sizes: tuple[int, ...]) -> tuple[Axis, Axis]:
        windows, strides = as_pair(self.window), as_pair(self.strides or self.window)
        height, width = (axis_of(*each, "valid") for each in zip(sizes, windows, strides, strict=True))
        return height, width

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """See :meth:`Layer.sizes`."""
        return tuple(axis.outputs for axis in self._axes(_pixels(sizes)))

    def pools(self) -> int:
        """See :meth:`Layer.pools`."""
        return 1


@dataclass(frozen=True)
class GlobalAveragePool(Layer):
    """The mean over all pixels, that is over all pairs of pixels of two samples."""

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """See :meth:`Layer.apply`."""
        assert isinstance(state, Images)
        state.pools -= 1
        area = prod(state.s.shape[:-1])
        state.s, state.theta = (total_sum(each) / area for each in (state.s, state.theta))

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """See :meth:`Layer.sizes`."""
        _pixels(sizes)
        return ()

    def pools(self) -> int:
        """See :meth:`Layer.pools`."""
        return 1


def _pixels(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes:
        raise ConfigError("there are no pixels here; needed images (n, C, H, W), and Flatten only after it")
    return sizes
