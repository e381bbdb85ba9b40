"""What sources of samples have in common: data and records, a plan, and tiles by threads or a cluster."""

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from ntkpipe.base.grid import kernel_grids
from ntkpipe.build.life import StoreSink, TileSource, Work
from ntkpipe.build.plan import Plan, Workload, make_plan
from ntkpipe.build.records import TileRecord, logged
from ntkpipe.build.tiles import BuildJob, Sink
from ntkpipe.build.workers import Resources
from ntkpipe.jacobian.model.samples import Samples, Source, StoredSource
from ntkpipe.jacobian.self_check import CheckReport
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.layout import Index, layouts
from ntkpipe.store.manifest import Choices, DataRecord, Manifest
from ntkpipe.store.store import Store


class SampleSource(TileSource, Protocol):
    """Tiles come from strips of samples: Jacobians of a model, or what a formula needs of each."""

    resources: Resources

    @property
    def samples(self) -> Mapping[str, Samples]:
        """Samples by split."""
        raise NotImplementedError

    def settled_plan(self) -> Plan:
        """The plan of a settled source."""
        raise NotImplementedError

    def job(self, plan: Plan, sources: Mapping[str, Source], sink: Sink, store: Store) -> BuildJob:
        """What each worker does."""
        raise NotImplementedError

    def check(self) -> tuple[CheckReport | None, float]:
        """What was checked before, and for how many seconds."""
        return None, 0.0

    def data(self, array: StoredArray, index: Index) -> NDArray[Any] | None:
        """See :meth:`TileSource.data`; outputs come with the tiles of their samples."""
        folder, split, *name = array.layout.name.split("/")
        samples, part = self.samples[split], array.layout.region(index)[0]
        if folder == "samples":
            return samples.source.read(part.start, part.stop)[name[0]]
        return samples.targets[part] if folder == "targets" and samples.targets is not None else None

    def first(self, stored: Manifest) -> tuple[DataRecord, DataRecord | None]:
        """See :meth:`TileSource.first`."""
        train, test = self.samples["train"], self.samples.get("test")
        before = None if test is None or stored.test is None else self._look(test, stored.test, "test")
        return self._look(train, stored.train, "train"), before

    def _look(self, samples: Samples, stored: DataRecord, split: str) -> DataRecord:
        first, is_read = samples.first(stored.num_samples), self.manifest.train.inputs_digest
        return first.inspect(f"{split} inputs") if is_read else first.describe()

    def planned(
        self,
        work: Work,
        workload: Workload,
        device: torch.device,
        rate: float,
        choices: Choices | None,
        *,
        shares_strips: bool = False,
    ) -> Plan:
        """How the work is done, by workers that do ``rate`` operations a second here, and may share strips by files."""
        machine = self.resources.machine(device, rate, work.medium.free_bytes())
        kernels = {name: each for name, each in layouts(work.manifest).items() if each.grid is not None}
        return make_plan(
            workload,
            machine if shares_strips else replace(machine, scratch_bytes=0),
            choices=choices,
            tiles_done=sum(each.num_chunks - work.left.get(name, 0) for name, each in kernels.items()),
            bytes_to_write=work.num_bytes,
        )

    def run(self, store: Store, manifest: Manifest, sink: StoreSink) -> Generator[TileRecord, None, None]:
        """See :meth:`TileSource.run`: blocks of tiles, on threads or by the workers of a cluster."""
        plan, sets = self.settled_plan(), (("train", manifest.train), ("test", manifest.test))
        sizes = {split: each.num_samples for split, each in sets if each}
        grids = kernel_grids(sizes["train"], sizes.get("test"), manifest.num_covectors, manifest.tile)
        plan = replace(plan, workload=replace(plan.workload, grids=grids, num_test=sizes.get("test", 0)))
        executor = self.resources.executor(store, plan.machine.workers)
        sources = {split: StoredSource(store, split, count) for split, count in sizes.items()}
        with closing(self.job(plan, sources, sink, store)) as job:
            yield from logged(store, plan, executor.run(job, plan.tasks()), *self.check())
