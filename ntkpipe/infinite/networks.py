"""Networks as sequences of layers, and the fully connected ones of the literature."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.blas import Pool, single_threaded_blas
from ntkpipe.base.errors import ConfigError, DataError, ResourceError
from ntkpipe.base.given import as_real
from ntkpipe.base.resources import format_seconds
from ntkpipe.infinite import images
from ntkpipe.infinite.activations.catalogue import Given
from ntkpipe.infinite.evaluate import HEIGHT, fill, own_state, scratch_bytes
from ntkpipe.infinite.layers import Activation, Dense, Layer, Parametrisation, Settled, advanced, as_layers
from ntkpipe.infinite.slow import slow
from ntkpipe.infinite.state import Kept, Rows, State, size_of

_OPERATION_SECONDS = 5e-10  # of one core, about
_MOST_SECONDS = 24 * 3600.0
_PARTS = 8  # a thread, of images

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
    def prepare(self, samples: object) -> Rows:
        """Check samples, and find their own covariances after each layer."""
        values = self._entered(samples)
        self._sizes((values.shape[-1], *values.shape[1:-1]))
        layers, scale, kept, nngp, ntk = self.layers, self.scale(values.shape[-1]), [], [], []
        for run in runs(len(values), images.pairs_at_once(layers, values) if values.ndim > 2 else HEIGHT):
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                state = own_state(layers, values[run], scale)
                kept.append(advanced(layers, state, partial(self._require_finite, state, run.start)))
            nngp.append(state.s)
            ntk.append(state.theta)
        return Rows(values, _joined(kept), np.concatenate(nngp), np.concatenate(ntk))

    def tile(self, rows: Rows, columns: Rows) -> tuple[FloatArray, FloatArray]:
        """NNGP and NTK of samples, (n, m) each; of a symmetric tile give the same object twice."""
        found = np.empty((2, len(rows), len(columns)))
        self.fill(rows, columns, found)
        return found[0], found[1]

    def fill(self, rows: Rows, columns: Rows, into: FloatArray, pool: Pool | None = None) -> None:
        """The same, into an array (2, n, m), by threads where a pool is given."""
        if rows.samples.shape[1:] != columns.samples.shape[1:]:
            shapes = (each.samples[0].T.shape for each in (rows, columns))
            raise DataError("samples of shapes {} and {}; needed equal ones".format(*shapes))
        layers, scale, is_symmetric = self.layers, self.scale(rows.samples.shape[-1]), rows is columns
        height = HEIGHT if rows.samples.ndim == 2 else -(-len(rows) // (_PARTS * pool.num_threads if pool else 1))

        def work(run: slice) -> None:
            # A symmetric kernel is computed from its diagonal on, and mirrored.
            first = run.start if is_symmetric else 0
            left, right = rows[run], columns[first:]
            is_last = is_symmetric and run.stop == len(rows)
            mirror = into[:, first:, run] if is_symmetric and not is_last else None
            fill(layers, left, left if is_last else right, scale=scale, into=into[:, run, first:], mirror=mirror)

        if pool is None:
            with single_threaded_blas():
                for run in runs(len(rows), height):
                    work(run)
        else:
            pool.each(work, runs(len(rows), height))

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
        entries: list[int] = [prod(sizes) ** copies for sizes in self._sizes(shape)]
        layers = sum(layer.operations(count) for layer, count in zip(self.layers, entries, strict=True))
        return 2.0 * shape[0] * entries[0] + layers

    def require_time(self, shape: Sequence[int], pairs: float, *, force: bool) -> None:
        """Raise ResourceError where pairs of images would take this process more than about a day, unless forced."""
        seconds = _OPERATION_SECONDS * self.operations(shape) * pairs
        if force or len(shape) == 1 or seconds <= _MOST_SECONDS:
            return
        pixels, remedy = shape[1] * shape[2], ""
        each = f"{pixels:,} numbers a pair"
        if images.pools_of(self.layers):
            each = f"pools need all pairs of pixels, {pixels**2:,} numbers a pair of images"
            remedy = ", smaller images, or Flatten in place of pools"
        raise ResourceError(
            f"{pairs:,.0f} pairs of images of {shape[1]} × {shape[2]} pixels take about {format_seconds(seconds)} "
            f"of one core: {each}. Use fewer images{remedy}; or compute_infinite_kernel, on all cores; or force=True"
        )

    def row_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of :class:`Rows` a sample."""
        rows = self.prepare(np.ones((1, *shape)))
        return rows.samples.nbytes + size_of(rows.kept) + 16

    def scratch_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of what a thread computes with beside rows and tiles, about."""
        return images.scratch_bytes(self.layers, shape) if len(shape) > 1 else scratch_bytes(shape[0])

    def _entered(self, samples: object) -> FloatArray:
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
                    f"{self._named(number + state.is_ahead)}: the {name} of sample {sample} with itself "
                    "leaves the range of float64; give smaller W_std, b_std or inputs, or fewer layers"
                )


def as_network(value: object) -> Network:
    """The network that is given; raises ConfigError for what is none."""
    if not isinstance(value, Network):
        raise ConfigError(
            f"net is {type(value).__name__}; needed a network of ntkpipe.infinite, such as FullyConnected(hidden=3)"
        )
    return value


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
        object.__setattr__(self, "steps", as_layers(layers, "Sequential()"))
        object.__setattr__(self, "first_layer", first_layer)
        self.__post_init__()

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
    ``trained`` is ``"last"`` where Θ is that of the last layer alone, or numbers of layers, from 0 to hidden.
    """

    hidden: int = 1
    activation: Given | Activation = "relu"
    W_std: float | Sequence[float] = 1.0
    b_std: float | Sequence[float | None] | None = None
    bias_init: float = 1.0
    first_layer: FirstLayer = "mean"
    parametrisation: Parametrisation = "ntk"
    widths: Sequence[int] | None = None
    trained: Literal["all", "last"] | frozenset[int] = "all"

    def __post_init__(self) -> None:
        if isinstance(self.trained, Collection) and not isinstance(self.trained, str):
            object.__setattr__(self, "trained", frozenset(self.trained))
        super().__post_init__()
        for name, count in (("W_std", self.hidden + 1), ("b_std", self.hidden + 1), ("widths", self.hidden)):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != count:
                raise ConfigError(f"FullyConnected(): {len(value)} of {name}; needed {count} for hidden={self.hidden}")
        if self.parametrisation == "standard" and self.widths is None:
            raise ConfigError("FullyConnected(): the standard parametrisation needs widths= of the hidden layers")
        if not isinstance(self.trained, str) and not self.trained <= set(range(self.hidden + 1)):
            raise ConfigError(f"FullyConnected(): trained={set(self.trained)}; needed numbers from 0 to {self.hidden}")
        assert self.layers  # which checks their options

    @classmethod
    def jacot(cls, hidden: int, beta: float = 0.1, activation: Given | Activation = "relu") -> "FullyConnected":
        """The networks of Jacot, Gabriel, Hongler 2018, of L = hidden + 1: W = 1, b = β."""
        return cls(hidden, activation, 1.0, beta)

    @classmethod
    def lee(
        cls,
        hidden: int,
        W_std: float = 1.5,
        b_std: float = 0.05,
        activation: Given | Activation = "erf",
    ) -> "FullyConnected":
        """Those of Lee et al. 2019 in the NTK parametrisation, with erf."""
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
        given: tuple[Any, Any] = (self.W_std, self.b_std)
        weights, biases = ([*each] if isinstance(each, tuple) else [each] * count for each in given)
        last = range(self.hidden if self.trained == "last" else 0, count)
        trained: Collection[int] = last if isinstance(self.trained, str) else self.trained
        act = act if isinstance(act, Activation) else Activation(act)
        found: list[Layer] = []
        for at, width in enumerate((*(self.widths or (None,) * self.hidden), None)):
            found += [
                Dense(weights[at], biases[at], self.bias_init, at in trained, self.parametrisation, width),
                act,
            ]
        return tuple(found[:-1])
