"""Samples for plans of a size at which nobody holds them."""

import numpy as np
import torch


class Generated(torch.utils.data.Dataset[np.ndarray]):
    """Samples that are made when they are read; a plan reads five."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).random(784, dtype=np.float32)
