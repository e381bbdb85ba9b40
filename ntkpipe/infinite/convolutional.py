"""Convolutional networks, that of Arora et al. 2019 among them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal

from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.activations.catalogue import Given
from ntkpipe.infinite.convolution import AveragePool, Conv, GlobalAveragePool, Pair, as_pair, settle_padding
from ntkpipe.infinite.layers import Activation, Dense, Flatten, Layer, Parametrisation, Settled
from ntkpipe.infinite.networks import FirstLayer, Network
from ntkpipe.infinite.pixels import Padding


@dataclass(frozen=True)
class Convolutional(Settled, Network):
    """Convolutions with an activation behind each, then a head and a dense layer; inputs are images (n, C, H, W).

    For pixels a, a' of samples x, x', and A(z)[a, a'] the mean of z[a + δ, a' + δ] over the places δ of a filter:

        Σ⁰[a, a'] = x_a·x'_a' / C;  E = Σ⁰ and Ė = 1 in the first layer, dual activations of Σ in others
        own = W² A(E) + b²,  Θ ← own + W² A(Ė Θ),  Σ ← W² A(E) + b² τ²

    (Novak et al. 2019, arXiv 1810.05148; Garriga-Alonso et al. 2019, 1808.05587; Arora et al. 2019, 1904.11955).
    A flat head takes the mean over pixels with themselves, and needs H·W numbers a pair of samples; a global average
    pool, or pools between, take the mean over all pairs of pixels, and need (H·W)².
    """

    hidden: int = 1  # convolutions
    activation: Given | Activation = "relu"
    W_std: float | Sequence[float] = 1.0  # these two for all layers, or one each: hidden + 1
    b_std: float | Sequence[float | None] | None = None
    filter: Pair = 3
    strides: int | Sequence[Pair] = 1  # of all convolutions, or one each
    padding: Padding = "same"  # see :class:`Conv`
    pool: int | Sequence[int] = 1  # the window of the average pool behind each activation; 1 is none
    head: Literal["flatten", "gap"] = "flatten"
    bias_init: float = 1.0
    first_layer: FirstLayer = "mean"
    parametrisation: Parametrisation = "ntk"
    channels: int | Sequence[int] | None = None  # for the standard parametrisation
    trained: Literal["all", "last"] | frozenset[int] = "all"  # or numbers of layers, from 0 on
    # Arora et al. 2019: ReLU, no biases, 2 / (places of the filter) a layer, the last one included, a first layer that
    # sums channels and filter, and as a flat ("vanilla") head the trace over pixels. `hidden` is their L, depth L + 1.
    preset: Literal["arora"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.trained, Collection) and not isinstance(self.trained, str):
            object.__setattr__(self, "trained", frozenset(self.trained))
        settle_padding(self)
        super().__post_init__()
        decided = {each.name for each in fields(self)} - {"hidden", "filter", "padding", "head", "trained", "preset"}
        for each in fields(self):
            if self.preset and each.name in decided and getattr(self, each.name) != each.default:
                raise ConfigError(f"Convolutional(): preset='arora' decides {each.name}; leave it out, or the preset")
        if self.parametrisation == "standard" and self.channels is None:
            raise ConfigError("Convolutional(): the standard parametrisation needs channels= of the convolutions")
        if not isinstance(self.trained, str) and not self.trained <= set(range(self.hidden + 1)):
            raise ConfigError(f"Convolutional(): trained={set(self.trained)}; needed numbers from 0 to {self.hidden}")
        assert self.layers  # which checks their options

    @classmethod
    def arora(cls, hidden: int, head: Literal["flatten", "gap"] = "gap") -> "Convolutional":
        """The CNTK of Arora et al. 2019: the preset."""
        return cls(hidden, head=head, preset="arora")

    @property
    def enters(self) -> FirstLayer:
        """See :attr:`Network.enters`."""
        return "sum" if self.preset else self.first_layer

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        count, area = self.hidden + 1, prod(as_pair(self.filter, "Convolutional(): filter"))
        weights, biases = self._each("W_std", count), self._each("b_std", count)
        if self.preset:
            weights = (area**0.5, *(2**0.5,) * (count - 2), (2 / area) ** 0.5)
        channels, strides, pools = (self._each(name, self.hidden) for name in ("channels", "strides", "pool"))
        trained: Collection[int] = range(count) if self.trained == "all" else (self.hidden,)
        if not isinstance(self.trained, str):
            trained = self.trained
        activation = self.activation if isinstance(self.activation, Activation) else Activation(self.activation)
        found: list[Layer] = []
        for at in range(count):
            shared = (weights[at], biases[at], self.bias_init, at in trained, self.parametrisation)
            if at == self.hidden:
                found += [GlobalAveragePool() if self.head == "gap" else Flatten(is_mean=self.preset is None)]
                found += [Dense(*shared)]
                break
            found += [Conv(*shared, channels[at], self.filter, strides[at], self.padding), activation]
            if pools[at] != 1:
                found.append(AveragePool(pools[at]))
        return tuple(found)

    def _each(self, name: str, count: int) -> tuple[Any, ...]:
        """The values of an option in each layer."""
        given = getattr(self, name)
        values = given if isinstance(given, tuple) else (given,) * count
        if len(values) != count:
            raise ConfigError(f"Convolutional(): {len(values)} of {name}; needed {count} for hidden={self.hidden}")
        return values
