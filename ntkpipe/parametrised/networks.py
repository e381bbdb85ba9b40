"""Networks of such layers: the finite ones of infinite networks, fully connected and convolutional ones by options."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntkpipe.base.arguments import checked
from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite import convolution, layers
from ntkpipe.infinite.convolution import as_pair
from ntkpipe.infinite.convolutional import Convolutional
from ntkpipe.infinite.networks import FullyConnected, Network
from ntkpipe.parametrised.layers import Conv2d, Dense, Padding, Pair, Parametrisation, Pointwise, Times

Seed = int | torch.Generator


class Skip(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Inputs and what the inner layers make of them, of one shape."""
        found: Tensor = self.inner(x)
        if found.shape != x.shape:
            raise ConfigError(f"a residual block makes {tuple(found.shape)} of {tuple(x.shape)}; needed equal widths")
        return x + found


def _weights_of(steps: Sequence[Any]) -> Iterator[layers.Dense]:
    """The layers that have weights, convolutions among them."""
    for step in steps:
        if isinstance(step, layers.Residual):
            yield from _weights_of(step.inner)
        elif isinstance(step, layers.Dense):
            yield step


@dataclass
class _Maker:
    """Makes modules of the layers of an infinite network."""

    widths: Sequence[int]  # of each layer with weights
    generator: torch.Generator
    dtype: torch.dtype | None
    parametrisation: Parametrisation | None  # in place of that of the layers
    num_made: int = 0  # layers with weights

    def sequence(self, steps: Sequence[Any], sample: Tensor) -> "OrderedDict[str, nn.Module]":
        """Modules by kind and number; a sample of zeros goes through them and says what the next one must fit."""
        found: OrderedDict[str, nn.Module] = OrderedDict()
        for step in steps:
            kind, module = self.module(step, sample)
            found[f"{kind}_{sum(name.startswith(f'{kind}_') for name in found)}"] = module
            try:
                with torch.no_grad():
                    sample = module(sample)
            except RuntimeError as error:
                shape = tuple(sample.shape[1:])
                raise ConfigError(f"{step.prints()} does not fit samples of shape {shape}: {error}") from None
        return found

    def module(self, step: Any, sample: Tensor) -> tuple[str, nn.Module]:
        """The kind of a layer, and its module."""
        n_in = sample.shape[1]
        match step:
            case convolution.Conv():
                place = {"stride": step.strides, "padding": step.padding}
                return "conv", self.weights(step, Conv2d, n_in, filter=step.filter, **place)
            case layers.Dense():
                return "dense", self.weights(step, Dense, n_in)
            case layers.Activation(function=str(name)):
                return "activation", Pointwise(name)
            case layers.Residual():
                return "residual", Skip(nn.Sequential(self.sequence(step.inner, sample)))
            case convolution.AveragePool():
                return "pool", nn.AvgPool2d(as_pair(step.window), as_pair(step.strides or step.window))
            case convolution.GlobalAveragePool():
                return "mean", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            case layers.Flatten(is_mean=True):
                return "flatten", nn.Flatten()
            case layers.Flatten():
                return "flatten", nn.Sequential(nn.Flatten(), Times(math.sqrt(sample[0, 0].numel())))
        raise ConfigError(f"{step.prints()} has no finite counterpart here; needed weights, named activations or pools")

    def weights(self, step: layers.Dense, make: type[Dense] | type[Conv2d], n_in: int, **options: Any) -> nn.Module:
        """A layer with weights of the next width."""
        place, self.num_made = self.num_made, self.num_made + 1
        module = make(
            n_in,
            self.widths[place],
            W_std=step.W_std,
            b_std=step.b_std,
            bias_init=step.bias_init,
            parametrisation=self.parametrisation or step.parametrisation,
            position="last" if self.num_made == len(self.widths) else "hidden" if place else "first",
            generator=self.generator,
            dtype=self.dtype,
            **options,
        )
        return module.requires_grad_(step.trained)


def _finite(
    network: Network,
    shape: tuple[int, ...],
    widths: Sequence[int],
    seed: Seed,
    dtype: torch.dtype | None,
    parametrisation: Parametrisation | None = None,
) -> nn.Sequential:
    """A network of these widths, the last of which is the number of outputs."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(int(seed))
    maker, sample = _Maker(widths, generator, dtype, parametrisation), torch.zeros(1, *shape, dtype=dtype)
    found = maker.sequence(network.layers, sample)
    if network.enters == "sum":
        found = OrderedDict(inputs=Times(math.sqrt(shape[0])), **found)
    return nn.Sequential(found).eval()


@checked
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
        Numbers of a sample.
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
    network = FullyConnected(len(widths), activation, W_std, b_std, bias_init, first_layer)
    return _finite(network, (n_in,), [*widths, n_out], seed, dtype, parametrisation)


@checked
def cnn(
    shape: Sequence[int],
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
    W_std
        Deviation of weights, one for all layers or one for each convolution and the dense layer.
    b_std
        Deviation of biases, likewise; none is no bias.
    bias_init
        τ, as of :func:`mlp`.
    first_layer
        ``"mean"`` or ``"sum"`` over channels of products of inputs.
    parametrisation
        ``"ntk"``, ``"standard"`` or ``"mup"``; see :class:`ntkpipe.parametrised.Dense`.
    seed
        Seed of the weights, or a generator that goes on.
    dtype
        dtype of the parameters; default torch's.

    Returns
    -------
    A module in eval mode of images (N, C, H, W) with outputs (N, O); parameters are ``conv_0.weight``
    (channels, C, filter, filter), ``conv_0.bias`` (channels,), …, ``dense.weight``, ``dense.bias``.

    Raises
    ------
    ConfigError
        If an option is none of those, lists do not have one value a layer, or filters or pools do not fit the images.
    """
    network = Convolutional(
        len(channels),
        activation,
        W_std,
        b_std,
        filter=filter,
        strides=strides,
        padding=padding,
        pool=pool,
        head=head,
        bias_init=bias_init,
        first_layer=first_layer,
    )
    return _finite(network, tuple(shape), [*channels, n_out], seed, dtype, parametrisation)


@checked
def matching(
    network: Network,
    width: int | Sequence[int] | None = None,
    seed: Seed = 0,
    *,
    n_in: int | Sequence[int],
    n_out: int = 1,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Make a finite network whose kernel converges to that of an infinite one as its width grows.

    Its layers are those of the infinite network, but for layer norms, which are refused; parameters of layers that are
    not trained there have no gradient. The difference of kernels at the start falls like 1/√width (Jacot, Gabriel,
    Hongler 2018, arXiv 1806.07572, Theorem 1; Lee et al. 2019, arXiv 1902.06720).

    Memory: the parameters, ``width²`` numbers for each layer but the first and the last, times the area of filters.

    Parameters
    ----------
    network
        The infinite network: what :mod:`ntkpipe.infinite` makes.
    width
        Units or channels of all hidden layers, or of each. Default those that the network has: in the standard
        parametrisation the kernel depends on them, so there are no others.
    seed
        Seed of the weights, or a generator that goes on.
    n_in
        Numbers of a sample, or (C, H, W) of images.
    n_out
        Outputs O: the kernel converges to ``Θ ⊗ I_O``.
    dtype
        dtype of the parameters; default torch's.

    Returns
    -------
    A module in eval mode of inputs (N, n_in) or (N, C, H, W) with outputs (N, O). Parameters have names such as
    ``dense_0.weight``, by the kind of the layer and its number among those.

    Raises
    ------
    ConfigError
        If a layer has no finite counterpart (a layer norm, an activation without a name), or widths do not fit.
    """
    own = [step.width for step in _weights_of(network.layers)][:-1]
    widths = own if width is None else [width] * len(own) if isinstance(width, int) else list(width)
    if None in widths or len(widths) != len(own):
        raise ConfigError(f"width={width}; needed the units of hidden layers: one number, or {len(own)}, one a layer")
    if any(step.parametrisation == "standard" for step in _weights_of(network.layers)) and widths != own:
        raise ConfigError(f"width={width}; the kernel of this network, in standard parametrisation, is of widths {own}")
    sizes = [size for size in widths if size is not None]
    return _finite(network, (n_in,) if isinstance(n_in, int) else tuple(n_in), [*sizes, n_out], seed, dtype)
