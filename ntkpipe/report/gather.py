"""Everything on a page, before anything is drawn: what the store keeps, and results of steps, saved now or before."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, IndefiniteError, NonFiniteError, ResourceError
from ntkpipe.base.operator import Work
from ntkpipe.base.ridge import absolute_ridge
from ntkpipe.base.targets import Targets, Task, encode
from ntkpipe.learning.gaussian.calibration import Calibration, calibration
from ntkpipe.report.blocks import Arrangement, arrange, block_means
from ntkpipe.report.findings import HOW_TO_TEST, choose
from ntkpipe.report.parts import Part
from ntkpipe.report.provenance import Records, read_records
from ntkpipe.solvers.result import Result
from ntkpipe.steps.registry import REGISTRY
from ntkpipe.steps.saved import saved_result
from ntkpipe.store.export import find_kernel
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore

Run = Callable[..., Result]  # runs a step by its name and options, and saves its result if the store can be written

_NO_TARGETS = (
    "The store has no targets; give targets to compute_kernel, or return them from the workflow's data.factory."
)
_NO_TEST_SET = f"The store has no test set; {HOW_TO_TEST}"
_NO_TEST_TARGETS = "The test set of this store has no targets; give test_targets to compute_kernel."


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Everything on a page."""

    store: KernelStore  # store, kernel: what the page is about
    kernel: Kernel
    records: Records  # what the store says of its making
    results: Mapping[str, Any]  # by step, those of chapters
    missing: Mapping[str, str]  # step → why it has no result, and how to get it, in one sentence
    calibrations: tuple[Calibration, ...]  # of the posterior with variances multiplied with s², and as they are
    others: Mapping[str, Result]  # what other steps have saved, by name
    means: list[FloatArray]  # of blocks of the kernel: rows of a picture, and classes if there are any
    arrangement: Arrangement  # the order of samples in that picture
    seconds: tuple[tuple[str, float], ...]  # (What, seconds) of what was done for the page
    work: Work  # passes and bytes of that


@dataclass(frozen=True)
class Chapter:
    """A section on the result of a step."""

    step: str  # its name, and that of the anchor
    title: str  # title, intro: as of a section
    intro: tuple[str, ...]
    # What follows, and a sentence on what is missing there, from the result and everything beside it
    show: Callable[[Any, Gathered], tuple[Sequence[Part], str | None]]


class _Results:
    """Results of steps on one kernel: saved ones, or else new ones."""

    def __init__(self, store: KernelStore, kernel: Kernel, run: Run | None) -> None:
        self.store, self.kernel, self.run = store, kernel, run
        self.found: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        # What targets were taken for in a step is what they are for the rest of the page.
        known = (self.saved(name) for name in ("regression", "alignment", "generalisation", "gaussian_process"))
        self.task: Task = next((one.options.get("task", "auto") for one in known if one is not None), "auto")
        self.work = Work()

    def saved(self, name: str) -> Result | None:
        """The saved result of a step if it is of this kernel, or of the test kernel beside it."""
        found, identity = saved_result(self.store, name, self.kernel.name), self.kernel.identity
        is_known = found is not None and found.matrix in (identity, identity.removesuffix("train") + "test_train")
        return found if is_known else None

    def find(self, name: str, lacking: str | None, asked: Mapping[str, Any]) -> None:
        """The saved result if it has the options that are asked for; else a new one, if the store lacks nothing."""
        found = None if lacking else self.saved(name)
        if lacking or (found is not None and self._has(found.options, asked)):
            pass
        elif self.run is None:
            what = "this" if found is None else "this at these ridges"
            how = f"write the report without saved_only (--saved-only), or compute {name} first"
            lacking = f"No step has saved {what}; {how}."
        else:
            try:
                found = self.run(name, **asked, **({} if name == "spectrum" else {"task": self.task}))
                self.work += found.work
            except (ConfigError, IndefiniteError, ResourceError) as error:
                lacking = str(error)
        if lacking:
            self.missing[name] = lacking
        else:
            self.found[name] = found

    def _has(self, given: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        """Whether these are the options; a ridge may be in other units."""
        if "ridge" in asked and "ridge" in given:
            ridge = absolute_ridge(given["ridge"], given.get("ridge_scale"), self.kernel.diagonal)
            return bool(ridge == asked["ridge"])
        return asked.items() <= given.items()

    def find_at_ridge(self, name: str, lacking: str | None) -> None:
        """An analysis at the ridge that regression chooses; any saved one where there is no regression."""
        if "regression" in self.found:
            self.find(name, lacking, {"ridge": choose(self.found["regression"]).ridge, "ridge_scale": None})
        else:
            self.find(name, lacking or (None if self.saved(name) else self.missing["regression"]), {})

    def calibrations(self) -> tuple[Calibration, ...]:
        """Of the posterior, which is missing where its variances cannot be judged."""
        posterior, targets = self.found.get("gaussian_process"), self.store.test_targets
        if posterior is None or targets is None:
            return ()
        try:
            return calibration(posterior, targets, scale="likelihood"), calibration(posterior, targets, scale=1.0)
        except ConfigError as error:
            self.missing["gaussian_process"] = str(error)
            return ()


def gather(store: KernelStore, array: str, across: Mapping[str, Any], run: Run | None) -> Gathered:
    """Read what is there and compute what is not, ``across`` the ridges that were asked for."""
    kernel = find_kernel(store, array)
    records, results = read_records(store), _Results(store, kernel, run)
    begin = perf_counter()
    arrangement = arrange(_encoded(store, results.task), kernel.grid.rows.num_samples)
    groupings = [(arrangement.bins, arrangement.num_bins)]
    if arrangement.classes is not None:
        groupings.append((arrangement.classes, len(arrangement.names)))
    means = block_means(kernel, groupings)
    picture = perf_counter() - begin
    no_targets = _NO_TARGETS if store.manifest.train.targets is None else None
    test = store.manifest.test
    no_test = no_targets or (_NO_TEST_SET if test is None else None if test.targets else _NO_TEST_TARGETS)
    # The first one computes all eigenpairs where they fit, and the others, also the spectrum, find them.
    results.find("alignment", no_targets, {})
    results.find("spectrum", None, across)
    for name in ("regression", "generalisation"):
        results.find(name, no_targets, across)
    for name in ("gaussian_process", "influence"):
        results.find_at_ridge(name, no_test)
    # A calibration is a part of what is said of the posterior.
    shown = results.found.keys() | ({"calibration"} if "gaussian_process" in results.found else set())
    calibrations = results.calibrations()
    others = {name: one for name in REGISTRY if name not in shown and (one := results.saved(name)) is not None}
    timed = results.found | others
    seconds = [(name.replace("_", " "), timed[name].seconds) for name in REGISTRY if name in timed]
    return Gathered(
        store=store,
        kernel=kernel,
        records=records,
        results=results.found,
        missing=results.missing,
        calibrations=calibrations,
        others=others,
        means=means,
        arrangement=arrangement,
        seconds=(*seconds, ("picture of the kernel", picture)),
        work=Work(1.0, seconds=picture) + results.work,
    )


def _encoded(store: KernelStore, task: Task) -> Targets | None:
    """Train targets, encoded; None if there are none or it is unclear what they are, which analyses warn of."""
    if store.targets is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            width = store.manifest.num_covectors
            return encode(store.targets, task=task, num_outputs=width if width > 1 else None)
        except (ConfigError, NonFiniteError):
            return None
