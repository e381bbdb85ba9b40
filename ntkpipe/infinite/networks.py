"""Networks as sequences of layers, and the fully connected ones of the literature."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.errors import ConfigError, DataError
from ntkpipe.base.given import as_real
from ntkpipe.infinite.activations.catalogue import Given
from ntkpipe.infinite.evaluate import HEIGHT, fill, own_state
from ntkpipe.infinite.layers import Activation, Dense, Layer, Parametrisation, Settled, advanced, require_layers
from ntkpipe.infinite.slow import slow
from ntkpipe.infinite.state import Kept, Rows, State, size_of

FirstLayer = Literal["mean", "sum"]


@dataclass(frozen=True)
class Network(ABC):
    """What makes kernels of samples: layers, and how inputs enter."""

    @property
    @abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""

    @property
    def enters(self) -> FirstLayer:
        """Whether Σ⁰ is the mean or the sum over features (channels) of products of inputs."""
        return "mean"

    def canonical(self) -> dict[str, Any]:
        """All options that decide numbers, as JSON has them; raises ConfigError where functions have no name."""
        return {"first_layer": self.enters, "layers": [layer.canonical() for layer in self.layers]}

    def copies(self, shape: Sequence[int]) -> int:
        """Copies of pixel axes that pairs of samples need: none, one (a pixel with itself), or two."""
        if len(shape) == 1:
            return 0
        return 2 if any(getattr(layer, "mixes_pixels", False) for layer in self.layers) else 1

    @single_threaded_blas()
    def prepare(self, samples: NDArray[Any]) -> Rows:
        """Check samples, and find their own covariances after each layer."""
        values = self._entered(samples)
        layers, copies, kept, nngp, ntk = self.layers, self.copies(values.shape[1:]), [], [], []
        for run in runs(len(values), HEIGHT if copies < 2 else 1):
            state = own_state(values[run], copies, self.scale(values.shape[-1]))
            with np.errstate(over="ignore", invalid="ignore"):
                kept.append(advanced(layers, state, partial(self._require_finite, state, run.start)))
            if state.s.ndim > 1:
                raise ConfigError(
                    f"the network ends with pixels {state.s.shape[1:]}; needed Flatten or GlobalAveragePool"
                )
            nngp.append(state.s)
            ntk.append(state.theta)
        return Rows(values, _joined(kept), np.concatenate(nngp), np.concatenate(ntk))

    def tile(self, rows: Rows, columns: Rows) -> tuple[FloatArray, FloatArray]:
        """NNGP and NTK of samples, (n, m) each; of a symmetric tile give the same object twice."""
        found = np.empty((2, len(rows), len(columns)))
        self.fill(rows, columns, found)
        return found[0], found[1]

    def fill(self, rows: Rows, columns: Rows, into: FloatArray) -> None:
        """The same, into an array (2, n, m)."""
        copies, scale = self.copies(rows.samples.shape[1:]), self.scale(rows.samples.shape[-1])
        with single_threaded_blas():
            fill(self.layers, rows, columns, copies=copies, scale=scale, into=into)

    def scale(self, features: int) -> float:
        """What products of inputs are multiplied with."""
        return 1.0 / features if self.enters == "mean" else 1.0

    def diagonal(self, rows: Rows) -> tuple[FloatArray, FloatArray]:
        """NNGP and NTK of each sample with itself, (n,) each."""
        return rows.nngp, rows.ntk

    def slow(self, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
        """NNGP and NTK of one pair by another path: numbers of Python, sums without rounding, angles of two sides."""
        first, second = (self._entered(np.asarray(each)[None])[0] for each in (x, y))
        return slow(self.layers, first, second, self.enters)

    def operations(self, shape: Sequence[int]) -> float:
        """Counted operations of a pair of samples of a shape."""
        size = prod(shape[1:]) ** self.copies(shape)
        return sum((layer.operations(size) for layer in self.layers), 2.0 * shape[0] * size)

    def row_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of :class:`Rows` a sample."""
        rows = self.prepare(np.ones((1, *shape)))
        return rows.samples.nbytes + size_of(rows.kept) + 16

    def _entered(self, samples: NDArray[Any]) -> FloatArray:
        """Inputs in float64, pixels before channels."""
        values = as_real("inputs", samples).astype(np.float64)
        if values.ndim not in (2, 4) or not values.size:
            raise DataError(f"inputs of shape {values.shape}; needed (n, features), or images (n, C, H, W)")
        bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
        if len(bad):
            raise DataError(f"inputs: sample {bad[0]} holds NaN or infinity ({len(bad)} such samples)")
        if values.ndim == 4:
            values = np.moveaxis(values, 1, -1)
        return np.ascontiguousarray(values)

    def _require_finite(self, state: State, first: int, number: int) -> None:
        for name, values in (("covariance", state.s), ("tangent kernel", state.theta)):
            bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
            if bad.any():
                sample, layer = first + int(np.argmax(bad)), self.layers[number].prints()
                raise ConfigError(
                    f"layer {number + 1} of {len(self.layers)} ({layer}): the {name} of sample {sample} with itself "
                    "leaves the range of float64; give smaller W_std, b_std or inputs, or fewer layers"
                )


def _joined(parts: list[Kept]) -> Kept:
    first = parts[0]
    return tuple(
        _joined([each[at] for each in parts])
        if isinstance(one, tuple)
        else np.concatenate([each[at] for each in parts])
        for at, one in enumerate(first)
    )


@dataclass(frozen=True)
class Sequential(Settled, Network):
    """Layers in order, such as ``[Dense(), Activation("relu"), Dense()]``; ``first_layer="sum"``: x·x' is no mean."""

    steps: tuple[Layer, ...]
    first_layer: FirstLayer = "mean"

    def __init__(self, layers: Sequence[Layer], first_layer: FirstLayer = "mean") -> None:
        require_layers(layers, "Sequential()")
        object.__setattr__(self, "steps", tuple(layers))
        object.__setattr__(self, "first_layer", first_layer)
        self.__post_init__()
        if not self.steps:
            raise ConfigError("Sequential() without layers; needed at least one")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        return self.steps

    @property
    def enters(self) -> FirstLayer:
        """See :attr:`Network.enters`."""
        return self.first_layer


@dataclass(frozen=True)
class FullyConnected(Settled, Network):
    """Dense layers with an activation between any two; W_std and b_std are numbers, or hidden + 1 of them.

    ``b_std=None`` is no bias. ``bias_init`` is τ: biases start as N(0, τ²), and with 0 at zero, but are trained.
    ``trained`` is ``"last"`` where Θ is that of the last layer alone, or numbers of layers from 1 to hidden + 1.
    """

    hidden: int = 1
    activation: Given | Activation = "relu"
    W_std: float | Sequence[float] = 1.0
    b_std: float | Sequence[float | None] | None = None
    bias_init: float = 1.0
    first_layer: FirstLayer = "mean"
    parametrisation: Parametrisation = "ntk"
    widths: Sequence[int] | None = None
    trained: Literal["all", "last"] | Sequence[int] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, count in (("W_std", self.hidden + 1), ("b_std", self.hidden + 1), ("widths", self.hidden)):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != count:
                raise ConfigError(f"FullyConnected(): {len(value)} of {name}; needed {count} for hidden={self.hidden}")
        if self.parametrisation == "standard" and self.widths is None:
            raise ConfigError("FullyConnected(): the standard parametrisation needs widths= of the hidden layers")
        if not isinstance(self.trained, str) and not set(self.trained) <= set(range(1, self.hidden + 2)):
            raise ConfigError(f"FullyConnected(): trained={self.trained}; needed numbers from 1 to {self.hidden + 1}")
        assert self.layers  # which checks their options

    @classmethod
    def jacot(cls, hidden: int, beta: float = 0.1, activation: Given | Activation = "relu") -> "FullyConnected":
        """The networks of Jacot, Gabriel, Hongler 2018, of L = hidden + 1: W = 1, b = β."""
        return cls(hidden, activation, 1.0, beta)

    @classmethod
    def lee(
        cls,
        hidden: int,
        W_std: float = 1.5,  # noqa: N803
        b_std: float = 0.05,
        activation: Given | Activation = "erf",
    ) -> "FullyConnected":
        """Those of Lee et al. 2019, with the numbers of their figures."""
        return cls(hidden, activation, W_std, b_std)

    @classmethod
    def arora(cls, hidden: int) -> "FullyConnected":
        """Those of Arora et al. 2019 (1904.11955, Eqs. 7 to 9): ReLU, no bias, Σ⁰ = x·x', c_σ = 2."""
        return cls(hidden, "relu", (1.0, *(2.0**0.5,) * hidden), first_layer="sum")

    @classmethod
    def scikit_ntk(cls, depth: int, bias: float = 0.1) -> "FullyConnected":
        """``NeuralTangentKernel(depth, bias)`` of scikit-ntk, which divides by (depth + 1)(bias² + 1)."""
        # A factor of the last layer's W² and b² is one of both kernels.
        last = ((depth + 1) * (bias**2 + 1.0)) ** -0.5
        weights, biases = (1.0, *(2.0**0.5,) * depth), (bias,) * (depth + 1)
        weights, biases = ((*each[:-1], each[-1] * last) for each in (weights, biases))
        return cls(depth, "relu", weights, biases, bias_init=0.0, first_layer="sum")

    @property
    def enters(self) -> FirstLayer:
        """See :attr:`Network.enters`."""
        return self.first_layer

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        count, act = self.hidden + 1, self.activation
        weights, biases = ([*each] if isinstance(each, tuple) else [each] * count for each in (self.W_std, self.b_std))
        every = range(count if self.trained == "last" else 1, count + 1)
        trained = self.trained if isinstance(self.trained, tuple) else every
        act = act if isinstance(act, Activation) else Activation(act)
        found: list[Layer] = []
        for at, width in enumerate((*(self.widths or (None,) * self.hidden), None)):
            found += [
                Dense(weights[at], biases[at], self.bias_init, at + 1 in trained, self.parametrisation, width),
                act,
            ]
        return tuple(found[:-1])
