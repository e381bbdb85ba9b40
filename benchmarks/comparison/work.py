"""The rows of the comparison: models, weights, inputs, and the least number of operations of the exact kernel."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_OUTPUTS = 10


@dataclass(frozen=True)
class Work:
    """One row: a kernel of a model.

    Attributes
    ----------
    key, title
        What is typed, and what is printed.
    kind
        ``ntk``, or ``pntk``: the kernel of sum(logits) / sqrt(O).
    num_samples
        N.
    make
        The model, weights not drawn yet.
    shape
        Of one sample.
    """

    key: str
    title: str
    kind: str
    num_samples: int
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def num_covectors(self) -> int:
        """Rows a sample, S."""
        return NUM_OUTPUTS if self.kind == "ntk" else 1

    def model(self) -> nn.Module:
        """The model in eval mode with weights N(0, 1/fan-in), gains 1 + 0.3 N(0, 1) and biases 0.3 N(0, 1)."""
        model, generator = self.make().eval(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
        return model

    def inputs(self) -> Tensor:
        """N standard normal samples."""
        return torch.randn((self.num_samples, *self.shape), generator=torch.Generator().manual_seed(1))

    def covectors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What is pulled back, shape (S, O)."""
        if self.kind == "ntk":
            return torch.eye(NUM_OUTPUTS, dtype=dtype)
        return torch.full((1, NUM_OUTPUTS), NUM_OUTPUTS**-0.5, dtype=dtype)

    def scaled(self, factor: float) -> "Work":
        """The same with fewer samples, a multiple of 8."""
        return replace(self, num_samples=max(8, round(self.num_samples * factor / 8) * 8))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, NUM_OUTPUTS)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(128, NUM_OUTPUTS)),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 convolution beside them where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(hidden + self.shortcut(x))


def resnet18() -> nn.Module:
    blocks, width = [], 64
    for n_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [ResidualBlock(width, n_out, stride), ResidualBlock(n_out, n_out, 1)]
        width = n_out
    stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, NUM_OUTPUTS))


class Transformer(nn.Module):
    """Two encoder layers, mean over tokens, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


_MLP, _CNN, _IMAGE = "MLP 784-1024-1024-10", "CNN 3-32-64-128", (3, 32, 32)

ROWS = {
    work.key: work
    for work in (
        Work("mlp-ntk", f"full NTK, {_MLP}", "ntk", 256, mlp, (784,)),
        Work("mlp-pntk", f"pNTK, {_MLP}", "pntk", 2048, mlp, (784,)),
        Work("cnn-ntk", f"full NTK, {_CNN} on 3x32x32", "ntk", 128, cnn, _IMAGE),
        Work("cnn-pntk", f"pNTK, {_CNN} on 3x32x32", "pntk", 1024, cnn, _IMAGE),
        Work("resnet-pntk", "pNTK, ResNet-18 on 3x32x32", "pntk", 64, resnet18, _IMAGE),
        Work("transformer-pntk", "pNTK, 2-layer transformer on 32 tokens", "pntk", 256, Transformer, (32, 128)),
    )
}


@dataclass(frozen=True)
class _Layer:
    """A product with a weight: T positions, n_in to n_out."""

    positions: int
    n_in: int
    n_out: int
    has_bias: bool

    @property
    def flops(self) -> float:
        """Of one sample, forward."""
        return 2.0 * self.positions * self.n_in * self.n_out


def least_flops(work: Work) -> float:
    """Operations that an exact kernel needs at least, one multiplication and addition counted as two.

    One forward pass; S pull-backs through every layer but the first one's input; then each layer in its cheapest exact
    representation: factors, T^2 (n_in + n_out) a pair, or the Jacobian, T n_in n_out a row and n_in n_out a pair. The
    kernel is symmetric: N (N + 1) / 2 pairs of inputs, NS (NS + 1) / 2 of rows. The last layer's cotangents are
    constant, so only its inputs count. Elementwise work is left out, gains and biases of norms are not.
    """
    layers, attention, others = _layers(work)
    size, width = work.num_samples, work.num_covectors
    pairs, row_pairs = size * (size + 1) / 2, size * width * (size * width + 1) / 2
    forward = sum(layer.flops for layer in layers) + attention
    backward = forward + attention - layers[0].flops  # of attention: two products each for one forward
    total = size * (forward + width * backward) + 2.0 * others * row_pairs
    *hidden, last = layers
    for layer in hidden:
        factors = 2.0 * layer.positions**2 * (layer.n_in * pairs + layer.n_out * row_pairs)
        dense = size * width * layer.flops + 2.0 * (layer.n_in + layer.has_bias) * layer.n_out * row_pairs
        total += min(factors, dense)
    return total + 2.0 * last.n_in * pairs


def _layers(work: Work) -> tuple[list[_Layer], float, int]:
    """Products in the order of execution, operations of attention itself, and parameters of norms."""
    model, layers, attention = work.model(), [], 0.0

    def see(module: nn.Module, arguments: tuple[Tensor, ...], output: object) -> None:
        nonlocal attention
        if isinstance(module, nn.MultiheadAttention):
            positions, width = arguments[0].shape[1], module.embed_dim
            layers.extend((_Layer(positions, width, 3 * width, True), _Layer(positions, width, width, True)))
            attention += 2 * 2.0 * positions**2 * width
        elif isinstance(output, Tensor):
            n_out, n_in = len(module.weight), module.weight[0].numel()
            layers.append(_Layer(output[0].numel() // n_out, n_in, n_out, module.bias is not None))

    for module in _modules(model, nn.Linear, nn.Conv2d, nn.MultiheadAttention):
        module.register_forward_hook(see)
    model(work.inputs()[:1])
    norms = _modules(model, nn.BatchNorm2d, nn.LayerNorm)
    return layers, attention, sum(parameter.numel() for norm in norms for parameter in norm.parameters())


def _modules(model: nn.Module, *types: type[nn.Module]) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, types))
