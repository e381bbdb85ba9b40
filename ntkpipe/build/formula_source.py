"""Networks of infinite width as sources of tiles: the NTK of a store, and beside it the NNGP, as a group's plane."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, DataError, NonFiniteError, NtkpipeError, ResourceError
from ntkpipe.base.grid import Span, default_tile, kernel_grids
from ntkpipe.base.kinds import INFINITE
from ntkpipe.base.paths import said
from ntkpipe.base.progress import Ticks
from ntkpipe.base.resources import format_seconds
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import encode
from ntkpipe.build.formula_strips import CONTRACTION, FormulaEngine, FormulaJob
from ntkpipe.build.from_samples import SampleSource
from ntkpipe.build.life import Products, RowProducts, Vector, Work
from ntkpipe.build.plan import Plan, Workload
from ntkpipe.build.prepare import Request
from ntkpipe.build.strips import StripCache
from ntkpipe.build.tiles import BuildJob, Sink
from ntkpipe.build.workers import Resources, environment
from ntkpipe.infinite.networks import as_network
from ntkpipe.jacobian.cost import Cost
from ntkpipe.jacobian.model.device import SIZES
from ntkpipe.jacobian.model.samples import Samples, Source, show_samples
from ntkpipe.store.manifest import FORMAT, Choices, DataRecord, Manifest, SourceRecord
from ntkpipe.store.store import Store

_CPU = torch.device("cpu")
# Pieces of which both kernels take 16 MiB, in one call.
_SIZES = replace(SIZES["cpu"], piece_rows=1024, piece_entry_bytes=16, scratch_bytes=16 * 2**20)
_NNGP = "nngp"  # the group of its plane
_CONVENTION = (
    "K[i, j] = Theta(x_i, x_j), the NTK of infinitely wide layers z = W_std / sqrt(fan_in) W a + b_std b, W ~ N(0, 1), "
    "b ~ N(0, tau^2), tau = bias_init; groups/nngp is the covariance Sigma of outputs. With E = E[f(u) f(v)] and E' = "
    "E[f'(u) f'(v)] over (u, v) ~ N(0, Sigma), a layer makes Sigma <- W_std^2 E + b_std^2 tau^2 and Theta <- W_std^2 E "
    "+ b_std^2 + W_std^2 E' Theta; standard parametrisation: fan_in E + 1 + W_std^2 E' Theta. First Sigma: the mean or "
    "the sum of products of inputs, as first_layer says. Of O outputs both are K x I_O"
)
_TILE_FLOPS = 2e11  # of a tile, at most, where no tile is asked for: decided by counts, so that runs agree
_TIMED_SECONDS, _TIMED_TRIES = 0.2, 3
_TIMED_SAMPLES, _TIMED_FLOPS = 1024, 2e9  # of a tile that is timed, at most
_MOST_SECONDS = 24 * 3600.0  # of a run that is not forced
_SLOW_SECONDS = 5.0  # of rows of one set, for entries one by one
_SLOW_FLOPS = 1e7  # of such an entry: scalar ones take about a microsecond
_SCAN_BYTES = 32 * 2**20


class FormulaPlan(Plan):
    """The plan of formulas, whose strips hold what the layers need of samples in place of Jacobians."""

    def rows(self) -> TableRows:
        """See :meth:`Plan.rows`."""
        own = {
            "kernels": ", ".join(f"{name} {g.shape[0]:,} × {g.shape[1]:,}" for name, g in self.workload.grids.items())
            + "; NTK and NNGP of each",
            "operations": f"{self.flops / 1e9:,.1f} GFLOP, {self.jacobian_flops / self.flops:.0%} of them of samples",
            "recompute factor": f"{self.recompute_factor:.2f} (preparations of a sample)",
        }
        left_out = ("Jacobian strips", "forward batch")
        return [(name, own.get(name, words)) for name, words in super().rows() if name not in left_out]


@dataclass(frozen=True)
class FormulaSource(SampleSource):
    """Tiles come from the formulas of a network."""

    engine: FormulaEngine
    given: Mapping[str, Samples]  # by split
    resources: Resources
    manifest: Manifest
    is_forced: bool = False
    settled: Plan | None = None

    @property
    def samples(self) -> Mapping[str, Samples]:
        """See :class:`SampleSource`."""
        return self.given

    @classmethod
    def of(
        cls,
        request: Request,
        resources: Resources,
        look: Callable[[Samples, str], DataRecord],
        *,
        num_outputs: int | None = None,
        is_forced: bool = False,
    ) -> "FormulaSource":
        """What is asked for; ``look`` finds the records of samples."""
        net, train, test, spec = as_network(request.model), request.train, request.test, request.kernel
        network = json.loads(json.dumps(net.canonical()))
        if resources.client is not None:
            resources.require_model(net)
        samples = {"train": train} | ({} if test is None else {"test": test})
        for one in samples.values():
            if one.is_mapping:
                raise DataError(f"{one.label} is a dict; a network of infinite width takes one array")
        records = {split: look(one, "inputs" if split == "train" else "test_inputs") for split, one in samples.items()}
        for one in samples.values():
            if one.infinite:
                raise NonFiniteError(f"{one.label}: infinite entries in {show_samples(one.infinite)}")
        (first,) = train.source.read(0, 1).values()
        engine = FormulaEngine(net, num_outputs or _num_outputs(train), first.shape[1:])
        edge = max(1, int((_TILE_FLOPS / engine.cost.pair_flops) ** 0.5))
        tile = spec.tile or min(default_tile(train.num_samples, 1, 2), edge)
        manifest = Manifest(
            format=FORMAT,
            kind=INFINITE.name,
            convention=_CONVENTION,
            num_outputs=engine.num_outputs,
            num_covectors=1,
            tile=min(tile, train.num_samples),
            compute_dtype="float64",
            accumulate_dtype="float64",
            store_dtype=spec.store_dtype or "float64",
            train=records["train"],
            test=records.get("test"),
            choices=Choices(strip=1, subtile=1, batch=1, representations={}, device="cpu", arithmetic=""),
            environment=environment(),
            groups={_NNGP: ()},
            source=SourceRecord(name="infinite", network=network, formulas=1),
        )
        return cls(engine, samples, resources, manifest, is_forced)

    def plan(self, work: Work) -> FormulaPlan:
        """How the work is done, with the rate of this machine for these formulas."""
        train, test, tile = self.samples["train"], self.samples.get("test"), self.manifest.tile
        num_test = None if test is None else test.num_samples
        cost, rate = self._measured()
        grids = kernel_grids(train.num_samples, num_test, 1, tile)
        itemsize = np.dtype(self.manifest.store_dtype).itemsize
        workload = Workload(grids, num_test or 0, tile, 1, itemsize, cost, num_groups=1, sizes=_SIZES)
        cluster, source = self.resources.cluster, self
        if cluster is not None:  # whose workers measured matrix products
            resources = replace(self.resources, cluster=replace(cluster, flops_per_second=rate))
            source = replace(self, resources=resources)
        found = source.planned(work, workload, _CPU, rate, None)  # no choice decides any bit
        return FormulaPlan(**{**vars(found), "sample_seconds": cost.jacobian_flops / rate})

    def _measured(self) -> tuple[Cost, float]:
        """Costs with the preparation of a sample, and operations of pairs a second, from the first samples."""
        net, cost = self.engine.net, self.engine.cost
        count = max(1, min(_TIMED_SAMPLES, int((_TIMED_FLOPS / cost.pair_flops) ** 0.5)))
        count = min(count, self.samples["train"].num_samples)
        (values,) = self.samples["train"].source.read(0, count).values()
        tries: list[tuple[float, float]] = []
        while sum(map(sum, tries)) < _TIMED_SECONDS and len(tries) < _TIMED_TRIES:
            start = perf_counter()
            rows = net.prepare(values)
            between = perf_counter()
            net.tile(rows, rows[:])
            tries.append((between - start, perf_counter() - between))
        preparation, contraction = (min(each) for each in zip(*tries, strict=True))
        rate = cost.pair_flops * count**2 / contraction
        return replace(cost, jacobian_flops=rate * preparation / count), rate

    def settle(self, work: Work) -> "FormulaSource":
        """See :meth:`TileSource.settle`: every sample passes through the layers once."""
        plan = self.plan(work).fitting()
        seconds = plan.seconds * (1.0 - plan.tiles_done / plan.workload.num_tiles)
        if seconds > _MOST_SECONDS and not self.is_forced:
            raise ResourceError(
                f"this network takes about {format_seconds(seconds)} on {plan.machine.num_workers} workers "
                f"({1 / plan.machine.flops_per_second * plan.workload.cost.pair_flops:.2g} s a pair of samples); take "
                "fewer samples, smaller images, Flatten in place of pooling, more workers, or force=True (run.force)"
            )
        self.resources.require_medium(work.medium)
        for one in self.samples.values():
            for start, stop in one.spans():
                for span in Span(start, stop).cut(max(1, _SCAN_BYTES // self.engine.cost.block_bytes)):
                    (values,) = one.source.read(span.start, span.stop).values()
                    try:
                        self.engine.net.prepare(values)
                    except NtkpipeError as error:
                        if span.start == 0:
                            raise
                        raise type(error)(f"{said(error)} (samples of {one.label} from {span.start} on)") from error
        where = self.resources.where_computed(_CPU)
        choices = plan.choices({}, *where) if work.existing is None else work.existing.manifest.choices
        return replace(self, settled=plan, manifest=self.manifest.model_copy(update={"choices": choices}))

    def settled_plan(self) -> Plan:
        """See :meth:`SampleSource.settled_plan`."""
        assert self.settled is not None
        return self.settled

    def job(self, plan: Plan, sources: Mapping[str, Source], sink: Sink, store: Store) -> BuildJob:
        """See :meth:`SampleSource.job`."""
        cache, dtype = StripCache(plan.cache_bytes), np.dtype(self.manifest.store_dtype)
        return FormulaJob(
            self.engine,
            plan,
            sources,
            False,
            sink,
            cache,
            dtype,
            prefixes=("kernel", f"groups/{_NNGP}"),
            in_use=store.in_use,
            contraction=CONTRACTION,
        )

    def products(self, signs: Vector, step: Callable[[], None]) -> Products | None:
        """See :meth:`TileSource.products`: none, but those of some rows."""
        return None

    def row_products(self, signs: Vector, progress: bool) -> "FormulaProducts":
        """See :meth:`TileSource.row_products`."""
        return FormulaProducts(self, signs, progress)


class FormulaProducts(RowProducts):
    """K v in a random row of each row of tiles, so that every tile takes part; random entries by a slow path."""

    by_tolerance = True

    def __init__(self, source: FormulaSource, signs: Vector, progress: bool) -> None:
        self._source, self._signs, self._progress = source, signs, progress
        self._net, self._tile, self._num_slow = source.engine.net, source.manifest.tile, 0

    def words(self) -> Mapping[str, Any]:
        """See :meth:`RowProducts.words`."""
        return {"by_formula": True, "slow_entries": self._num_slow}

    def _read(self, split: str, start: int, stop: int) -> NDArray[Any]:
        (values,) = self._source.samples[split].source.read(start, stop).values()
        return values

    def bundles(self, split: str) -> NDArray[np.int64]:
        """See :meth:`RowProducts.bundles`."""
        count, random = self._source.samples[split].num_samples, np.random.default_rng(2)
        found = np.full(count, -1, np.int64)
        for label, span in enumerate(Span(0, count).cut(self._tile)):
            found[random.integers(span.start, span.stop)] = label
        return found

    def sums(self, labels: Mapping[str, NDArray[np.int64]]) -> Products:
        """See :meth:`RowProducts.sums`."""
        found: Products = {}
        for split, own in labels.items():
            picked = np.flatnonzero(own >= 0)
            values = np.zeros((2, own.max(initial=-1) + 1))
            if len(picked):
                for into, sums in zip(values, self._rows(split, picked), strict=True):
                    np.add.at(into, own[picked], sums)
            found |= {(None, None, split): values[0], (0, None, split): values[1]}
        return found

    def _rows(self, split: str, picked: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sums of NTK and NNGP times the vector over columns, shape (2, rows)."""
        samples = np.concatenate([self._read(split, row, row + 1) for row in picked.tolist()])
        left, count = self._net.prepare(samples), len(self._signs)
        found, slow = np.zeros((2, len(picked))), self._chosen(samples, count)
        self._num_slow += len(slow)
        spans = Span(0, count).cut(self._tile)
        with Ticks(len(spans), what=f"rows of {split}", unit="step", enabled=self._progress) as ticks:
            for span in spans:
                values = self._read("train", span.start, span.stop)
                nngp, ntk = self._net.tile(left, self._net.prepare(values))
                for row, column in slow:
                    if span.start <= column < span.stop:
                        at = column - span.start
                        nngp[row, at], ntk[row, at] = self._net.slow(samples[row], values[at])
                for into, part in zip(found, (ntk, nngp), strict=True):
                    into += part @ self._signs[span.start : span.stop]
                ticks.tick()
        return found

    def _chosen(self, samples: NDArray[Any], count: int) -> list[tuple[int, int]]:
        """Entries for the slow path, as many as its time allows, at least one a row."""
        if self._source.engine.cost.pair_flops > _SLOW_FLOPS:
            return []
        start = perf_counter()
        self._net.slow(samples[0], samples[-1])
        most = max(len(samples), int(_SLOW_SECONDS / (perf_counter() - start)))
        every = np.random.default_rng(3).permutation(len(samples) * count)
        return [divmod(int(n), count) for n in every[:most]]


def _num_outputs(train: Samples) -> int:
    targets = train.targets
    if targets is None:
        return 1
    with suppress(ConfigError):  # of what are no labels, which solvers refuse
        if targets.ndim == 1 and targets.dtype.kind != "f":
            return int(encode(targets).matrix.shape[1])
    return max(1, int(np.prod(targets.shape[1:])))
