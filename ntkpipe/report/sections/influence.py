"""The section on which training points predictions are made of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.report.findings import Findings, Missing
from ntkpipe.report.images import Split, StoredImages
from ntkpipe.report.parts import Gallery, Part, Section, Thumbnail
from ntkpipe.report.sections.words import number, share, warnings
from ntkpipe.report.theme import data_uri

_TITLE = "Most influential training points"
_INTRO = (
    "A prediction is a sum over training samples, f(x) = Σᵢ αᵢ K(x, xᵢ), and a term says what a training sample adds "
    "to the output that was predicted (the representer values of Yeh et al. 2018, arXiv 1811.09720). Positive terms "
    "speak for the prediction, negative ones against it. A term is not what would change without the sample; that is "
    "leave-one-out.",
)
_NUM_WRONG, _NUM_RIGHT, _NUM_OTHERS, _NUM_OVERALL = 3, 3, 6, 10

Targets = NDArray[Any] | None


def influence_section(
    found: Findings | Missing, images: StoredImages, targets: Targets, test_targets: Targets, num_train: int
) -> Section:
    """Test samples with the training samples of their largest terms, and those that matter most overall."""
    if isinstance(found, Missing):
        return Section("influence", _TITLE, _INTRO, (), found.why)
    top = found.indices("top_samples", below=num_train, axes=2)[:, :_NUM_OTHERS]
    terms = found.array("top_terms", axes=2)[:, :_NUM_OTHERS]
    predicted = _predicted(found)
    shown = _shown(predicted, test_targets, len(top))
    overall = found.indices("most_influential", below=num_train)[:_NUM_OVERALL]
    tests = _pictures(images, "test", shown)
    trains = _pictures(images, "train", [*top[shown].reshape(-1), *overall])
    rows = tuple(
        (
            _thumbnail("test", sample, tests, _lines(sample, test_targets, predicted)),
            tuple(
                _thumbnail("training", int(one), trains, (*_lines(int(one), targets, None), f"{term:+.3g}"))
                for one, term in zip(top[sample], terms[sample], strict=True)
            ),
        )
        for sample in shown
    )
    parts: list[Part] = [Gallery("Test samples, and the largest terms of their predictions", _reading(found), rows)]
    parts.append(_overall(found, overall, trains, targets))
    parts += warnings(found)
    return Section("influence", _TITLE, _INTRO, tuple(parts), images.why_not())


def _reading(found: Findings) -> tuple[str, ...]:
    ridge = float(found.mapping("options")["ridge"])
    return (
        f"First a test sample, then the training samples of its largest terms with their values, at λ = "
        f"{ridge:.3g}; the first rows are samples that are predicted wrongly, if there are any. A wrong prediction "
        "whose largest terms are of the wrong class and look alike tells why it is wrong, or that a label is.",
        f"The {found.array('top_terms', axes=2).shape[1]} largest terms are {share(found.number('top_share'))} of the "
        "sizes of all terms, on average: the smaller this is, the less a single training sample decides.",
    )


def _predicted(found: Findings) -> NDArray[Any] | None:
    """The label that each test sample was given; none if targets are no classes."""
    classes = found.mapping("options").get("classes")
    if not isinstance(classes, list | tuple) or not classes:
        return None
    return np.asarray(classes)[found.indices("predicted", below=len(classes))]


def _shown(predicted: NDArray[Any] | None, test_targets: Targets, num_test: int) -> list[int]:
    """Some that are wrong and some that are right, the first of each class."""
    if predicted is None or test_targets is None:
        return list(range(min(num_test, _NUM_WRONG + _NUM_RIGHT)))
    is_wrong = predicted != test_targets
    wrong = np.flatnonzero(is_wrong)[:_NUM_WRONG]
    right = np.flatnonzero(~is_wrong)
    firsts = right[np.unique(test_targets[right], return_index=True)[1]]
    return [*map(int, wrong), *map(int, np.sort(firsts)[:_NUM_RIGHT])]


def _lines(sample: int | np.int64, targets: Targets, predicted: NDArray[Any] | None) -> tuple[str, ...]:
    """What is said of a sample: number, target, prediction."""
    said = [f"no. {sample:,}"]
    if targets is not None and targets.ndim == 1:
        is_class = targets.dtype.kind in "iu"
        said.append(f"class {targets[sample]}" if is_class else f"target {number(float(targets[sample]), 3)}")
    if predicted is not None:
        said.append(f"predicted {predicted[sample]}")
    return tuple(said)


def _pictures(images: StoredImages, split: Split, samples: Sequence[Any]) -> dict[int, str]:
    found = images.read(split, [int(sample) for sample in samples])
    return {sample: data_uri("image/png", png) for sample, png in found.items()}


def _thumbnail(split: str, sample: int, pictures: dict[int, str], lines: tuple[str, ...]) -> Thumbnail:
    return Thumbnail(pictures.get(sample), f"{split} sample {', '.join(lines)}", lines)


def _overall(found: Findings, overall: NDArray[np.int64], pictures: dict[int, str], targets: Targets) -> Gallery:
    sizes = found.array("mean_size")
    mean = float(sizes.mean())
    said = [(*_lines(one, targets, None), f"{sizes[one] / mean:.3g} × mean") for one in overall]
    row = tuple(_thumbnail("training", int(one), pictures, lines) for one, lines in zip(overall, said, strict=True))
    return Gallery(
        "Training samples with the largest terms over the whole test set",
        (
            f"Ordered by the mean size of their terms; a training sample has {number(mean, 3)} on average. Samples far "
            "above that are worth a look: unusual ones, and ones with a wrong label, are often among them.",
        ),
        ((Thumbnail(None, "", ("over all test samples",)), row),),
    )
