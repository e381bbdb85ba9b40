"""Grow a store by more samples: check that they extend what is stored, and complete its ragged edge first."""

from collections import Counter
from collections.abc import Mapping

from ntkpipe.build.matching import require_beginning, require_same_function
from ntkpipe.build.prepare import Prepared
from ntkpipe.build.run import Settled, build_chunks, first_of, settle
from ntkpipe.build.workers import Resources
from ntkpipe.store.manifest import Manifest
from ntkpipe.store.mending.growth import ChunkKey, OldEntries, begin, end_growth, ragged
from ntkpipe.store.store import Store


def grow_store(prepared: Prepared, asked: Manifest, existing: Store, resources: Resources) -> tuple[Store, Settled]:
    """Give a store the samples that are asked for, so that a run can compute the tiles that are missing then."""
    after = existing.manifest.grown(asked.train, asked.test, asked.environment)
    before = first_of(prepared, existing.manifest)
    require_beginning(existing, before, asked)
    require_same_function(existing, prepared)
    existing.complete_layout()
    left = chunks_left(existing, after)
    _, settled = settle(prepared, after, Store(existing.medium, after), existing.medium, resources, left=left)
    _complete_edge(before, existing, ragged(existing.manifest, after), resources)
    return begin(existing, after), settled


def chunks_left(store: Store, after: Manifest) -> Mapping[str, int]:
    """How many chunks of each array are to be written once the store has grown."""
    edge = Counter(name for name, index in ragged(store.manifest, after) if store.arrays[name].has(index))
    left = {}
    for name, array in Store(store.medium, after).arrays.items():
        is_recut = name in store.arrays and store.arrays[name].layout.chunks != array.layout.chunks
        left[name] = array.layout.num_chunks if is_recut else len(array.missing()) + edge[name]
    return left


def _complete_edge(before: Prepared, store: Store, edge: frozenset[ChunkKey], resources: Resources) -> None:
    """Compute missing chunks among those that get larger now, or did so in an earlier growth."""
    # What is stored then depends only on the manifest and its history, not on when runs were interrupted.
    needed = edge | OldEntries.of(store, store.manifest.earlier()).chunks()
    wanted = {chunk for chunk in needed if not store.arrays[chunk[0]].has(chunk[1])}
    if wanted:
        data = (name for name in store.arrays if name.startswith(("samples/", "targets/")))
        wanted |= {(name, index) for name in data for index in store.arrays[name].missing()}
        build_chunks(store, frozenset(wanted), before, resources.without_self_check())
    end_growth(store)
