"""Both kernels of one pair of samples by scalars: pixel by pixel, asked for from the last layer to the inputs."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from numpy.typing import NDArray

from ntkpipe.infinite.convolution import AveragePool, Conv, GlobalAveragePool, as_pair
from ntkpipe.infinite.layers import Activation, Dense, Flatten, Layer, LayerNorm, Residual
from ntkpipe.infinite.pixels import Padding

Pixel = tuple[int, ...]  # (row, column), or () of features


@dataclass(frozen=True)
class Entries:
    """Σ and Θ of a pixel of sample i and one of sample j, i and j being 0 or 1."""

    at: Callable[[int, int, Pixel, Pixel], tuple[float, float]]
    sizes: tuple[int, ...]  # height and width, or () of features
    fan_in: int

    def variance(self, sample: int, pixel: Pixel) -> float:
        """Σ of a pixel with itself."""
        return self.at(sample, sample, pixel, pixel)[0]

    def pixels(self) -> Iterator[Pixel]:
        """All pixels."""
        return product(*map(range, self.sizes))


def slow(layers: Sequence[Layer], first: NDArray[Any], second: NDArray[Any], *, is_mean: bool) -> tuple[float, float]:
    """NNGP and NTK of two samples, (features,) or (C, H, W); Σ⁰ is the mean or the sum over features or channels."""
    samples = (first.tolist(), second.tolist())

    def at(i: int, j: int, a: Pixel, b: Pixel) -> tuple[float, float]:
        values = zip(*(_features(samples[k], pixel) for k, pixel in ((i, a), (j, b))), strict=True)
        return math.fsum(u * v for u, v in values) / (len(first) if is_mean else 1), 0.0

    entries = Entries(cache(at), first.shape[1:], len(first))
    for layer in layers:
        entries = _after(layer, entries)
    return entries.at(0, 1, (), ())


def _features(sample: Any, pixel: Pixel) -> list[float]:
    return [channel[pixel[0]][pixel[1]] for channel in sample] if pixel else sample


def _after(layer: Layer, below: Entries) -> Entries:
    """What a layer makes of entries."""
    match layer:
        case Residual():
            inner = below
            for each in layer.inner:
                inner = _after(each, inner)
            return replace(inner, at=cache(lambda *where: _sum([below.at(*where), inner.at(*where)])))
        case Activation():
            return replace(below, at=cache(lambda *where: _activated(layer, below, *where)))
        case LayerNorm():
            return replace(below, at=cache(lambda *where: _normalised(layer, below, *where)))
        case Conv():
            return _dense(layer, _convolved(layer, below))
        case Dense():
            return _dense(layer, below)
        case Flatten():
            area = math.prod(below.sizes)
            count = area if layer.is_mean else 1
            at = cache(lambda i, j, *_: _mean([below.at(i, j, a, a) for a in below.pixels()], count))
            return Entries(at, (), below.fan_in * area)
        case GlobalAveragePool():
            both = list(product(below.pixels(), repeat=2))
            at = cache(lambda i, j, *_: _mean([below.at(i, j, a, b) for a, b in both], len(both)))
            return Entries(at, (), below.fan_in)
        case AveragePool():
            return _pooled(layer, below)
    raise NotImplementedError(type(layer).__name__)


def _sum(parts: list[tuple[float, float]]) -> tuple[float, float]:
    return math.fsum(s for s, _ in parts), math.fsum(theta for _, theta in parts)


def _mean(parts: list[tuple[float, float]], count: int) -> tuple[float, float]:
    s, theta = _sum(parts)
    return s / count, theta / count


def _activated(layer: Activation, below: Entries, i: int, j: int, a: Pixel, b: Pixel) -> tuple[float, float]:
    s, theta = below.at(i, j, a, b)
    value, slope = layer.dual.slow(s, below.variance(i, a), below.variance(j, b))
    return value, slope * theta


def _normalised(layer: LayerNorm, below: Entries, i: int, j: int, a: Pixel, b: Pixel) -> tuple[float, float]:
    s, theta = below.at(i, j, a, b)
    scale = math.sqrt(below.variance(i, a) + layer.eps) * math.sqrt(below.variance(j, b) + layer.eps)
    return s / scale, theta / scale


def _dense(layer: Dense, below: Entries) -> Entries:
    gain, bias = layer.W_std**2, (layer.b_std or 0.0) ** 2

    def at(*where: Any) -> tuple[float, float]:
        s, theta = below.at(*where)
        own = gain * s + bias
        if layer.parametrisation == "standard":
            own = below.fan_in * s + (layer.b_std is not None)
        return gain * s + bias * layer.bias_init**2, own * layer.trained + gain * theta

    return Entries(cache(at), below.sizes, layer.width or 0)


def _convolved(layer: Conv, below: Entries) -> Entries:
    filters, strides = as_pair(layer.filter), as_pair(layer.strides)
    befores, sizes = zip(
        *(_padded(*each, layer.padding) for each in zip(below.sizes, filters, strides, strict=True)), strict=True
    )

    def read(pixel: Pixel, place: Pixel) -> Pixel | None:
        found = [at * stride + k - before for at, stride, k, before in zip(pixel, strides, place, befores, strict=True)]
        if layer.padding == "circular":
            return tuple(at % size for at, size in zip(found, below.sizes, strict=True))
        return tuple(found) if all(0 <= at < size for at, size in zip(found, below.sizes, strict=True)) else None

    def at(i: int, j: int, a: Pixel, b: Pixel) -> tuple[float, float]:
        reads = [(read(a, place), read(b, place)) for place in product(*map(range, filters))]
        return _mean([below.at(i, j, u, v) for u, v in reads if u is not None and v is not None], len(reads))

    return Entries(cache(at), sizes, below.fan_in * math.prod(filters))


def _padded(size: int, window: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Padding before the first pixel, and the number of outputs."""
    if padding == "valid":
        return 0, len(range(0, size - window + 1, stride))
    if isinstance(padding, int):
        return padding, len(range(0, size + 2 * padding - window + 1, stride))
    starts = range(0, size, stride)
    return max(starts[-1] + window - size, 0) // 2, len(starts)


def _pooled(layer: AveragePool, below: Entries) -> Entries:
    windows, steps = as_pair(layer.window), as_pair(layer.strides or layer.window)
    sizes = tuple(len(range(0, n - k + 1, s)) for n, k, s in zip(below.sizes, windows, steps, strict=True))

    def window(pixel: Pixel) -> list[Pixel]:
        sides = zip(pixel, steps, windows, strict=True)
        return list(product(*(range(at * step, at * step + size) for at, step, size in sides)))

    def at(i: int, j: int, a: Pixel, b: Pixel) -> tuple[float, float]:
        return _mean([below.at(i, j, u, v) for u in window(a) for v in window(b)], math.prod(windows) ** 2)

    return Entries(cache(at), sizes, below.fan_in)
