"""Any plan covers every tile once, keeps within its memory, and says what it will recompute."""

import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import DictSink, LinearEngine
from workloads import PLENTY, make_workload, workloads

from ntkpipe.base.errors import ResourceError
from ntkpipe.base.resources import format_seconds
from ntkpipe.build.plan import Machine, Workload, make_plan
from ntkpipe.build.tiles import BuildJob, StripCache
from ntkpipe.executors.threads import ThreadExecutor
from ntkpipe.jacobian.cost import Cost
from ntkpipe.jacobian.model.samples import ArraySource
from ntkpipe.store.manifest import Choices


def with_room_for(workload: Workload, num_samples: int) -> Machine:
    """A machine whose one worker has memory for the Jacobians of so many samples, beside tiles and scratch."""
    least = make_plan(workload, replace(PLENTY, memory_limit=1)).memory_bytes  # with three
    return replace(PLENTY, memory_limit=least + (num_samples - 3) * workload.cost.block_bytes + 1000)


machines = st.builds(
    Machine,
    workers=st.integers(1, 9),
    memory_limit=st.integers(1, 10**9),
    base_memory=st.integers(0, 10**8),
    free_disk=st.none() | st.integers(0, 10**9),
    flops_per_second=st.floats(1e6, 1e12),
)
every_choice = st.builds(
    Choices,
    strip=st.integers(1, 80),
    subtile=st.integers(1, 80),
    batch=st.integers(1, 80),
    representations=st.just({}),
    device=st.just("cpu"),
)


@given(workloads, machines)
def test_tasks_cover_every_stored_tile_once(workload, machine):
    plan = make_plan(workload, machine)
    tasks = list(plan.tasks())
    assert len(tasks) == plan.num_tasks
    for name, grid in workload.grids.items():
        covered = Counter(
            (row, column)
            for task in tasks
            if task.array == name
            for row in task.block.rows()
            for column in task.block.columns()
            if grid.is_stored(row, column)
        )
        assert covered == dict.fromkeys(grid.tiles(), 1)
    diagonal = [task.block.row_start for task in tasks if task.array == "kernel/test_diagonal"]
    assert diagonal == list(range(-(-workload.num_test // workload.tile)))


@given(workloads, machines)
def test_it_keeps_within_memory_and_disk_or_refuses_with_both_numbers(workload, machine):
    plan = make_plan(workload, machine, bytes_to_write=5000)
    too_much_memory = plan.memory_bytes > machine.memory_limit
    too_much_disk = machine.free_disk is not None and machine.free_disk < 5000
    assert len(plan.problems) == too_much_memory + too_much_disk
    if plan.problems:
        with pytest.raises(ResourceError) as info:
            plan.fitting()
        words = dict(plan.rows())
        assert not too_much_memory or words["memory bound"].split("; limit ")[1] in str(info.value)
        assert not too_much_memory or words["memory bound"].split(";")[0] in str(info.value)
        assert not too_much_disk or "needs 4.9 KiB more" in str(info.value)
    else:
        plan.fitting()


@given(workloads, machines, st.integers(0, 10**9))
def test_what_fits_a_memory_fits_a_larger_one(workload, machine, more):
    machine = replace(machine, free_disk=None)
    small = make_plan(workload, machine)
    large = make_plan(workload, replace(machine, memory_limit=machine.memory_limit + more))
    assert small.problems or not large.problems


@pytest.mark.parametrize(("tile", "largest"), [(4, 4), (18, 18), (600, 14)])
def test_heavy_jacobians_fit_any_memory_that_holds_three_samples(tile, largest):
    """One held, one streaming, one being put together: from there on strips grow with the memory."""
    workload = make_workload(2000, 0, tile, 1, Cost(10**9, 1, 0, 1, jacobian_flops=1.0, pair_flops=1.0))
    plans = [make_plan(workload, with_room_for(workload, held)) for held in range(3, 60)]
    assert all(plan.problems == () for plan in plans)
    strips = [plan.strip for plan in plans]
    assert strips == sorted(strips)
    assert strips[-1] == largest


@given(workloads, machines)
def test_with_memory_enough_nothing_is_cut_or_computed_again(workload, machine):
    plan = make_plan(workload, replace(machine, memory_limit=10**15, free_disk=None))
    assert plan.problems == ()
    assert plan.machine.workers == machine.workers
    assert plan.strip == workload.tile


@given(workloads, machines)
def test_what_is_chosen_fits_the_tile(workload, machine):
    plan = make_plan(workload, machine)
    assert 1 <= plan.batch <= plan.strip <= workload.tile
    assert 1 <= plan.subtile <= plan.strip
    assert plan.hold >= 1
    assert plan.recompute_factor >= 1.0
    assert plan.flops >= sum(grid.num_pairs for grid in workload.grids.values()) * workload.cost.pair_flops


@given(workloads, machines, every_choice)
def test_a_resumed_store_keeps_its_choices_on_any_machine(workload, machine, choices):
    plan = make_plan(workload, machine, choices=choices)
    assert plan.strip == choices.strip
    assert plan.subtile == min(choices.subtile, choices.strip)
    assert plan.batch == min(choices.batch, choices.strip)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 15), st.integers(1, 12), st.integers(0, 40), st.integers(1, 4))
def test_the_recompute_factor_bounds_the_strips_that_a_run_computes(num_train, num_test, tile, held, workers):
    """Jacobians that cost nothing are not cached: only strips that a worker holds are reused."""
    cost = Cost(10**6, 1, 0, 1, jacobian_flops=0.0, pair_flops=1e6)
    workload = make_workload(num_train, num_test, tile, 1, cost)
    plan = make_plan(workload, replace(with_room_for(workload, held + 3), workers=workers))
    assert plan.cache_bytes == 0
    counted = run(plan, num_train, num_test)
    assert sum(counted.values()) <= plan.recompute_factor * workload.num_samples
    assert len(counted) == workload.num_samples


@pytest.mark.parametrize("held", [16, 24])
def test_the_recompute_factor_is_no_idle_bound(held):
    """One worker computes what it says, or a strip a block less."""
    cost = Cost(10**6, 1, 0, 1, jacobian_flops=0.0, pair_flops=1e6)
    workload = make_workload(32, 0, 4, 1, cost)
    plan = make_plan(workload, with_room_for(workload, held))
    counted = sum(run(plan, 32, 0).values()) / 32
    assert 1 < 0.9 * plan.recompute_factor <= counted <= plan.recompute_factor


def test_a_cache_for_everything_computes_each_jacobian_once():
    cost = Cost(1000, 1, 0, 1, jacobian_flops=1e9, pair_flops=1.0)
    plan = make_plan(make_workload(32, 9, 4, 1, cost), replace(PLENTY, workers=3))
    assert plan.recompute_factor == 1.0
    assert set(run(plan, 32, 9).values()) == {1}


def run(plan, num_train: int, num_test: int) -> dict[float, int]:
    """Run a plan; how often each sample's Jacobian was computed."""
    x = np.stack([np.arange(num_train + num_test), np.ones(num_train + num_test)], axis=1)
    sources = {"train": ArraySource({"input": x[:num_train]}, num_train)}
    if num_test:
        sources["test"] = ArraySource({"input": x[num_train:]}, num_test)
    engine = LinearEngine()
    job = BuildJob(engine, plan, sources, False, DictSink(), StripCache(plan.cache_bytes), np.dtype("float64"))
    list(ThreadExecutor(plan.machine.workers).run(job, plan.tasks()))
    return engine.counts


def test_a_million_samples_are_planned_without_listing_their_tiles():
    cost = Cost(400, 5000, 10**6, 100, jacobian_flops=1e5, pair_flops=200.0)
    workload = make_workload(10**6, 0, 4096, 1, cost)
    tracemalloc.start()
    plan = make_plan(workload, replace(PLENTY, workers=16, memory_limit=8 * 2**30, flops_per_second=5e10))
    count = sum(1 for _ in plan.tasks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert workload.num_tiles == 245 * 246 // 2
    assert plan.problems == ()
    assert plan.num_tasks == count >= 4 * 16
    assert plan.bytes_to_write == workload.num_tiles * 4096**2 * 8
    assert plan.recompute_factor < 20
    assert peak < 2**20


@pytest.mark.parametrize(("jacobian_flops", "tiles"), [(1e5, range(1, 10)), (1e9, range(16, 257))])
def test_blocks_of_many_processes_keep_them_busy_unless_jacobians_are_dear(jacobian_flops, tiles):
    cost = Cost(400, 5000, 10**6, 100, jacobian_flops=jacobian_flops, pair_flops=4000.0)
    workload = make_workload(10**6, 0, 4096, 1, cost)
    plan = make_plan(
        workload, replace(PLENTY, processes=256, is_remote=True, memory_limit=2**30, flops_per_second=1e11)
    )
    assert plan.num_tasks >= 4 * 256
    assert plan.height * plan.width in tiles
    idle = plan.block_seconds / (plan.seconds + plan.block_seconds)
    assert (idle < 0.05) == (jacobian_flops < 1e9)


def test_a_plan_in_words_and_as_json():
    plan = make_plan(make_workload(32, 9, 4, 2, Cost(1000, 1, 0, 1, 1e9, 1.0)), PLENTY, tiles_done=3, bytes_to_write=10)
    words = dict(plan.rows())
    assert words["kernels"] == "kernel/train 64 × 64, kernel/test_train 18 × 64"
    assert words["tiles"] == "60, of which 3 exist"
    assert words["to write"] == "10 B; free space unknown"
    assert plan.to_json()["tiles_done"] == 3
    assert plan.to_json()["memory_bytes"] == plan.memory_bytes


def test_every_plane_has_tiles_buffers_and_bytes():
    """Tiles of all planes are held twice; sums of single outputs are kept apart, and with groups once more."""
    one = make_workload(640, 90, 64, 1, Cost(1000, 1, 0, 1, 1e9, 1.0))
    many = replace(one, num_matrices=10, num_groups=2)
    few, lots = make_plan(one, PLENTY), make_plan(many, PLENTY)
    assert (many.num_planes, many.num_tiles, many.tile_bytes) == (30, 30 * one.num_tiles, one.tile_bytes)
    assert lots.bytes_to_write == 30 * few.bytes_to_write
    assert lots.num_tasks == few.num_tasks
    assert lots.flops == few.flops
    assert lots.memory_bytes - few.memory_bytes >= 2 * 29 * one.tile_bytes + 9 * 64**2 * 16 + 10 * 64**2 * 8
    assert lots.to_json()["planes"] == 30
    assert "30 of each, of each of 10 outputs, of all parameters and 2 groups" in dict(lots.rows())["kernels"]
    large = replace(PLENTY, memory_limit=2**40)
    subtiles = [make_plan(replace(load, tile=5000), large).subtile for load in (one, many)]
    assert subtiles == [2560, 809]


@pytest.mark.parametrize(("seconds", "words"), [(1.0, "1.0 s"), (99, "99.0 s"), (120, "2.0 min"), (7200, "2.0 h")])
def test_seconds_in_words(seconds, words):
    assert format_seconds(seconds) == words


def test_memory_that_a_batch_takes_whatever_its_size_is_counted():
    cost = Cost(1000, 1000, 0, 1000, 1e6, 1e3)
    without, beside = (
        make_plan(make_workload(64, 0, 16, 2, replace(cost, fixed_workspace_bytes=size)), PLENTY)
        for size in (0, 5 * 2**20)
    )
    assert beside.memory_bytes - without.memory_bytes == 5 * 2**20


@pytest.mark.parametrize("num_samples", [4, 5, 6, 7])
def test_where_a_few_jacobians_fit_a_strip_is_one_of_them(num_samples):
    workload = make_workload(64, 0, 64, 1, Cost(10**6, 1000, 0, 1000, 1e6, 1e3))
    plan = make_plan(workload, with_room_for(workload, num_samples))
    assert plan.strip == 1
