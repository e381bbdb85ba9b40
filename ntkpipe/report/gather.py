"""Everything on a page, before anything is drawn: what the store keeps, and what analyses found, now or before."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from ntkpipe.analysis.alignment import Alignment
from ntkpipe.analysis.generalisation import Generalisation
from ntkpipe.analysis.spectrum import KernelSpectrum
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, IndefiniteError, NonFiniteError, ResourceError
from ntkpipe.base.operator import Work
from ntkpipe.base.ridge import absolute_ridge
from ntkpipe.base.targets import Targets, Task, encode
from ntkpipe.learning.gaussian.calibration import calibration
from ntkpipe.learning.gaussian.influence import Influence
from ntkpipe.learning.gaussian.process import Posterior
from ntkpipe.learning.regression.ridge_path import RidgePath
from ntkpipe.report.blocks import Arrangement, arrange, block_means
from ntkpipe.report.findings import HOW_TO_TEST, Judged, Missing, choose
from ntkpipe.report.images import StoredImages
from ntkpipe.report.provenance import Records, read_records
from ntkpipe.solvers.result import Result
from ntkpipe.steps.registry import REGISTRY
from ntkpipe.steps.saved import saved_result
from ntkpipe.store.export import find_kernel
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.results import reading_results

R = TypeVar("R", bound=Result)
Run = Callable[..., Result]  # runs a step by its name and options

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
    spectrum: KernelSpectrum | Missing
    alignment: Alignment | Missing
    regression: RidgePath | Missing
    generalisation: Generalisation | Missing
    process: Judged | Missing
    influence: Influence | Missing
    others: Mapping[str, Result]  # what other steps have saved, by name
    means: list[FloatArray]  # of blocks of the kernel: rows of a picture, and classes if there are any
    arrangement: Arrangement  # the order of samples in that picture
    images: StoredImages  # the samples, if they are images
    mean_diagonal: float  # of the kernel
    seconds: tuple[tuple[str, float], ...]  # (What, seconds) of what was done for the page
    work: Work  # passes and bytes of that


class _Results:
    """Results of steps on one kernel: saved ones, or else new ones, which are saved if the store can be written."""

    def __init__(self, store: KernelStore, kernel: Kernel, run: Run | None) -> None:
        self.store, self.kernel, self.run = store, kernel, run
        self.shown: dict[str, Result] = {}
        # What targets were taken for in a step is what they are for the rest of the page.
        known = (self.saved(name) for name in ("regression", "alignment", "generalisation", "gaussian_process"))
        self.task: Task = next((one.options.get("task", "auto") for one in known if one is not None), "auto")
        self.work = Work()

    def saved(self, name: str) -> Result | None:
        """The saved result of a step if it is of this kernel, or of the test kernel beside it."""
        found, identity = saved_result(self.store, name, self.kernel.name), self.kernel.identity
        is_known = found is not None and found.matrix in (identity, identity.removesuffix("train") + "test_train")
        return found if is_known else None

    def find(self, kind: type[R], name: str, lacking: str | None, **asked: Any) -> R | Missing:
        """The saved result if it has the options that are asked for; else a new one, if the store lacks nothing."""
        if lacking is not None:
            return Missing(lacking)
        found = self.saved(name)
        if not isinstance(found, kind) or not self._has(found.options, asked):
            if self.run is None:
                what = "this" if found is None else "this at these ridges"
                how = f"write the report without saved_only (--saved-only), or compute {name} first"
                return Missing(f"No step has saved {what}; {how}.")
            try:
                found = self.run(name, **asked, **({} if name == "spectrum" else {"task": self.task}))
            except (ConfigError, IndefiniteError, ResourceError) as error:
                return Missing(str(error))
            assert isinstance(found, kind)
            self.work += found.work
        self.shown[name] = found
        return found

    def _has(self, given: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
        """Whether these are the options; a ridge may be in other units."""
        if "ridge" in asked and "ridge" in given:
            ridge = absolute_ridge(given["ridge"], given.get("ridge_scale"), self.kernel.diagonal)
            return bool(ridge == asked["ridge"])
        return asked.items() <= given.items()

    def at_ridge(self, kind: type[R], name: str, lacking: str | None, path: RidgePath | Missing) -> R | Missing:
        """An analysis at the ridge that a path chooses; any saved one where there is no path."""
        if isinstance(path, Missing):
            return self.find(kind, name, lacking or (None if self.saved(name) else path.why))
        return self.find(kind, name, lacking, ridge=choose(path).ridge, ridge_scale=None)


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
    with reading_results(store.path):
        # The first one computes all eigenpairs where they fit, and the others, also the spectrum, find them.
        alignment = results.find(Alignment, "alignment", no_targets)
        spectrum = results.find(KernelSpectrum, "spectrum", None, **across)
        regression = results.find(RidgePath, "regression", no_targets, **across)
        generalisation = results.find(Generalisation, "generalisation", no_targets, **across)
        posterior = results.at_ridge(Posterior, "gaussian_process", no_test, regression)
        influence = results.at_ridge(Influence, "influence", no_test, regression)
        names = REGISTRY.keys() - results.shown.keys()
        if not isinstance(posterior, Missing):
            names -= {"calibration"}  # a part of what is said of the posterior
        others = {name: found for name in REGISTRY if name in names and (found := results.saved(name)) is not None}
        process = posterior if isinstance(posterior, Missing) else _judged(posterior, store)
    timed = results.shown | others
    seconds = [(name.replace("_", " "), timed[name].seconds) for name in REGISTRY if name in timed]
    return Gathered(
        store=store,
        kernel=kernel,
        records=records,
        spectrum=spectrum,
        alignment=alignment,
        regression=regression,
        generalisation=generalisation,
        process=process,
        influence=influence,
        others=others,
        means=means,
        arrangement=arrangement,
        images=StoredImages(store),
        mean_diagonal=float(kernel.diagonal().astype(np.float64).mean()),
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


def _judged(posterior: Posterior, store: KernelStore) -> Judged | Missing:
    assert store.test_targets is not None
    try:
        scaled, plain = (calibration(posterior, store.test_targets, scale=scale) for scale in ("likelihood", 1.0))
    except ConfigError as error:
        return Missing(str(error))
    return Judged(posterior, scaled, plain)
