"""A model and its samples as a source of tiles: planned, self-checked, and computed by threads or a cluster."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntkpipe.base.errors import SelfCheckError, StoreMismatchError
from ntkpipe.base.progress import Ticks
from ntkpipe.build.from_samples import SampleSource
from ntkpipe.build.life import Products, RowProducts, Vector, Work
from ntkpipe.build.plan import Plan
from ntkpipe.build.prepare import Prepared, Request, Settled, plan_and_check, prepare, products_of, workload_of
from ntkpipe.build.scratch import Scratch
from ntkpipe.build.strips import StripCache
from ntkpipe.build.tiles import BuildJob, Sink
from ntkpipe.build.workers import Resources, environment
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.fallback import JacobianProducts, NoProductError
from ntkpipe.jacobian.model.samples import Samples, Source
from ntkpipe.jacobian.model.state import fingerprint
from ntkpipe.jacobian.probe import probe_samples
from ntkpipe.jacobian.representations.pieces import contract
from ntkpipe.jacobian.representations.sums import Workspace
from ntkpipe.jacobian.self_check import CheckReport
from ntkpipe.store.growth import ChunkKey
from ntkpipe.store.manifest import FORMAT, Choices, DataRecord, Manifest
from ntkpipe.store.store import Store

# Outputs of the same model on another machine agree to rounding; those of another function do not.
_OUTPUT_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}
# Rounding across the kink of an activation changes an entry by more than rounding itself.
_ENTRY_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "tf32": 5e-2, "bfloat16": 0.2}


def job_of(
    settled: Settled,
    sources: Mapping[str, Source],
    sink: Sink,
    store: Store | None = None,
) -> BuildJob:
    """The job of a run whose tiles go to a sink, which is that of a store, or of matrices in memory."""
    prepared, engine, plan = settled.prepared, settled.engine, settled.plan
    cache, dtype = StripCache(plan.cache_bytes), np.dtype(prepared.spec.resolved_store_dtype())
    root, in_use = (None, nullcontext) if store is None else (store.root, store.in_use)
    scratch = Scratch(root if isinstance(root, Path) else None, plan.bytes_to_write)
    pairs, prefixes = prepared.kind.pairs, tuple(plane.prefix for plane in prepared.planes)
    return BuildJob(
        engine, plan, sources, prepared.train.is_mapping, sink, cache, dtype, pairs, prefixes, in_use, scratch
    )


@dataclass(frozen=True)
class ModelSource(SampleSource):
    """Tiles come from Jacobian strips of a model and its samples."""

    prepared: Prepared
    resources: Resources
    manifest: Manifest
    settled: Settled | None = None

    @property
    def samples(self) -> Mapping[str, Samples]:
        """See :class:`SampleSource`."""
        return self.prepared.samples

    @classmethod
    def of(cls, request: Request, resources: Resources, look: Callable[[Samples, str], DataRecord]) -> "ModelSource":
        """Prepare what is asked for; ``look`` finds the records of samples."""
        prepared = prepare(request, device=resources.device)
        if resources.client is not None:
            resources.require_model(prepared.model)
        spec, test = prepared.spec, prepared.test
        manifest = Manifest(
            format=FORMAT,
            kind=spec.kind,
            convention=prepared.kind.convention,
            num_outputs=prepared.num_outputs,
            num_covectors=prepared.num_covectors,
            tile=prepared.tile,
            compute_dtype=spec.compute_dtype,
            accumulate_dtype=spec.resolved_accumulate_dtype(),
            store_dtype=spec.resolved_store_dtype(),
            model=fingerprint(request.model, prepared.model.names),
            train=look(prepared.train, "inputs"),
            test=None if test is None else look(test, "test_inputs"),
            choices=Choices(strip=1, subtile=1, batch=1, representations={}, device="cpu", arithmetic=""),
            environment=environment(),
            groups=dict(prepared.groups),
        )
        return cls(prepared, resources, manifest)

    def require_same_function(self, store: Store, doubted: frozenset[ChunkKey] = frozenset()) -> None:
        """See :meth:`TileSource.require_same_function`: a few samples of the first stored tile."""
        # Fingerprints cover parameters, buffers and the module tree, but neither a constant in `forward` nor the hook.
        array = store.arrays["outputs/train"]
        # A truncated chunk counts as missing, too: it is written again.
        good = sorted(index for index in array.present() if (array.layout.name, index) not in doubted)
        if not good:
            return
        first = good[0]
        stored = array.read(first)
        picked = probe_samples(len(stored))
        samples = [first[0] * store.manifest.tile + sample for sample in picked]
        outputs = self.prepared.model(self.prepared.load(samples)).detach().double().cpu().numpy()
        gap = float(np.abs(outputs - stored[picked]).max())
        scale = float(np.abs(stored[picked]).max()) or 1.0
        if gap > _OUTPUT_TOLERANCE[store.manifest.compute_dtype] * scale:
            raise StoreMismatchError(
                f"{store.root}: parameters and samples are those of the store, but outputs differ by {gap:.2g} (of "
                f"{scale:.2g}): the model's forward pass or the forward hook differs",
                (("outputs", stored[picked].tolist(), outputs.tolist()),),
            )
        tile, index = store.arrays[self.prepared.planes[0].array("kernel/train")], (first[0], first[0])
        if not tile.has(index) or (tile.layout.name, index) in doubted:
            return
        pairs, width = self.prepared.kind.pairs, store.manifest.num_covectors
        piece, _ = self.prepared.engine.piece(self.prepared.load(samples))
        found = contract(piece, piece, Workspace(), pairs).double().cpu().numpy()
        found = found[0] if pairs == "same" else found  # of the first output, if each has its own
        rows = np.add.outer(np.array(picked) * width, np.arange(width)).reshape(-1)
        stored = tile.read(index)[np.ix_(rows, rows)].astype(np.float64)
        scale = float(np.sqrt(np.outer(stored.diagonal(), stored.diagonal())).max()) or 1.0
        error = float(np.abs(found - stored).max()) / scale
        if error > _ENTRY_TOLERANCE[store.manifest.compute_dtype]:
            raise StoreMismatchError(
                f"{store.root}: parameters, samples and outputs are those of the store, but kernel entries differ by "
                f"{error:.1e} of their scale: the model is differentiated in another way (detached, or hooked)",
                (("kernel entries", stored.tolist(), found.tolist()),),
            )

    def engine(self, work: Work) -> Engine:
        """The engine, with the choices that a store recorded."""
        engine, existing = self.prepared.engine, work.existing
        if existing is None:
            return engine
        choices, path = existing.manifest.choices, existing.root
        engine = engine.reusing(choices.representations)
        if engine.representations != choices.representations:
            raise StoreMismatchError(
                f"{path} was begun with Jacobians found as {choices.representations}; now they would be found as "
                f"{engine.representations}. Use the versions in its manifest, or mode='w' to start over",
                (("choices.representations", choices.representations, engine.representations),),
            )
        device, arithmetic = self.resources.where_computed(engine.model.device)
        if (device, arithmetic) != (choices.device, choices.arithmetic):
            warnings.warn(
                f"{path} was begun on {choices.device} ({choices.arithmetic}), this run is on {device} ({arithmetic}): "
                "its tiles will agree to rounding, not to the last bit",
                stacklevel=2,
            )
        return engine

    def plan(self, work: Work, engine: Engine) -> Plan:
        """How the work is done."""
        workload = workload_of(self.prepared, engine, self.prepared.grids(), self.prepared.num_test)
        choices = None if work.existing is None else work.existing.manifest.choices
        return self.planned(
            work, workload, engine.model.device, engine.setup.rates.product, choices, shares_strips=True
        )

    def settle(self, work: Work) -> "ModelSource":
        """See :meth:`TileSource.settle`."""
        run, existing, planned = self.resources, work.existing, partial(self.plan, work)
        settled = plan_and_check(self.prepared, self.engine(work), planned, is_checked=run.run.self_check)
        run.require_medium(work.medium)
        found = settled.engine.representations
        if existing is None:
            choices = settled.plan.choices(found, *run.where_computed(settled.engine.model.device))
        else:
            choices = existing.manifest.choices
            if settled.check is not None and found != choices.representations:
                raise SelfCheckError(
                    f"{existing.root} was begun with Jacobians found as {choices.representations}, which the "
                    f"self-check refuses now ({settled.check.moved}); what is stored cannot be trusted: use mode='w' "
                    "to start over"
                )
        return replace(self, settled=settled, manifest=self.manifest.model_copy(update={"choices": choices}))

    def settled_plan(self) -> Plan:
        """See :meth:`SampleSource.settled_plan`."""
        assert self.settled is not None
        return self.settled.plan

    def job(self, plan: Plan, sources: Mapping[str, Source], sink: Sink, store: Store) -> BuildJob:
        """See :meth:`SampleSource.job`."""
        assert self.settled is not None
        return job_of(replace(self.settled, plan=plan), sources, sink, store)

    def check(self) -> tuple[CheckReport | None, float]:
        """See :meth:`SampleSource.check`."""
        assert self.settled is not None
        return self.settled.check, self.settled.check_seconds

    def num_steps(self) -> int:
        """See :meth:`TileSource.num_steps`: a pass over the train samples, and one per group over all."""
        samples = self.prepared.samples
        passes = [samples["train"], *len(self._groups) * list(samples.values())]
        return sum(len(each.spans(one.num_samples)) for each in self._products for one in passes)

    def products(self, signs: Vector, step: Callable[[], None]) -> Products | None:
        """See :meth:`TileSource.products`: J(J'v), by plain ``torch.func``; none where there is no J u."""
        try:
            return self._products_of(signs, step)
        except NoProductError:
            return None

    def _products_of(self, signs: Vector, step: Callable[[], None]) -> Products:
        found: Products = {}
        for output, each in enumerate(self._products):
            # J'v is computed once: its parts in the groups of parameters give their kernels, which sum to the whole.
            direction = each.transposed(self.prepared.train.source, signs, step)
            for group, names in enumerate(self._groups):
                part = {name: value if name in names else torch.zeros_like(value) for name, value in direction.items()}
                for split, samples in self.prepared.samples.items():
                    product = each.product(samples.source, part, step)
                    for number in (None, group):
                        key = number, output if self.prepared.kind.pairs == "same" else None, split
                        found[key] = found[key] + product if key in found else product
        return found

    def row_products(self, signs: Vector, progress: bool) -> "GradientProducts":
        """See :meth:`TileSource.row_products`: u = J'v, then the gradients of rows times u."""
        return GradientProducts(self.prepared, self._products, self._groups, signs, progress)

    @property
    def _products(self) -> list[JacobianProducts]:
        """One; or one for each output, which sum to the kernel or have one each."""
        manifest, choices = self.manifest, self.manifest.choices
        sizes = manifest.tile, choices.strip, choices.subtile, choices.batch
        return products_of(self.prepared, *sizes)

    @property
    def _groups(self) -> list[frozenset[str]]:
        """Parameters of each group, and last of those in none."""
        left = frozenset(self.prepared.model.names).difference(*self.manifest.groups.values())
        return [*map(frozenset, self.manifest.groups.values()), *([left] if left else [])]


class GradientProducts(RowProducts):
    """K v at rows, or sums of rows, as <g_r, J'v>, by backward passes alone as those of the tiles."""

    # They say what a store should hold, whether or not backward is the derivative of forward: J u of a straight-through
    # estimator, of a hook that scales gradients, or of an implicit layer is of another J than the gradients are.

    def __init__(
        self,
        prepared: Prepared,
        products: Sequence[JacobianProducts],
        groups: Sequence[frozenset[str]],
        signs: NDArray[np.float64],
        progress: bool,
    ) -> None:
        self._prepared, self._products, self._groups = prepared, products, groups
        self._signs, self._progress = signs, progress
        self._directions = [self._transposed(each) for each in products]

    def _transposed(self, products: JacobianProducts) -> dict[str, Tensor]:
        parameters = products.model.parameters
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
        labels = (self._signs > 0).astype(np.int64)
        for label, gradients in self._rows(products, "train", labels):
            for name, value in gradients.items():
                total[name] += value if label else -value
        return total

    def _rows(
        self, products: JacobianProducts, split: str, labels: NDArray[np.int64]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        samples = self._prepared.samples[split]
        count = len(products.spans(samples.num_samples))
        with Ticks(count, what=f"gradients of {split}", unit="step", enabled=self._progress) as ticks:
            yield from products.row_gradients(samples.source, labels, ticks.tick)

    def bundles(self, split: str) -> NDArray[np.int64]:
        """See :meth:`RowProducts.bundles`: two random halves of the samples of a batch, for each covector."""
        products, count = self._products[0], self._prepared.samples[split].num_samples
        width = len(products.covectors)
        batches = np.concatenate([np.full(len(span), n) for n, span in enumerate(products.spans(count))])
        halves = 2 * batches + np.random.default_rng(1).integers(2, size=count)
        found: NDArray[np.int64] = (halves[:, None] * width + np.arange(width)).reshape(-1)
        return found

    def sums(self, labels: Mapping[str, NDArray[np.int64]]) -> Products:
        """See :meth:`RowProducts.sums`."""
        found: Products = {}
        is_apart = self._prepared.kind.pairs == "same"
        for output, (products, direction) in enumerate(zip(self._products, self._directions, strict=True)):
            for split, own in labels.items():
                place = output if is_apart else None
                numbers: list[int | None] = [None, *range(len(self._groups))]
                into = [found.setdefault((n, place, split), np.zeros(own.max(initial=-1) + 1)) for n in numbers]
                for label, gradients in self._rows(products, split, own):
                    for names, values in zip(self._groups, into[1:], strict=True):
                        part = sum(
                            float((value.double() * direction[name]).sum())
                            for name, value in gradients.items()
                            if name in names
                        )
                        values[label] += part
                        into[0][label] += part
        return found
