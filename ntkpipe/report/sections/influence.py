"""The section on which training points predictions are made of."""

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.learning.gaussian.influence import Influence
from ntkpipe.report.gather import Chapter, Gathered
from ntkpipe.report.images import Split, StoredImages
from ntkpipe.report.parts import Gallery, Part, Thumbnail
from ntkpipe.report.sections.words import number, share

_INTRO = (
    "A prediction is a sum over training samples, f(x) = Σᵢ αᵢ K(x, xᵢ), and a term says what a training sample adds "
    "to the output that was predicted (the representer values of Yeh et al. 2018, arXiv 1811.09720). Positive terms "
    "speak for the prediction, negative ones against it. A term is not what would change without the sample; that is "
    "leave-one-out.",
)
_NUM_WRONG, _NUM_RIGHT, _NUM_OTHERS, _NUM_OVERALL = 3, 3, 6, 10

Targets = NDArray[Any] | None


def _show(found: Influence, gathered: Gathered) -> tuple[tuple[Part, ...], str | None]:
    """Test samples with the training samples of their largest terms, and those that matter most overall."""
    store, is_class = gathered.store, gathered.arrangement.classes is not None
    images = StoredImages(store)
    top, overall = found.top_samples[:, :_NUM_OTHERS], found.most_influential[:_NUM_OVERALL]
    for samples in (top, overall):
        if samples.size and not 0 <= samples.min() <= samples.max() < len(found.mean_size):
            raise ValueError("a sample that does not exist")
    predicted, targets, test_targets = _predicted(found), store.targets, store.test_targets
    shown = _shown(predicted, test_targets, len(top))
    tests = _pictures(images, "test", shown)
    trains = _pictures(images, "train", [*top[shown].reshape(-1), *overall])

    def train(sample: int, said: str) -> Thumbnail:
        return _thumbnail("training", sample, trains, (*_lines(sample, targets, None, is_class), said))

    rows = tuple(
        (
            _thumbnail("test", sample, tests, _lines(sample, test_targets, predicted, is_class)),
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


def _predicted(found: Influence) -> NDArray[Any] | None:
    """The label that each test sample was given; none if targets are no classes."""
    # Reports of older versions saved classes among the options.
    classes = found.classes or found.options.get("classes")
    return np.asarray(classes)[found.predicted] if classes else None


def _shown(predicted: NDArray[Any] | None, test_targets: Targets, num_test: int) -> list[int]:
    """Some that are wrong and some that are right, the first of each class."""
    if predicted is None or test_targets is None:
        return list(range(min(num_test, _NUM_WRONG + _NUM_RIGHT)))
    is_wrong = predicted != test_targets.reshape(-1)
    wrong, right = np.flatnonzero(is_wrong)[:_NUM_WRONG], np.flatnonzero(~is_wrong)
    firsts = right[np.unique(test_targets[right], return_index=True)[1]]
    return [*map(int, wrong), *map(int, np.sort(firsts)[:_NUM_RIGHT])]


def _lines(sample: int, targets: Targets, predicted: NDArray[Any] | None, is_class: bool) -> tuple[str, ...]:
    said = [f"no. {sample:,}"]
    if targets is not None and targets.size == len(targets):
        target = targets.reshape(-1)[sample]
        said.append(f"class {target}" if is_class else f"target {number(float(target), 3)}")
    if predicted is not None:
        said.append(f"predicted {predicted[sample]}")
    return tuple(said)


def _pictures(images: StoredImages, split: Split, samples: Sequence[Any]) -> dict[int, str]:
    found = images.read(split, [int(sample) for sample in samples])
    return {sample: f"data:image/png;base64,{b64encode(png).decode()}" for sample, png in found.items()}


def _thumbnail(split: str, sample: int, pictures: dict[int, str], lines: tuple[str, ...]) -> Thumbnail:
    return Thumbnail(pictures.get(sample), f"{split} sample {', '.join(lines)}", lines)
