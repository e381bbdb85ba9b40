"""Layers of an infinitely wide network: what each does to covariances Σ and tangent kernels Θ."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from ntkpipe.base.arguments import check_options, options_of, parameters_of, require_known
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import as_real
from ntkpipe.infinite.activations.catalogue import Given, dual_of
from ntkpipe.infinite.activations.dual import Dual
from ntkpipe.infinite.activations.hermite import LEAST_TOLERANCE, Series
from ntkpipe.infinite.state import Kept, State

Parametrisation = Literal["ntk", "standard"]


_CHECKED_ELSEWHERE = {"function", "activation", "kinks", "layers"}  # what an option may not be: functions, negative


class Settled:
    """A frozen dataclass whose options are checked by their annotations; lists become tuples."""

    def __post_init__(self) -> None:
        maker: Any = type(self)
        options = {name: each for name, each in options_of(maker).items() if name not in _CHECKED_ELSEWHERE}
        given = {name: getattr(self, name) for name in options}
        for name, value in check_options(options, given, f"{maker.__name__}()").items():
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)


@dataclass(frozen=True)
class Layer(Settled):
    """One step of a network; equal options make equal layers."""

    def keep(self, state: State) -> Kept:
        """What pairs will need of each sample, by its own state before this layer."""
        return ()

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """Change Σ and Θ of pairs, or of samples with themselves, whose kept parts are given."""
        raise NotImplementedError

    def advance(self, state: State) -> Kept:
        """Change an own state, and return what was kept of it."""
        kept = self.keep(state)
        self.apply(state, kept, kept)
        return kept

    @property
    def gain(self) -> float:
        """What Σ and Θ are multiplied with before all else, by :meth:`State.multiply`."""
        return 1.0

    def canonical(self) -> dict[str, Any]:
        """All options that decide numbers, as JSON has them."""
        return {"layer": type(self).__name__} | {each.name: getattr(self, each.name) for each in fields(self)}

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Height and width of what comes out, () of features; raises ConfigError where such an image does not fit."""
        return sizes

    def pools(self) -> int:
        """How many layers in it need pairs of different pixels."""
        return 0

    def operations(self, entries: int) -> float:
        """Counted additions, or what takes as long, of a pair whose Σ has so many entries."""
        return 4.0 * entries

    def prints(self) -> str:
        """The layer in the words of messages."""
        return type(self).__name__


@dataclass(frozen=True)
class Dense(Layer):
    """z = W_std / √fan_in · W a + b_std · b, or the same in the standard parametrisation, where Θ counts the width."""

    W_std: float = 1.0
    b_std: float | None = None  # None: no bias
    bias_init: float = 1.0  # τ: biases start as N(0, τ²) in units of b_std
    trained: bool = True
    parametrisation: Parametrisation = "ntk"
    width: int | None = None  # which the next layer needs in the standard parametrisation

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.W_std:
            raise ConfigError(f"{self.prints()}(): W_std=0; needed a positive number")

    @property
    def gain(self) -> float:
        """W²."""
        return self.W_std**2

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """Θ ← own + W² Θ, Σ ← W² Σ + b² τ² (Jacot et al. 2018, Thm. 1; Sohl-Dickstein et al. 2020, standard)."""
        state.multiply(self.gain)
        s, theta, bias = state.s, state.theta, (self.b_std or 0.0) ** 2
        if self.trained and self.parametrisation == "standard":
            if not state.fan_in:
                raise ConfigError("the standard parametrisation needs width= of the layer before")
            (own,) = state.scratch(1)
            np.multiply(s, state.fan_in / self.gain, out=own)
            if self.b_std is not None:
                own += 1.0
            theta += own
        shift = bias * self.bias_init**2
        if shift:
            s += shift
        if self.trained and self.parametrisation == "ntk":
            theta += s
            if bias != shift:
                theta += bias - shift
        state.fan_in = self.width or 0


@dataclass(frozen=True)
class Activation(Layer):
    """A function of each unit: a name such as ``"leaky_relu:0.1"``, or a pair (f, df) with its kinks."""

    function: Given = "relu"
    kinks: tuple[float, ...] = ()
    name: str | None = None  # of a pair of functions, which a store needs
    tolerance: float = 1e-13  # of a series, relative to √(V(x, x) V(x', x'))
    dual: Dual = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Activation(): tolerance", self.tolerance, low=LEAST_TOLERANCE)
        kinks = np.unique(as_real("kinks", self.kinks)).tolist()
        object.__setattr__(self, "kinks", tuple(check_number("a kink", each, low=-1e100, high=1e100) for each in kinks))
        object.__setattr__(self, "dual", dual_of(self.function, self.kinks, self.tolerance, self.name))

    def keep(self, state: State) -> Kept:
        """What the dual activation needs of variances."""
        return self.dual.keep(state.variances, state.gain)

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """Σ ← V(Σ), Θ ← V̇(Σ) Θ, both times the gain of the next layer."""
        for strip, first, second in state.strips(left, right):
            self.dual.apply(strip, first, second, state.gain)
        state.is_ahead = state.gain != 1.0

    def operations(self, entries: int) -> float:
        """See :meth:`Layer.operations`."""
        return self.dual.operations * entries

    def canonical(self) -> dict[str, Any]:
        """See :meth:`Layer.canonical`."""
        if not isinstance(self.function, str) and self.name is None:
            raise ConfigError("an activation is a pair of functions without a name; give Activation(f, df, name=…)")
        found: dict[str, Any] = {"layer": "Activation", "function": self.dual.name}
        if isinstance(self.dual, Series):
            found |= {"kinks": list(self.dual.kinks), "tolerance": self.tolerance, "given": self.name}
        return found


@dataclass(frozen=True)
class Residual(Layer):
    """x + inner(x): states add."""

    inner: tuple[Layer, ...] = ()

    def __init__(self, *inner: Layer) -> None:
        object.__setattr__(self, "inner", as_layers(inner, "Residual()"))
        if not inner:
            raise ConfigError("Residual() without layers; needed at least one")

    def advance(self, state: State) -> Kept:
        """See :meth:`Layer.advance`."""
        s, theta = state.s.copy(), state.theta.copy()
        kept = advanced(self.inner, state)
        self._add(state, s, theta)
        return kept

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """See :meth:`Layer.apply`."""
        s, theta = state.s.copy(), state.theta.copy()
        through(self.inner, state, left, right)
        self._add(state, s, theta)

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """See :meth:`Layer.sizes`."""
        found = sizes
        for layer in self.inner:
            found = layer.sizes(found)
        if found != sizes:
            raise ConfigError(f"it turns {said(sizes)} into {said(found)}; needed equal sizes to add")
        return sizes

    def pools(self) -> int:
        """See :meth:`Layer.pools`."""
        return sum(layer.pools() for layer in self.inner)

    def operations(self, entries: int) -> float:
        """See :meth:`Layer.operations`."""
        return 4.0 * entries + sum(layer.operations(entries) for layer in self.inner)

    @staticmethod
    def _add(state: State, s: Any, theta: Any) -> None:
        state.s += s
        state.theta += theta

    def canonical(self) -> dict[str, Any]:
        """See :meth:`Layer.canonical`."""
        return {"layer": "Residual", "inner": [layer.canonical() for layer in self.inner]}


@dataclass(frozen=True)
class LayerNorm(Layer):
    """Units with mean 0 and variance 1 over features: Σ and Θ over √((p + ε)(q + ε))."""

    eps: float = 1e-12

    def keep(self, state: State) -> Kept:
        """1 / √(p + ε)."""
        return (1.0 / np.sqrt(state.variances + self.eps),)

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """See :meth:`Layer.apply`."""
        (scale,) = state.scratch(1)
        np.multiply(*state.spread(left[0], right[0]), out=scale)
        state.s *= scale
        state.theta *= scale


@dataclass(frozen=True)
class Flatten(Layer):
    """Pixels become features: the mean over pixels with themselves."""

    is_mean: bool = True  # or the sum

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """See :meth:`Layer.apply`; nothing where there are no pixels."""
        state.flatten(is_mean=self.is_mean)

    def sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """See :meth:`Layer.sizes`."""
        return ()


def said(sizes: tuple[int, ...]) -> str:
    """Height and width in words."""
    return f"{sizes[0]} × {sizes[1]} pixels" if sizes else "features"


def as_layers(given: Sequence[Any], where: str) -> tuple[Layer, ...]:
    """The layers, those made that are given by their options, as in workflow files; refuses what is none."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        needed = "at least one layer, such as [Dense(), Activation('relu')]"
        raise ConfigError(f"{where}: layers={given!r}; needed {needed}")
    return tuple(_as_layer(each, f"{where}: part {number + 1}") for number, each in enumerate(given))


def _as_layer(value: Any, where: str) -> Layer:
    if isinstance(value, Layer):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("layer"), str):
        needed = "layers, such as Dense() or Activation('relu'), in a file {layer: Activation, function: relu}"
        raise ConfigError(f"{where} is {value!r}; needed {needed}")
    known = {each.__name__: each for each in _kinds(Layer)}
    options: dict[str, Any] = {name: each for name, each in value.items() if name != "layer"}
    require_known([value["layer"]], known, where, "layer")
    maker: Any = known[value["layer"]]
    require_known(options, parameters_of(maker), f"{where}: {maker.__name__}", "option")
    inner = as_layers(options.pop("inner"), where) if "inner" in options else ()
    made: Layer = maker(*inner, **options)
    return made


def _kinds(kind: type[Layer]) -> Iterator[type[Layer]]:
    for each in kind.__subclasses__():
        yield each
        yield from _kinds(each)


def through(layers: Sequence[Layer], state: State, left: Kept, right: Kept) -> None:
    """Take a state of pairs through layers."""
    for layer, after, rows, columns in zip(layers, _gains(layers), left, right, strict=True):
        state.gain = after
        layer.apply(state, rows, columns)
    state.is_ahead = False


def advanced(layers: Sequence[Layer], state: State, seen: Callable[[int], None] = lambda number: None) -> Kept:
    """Take an own state through layers, and return what was kept of it; `seen` is called after each."""
    kept = []
    for number, (layer, after) in enumerate(zip(layers, _gains(layers), strict=True)):
        state.gain = after
        try:
            kept.append(layer.advance(state))
        except ConfigError as error:
            raise ConfigError(f"layer {number + 1} ({layer.prints()}): {error}") from None
        seen(number)
    state.is_ahead = False
    return tuple(kept)


def _gains(layers: Sequence[Layer]) -> list[float]:
    """The gain of the layer behind each."""
    return [*(layer.gain for layer in layers[1:]), 1.0]
