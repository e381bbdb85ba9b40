"""Convolutional networks, and that of Arora et al. 2019."""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.activations.catalogue import Given
from ntkpipe.infinite.convolution import AveragePool, Conv, GlobalAveragePool, Pair, as_pair
from ntkpipe.infinite.layers import Activation, Dense, Flatten, Layer, Parametrisation
from ntkpipe.infinite.networks import FirstLayer, Network
from ntkpipe.infinite.pixels import Padding


@dataclass(frozen=True)
class Convolutional(Network):
    """Convolutions, each with an activation behind it, then a head and a dense layer.

    With pixels a, a' of samples x, x' and the mean A over the places δ of a filter (Arora et al. 2019, arXiv 1904.11955,
    Sec. 4; Novak et al. 2019, 1810.05148; Garriga-Alonso et al. 2019, 1808.05587):

        Σ⁰[a, a'] = x_a·x'_a' / C,  A(z)[a, a'] = mean over δ of z[a + δ, a' + δ]
        own = W² A(E) + b²,  Θ ← own + W² A(Ė Θ),  Σ ← W² A(E) + b² τ²,  E, Ė the dual activation of Σ
    """
