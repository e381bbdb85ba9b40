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
from ntkpipe.infinite import images
from ntkpipe.infinite.activations.catalogue import Given
from ntkpipe.infinite.evaluate import HEIGHT, fill, own_state
from ntkpipe.infinite.layers import Activation, Dense, Layer, Parametrisation, advanced
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

    def _sizes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Heights and widths before each layer, of samples of a shape; raises ConfigError for what does not fit."""
        found = [tuple(shape[1:])]
        for number, layer in enumerate(self.layers):
            try:
                found.append(layer.sizes(found[-1]))
            except ConfigError as error:
                raise ConfigError(f"{self._named(number)}: {error}") from None
        if found.pop():
            raise ConfigError("the network ends with pixels; needed Flatten or GlobalAveragePool before its last layer")
        return found

    def _named(self, number: int) -> str:
        return f"layer {number + 1} of {len(self.layers)} ({self.layers[number].prints()})"

    @single_threaded_blas()
    def prepare(self, samples: NDArray[Any]) -> Rows:
        """Check samples, and find their own covariances after each layer."""
        values = self._entered(samples)
        self._sizes((values.shape[-1], *values.shape[1:-1]))
        layers, scale, kept, nngp, ntk = self.layers, self.scale(values.shape[-1]), [], [], []
        for run in runs(len(values), images.pairs_at_once(layers, values) if values.ndim > 2 else HEIGHT):
            state = own_state(layers, values[run], scale)
            with np.errstate(over="ignore", invalid="ignore"):
                kept.append(advanced(layers, state, partial(self._require_finite, state, run.start)))
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
        with single_threaded_blas():
            fill(self.layers, rows, columns, scale=self.scale(rows.samples.shape[-1]), into=into)

    def scale(self, features: int) -> float:
        """What products of inputs are multiplied with."""
        return 1.0 / features if self.enters == "mean" else 1.0

    def diagonal(self, rows: Rows) -> tuple[FloatArray, FloatArray]:
        """NNGP and NTK of each sample with itself, (n,) each."""
        return rows.nngp, rows.ntk

    def slow(self, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
        """NNGP and NTK of one pair by another path: entry by entry in scalars, of samples as they are given."""
        return slow(self.layers, np.asarray(x, np.float64), np.asarray(y, np.float64), is_mean=self.enters == "mean")

    def operations(self, shape: Sequence[int]) -> float:
        """Counted operations of a pair of samples of a shape."""
        copies = 2 if images.pools_of(self.layers) else 1
        entries = [prod(sizes) ** copies for sizes in self._sizes(shape)]
        layers = sum(layer.operations(count) for layer, count in zip(self.layers, entries, strict=True))
        return 2.0 * shape[0] * entries[0] + layers

    def row_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of :class:`Rows` a sample."""
        rows = self.prepare(np.zeros((1, *shape)))
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
            bad = ~np.isfinite(state.by_sample(values)).all(axis=1)
            if bad.any():
                sample = first + int(np.argmax(bad))
                raise ConfigError(
                    f"{self._named(number)}: the {name} of sample {sample} with itself "
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
class Sequential(Network):
    """Layers in order."""

    steps: tuple[Layer, ...]
    first_layer: FirstLayer = "mean"

    def __init__(self, layers: Sequence[Layer], first_layer: FirstLayer = "mean") -> None:
        object.__setattr__(self, "steps", tuple(layers))
        object.__setattr__(self, "first_layer", first_layer)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        return self.steps

    @property
    def enters(self) -> FirstLayer:
        """See :attr:`Network.enters`."""
        return self.first_layer


@dataclass(frozen=True)
class FullyConnected(Network):
    """Dense layers with an activation between any two."""

    hidden: int = 1
    activation: Given | Activation = "relu"
    W_std: float | tuple[float, ...] = 1.0
    b_std: float | tuple[float | None, ...] | None = None
    bias_init: float = 1.0
    first_layer: FirstLayer = "mean"
    parametrisation: Parametrisation = "ntk"
    widths: tuple[int, ...] | None = None
    trained: Literal["all", "last"] | frozenset[int] = "all"

    @property
    def enters(self) -> FirstLayer:
        """See :attr:`Network.enters`."""
        return self.first_layer

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        count = self.hidden + 1
        weights = self.W_std if isinstance(self.W_std, tuple) else (self.W_std,) * count
        biases = self.b_std if isinstance(self.b_std, tuple) else (self.b_std,) * count
        trained = {"all": range(count), "last": (count - 1,)}.get(self.trained, self.trained)  # type: ignore[call-overload]
        act = self.activation if isinstance(self.activation, Activation) else Activation(self.activation)
        found: list[Layer] = []
        for at in range(count):
            width = (*self.widths, None)[at] if self.widths else None
            weight, bias = weights[at], biases[at]
            found += [Dense(weight, bias, self.bias_init, at in trained, self.parametrisation, width), act]
        return tuple(found[:-1])
