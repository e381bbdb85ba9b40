"""Everything on a page, before anything is drawn: results of steps, and means of blocks of the kernel in one pass."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import absolute_ridge
from ntkpipe.base.errors import ConfigError, IndefiniteError, NonFiniteError, ResourceError
from ntkpipe.base.operator import Work
from ntkpipe.base.progress import Phase
from ntkpipe.base.targets import Targets, Task, encode, encode_test
from ntkpipe.learning.gaussian.calibration import Calibration, calibration
from ntkpipe.learning.regression.ridge_path import Best, RidgePath
from ntkpipe.report.parts import Part
from ntkpipe.solvers.result import Result
from ntkpipe.steps.registry import REGISTRY, saved_result
from ntkpipe.store.export import find_kernel
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore

BinLabels = NDArray[np.int64]
Run = Callable[..., Result]  # runs a step by its name and options, and saves its result if the store can be written

HOW_TO_TEST = "compute the kernel with test_inputs and test_targets (`ntkpipe run FILE --grow` adds them)."
CRITERIA: dict[Any, str] = {  # of `RidgePath.best_by`, in words
    "leave_one_out_loss": "leave-one-out loss",
    "generalised_cross_validation": "generalised cross-validation",
}
_NO_TARGETS = (
    "The store has no targets; give targets to compute_kernel, or return them from the workflow's data.factory."
)
_NO_TEST_SET = f"The store has no test set; {HOW_TO_TEST}"
_NO_TEST_TARGETS = "The test set of this store has no targets; give test_targets to compute_kernel."
_MOST_BINS = 300  # rows of the picture of a kernel: a screen shows no more


class Gathered:
    """Everything on a page: what the store keeps, and results of steps on one kernel, saved ones or else new ones."""

    def __init__(
        self,
        store: KernelStore,
        array: str,
        across: Mapping[str, Any],
        run: Run | None,
        task: Task | None = None,
        *,
        progress: bool = False,
    ) -> None:
        self.store, self.kernel, self._run = store, find_kernel(store, array), run
        self.results: dict[str, Any] = {}  # by step, those of chapters
        self.missing: dict[str, str] = {}  # step → why it has no result, and how to get it, in one sentence
        self.best: Best | None = None  # the ridge that training data choose
        self.measured = np.nan, np.nan  # accuracy and loss on the test set there, if they are known
        # What targets were taken for in a step is what they are for the rest of the page.
        known = (self._saved(name) for name in ("regression", "alignment", "generalisation", "gaussian_process"))
        saved: Task = next((one.options.get("task", "auto") for one in known if one is not None), "auto")
        self._task = saved if task is None else task
        self.targets, self.test_targets = _encoded(store, self._task)
        begin = perf_counter()
        # The order of samples in a picture, and means of blocks: rows of the picture, and classes if there are any
        self.arrangement = arrange(self.targets, self.kernel.grid.rows.num_samples)
        groupings = (self.arrangement.bins, self.arrangement.classes)
        with Phase("picture of the kernel", enabled=progress):
            self.means = block_means(self.kernel, [labels for labels in groupings if labels is not None])
        picture = perf_counter() - begin
        self.work = Work(1.0, seconds=picture)  # passes and bytes of what was done for the page
        self._find_all(across)
        # A calibration is a part of what is said of the posterior.
        shown = self.results.keys() | ({"calibration"} if "gaussian_process" in self.results else set())
        # What other steps have saved, by name
        self.others = {name: one for name in REGISTRY if name not in shown and (one := self._saved(name)) is not None}
        # Of the posterior with variances multiplied with s², and as they are
        self.calibrations = self._calibrations()
        timed = self.results | self.others
        seconds = [(name.replace("_", " "), timed[name].seconds) for name in REGISTRY if name in timed]
        self.seconds = (*seconds, ("picture of the kernel", picture))  # (What, seconds) of what is on the page

    def _find_all(self, across: Mapping[str, Any]) -> None:
        """Find what chapters show, ``across`` the ridges that were asked for."""
        no_targets = _NO_TARGETS if self.store.manifest.train.targets is None else None
        test = self.store.manifest.test
        no_test = no_targets or (_NO_TEST_SET if test is None else None if test.targets else _NO_TEST_TARGETS)
        # The first one computes all eigenpairs where they fit, and the others, also the spectrum, find them.
        self._find("generalisation", no_targets, across)
        self._find("alignment", no_targets, {})
        self._find("spectrum", None, across)
        self._find("regression", no_targets, across)
        if (path := self.results.get("regression")) is not None:
            self.best = choose(path)
            self.measured = float(path.test_accuracy[self.best.index]), float(path.test_loss[self.best.index])
        for name in ("gaussian_process", "influence"):
            if self.best is not None:
                self._find(name, no_test, {"ridge": self.best.ridge, "ridge_scale": None})
            else:  # at any ridge, if it was saved
                self._find(name, no_test or (None if self._saved(name) else self.missing["regression"]), {})

    def _saved(self, name: str) -> Result | None:
        """The saved result of a step if it is of this kernel, or of the test kernel beside it."""
        found, identity = saved_result(self.store, name, self.kernel.name), self.kernel.identity
        is_known = found is not None and found.matrix in (identity, identity.removesuffix("train") + "test_train")
        return found if is_known else None

    def _find(self, name: str, lacking: str | None, asked: Mapping[str, Any]) -> None:
        """The saved result if it has the options that are asked for; else a new one, if the store lacks nothing."""
        found = None if lacking else self._saved(name)
        if lacking or (found is not None and self._has(found.options, asked) and self._is_alike(found)):
            pass
        elif self._run is None:
            what = "this" if found is None else "this at these ridges, for targets that are taken for the same"
            how = f"write the report without saved_only (--saved-only), or compute {name} first"
            lacking = f"No step has saved {what}; {how}."
        else:
            try:
                found = self._run(name, **asked, **({} if name == "spectrum" else {"task": self._task}))
                self.work += found.work
            except (ConfigError, IndefiniteError, ResourceError) as error:
                lacking = str(error)
        if lacking:
            self.missing[name] = lacking
        else:
            self.results[name] = found

    def _has(self, given: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        """Whether these are the options; a ridge may be in other units."""
        if "ridge" in asked and "ridge" in given:
            ridge = absolute_ridge(given["ridge"], given.get("ridge_scale"), self.kernel.diagonal)
            return bool(ridge == asked["ridge"])
        return asked.items() <= given.items()

    def _is_alike(self, found: Result) -> bool:
        """Whether targets were taken for what they are on this page."""
        said = getattr(found, "targets", "")  # which results of older versions do not say
        return not said or self.targets is None or said == self.targets.words

    def _calibrations(self) -> tuple[Calibration, ...]:
        posterior, targets = self.results.get("gaussian_process"), self.store.test_targets
        if posterior is None or targets is None:
            return ()
        # Posteriors of older versions do not say which classes their outputs are; the train targets do.
        classes = None if posterior.targets or self.targets is None else self.targets.classes
        judge = partial(calibration, posterior, targets, classes=posterior.classes or classes)
        try:
            return judge(scale="likelihood"), judge(scale=1.0)
        except ConfigError as error:  # a posterior that cannot be judged is not shown
            self.missing["gaussian_process"] = str(error)
            return ()


@dataclass(frozen=True)
class Chapter:
    """A section on the result of a step."""

    step: str  # its name, and that of the anchor
    title: str  # title, intro: as of a section
    intro: tuple[str, ...]
    # What follows, and a sentence on what is missing there, from the result and everything beside it
    show: Callable[[Any, Gathered], tuple[Sequence[Part], str | None]]


def choose(path: RidgePath) -> Best:
    """The best ridge by what training data alone say; the largest where they say nothing."""
    for criterion in CRITERIA:
        if np.isfinite(getattr(path, criterion)).any():
            return path.best_by(criterion)
    index = int(np.argmax(path.ridges))
    return Best(criterion=criterion, index=index, ridge=float(path.ridges[index]), value=np.nan)


def _encoded(store: KernelStore, task: Task) -> tuple[Targets | None, Targets | None]:
    """Train and test targets, encoded; None if there are none or it is unclear what they are, which analyses say."""
    train = test = None
    with warnings.catch_warnings(), suppress(ConfigError, NonFiniteError):
        warnings.simplefilter("ignore")
        if store.targets is not None:
            width = store.manifest.num_covectors
            train = encode(store.targets, task=task, num_outputs=width if width > 1 else None)
            test = None if store.test_targets is None else encode_test(store.test_targets, train)
    return train, test


@dataclass(frozen=True)
class Arrangement:
    """Samples in the order in which a picture shows them."""

    bins: BinLabels  # shape (N,): the row of the picture in which each sample is
    # Shape (N,): the number of each sample's class among :attr:`names`; none if targets are no classes
    classes: BinLabels | None
    names: tuple[str, ...]  # labels of classes
    bounds: tuple[int, ...]  # where one class ends and the next begins, in samples
    order: str  # what decides the order, in words


def arrange(targets: Targets | None, num_samples: int) -> Arrangement:
    """By class, or by the one target, or as stored; where samples are many, neighbours share a row."""
    names: tuple[str, ...] = ()
    bounds: tuple[int, ...] = ()
    classes, order = None, "as stored"
    key: NDArray[Any] = np.arange(num_samples)
    if targets is not None and targets.classes is not None and targets.codes is not None:
        there, classes = np.unique(targets.codes, return_inverse=True)  # a full NTK has outputs for others, too
        names, order = tuple(map(str, targets.classes[there].tolist())), "sorted by class"
        key = classes
        bounds = tuple(int(end) for end in np.bincount(classes).cumsum()[:-1])
    elif targets is not None and targets.matrix.shape[1] == 1:
        key, order = targets.matrix[:, 0], "sorted by target"
    num_bins = min(num_samples, _MOST_BINS)
    bins = np.empty(num_samples, np.int64)
    bins[np.argsort(key, kind="stable")] = np.arange(num_samples) * num_bins // num_samples
    return Arrangement(bins, classes, names, bounds, order)


def block_means(kernel: Kernel, groupings: Sequence[BinLabels]) -> list[FloatArray]:
    """Mean entry of each pair of groups of samples, for one or more groupings; one pass over the stored tiles.

    Entries of a sample with itself are left out where a group has others. Of a full NTK the entry of two samples is the
    mean of their block's diagonal.
    """
    sums = [np.zeros((count, count)) for count in (int(labels.max()) + 1 for labels in groupings)]
    diagonal = np.zeros(kernel.grid.rows.num_samples)
    for row, column in kernel.grid.tiles():
        tile = _by_sample(kernel.read_stored(row, column), kernel.num_covectors)
        at = [slice(span.start, span.stop) for span in map(kernel.grid.rows.samples, (row, column))]
        for total, labels in zip(sums, groupings, strict=True):
            pairs = labels[at[0], None] * len(total) + labels[at[1]]
            part = np.bincount(pairs.ravel(), tile.ravel(), total.size).reshape(total.shape)
            total += part if row == column else part + part.T
        if row == column:
            diagonal[at[0]] = tile.diagonal()
    return [_mean(total, diagonal, labels) for total, labels in zip(sums, groupings, strict=True)]


def _by_sample(tile: NDArray[Any], width: int) -> FloatArray:
    blocks = tile.astype(np.float64).reshape(tile.shape[0] // width, width, tile.shape[1] // width, width)
    return np.asarray(blocks.trace(axis1=1, axis2=3) / width, np.float64)


def _mean(total: FloatArray, diagonal: FloatArray, labels: BinLabels) -> FloatArray:
    """Sums over numbers of entries; a group of one sample has its diagonal entry alone."""
    sizes = np.bincount(labels, minlength=len(total)).astype(np.float64)
    counts, alone = np.outer(sizes, sizes), sizes == 1
    own = np.bincount(labels, diagonal, minlength=len(total))
    np.fill_diagonal(total, np.where(alone, own, total.diagonal() - own))
    np.fill_diagonal(counts, np.where(alone, 1.0, sizes * (sizes - 1)))
    return np.asarray(total / np.maximum(counts, 1.0), np.float64)
