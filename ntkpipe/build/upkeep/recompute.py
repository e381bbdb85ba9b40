"""Recompute chunks of a store with the choices that it recorded, so that they get the bits that they had."""

from dataclasses import replace

import numpy as np

from ntkpipe.base.config import KernelSpec
from ntkpipe.base.errors import ConfigError, TileError
from ntkpipe.build.matching import require_same_function
from ntkpipe.build.prepare import Prepared
from ntkpipe.build.run import build_chunks, first_of, write_samples
from ntkpipe.build.workers import Resources
from ntkpipe.jacobian.model.samples import Samples, StoredSource, as_samples
from ntkpipe.store.manifest import Manifest
from ntkpipe.store.mending.growth import ChunkKey, aside, ragged
from ntkpipe.store.store import Store


def stored_spec(manifest: Manifest) -> KernelSpec:
    """The arguments that a store was made with, with every default filled in."""
    same = ("kind", "groups", "compute_dtype", "accumulate_dtype", "store_dtype", "tile")
    return KernelSpec(parameters=manifest.model.parameters, **{name: getattr(manifest, name) for name in same})


def given_or_stored(store: Store, split: str, inputs: object, targets: object) -> Samples | None:
    """Samples of one set: the given ones, else those in the store, once their checksums hold."""
    record = store.manifest.train if split == "train" else store.manifest.test
    if record is None:
        if inputs is not None:
            raise ConfigError(f"{store.root} was made without test_inputs, but test_inputs were given")
        return None
    label, has_targets = f"{split} inputs", record.targets is not None
    try:
        if inputs is not None:
            samples = as_samples(inputs, targets, label=label, with_targets=has_targets)
        else:
            samples = Samples(StoredSource(store, split, record.num_samples), record.is_mapping, None, False, label)
            for start, stop in samples.spans():
                samples.source.read(start, stop)
        if has_targets and samples.targets is None:
            if targets is None:
                targets = store.arrays[f"targets/{split}"].read_samples(0, record.num_samples)
            samples = replace(samples, given_targets=np.asarray(targets))
    except (TileError, KeyError) as error:
        names = "inputs and targets" if split == "train" else "test_inputs and test_targets"
        raise ConfigError(
            f"the {split} samples in {store.root} cannot be used ({error}); give {names}, or a workflow file"
        ) from error
    return samples


def recompute(store: Store, chunks: frozenset[ChunkKey], prepared: Prepared, resources: Resources) -> None:
    """Compute chunks of a store again, each with the bits that it had, and replace them one by one."""
    require_same_function(store, prepared, chunks)
    store.complete_layout()
    data = frozenset(chunk for chunk in chunks if chunk[0].startswith(("samples/", "targets/")))
    with store.in_use():
        write_samples(store, "train", prepared.train, data)
        if prepared.test is not None:
            write_samples(store, "test", prepared.test, data)
    quick, earlier = resources.without_self_check(), store.manifest.earlier()
    # A tile at the former edge of a store that grew has entries from before and after: the earlier come first, aside.
    for before, after in zip(earlier, (*earlier, store.manifest)[1:], strict=True):
        arrays = aside(store, before)
        wanted = frozenset(
            (name, index) for name, index in (chunks - data) & ragged(before, after) if not arrays[name].has(index)
        )
        if wanted:
            for name in sorted({name for name, _ in wanted}):
                arrays[name].create()
            build_chunks(store, wanted, first_of(prepared, before), quick, stage=before)
    if chunks - data:
        build_chunks(store, chunks - data, prepared, resources)
