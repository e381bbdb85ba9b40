"""Kernels of one pair of samples by another path, for certificates: numbers of Python, sums without rounding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.layers import Activation, Dense, Flatten, Layer, LayerNorm, Residual


@dataclass
class Pair:
    """Σ(x, x'), Σ(x, x), Σ(x', x'), Θ(x, x')."""

    s: float
    p: float
    q: float
    theta: float
    fan_in: int


def slow(layers: Sequence[Layer], x: FloatArray, y: FloatArray, enters: str) -> tuple[float, float]:
    """NNGP and NTK of two samples."""
    count = len(x) if enters == "mean" else 1
    s, p, q = (math.fsum(left * right) / count for left, right in ((x, y), (x, x), (y, y)))
    pair = Pair(s, p, q, 0.0, len(x))
    for layer in layers:
        _step(layer, pair)
    return pair.s, pair.theta


def _step(layer: Layer, pair: Pair) -> None:
    if isinstance(layer, Dense):
        _dense(layer, pair)
    elif isinstance(layer, Activation):
        value, slope = layer.dual.slow(pair.s, pair.p, pair.q)
        pair.s, pair.theta = value, slope * pair.theta
        pair.p, pair.q = (layer.dual.slow(each, each, each)[0] for each in (pair.p, pair.q))
    elif isinstance(layer, LayerNorm):
        norms = math.sqrt(pair.p + layer.eps) * math.sqrt(pair.q + layer.eps)
        pair.s, pair.theta = pair.s / norms, pair.theta / norms
        pair.p, pair.q = pair.p / (pair.p + layer.eps), pair.q / (pair.q + layer.eps)
    elif isinstance(layer, Residual):
        before = Pair(**vars(pair))
        for each in layer.inner:
            _step(each, pair)
        pair.s, pair.p, pair.q = pair.s + before.s, pair.p + before.p, pair.q + before.q
        pair.theta += before.theta
    elif not isinstance(layer, Flatten):
        raise ConfigError(f"{type(layer).__name__} of samples without pixels; give images (n, C, H, W)")


def _dense(layer: Dense, pair: Pair) -> None:
    gain, bias = layer.W_std**2, (layer.b_std or 0.0) ** 2
    own = gain * pair.s + bias
    if layer.parametrisation == "standard":
        own = pair.fan_in * pair.s + (layer.b_std is not None)
    pair.theta = own * layer.trained + gain * pair.theta
    pair.s, pair.p, pair.q = (gain * each + bias * layer.bias_init**2 for each in (pair.s, pair.p, pair.q))
    pair.fan_in = layer.width or 0
