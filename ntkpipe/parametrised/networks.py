"""Networks of such layers: fully connected, convolutional, and the finite ones of infinite networks."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.layers import Activation
from ntkpipe.infinite.networks import FullyConnected
from ntkpipe.parametrised.layers import (
    Conv2d,
    Dense,
    Padding,
    Pair,
    Parametrisation,
    Pointwise,
    Position,
    Scale,
)

Seed = int | torch.Generator


def _generator(seed: Seed) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(int(seed))


def _one_a_layer(name: str, values: Any, count: int) -> list[Any]:
    """An option of each layer, of one for all or as many as there are layers."""
    found = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(found) != count:
        raise ConfigError(f"{name} has {len(found)} values; needed one, or {count}, one a layer")
    return found


def _entrance(first_layer: str, features: int) -> dict[str, nn.Module]:
    """What multiplies inputs before the first layer, which takes means over features, if anything."""
    if first_layer not in ("mean", "sum"):
        raise ConfigError(f"first_layer={first_layer!r}; needed 'mean' or 'sum'")
    return {"inputs": Scale(math.sqrt(features))} if first_layer == "sum" else {}


def _position(layer: int, count: int) -> Position:
    return "last" if layer == count - 1 else "hidden" if layer else "first"


def mlp(
    n_in: int,
    widths: Sequence[int],
    n_out: int,
    *,
    activation: str = "relu",
    W_std: float | Sequence[float] = 1.0,
    b_std: float | Sequence[float | None] | None = None,
    bias_init: float = 1.0,
    first_layer: Literal["mean", "sum"] = "mean",
    parametrisation: Parametrisation = "ntk",
    seed: Seed = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Make a fully connected network, whose kernel converges to that of :class:`ntkpipe.infinite.FullyConnected`.

    In the NTK parametrisation (Jacot, Gabriel, Hongler 2018, arXiv 1806.07572) and the standard one the empirical NTK
    tends to the infinite one like 1/√width; in the maximal-update parametrisation (Yang, Hu 2021, arXiv 2011.14522)
    outputs at the start tend to zero, and features move whatever the width is.

    Memory: the parameters.

    Parameters
    ----------
    n_in
        Numbers of a sample; samples of more axes are flattened.
    widths
        Units of each hidden layer.
    n_out
        Outputs O.
    activation
        Name of the activation, as :mod:`ntkpipe.infinite` has it.
    W_std
        Deviation of weights, one for all layers or one a layer (hidden + 1).
    b_std
        Deviation of biases, likewise; none is no bias.
    bias_init
        τ: deviation of biases at the start, relative to b_std; zero: they start at zero, and are trained.
    first_layer
        ``"mean"``: inputs count as x·x'/n_in; ``"sum"``: as x·x', since they are multiplied by √n_in.
    parametrisation
        ``"ntk"``, ``"standard"`` or ``"mup"``; see :class:`ntkpipe.parametrised.Dense`.
    seed
        Seed of the weights, or a generator that goes on.
    dtype
        dtype of the parameters; default torch's.

    Returns
    -------
    A module in eval mode of inputs (N, n_in) with outputs (N, O); parameters are ``dense_0.weight`` (units, n_in),
    ``dense_0.bias`` (units,), and so on.

    Raises
    ------
    ConfigError
        If an option is none of those, or lists do not have one value a layer.
    """
    sizes = [n_in, *widths, n_out]
    count = len(sizes) - 1
    if parametrisation == "mup" and count == 1:
        raise ConfigError("parametrisation='mup' of a network without hidden layers; needed at least one of widths")
    deviations, biases = _one_a_layer("W_std", W_std, count), _one_a_layer("b_std", b_std, count)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten(), **_entrance(first_layer, n_in))
    generator = _generator(seed)
    for layer in range(count):
        if layer:
            layers[f"activation_{layer - 1}"] = Pointwise(activation)
        layers[f"dense_{layer}"] = Dense(
            sizes[layer],
            sizes[layer + 1],
            deviations[layer],
            biases[layer],
            parametrisation,
            bias_init=bias_init,
            position=_position(layer, count),
            generator=generator,
            dtype=dtype,
        )
    return nn.Sequential(layers).eval()


def cnn(
    shape: tuple[int, int, int],
    channels: Sequence[int],
    n_out: int,
    *,
    activation: str = "relu",
    filter: Pair = 3,  # noqa: A002 - as infinite.Convolutional calls it
    strides: int | Sequence[Pair] = 1,
    padding: Padding = "same",
    pool: int | Sequence[int] = 1,
    head: Literal["flatten", "gap"] = "gap",
    W_std: float | Sequence[float] = 1.0,
    b_std: float | Sequence[float | None] | None = None,
    bias_init: float = 1.0,
    first_layer: Literal["mean", "sum"] = "mean",
    parametrisation: Parametrisation = "ntk",
    seed: Seed = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Make a convolutional network, whose kernel converges to that of :class:`ntkpipe.infinite.Convolutional`.

    A convolution, the activation and an average pool for each entry of ``channels``, then pixels flattened or averaged,
    and a dense layer (Novak et al. 2019, arXiv 1810.05148; Garriga-Alonso et al. 2019, arXiv 1808.05587).

    Memory: the parameters.

    Parameters
    ----------
    shape
        (C, H, W) of the images.
    channels
        Channels of each convolution.
    n_out
        Outputs O.
    activation
        Name of the activation, as :mod:`ntkpipe.infinite` has it.
    filter
        Edge of the filters, or (height, width).
    strides
        Stride of all convolutions, or one or a pair each.
    padding
        ``"same"``, ``"valid"``, ``"circular"``, or zeros on each side; see :class:`ntkpipe.parametrised.Conv2d`.
    pool
        Edge of the average pool behind each activation, or one each; 1 is none.
    head
        ``"gap"``: the mean over pixels; ``"flatten"``: all pixels.
    W_std, b_std, bias_init, first_layer, parametrisation, seed, dtype
        As those of :func:`mlp`; lists have a value for each convolution and one for the dense layer, and the first
        layer's sum is over channels.

    Returns
    -------
    A module in eval mode of images (N, C, H, W) with outputs (N, O); parameters are ``conv_0.weight``
    (channels, C, filter, filter), ``conv_0.bias`` (channels,), …, ``dense.weight``, ``dense.bias``.

    Raises
    ------
    ConfigError
        If an option is none of those, lists do not have one value a layer, or filters or pools do not fit the images.
    """
    count, generator = len(channels), _generator(seed)
    if head not in ("flatten", "gap") or not count:
        raise ConfigError(f"head={head!r}, {count} convolutions; needed 'flatten' or 'gap', and at least one")
    deviations, biases = _one_a_layer("W_std", W_std, count + 1), _one_a_layer("b_std", b_std, count + 1)
    steps, pools = _one_a_layer("strides", strides, count), _one_a_layer("pool", pool, count)
    common: dict[str, Any] = {"bias_init": bias_init, "generator": generator, "dtype": dtype}
    layers: OrderedDict[str, nn.Module] = OrderedDict(_entrance(first_layer, shape[0]))
    for layer, (n_in, n_units) in enumerate(zip([shape[0], *channels], channels, strict=False)):
        layers[f"conv_{layer}"] = Conv2d(
            n_in,
            n_units,
            filter,
            deviations[layer],
            biases[layer],
            parametrisation,
            stride=steps[layer],
            padding=padding,
            position=_position(layer, count + 1),
            **common,
        )
        layers[f"activation_{layer}"] = Pointwise(activation)
        if check_number("pool", pools[layer], low=1) > 1:
            layers[f"pool_{layer}"] = nn.AvgPool2d(pools[layer])
    if head == "gap":
        layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    try:
        with torch.no_grad():
            size = nn.Sequential(layers)(torch.zeros(1, *shape, dtype=dtype)).shape[1]
    except RuntimeError as error:
        fits = f"images of shape {tuple(shape)} do not fit filters of {filter}, strides {steps}, pools {pools}"
        raise ConfigError(f"{fits}, padding {padding!r}: {error}") from None
    layers["dense"] = Dense(size, n_out, deviations[-1], biases[-1], parametrisation, position="last", **common)
    return nn.Sequential(layers).eval()


def matching(
    network: FullyConnected,
    width: int | Sequence[int] | None = None,
    seed: Seed = 0,
    *,
    n_in: int,
    n_out: int = 1,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Make a finite network whose kernel converges to that of an infinite one as its width grows.

    Its options are those of the infinite network; parameters of layers that are not trained there have no gradient. The
    difference of kernels at the start falls like 1/√width (Jacot, Gabriel, Hongler 2018, arXiv 1806.07572, Theorem 1).

    Memory: the parameters, about ``(hidden - 1) width²`` numbers.

    Parameters
    ----------
    network
        The infinite network. A convolutional one has :func:`cnn`.
    width
        Units of all hidden layers, or of each. Default the widths of the infinite network, which those in standard
        parametrisation have; their kernel depends on them, so there are no others.
    seed
        Seed of the weights, or a generator that goes on.
    n_in
        Numbers of a sample.
    n_out
        Outputs O: the kernel converges to ``Θ ⊗ I_O``.
    dtype
        dtype of the parameters; default torch's.

    Returns
    -------
    What :func:`mlp` returns.

    Raises
    ------
    ConfigError
        If the network is not fully connected, widths do not fit it, or its activation is a function without a name.
    """
    if not isinstance(network, FullyConnected):
        raise ConfigError(f"{type(network).__name__}; needed a FullyConnected (see cnn for convolutions)")
    own = network.widths
    if width is None and own is None:
        raise ConfigError("width=None; needed the units of hidden layers, which this network does not have")
    widths = list(own or ()) if width is None else _one_a_layer("width", width, network.hidden)
    if network.parametrisation == "standard" and widths != list(own or ()):
        raise ConfigError(f"width={width}; the kernel of this network, in standard parametrisation, is of widths {own}")
    activation = network.activation
    if isinstance(activation, Activation):
        activation = activation.function
    if not isinstance(activation, str):
        raise ConfigError("the activation is a pair of functions of numpy; needed one that has a name")
    model = mlp(
        n_in,
        widths,
        n_out,
        activation=activation,
        W_std=network.W_std,
        b_std=network.b_std,
        bias_init=network.bias_init,
        first_layer=network.first_layer,
        parametrisation=network.parametrisation,
        seed=seed,
        dtype=dtype,
    )
    count = network.hidden + 1
    trained = (
        range(count) if network.trained == "all" else [count - 1] if network.trained == "last" else network.trained
    )
    for layer in range(count):
        model.get_submodule(f"dense_{layer}").requires_grad_(layer in trained)
    return model
