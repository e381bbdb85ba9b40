"""Models and data of the digits workflows."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

NUM_TRAIN = 1500


def data(flat: bool = True, seed: int = 0, num_train: int = NUM_TRAIN) -> dict[str, Any]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels in [0, 1], shuffled: 1,500 to train, 297 to test.

    Parameters
    ----------
    flat
        Shape (64,) a sample for an MLP, or (1, 8, 8) for a CNN.
    seed
        Of the shuffle.
    num_train
        Only the first ones of those to train with; ``ntkpipe run --grow`` adds the others later.
    """
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images, labels = (digits.data[order] / 16).astype(np.float32), digits.target[order].astype(np.int64)
    images = images if flat else images.reshape(-1, 1, 8, 8)
    return {
        "inputs": images[:num_train],
        "targets": labels[:num_train],
        "test_inputs": images[NUM_TRAIN:],
        "test_targets": labels[NUM_TRAIN:],
    }


def mlp(width: int = 256, seed: int = 0) -> nn.Module:
    """64-width-width-10 with ReLU, at PyTorch's initialisation."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).eval()


def cnn(channels: int = 16, seed: int = 0) -> nn.Module:
    """Two 3 x 3 convolutions with batch normalisation in eval mode, average pooling, a linear layer."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    ]
    return nn.Sequential(*layers).eval()
