"""Model and data of the CIFAR-10 workflows."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

VARIABLE = "NTKPIPE_CIFAR10"
ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
RECORDS_PER_FILE = 10_000
NUM_CLASSES = 10
SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32

# Of the train set's pixels in [0, 1], for each channel.
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)[:, None, None]
STD = np.array([0.2470, 0.2435, 0.2616], np.float32)[:, None, None]


@dataclass(frozen=True)
class Images:
    """Images as bytes, normalised when they are read: a map-style data set that needs a quarter of the memory.

    Attributes
    ----------
    pixels
        Shape (n, 3, 32, 32), uint8.
    """

    pixels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> NDArray[np.float32]:
        return (self.pixels[i] / np.float32(255) - MEAN) / STD


def data(
    folder: str | None = None,
    num_train: int = 50_000,
    num_test: int = 10_000,
    records_per_file: int = RECORDS_PER_FILE,
) -> dict[str, Any]:
    """CIFAR-10 from the files of its binary version, in their order, which is random; (3, 32, 32) a sample.

    The Python version of the data set is not read: its files are pickles, and unpickling runs what they say.

    Parameters
    ----------
    folder
        ``cifar-10-batches-bin`` or the folder that holds it; default the environment variable NTKPIPE_CIFAR10.
    num_train, num_test
        The first images of the five train files and of the test file; without test images if that is 0.
    records_per_file
        What a complete file holds.

    Raises
    ------
    FileNotFoundError
        If the data set is not there.
    ValueError
        If a file is not complete, holds something else, or has fewer images than asked for.
    """
    if num_train < 1:
        raise ValueError(f"num_train={num_train}; needed at least one train image")
    home = _find(folder)
    images, labels = _read([home / name for name in TRAIN_FILES], num_train, records_per_file)
    made = {"inputs": images, "targets": labels}
    if num_test:
        made["test_inputs"], made["test_targets"] = _read(
            [home / name for name in TEST_FILES], num_test, records_per_file
        )
    return made


def _find(folder: str | None) -> Path:
    """The folder with the files."""
    given = folder or os.environ.get(VARIABLE)
    how = (
        f"download {ADDRESS}, unpack it, and give the path of its folder {FOLDER} as the environment variable "
        f"{VARIABLE} or as data.arguments.folder"
    )
    if not given:
        raise FileNotFoundError(f"CIFAR-10 is not part of this repository: {how}")
    path = Path(given).expanduser()
    for candidate in (path, path / FOLDER):
        if (candidate / TRAIN_FILES[0]).exists():
            return candidate
    if any((candidate / "data_batch_1").exists() for candidate in (path, path / "cifar-10-batches-py")):
        raise FileNotFoundError(
            f"{path} holds the Python version of CIFAR-10, which is not read, since unpickling runs what a file says. "
            f"For the binary version, {how}"
        )
    raise FileNotFoundError(f"no {TRAIN_FILES[0]} in {path} or {path / FOLDER}: {how}")


def _read(files: list[Path], count: int, records_per_file: int) -> tuple[Images, NDArray[np.int64]]:
    """The first ``count`` records of files that follow each other; those that are not needed are not opened."""
    if not 0 <= count <= len(files) * records_per_file:
        held = len(files) * records_per_file
        raise ValueError(f"{count:,} images were asked for; {files[0].name} to {files[-1].name} hold {held:,}")
    records = np.empty((count, RECORD_BYTES), np.uint8)
    for start in range(0, count, records_per_file):
        path = files[start // records_per_file]
        _check_size(path, records_per_file)
        part = records[start : start + records_per_file]
        part[:] = np.fromfile(path, np.uint8, count=part.size).reshape(part.shape)
        wrong = np.flatnonzero(part[:, 0] >= NUM_CLASSES)
        if len(wrong):
            raise ValueError(
                f"{path}: record {wrong[0]} has the label {part[wrong[0], 0]}; needed 0 to {NUM_CLASSES - 1}, so this "
                "is another data set or a damaged file"
            )
    return Images(records[:, 1:].reshape(-1, *SHAPE)), records[:, 0].astype(np.int64)


def _check_size(path: Path, num_records: int) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, though others of its data set are there; unpack {ADDRESS} again")
    found, needed = path.stat().st_size, num_records * RECORD_BYTES
    if found != needed:
        raise ValueError(
            f"{path} holds {found:,} bytes; needed {needed:,}: {num_records:,} records of {RECORD_BYTES:,} bytes, each "
            f"a label and 3 x 32 x 32 pixels. Unpack {ADDRESS} again"
        )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a way around them [1]_.

    References
    ----------
    .. [1] He, Zhang, Ren, Sun (2016). Deep Residual Learning for Image Recognition. CVPR. arXiv:1512.03385.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(z + self.shortcut(x))


def resnet18(width: int = 64, seed: int = 0) -> nn.Module:
    """ResNet-18 for 32 x 32 images, in eval mode: a 3 x 3 stem of stride 1, no max pooling, 11.2 M parameters.

    Convolutions are drawn as He and others did (normal, variance 2 / fan-out), the last layer as PyTorch does. Batch
    normalisation has its initial statistics, mean 0 and variance 1, unless a checkpoint is loaded.

    Parameters
    ----------
    width
        Channels of the first of four stages; each further one has twice as many.
    seed
        Of the initialisation.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(4):
        wider = width * 2**stage
        layers += [BasicBlock(channels, wider, 1 if stage == 0 else 2), BasicBlock(wider, wider, 1)]
        channels = wider
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, NUM_CLASSES))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.eval()
