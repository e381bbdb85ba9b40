"""A run small enough for any test, and ways to stop it, damage its store and compare it with another."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ntkpipe import compute_infinite_kernel, compute_kernel
from ntkpipe.build.life import StoreSink
from ntkpipe.infinite import FullyConnected
from ntkpipe.jacobian.engine import JacobianBlock
from ntkpipe.jacobian.model.device import SIZES
from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.pieces import Piece
from ntkpipe.store.kernel_store import KernelStore


class WithoutRule(nn.Module):
    """A parameter that is used by an operation without a rule, and so is left to vmap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(x, self.offset)


def mlp(seed: int = 0, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).eval()


def inputs(num_samples: int = 18, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_samples, 4)).astype(np.float32)


def compute(path: Path, **changes: Any) -> KernelStore:
    """The run that most tests start from: 18 train and 7 test samples in tiles of 4; 25 tiles."""
    options = {
        "model": mlp(),
        "inputs": inputs(),
        "targets": np.arange(18),
        "test_inputs": inputs(7, seed=1),
        "tile": 4,
        "workers": 2,
        "progress": False,
        "self_check": False,
        **changes,
    }
    return compute_kernel(store=path, **options)


NETWORK = FullyConnected(hidden=2, activation="erf", W_std=1.3, b_std=0.2)


def compute_infinite(path: Path, **changes: Any) -> KernelStore:
    """The same samples in the kernels of a network of infinite width: 50 tiles."""
    options = {
        "net": NETWORK,
        "inputs": inputs(),
        "targets": np.arange(18) % 3,
        "test_inputs": inputs(7, seed=1),
        "tile": 4,
        "workers": 2,
        "progress": False,
        **changes,
    }
    return compute_infinite_kernel(store=path, **options)


def chunks(path: Path) -> dict[str, bytes]:
    """Every chunk of every array: what two equal runs have in common to the last bit."""
    files = (file for file in path.rglob("c/**/*") if file.suffix != ".partial" and file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def times(path: Path) -> dict[str, int]:
    """When each chunk was written."""
    return {name: (path / name).stat().st_mtime_ns for name in chunks(path)}


def with_sizes(monkeypatch: Any, **changes: int) -> None:
    """Cut work on a CPU in other sizes, as in :class:`ntkpipe.jacobian.model.device.Sizes`."""
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], **changes))


class Allowance:
    """Lets a number of kernel tiles be written, then raises instead."""

    def __init__(self, monkeypatch: Any, tiles: int, error: BaseException) -> None:
        self.left = tiles
        self.error = error
        self.write: Callable[..., None] = StoreSink.write
        monkeypatch.setattr(StoreSink, "write", lambda *args: self.spend(*args))

    def spend(self, sink: StoreSink, array: str, index: tuple[int, ...], values: np.ndarray) -> None:
        if array.startswith(("kernel/", "groups/")) and not array.endswith("/test_diagonal"):
            if self.left == 0:
                raise self.error
            self.left -= 1
        self.write(sink, array, index, values)


class LinearEngine:
    """An engine whose Jacobians are the samples themselves: K = x x', exact for small integers. Counts its work."""

    tf32 = False

    def __init__(self, num_covectors: int = 1) -> None:
        self.num_covectors = num_covectors
        self.counts: dict[float, int] = {}
        self.covectors = torch.zeros(1)
        self.width = 0  # numbers of a sample
        self.model = self

    def to_batch(self, arrays: dict[str, torch.Tensor], is_mapping: bool) -> torch.Tensor:
        return arrays["input"]

    def copy(self) -> "LinearEngine":
        return self

    def moved(self, device: torch.device) -> "LinearEngine":
        return self

    def block(self, load: Any, start: int, stop: int, *, subtile: int, batch: int) -> tuple[JacobianBlock, int]:
        x = load(start, stop)
        self.width = x[0].numel()
        for name in x[:, 0].tolist():
            self.counts[name] = self.counts.get(name, 0) + 1
        return self.held(x, subtile), batch

    def held(self, x: torch.Tensor, subtile: int) -> JacobianBlock:
        parts = x.reshape(len(x), self.num_covectors, -1).split(subtile)
        pieces = tuple(Piece(len(part), self.num_covectors, (Dense(part),)) for part in parts)
        return JacobianBlock(pieces, x[:, :2].clone())

    def blank(self, num_samples: int, subtile: int) -> JacobianBlock:
        return self.held(torch.zeros(num_samples, self.width, dtype=torch.float64), subtile)


class DictSink:
    """Chunks go to a dict."""

    def __init__(self) -> None:
        self.chunks: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
        self.writes: list[tuple[str, tuple[int, ...]]] = []

    def exists(self, array: str, index: tuple[int, ...]) -> bool:
        return (array, index) in self.chunks

    def place(self, array: str, index: tuple[int, ...]) -> None:
        return None

    def write(self, array: str, index: tuple[int, ...], values: np.ndarray) -> None:
        self.writes.append((array, index))
        self.chunks[array, index] = values.copy()
