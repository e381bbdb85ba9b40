"""Everything on a page, before anything is drawn: what the store keeps, and analyses, each done once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, IndefiniteError, ResourceError
from ntkpipe.base.operator import Work
from ntkpipe.base.progress import Passes
from ntkpipe.base.resources import half_of_room
from ntkpipe.base.ridge import RidgeScale
from ntkpipe.base.targets import num_classes_of
from ntkpipe.operators.opening import as_operator
from ntkpipe.report.blocks import Arrangement, arrange, block_means
from ntkpipe.report.findings import Findings, Missing
from ntkpipe.report.images import StoredImages
from ntkpipe.report.provenance import Records, read_records
from ntkpipe.solvers.direct.eigh import Spectrum, eigh
from ntkpipe.solvers.on_store import StoreRequest, find_kernel, of_store, result_name
from ntkpipe.solvers.result import Result, ignore
from ntkpipe.solvers.steps import StoredPairs, stored_pairs
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.results import Checkpoint, load_result, reading_results

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What was asked for; see :func:`ntkpipe.write_report`."""

    array: str  # array, ridges, ridge_scale, memory_limit, client, progress, saved_only: as there
    ridges: tuple[float, ...] | None
    ridge_scale: RidgeScale
    memory_limit: int | None
    client: "Client | None" = field(repr=False)
    progress: bool
    saved_only: bool


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Everything on a page."""

    store: KernelStore  # store, kernel: what the page is about
    kernel: Kernel
    records: Records  # what the store says of its making
    found: Mapping[str, Findings | Missing]  # what analyses found, by name
    means: list[FloatArray]  # of blocks of the kernel: rows of a picture, and classes if there are any
    arrangement: Arrangement  # the order of samples in that picture
    images: StoredImages  # the samples, if they are images
    mean_diagonal: float  # of the kernel
    seconds: tuple[tuple[str, float], ...]  # (What, seconds) of what was done for the page
    work: Work  # passes and bytes of that
    matrix: str  # identity of the kernel


class Inputs:
    """What analyses are given: the kernel as an operator, targets, the test set, all eigenpairs where they fit."""

    def __init__(self, store: KernelStore, options: PageOptions) -> None:
        self.store = store
        self.options = options
        self.kernel = find_kernel(store, options.array)
        self.found: dict[str, Findings | Missing] = {}
        self.seconds: list[tuple[str, float]] = []

    @cached_property
    def eigenpairs(self) -> Spectrum | None:
        """All of them, or none where they do not fit."""
        begin = perf_counter()
        try:
            with Passes("all eigenpairs", enabled=self.options.progress) as shown:
                found = eigh(
                    self.kernel,
                    memory_limit=self.options.memory_limit,
                    monitor=lambda step: shown.show(step.work.passes, step.residual, step.target),
                )
        except ResourceError:
            return None
        self.seconds.append(("all eigenpairs", perf_counter() - begin))
        return found

    @property
    def pairs(self) -> "Spectrum | StoredPairs | None":
        """All eigenpairs, or the leading ones that an earlier step has saved, or none.

        Without targets nobody needs eigenvectors, and eigenvalues alone cost a fraction.
        """
        whole = None if self.store.targets is None else self.eigenpairs
        return whole or stored_pairs(self.store, self.options.array)

    @property
    def known_targets(self) -> NDArray[Any]:
        """Targets of the train samples, for analyses that are only asked where there are some."""
        assert self.store.targets is not None
        return self.store.targets

    @cached_property
    def test_kernel(self) -> Kernel | None:
        """Test × train, of the same outputs and parameters, or none."""
        array = self._array("test_train")
        return None if array is None else Kernel(array, self.store.manifest.digest())

    @cached_property
    def test_diagonal(self) -> NDArray[Any] | None:
        """The block of each test sample with itself, (M, S, S), or none."""
        array = self._array("test_diagonal")
        return None if array is None else array.read_samples(0, array.layout.shape[0])

    def _array(self, name: str) -> StoredArray | None:
        return self.store.store.arrays.get(self.kernel.name.removesuffix("train") + name)


def _has_the_ridges(inputs: Inputs, saved: Mapping[str, Any]) -> bool:
    """Whether a saved result has the ridges that were asked for, if any were."""
    options = inputs.options
    if options.ridges is None or "ridges" not in saved["options"]:
        return True
    return (saved["options"]["ridges"], saved["options"]["ridge_scale"]) == (list(options.ridges), options.ridge_scale)


@dataclass(frozen=True)
class Analysis:
    """One request to a kernel."""

    ask: Callable[[Inputs, StoreRequest], Result]  # of the inputs and the kernel as an operator
    needs_targets: bool = False  # whether it needs targets of the train samples
    needs_test: bool = False  # whether it needs a test set (with targets, if it needs targets)
    # Whether a saved result of the same kernel answers the same request
    is_current: Callable[[Inputs, Mapping[str, Any]], bool] = _has_the_ridges

    def lacks(self, inputs: Inputs) -> str | None:
        """One sentence on what is not there, and how to get it; none if all is."""
        if self.needs_targets and inputs.store.targets is None:
            how = "give targets to compute_kernel, or return them from the workflow's data.factory."
            return f"The store has no targets; {how}"
        if self.needs_test and inputs.test_kernel is None:
            how = "compute the kernel with test_inputs and test_targets (`ntkpipe run FILE --grow` adds them)."
            return f"The store has no test set; {how}"
        if self.needs_test and self.needs_targets and inputs.store.test_targets is None:
            return "The test set of this store has no targets; give test_targets to compute_kernel."
        return None


def gather(store: KernelStore, options: PageOptions, analyses: Mapping[str, Analysis]) -> Gathered:
    """Read what is there and compute what is not."""
    inputs = Inputs(store, options)
    records = read_records(store)
    num_samples = inputs.kernel.grid.rows.num_samples
    targets = store.targets
    is_class = targets is not None and num_classes_of(targets) is not None
    arrangement = arrange(targets, num_samples, is_class=is_class)
    begin = perf_counter()
    groupings = [(arrangement.bins, arrangement.num_bins)]
    if arrangement.classes is not None:
        groupings.append((arrangement.classes, len(arrangement.names)))
    means = block_means(inputs.kernel, groupings)
    seconds = [("picture of the kernel", perf_counter() - begin)]
    work = Work(1.0, seconds=seconds[0][1])
    with reading_results(store.path):
        for name, analysis in analyses.items():
            inputs.found[name] = find(inputs, name, analysis)
    for one in inputs.found.values():
        if isinstance(one, Findings) and not one.is_saved:
            cost = one.mapping("work")
            work += Work(cost["passes"], cost["bytes_read"], cost["seconds"])
    computed = [(name, one.seconds) for name, one in inputs.found.items() if isinstance(one, Findings)]
    return Gathered(
        store=store,
        kernel=inputs.kernel,
        records=records,
        found=inputs.found,
        means=means,
        arrangement=arrangement,
        images=StoredImages(store),
        mean_diagonal=float(inputs.kernel.diagonal().astype(np.float64).mean()),
        seconds=(*inputs.seconds, *computed, *seconds),
        work=work,
        matrix=inputs.kernel.identity,
    )


def find(inputs: Inputs, name: str, analysis: Analysis) -> Findings | Missing:
    """The saved result of an analysis if it is of this kernel and these options; or a new one, saved if that can be."""
    if (lacking := analysis.lacks(inputs)) is not None:
        return Missing(lacking)
    store = inputs.store
    saved = load_result(store.store, result_name(name, inputs.kernel.name))
    if saved is not None and saved.get("matrix") == inputs.kernel.identity and analysis.is_current(inputs, saved):
        return Findings(name, saved, is_saved=True)
    if inputs.options.saved_only:
        return Missing(
            f"No step has saved this; write the report without saved_only (--saved-only), or compute {name} first."
        )
    try:
        return Findings.of(name, _compute(inputs, name, analysis))
    except (ConfigError, IndefiniteError, ResourceError) as error:
        return Missing(str(error))


def _compute(inputs: Inputs, name: str, analysis: Analysis) -> Result:
    """The answer, saved unless the store cannot be written."""
    store, options = inputs.store, inputs.options

    def answer(request: StoreRequest) -> Result:
        return analysis.ask(inputs, request)

    if store.store.is_writable():
        given = {"memory_limit": options.memory_limit, "client": options.client, "progress": options.progress}
        return of_store(name)(answer)(store, array=options.array, **given)
    share = half_of_room(options.memory_limit)
    operator = as_operator(inputs.kernel, memory_limit=share, client=options.client)
    try:
        checkpoint = Checkpoint(store.store, name)
        return answer(StoreRequest(store, inputs.kernel, operator, ignore, checkpoint, share, options.client))
    finally:
        operator.close()
