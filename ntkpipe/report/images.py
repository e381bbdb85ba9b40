"""Stored samples that are images, as small PNG files."""

import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.manifest import ArrayRecord

Split = Literal["train", "test"]

_EDGES = (8, 512)  # fewer pixels along an edge show nothing, and more are no thumbnail
_CHANNELS = (1, 3)
_PERCENTILES = (0.5, 99.5)


def image_shape(record: ArrayRecord) -> tuple[int, ...] | None:
    """Shape of a sample as an image; its channels, if there are any, come first or last. None if it looks like none."""
    shape = record.shape
    if len(shape) == 1:  # a guess
        edges = {channels: math.isqrt(shape[0] // channels) for channels in _CHANNELS}
        shape = next(((c, edge, edge) for c, edge in edges.items() if c * edge * edge == shape[0]), shape)
    if len(shape) not in {2, 3} or not (record.dtype.startswith("float") or record.dtype == "uint8"):
        return None
    pixels = shape if len(shape) == 2 else shape[1:] if shape[0] in _CHANNELS else shape[:2]
    is_image = len(shape) == 2 or not {shape[0], shape[2]}.isdisjoint(_CHANNELS)
    return shape if is_image and all(_EDGES[0] <= edge <= _EDGES[1] for edge in pixels) else None


class StoredImages:
    """The samples of a store as images."""

    def __init__(self, store: KernelStore) -> None:
        self._store = store
        inputs = store.manifest.train.inputs
        self._name = next(iter(inputs), "")
        self.holds_samples = f"samples/train/{self._name}" in store.store.arrays
        self.shape = image_shape(inputs[self._name]) if self.holds_samples and len(inputs) == 1 else None

    def why_not(self) -> str | None:
        """One sentence if there are no images, or none if there are."""
        why = "The stored inputs do not look like images"
        if not self.holds_samples:
            why = "The store holds no inputs (it was derived without --samples)"
        return None if self.shape else f"{why}, so samples are told by their numbers and classes only."

    def read(self, split: Split, numbers: Sequence[int]) -> dict[int, bytes]:
        """PNG files of samples by number; none if the store has no images."""
        if self.shape is None:
            return {}
        array = self._store.store.arrays[f"samples/{split}/{self._name}"]
        samples = {number: array.read_samples(number, number + 1)[0] for number in sorted(set(numbers))}
        pixels = {number: _pixels(sample, self.shape) for number, sample in samples.items()}
        low, high = _contrast(list(pixels.values()))
        return {number: _png((image - low) / (high - low)) for number, image in pixels.items()}


def _pixels(sample: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float64]:
    image = sample.reshape(shape).astype(np.float64)
    if image.ndim == 2:
        return image[:, :, None]
    return np.moveaxis(image, 0, -1) if shape[0] in _CHANNELS else image


def _contrast(images: list[NDArray[np.float64]]) -> tuple[float, float]:
    """What becomes black and white: samples may be normalised in any way."""
    if not images:
        return 0.0, 1.0
    low, high = np.nanpercentile(np.concatenate([image.reshape(-1) for image in images]), _PERCENTILES)
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _png(image: NDArray[np.float64]) -> bytes:
    from matplotlib.image import imsave  # an extra, which the page needs in any case

    buffer = io.BytesIO()
    bytes_of = np.rint(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    imsave(buffer, bytes_of if image.shape[2] == 3 else bytes_of.repeat(3, axis=2), format="png")
    return buffer.getvalue()
