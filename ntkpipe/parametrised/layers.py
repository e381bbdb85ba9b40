"""Layers whose weights and biases are multiplied by constants, so that training has a limit in width."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError, nearest

Parametrisation = Literal["ntk", "standard", "mup"]
Position = Literal["first", "hidden", "last"]
Padding = Literal["same", "valid", "circular"] | int
Pair = int | Sequence[int]  # of both axes, or one each

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "erf": torch.erf,
    "gelu": F.gelu,
    "sin": torch.sin,
    "cos": torch.cos,
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gaussian": lambda x: torch.exp(-x * x),
    "silu": F.silu,
    "elu": F.elu,
    "hardtanh": F.hardtanh,
}
_WITH_NUMBER = {"leaky_relu": F.leaky_relu}  # a number behind a colon is their second argument


class Pointwise(nn.Module):
    """An activation by its name in :mod:`ntkpipe.infinite`, such as ``"relu"`` or ``"leaky_relu:0.1"``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, colon, number = str(name).partition(":")
        known = _WITH_NUMBER if colon else ACTIVATIONS | _WITH_NUMBER
        if self.name not in known:
            shown = ", ".join([*ACTIVATIONS, "leaky_relu:0.1"])
            raise ConfigError(f"activation={name!r}; known are {shown}{nearest(self.name, known)}")
        try:
            self.numbers = [float(number)] if colon else []
        except ValueError:
            raise ConfigError(f"activation={name!r}; needed a number behind the colon") from None

    def forward(self, x: Tensor) -> Tensor:
        """The activation of each entry."""
        found: Tensor = (ACTIVATIONS | _WITH_NUMBER)[self.name](x, *self.numbers)
        return found

    def extra_repr(self) -> str:
        """The name."""
        return ":".join([self.name, *map(str, self.numbers)])


class Times(nn.Module):
    """Multiplies its inputs by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The inputs times the constant."""
        return self.factor * x

    def extra_repr(self) -> str:
        """The constant."""
        return f"{self.factor:.6g}"


class _Layer(nn.Module):
    """``z = k · product(a, weight) + β · bias``, spelled ``β · f((k/β) · a, weight, bias)``.

    So the engine sees parameters as they are, and holds weight and bias as one pairwise term. With ``k · weight`` it
    would multiply Jacobians out, and with ``k · f(a, weight) + β · bias`` the bias would be a term of its own.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        W_std: float,
        b_std: float | None,
        bias_init: float,
        parametrisation: Parametrisation,
        position: Position,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("parametrisation", parametrisation, get_args(Parametrisation)),
            ("position", position, get_args(Position)),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r}; needed one of {', '.join(known)}{nearest(str(value), known)}")
        for size in shape:
            if int(check_number("a size", size, low=1)) != size:
                raise ConfigError(f"a size of {size}; needed an integer")
        for name, number in (("W_std", W_std), ("b_std", b_std or 0.0), ("bias_init", bias_init)):
            check_number(name, number, low=0.0)
        self.parametrisation, self.W_std, self.b_std = parametrisation, W_std, b_std
        fan_in = math.prod(shape[1:])
        # k, β and the deviations at the start: of weights W_std / (k √fan_in), of biases b_std · bias_init / β.
        self.weight_scale, self.bias_scale = 1.0, 1.0
        start, bias_start = W_std / math.sqrt(fan_in), (b_std or 0.0) * bias_init
        if parametrisation == "ntk":
            self.weight_scale, self.bias_scale = start, b_std or 0.0
            start, bias_start = 1.0, bias_init
        elif parametrisation == "mup":
            # Yang, Hu 2021 (arXiv 2011.14522), Table 1, n^-a as the multiplier and n^-b as the deviation at the start:
            # with a = -1/2, 0, 1/2 and b = 1/2 all rates are one (c = 0).
            width = shape[0]
            if position == "first":
                self.weight_scale, start = math.sqrt(width), start / math.sqrt(width)
            elif position == "last":
                self.weight_scale = 1 / math.sqrt(fan_in)
            if position != "last":
                self.bias_scale, bias_start = math.sqrt(width), bias_start / math.sqrt(width)
        has_bias = b_std is not None and self.bias_scale > 0
        weight = _normal(shape, generator, units_last=position == "last") * start
        self.weight = nn.Parameter(weight.to(dtype or torch.get_default_dtype()))
        self.bias: nn.Parameter | None = None
        if has_bias:
            bias = _normal(shape[:1], generator) * bias_start
            self.bias = nn.Parameter(bias.to(dtype or torch.get_default_dtype()))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer does with inputs, weight and bias where both constants are one."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Preactivations of a batch."""
        outer = 1.0 if self.bias is None else self.bias_scale
        inner = self.weight_scale / outer
        found = self.product(x if inner == 1 else inner * x, self.weight, self.bias)
        return found if outer == 1 else outer * found

    def extra_repr(self) -> str:
        """Sizes and options."""
        shape, parametrisation = tuple(self.weight.shape), self.parametrisation
        return f"{shape}, W_std={self.W_std:.6g}, b_std={self.b_std}, parametrisation={parametrisation!r}"


def _normal(shape: tuple[int, ...], generator: torch.Generator | None, *, units_last: bool = False) -> Tensor:
    """N(0, 1) in float64 from a stream of its own: how many numbers one parameter draws moves no other parameter.

    Hidden units come one after the other, also where they are the second axis of a last layer.
    """
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    own = torch.Generator().manual_seed(seed)
    drawn = shape[1::-1] if units_last else shape
    found = torch.randn(drawn, generator=own, dtype=torch.float64)
    return found.T.contiguous() if units_last else found


class Dense(_Layer):
    """A dense layer, ``z = W_std/√n_in · W a + b_std · b`` in the NTK parametrisation, where W, b ~ N(0, 1).

    Standard: ``z = W a + b`` with W ~ N(0, W_std²/n_in), b ~ N(0, b_std²). ``"mup"`` is the maximal-update
    parametrisation (Yang, Hu 2021, arXiv 2011.14522): beside the standard one the last layer starts smaller by √n_in
    and learns n_in times as slowly, and the first layer and biases of hidden ones learn n_out times as fast; all by
    constants, so that one rate serves all parameters.

    Memory: the parameters, ``n_out (n_in + 1)`` numbers.

    Parameters
    ----------
    n_in
        Size of the inputs, which are of shape (…, n_in).
    n_out
        Size of the outputs.
    W_std
        Deviation of weights, ≥ 0.
    b_std
        Deviation of biases; none is no bias, and zero is none in the NTK parametrisation.
    parametrisation
        ``"ntk"``, ``"standard"`` or ``"mup"``.
    bias_init
        τ: deviation of biases at the start, relative to b_std.
    position
        ``"first"``, ``"hidden"`` or ``"last"`` weight layer of a network, which ``"mup"`` must know.
    generator
        Where weights are drawn from; default torch's own.
    dtype
        dtype of the parameters; default torch's.

    Raises
    ------
    ConfigError
        If an option is not one of those, or a number is out of range.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        W_std: float = 1.0,
        b_std: float | None = None,
        parametrisation: Parametrisation = "ntk",
        *,
        bias_init: float = 1.0,
        position: Position = "hidden",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (n_out, n_in),
            W_std=W_std,
            b_std=b_std,
            bias_init=bias_init,
            parametrisation=parametrisation,
            position=position,
            generator=generator,
            dtype=dtype,
        )

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x Wᵀ + b``."""
        return F.linear(x, weight, bias)


class Conv2d(_Layer):
    """A convolution of images (N, C, H, W), ``z = W_std/√fan_in · W * a + b_std · b`` with fan_in = n_in · filter².

    fan_in counts pixels that are padded, too. See :class:`Dense` for parametrisations.

    Memory: the parameters, ``n_out (n_in · filter² + 1)`` numbers.

    Parameters
    ----------
    n_in
        Channels of the inputs.
    n_out
        Channels of the outputs.
    filter
        Edge of the filter, or (height, width).
    W_std, b_std, parametrisation, bias_init, position, generator, dtype
        As those of :class:`Dense`.
    stride
        Step along both axes, or one each.
    padding
        ``"same"``: zeros, such that H/stride pixels come out, rounded up, and the larger half behind, as in JAX and
        TensorFlow; ``"circular"``: as many, of the other edge; ``"valid"``: none; or how many zeros on each side, as in
        ``torch.nn.Conv2d``.

    Raises
    ------
    ConfigError
        If an option is not one of those, or a number is out of range.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        filter: Pair = 3,  # noqa: A002 - as infinite.Convolutional calls it
        W_std: float = 1.0,
        b_std: float | None = None,
        parametrisation: Parametrisation = "ntk",
        *,
        stride: Pair = 1,
        padding: Padding = "same",
        bias_init: float = 1.0,
        position: Position = "hidden",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        edges, steps = ((pair, pair) if isinstance(pair, int) else tuple(pair) for pair in (filter, stride))
        for step in steps:
            check_number("stride", step, low=1)
        if not isinstance(padding, str):
            check_number("padding", padding, low=0)
        elif padding not in ("same", "valid", "circular"):
            raise ConfigError(f"padding={padding!r}; needed 'same', 'valid', 'circular', or zeros on each side")
        super().__init__(
            (n_out, n_in, *edges),
            W_std=W_std,
            b_std=b_std,
            bias_init=bias_init,
            parametrisation=parametrisation,
            position=position,
            generator=generator,
            dtype=dtype,
        )
        self.stride, self.padding = steps, padding

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``W * x + b``."""
        if isinstance(self.padding, int):
            return F.conv2d(x, weight, bias, self.stride, self.padding)
        if self.padding != "valid":
            sides: list[int] = []
            for axis in (-1, -2):
                size, step = x.shape[axis], self.stride[axis]
                total = max((-(-size // step) - 1) * step + weight.shape[axis] - size, 0)
                sides += [total // 2, total - total // 2]
            x = F.pad(x, sides, mode="circular" if self.padding == "circular" else "constant")
        return F.conv2d(x, weight, bias, self.stride)
