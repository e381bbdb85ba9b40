"""The section on which training points predictions are made of, with stored samples that are images."""

import io
import math
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

from ntkpipe.base.targets import Targets
from ntkpipe.learning.gaussian.influence import Influence
from ntkpipe.report.gather import Chapter, Gathered
from ntkpipe.report.parts import Gallery, Part, Thumbnail, number, share
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.manifest import ArrayRecord

_INTRO = (
    "A prediction is a sum over training samples, f(x) = Σᵢ αᵢ K(x, xᵢ), and a term says what a training sample adds "
    "to the output that was predicted (the representer values of Yeh et al. 2018, arXiv 1811.09720). Positive terms "
    "speak for the prediction, negative ones against it. A term is not what would change without the sample; that is "
    "leave-one-out.",
)
_NUM_WRONG, _NUM_RIGHT, _NUM_OTHERS, _NUM_OVERALL = 3, 3, 6, 10
_EDGES = (8, 512)  # of images: fewer pixels along an edge show nothing, and more are no thumbnail
_CHANNELS = (1, 3)
_PERCENTILES = (0.5, 99.5)  # what becomes black and white


def _show(found: Influence, gathered: Gathered) -> tuple[tuple[Part, ...], str | None]:
    """Test samples with the training samples of their largest terms, and those that matter most overall."""
    store = gathered.store
    images = StoredImages(store)
    top, overall = found.top_samples[:, :_NUM_OTHERS], found.most_influential[:_NUM_OVERALL]
    for samples in (top, overall):
        if samples.size and not 0 <= samples.min() <= samples.max() < len(found.mean_size):
            raise ValueError("a sample that does not exist")
    # Reports of older versions saved classes among the options; there are none if targets are no classes.
    classes = found.classes or found.options.get("classes")
    predicted = np.asarray(classes)[found.predicted] if classes else None
    codes = None if gathered.test_targets is None else gathered.test_targets.codes
    shown = _shown(None if predicted is None else found.predicted, codes, len(top))
    tests = images.read("test", shown)
    trains = images.read("train", [*top[shown].ravel().tolist(), *overall.tolist()])

    def test(sample: int) -> Thumbnail:
        said = () if predicted is None else (f"predicted {predicted[sample]}",)
        return _thumbnail("test", sample, tests.get(sample), gathered.test_targets, store.test_targets, *said)

    def train(sample: int, said: str) -> Thumbnail:
        return _thumbnail("training", sample, trains.get(sample), gathered.targets, store.targets, said)

    rows = tuple(
        (
            test(sample),
            tuple(train(one, f"{term:+.3g}") for one, term in zip(top[sample].tolist(), terms, strict=True)),
        )
        for sample, terms in zip(shown, found.top_terms[shown, :_NUM_OTHERS], strict=True)
    )
    mean = float(found.mean_size.mean())
    most = tuple(train(one, f"{found.mean_size[one] / mean:.3g} × mean") for one in overall.tolist())
    parts: tuple[Part, ...] = (
        Gallery("Test samples, and the largest terms of their predictions", _reading(found), rows),
        Gallery(
            "Training samples with the largest terms over the whole test set",
            (
                f"Ordered by the mean size of their terms; a training sample has {number(mean, 3)} on average. Samples "
                "far above that are worth a look: unusual ones, and ones with a wrong label, are often among them.",
            ),
            ((Thumbnail(None, "", ("over all test samples",)), most),),
        ),
    )
    return parts, images.why_not()


INFLUENCE = Chapter("influence", "Most influential training points", _INTRO, _show)


def _reading(found: Influence) -> tuple[str, ...]:
    ridge, unit = found.options.get("ridge"), " mean diagonals" if found.options.get("ridge_scale") else ""
    at = "" if ridge is None else f", at λ = {ridge:.3g}{unit}"
    return (
        f"First a test sample, then the training samples of its largest terms with their values{at}; the first rows "
        "are samples that are predicted wrongly, if there are any. A wrong prediction whose largest terms are of the "
        "wrong class and look alike tells why it is wrong, or that a label is.",
        f"The {found.top_terms.shape[1]} largest terms are {share(found.top_share)} of the sizes of all terms, on "
        "average: the smaller this is, the less a single training sample decides.",
    )


def _shown(predicted: NDArray[np.int64] | None, codes: NDArray[np.int64] | None, num_test: int) -> list[int]:
    """Some that are wrong and some that are right, the first of each class."""
    if predicted is None or codes is None:
        return list(range(min(num_test, _NUM_WRONG + _NUM_RIGHT)))
    is_wrong = predicted != codes
    wrong, right = np.flatnonzero(is_wrong)[:_NUM_WRONG], np.flatnonzero(~is_wrong)
    firsts = right[np.unique(codes[right], return_index=True)[1]]
    return [*map(int, wrong), *map(int, np.sort(firsts)[:_NUM_RIGHT])]


def _thumbnail(
    split: str, sample: int, uri: str | None, targets: Targets | None, given: NDArray[Any] | None, *said: str
) -> Thumbnail:
    lines = [f"no. {sample:,}"]
    if targets is not None and targets.classes is not None and targets.codes is not None:
        code = targets.codes[sample]
        # A class that training does not have goes by what was given.
        name = targets.classes[code] if code >= 0 or given is None else given[sample]
        lines.append(f"class {name}")
    elif targets is not None and targets.matrix.shape[1] == 1:
        lines.append(f"target {number(float(targets.matrix[sample, 0]), 3)}")
    lines += said
    return Thumbnail(uri, f"{split} sample {', '.join(lines)}", tuple(lines))


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

    def read(self, split: str, numbers: Sequence[int]) -> dict[int, str]:
        """URIs of samples by number; none if the store has no images."""
        if self.shape is None or not numbers:
            return {}
        array = self._store.store.arrays[f"samples/{split}/{self._name}"]
        samples = {number: array.read_samples(number, number + 1)[0] for number in sorted(set(numbers))}
        images = {number: _pixels(sample, self.shape) for number, sample in samples.items()}
        # Samples may be normalised in any way.
        low, high = np.nanpercentile(np.concatenate([image.ravel() for image in images.values()]), _PERCENTILES)
        low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
        return {number: _uri((image - low) / (high - low)) for number, image in images.items()}


def _pixels(sample: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float64]:
    image = sample.reshape(shape).astype(np.float64)
    if image.ndim == 2:
        return image[:, :, None]
    return np.moveaxis(image, 0, -1) if shape[0] in _CHANNELS else image


def _uri(image: NDArray[np.float64]) -> str:
    buffer = io.BytesIO()
    bytes_of = np.rint(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    imsave(buffer, bytes_of if image.shape[2] == 3 else bytes_of.repeat(3, axis=2), format="png")
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
