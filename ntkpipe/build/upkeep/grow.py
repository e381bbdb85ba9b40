"""More samples for a store: what is asked is compared with what is there, and its ragged edge is completed first."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import StoreMismatchError, TileError
from ntkpipe.build.plan import BlockTask, ClusterWorkers
from ntkpipe.build.prepare import Prepared
from ntkpipe.build.records import BuildRecord
from ntkpipe.build.run import Settled, build, first_of, require_same, require_same_function, settle
from ntkpipe.executors.threads import Executor
from ntkpipe.jacobian.model.samples import Samples, StoredSource
from ntkpipe.store.chunks import Store
from ntkpipe.store.manifest import DataRecord, Manifest
from ntkpipe.store.mending.growth import Chunk, Kept, begin, end_growth, ragged


def grow_store(
    prepared: Prepared,
    asked: Manifest,
    existing: Store,
    run: RunSpec,
    *,
    crew: ClusterWorkers | None,
    executor: Callable[[Store], Executor[BlockTask, BuildRecord] | None],
    progress: bool,
) -> Settled:
    """Give a store the samples that are asked for, so that a run can compute the tiles that are missing then."""
    after = existing.manifest.grown(asked.train, asked.test, asked.environment)
    before = first_of(prepared, existing.manifest)
    require_beginning(existing, before, asked)
    require_same_function(existing, prepared)
    existing.complete_layout()
    settled = settle(
        prepared,
        after,
        Store(existing.medium, after),
        existing.medium,
        run,
        "a",
        crew,
        left=chunks_left(existing, after),
    )
    _complete_edge(
        before, existing, ragged(existing.manifest, after), run, crew=crew, executor=executor, progress=progress
    )
    return replace(settled, store=begin(existing, after))


def chunks_left(store: Store, after: Manifest) -> Mapping[str, int]:
    """How many chunks of each array are to be written once the store has grown."""
    edge = Counter(name for name, index in ragged(store.manifest, after) if store.arrays[name].has(index))
    left = {}
    for name, array in Store(store.medium, after).arrays.items():
        is_recut = name in store.arrays and store.arrays[name].layout.chunks != array.layout.chunks
        left[name] = array.layout.num_chunks if is_recut else len(array.missing()) + edge[name]
    return left


def require_beginning(store: Store, before: Prepared, asked: Manifest) -> None:
    """Check that the samples and targets of a store are the first ones of those that are asked for."""
    found: dict[str, DataRecord | None] = {"train": None, "test": None}
    for split, samples, stored in (
        ("train", before.train, store.manifest.train),
        ("test", before.test, store.manifest.test),
    ):
        if samples is None or stored is None:
            continue
        record = found[split] = samples.inspect(f"{split} inputs")
        differing = [
            name for name in ("inputs_digest", "targets_digest") if getattr(record, name) != getattr(stored, name)
        ]
        if differing and record.inputs == stored.inputs and record.targets == stored.targets:
            where = _first_difference(store, split, samples)
            raise StoreMismatchError(
                f"{store.root} holds {stored.num_samples} {split} samples, which must be the first ones of those that "
                f"are asked for, but {where}. Add samples at the end; or use another path, or mode='w' to start over",
                tuple((f"{split}.{name}", getattr(stored, name), getattr(record, name)) for name in differing),
            )
    require_same(store, asked.model_copy(update=found))


def _first_difference(store: Store, split: str, samples: Samples) -> str:
    """The first sample that is another one than in the store, in words."""
    stored = StoredSource(store, split, samples.num_samples)
    targets = samples.targets
    try:
        for start, stop in samples.spans():
            pairs = [
                (values, stored.read(start, stop)[name]) for name, values in samples.source.read(start, stop).items()
            ]
            if targets is not None:
                pairs.append((targets[start:stop], store.arrays[f"targets/{split}"].read_samples(start, stop)))
            for number in range(stop - start):
                if any(not np.array_equal(one[number], other[number]) for one, other in pairs):
                    return f"sample {start + number} or its target is another one"
    except TileError as error:
        return f"they differ ({error})"
    return "the bits of their zeros differ"


def _complete_edge(
    before: Prepared,
    store: Store,
    edge: frozenset[Chunk],
    run: RunSpec,
    *,
    crew: ClusterWorkers | None,
    executor: Callable[[Store], Executor[BlockTask, BuildRecord] | None],
    progress: bool,
) -> None:
    """Compute what is missing of the chunks that get larger, and of those that an earlier growth made larger.

    So what is stored depends on the manifest and its history alone, whenever a run was interrupted.
    """
    needed = edge | Kept.of(store, store.manifest.earlier()).chunks()
    wanted = {chunk for chunk in needed if not store.arrays[chunk[0]].has(chunk[1])}
    if wanted:
        data = (name for name in store.arrays if name.startswith(("samples/", "targets/")))
        wanted |= {(name, index) for name in data for index in store.arrays[name].missing()}
        left = Counter(name for name, _ in wanted)
        quick = run.model_copy(update={"self_check": False})
        settled = settle(before, store.manifest, store, store.medium, quick, "a", crew, left=left)
        build(
            settled,
            before.train,
            before.test,
            executor=executor(store),
            wanted=frozenset(wanted),
            progress=progress,
        )
    end_growth(store)
