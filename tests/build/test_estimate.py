"""What a described cluster would take: by hand where that is possible, and never longer with more of anything."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import inputs, mlp
from workloads import PLENTY, make_workload, workloads

from ntkpipe import ClusterSpec, estimate_cluster, plan_kernel
from ntkpipe.base.errors import ConfigError
from ntkpipe.build.estimate import START_SECONDS
from ntkpipe.build.plan import make_plan
from ntkpipe.jacobian.cost import Cost

# Contractions alone, a second for each pair of samples at the rate below.
CHEAP = Cost(1, 1, 0, 1, jacobian_flops=0.0, pair_flops=1e9)
LARGE = {"flops_per_second": 1e9, "memory_limit": 10**12}


def cheap_plan(num_samples=64, tile=8, cost=CHEAP, **machine):
    return make_plan(make_workload(num_samples, 0, tile, 1, cost), replace(PLENTY, **machine))


def test_a_case_by_hand():
    """64 samples: 64 * 65 / 2 = 2080 pairs of one second; tiles of 64 s are blocks of their own, 36 of them."""
    found = estimate_cluster(
        cheap_plan(), {**LARGE, "workers": 4, "price": 0.9, "currency": "EUR", "write_bytes_per_second": 36 * 8**3}
    )
    assert found.plan.num_tasks == 36
    assert found.compute_seconds == pytest.approx(2080)
    assert found.block_seconds == pytest.approx(64)
    assert found.write_seconds == pytest.approx(1.0)
    assert found.seconds == pytest.approx(START_SECONDS + 2080 / 4 + 0.75 * 64)
    assert found.cost == pytest.approx(0.9 * 4 * found.seconds / 3600)
    assert found.binds == "compute"
    words = dict(found.rows())
    assert words["blocks"] == "36, of up to 1 × 1 tiles, 64.0 s; 9.0 a worker"
    assert words["cost"].endswith(" EUR")


def test_jacobians_count_as_they_were_timed_at_the_rate_of_the_cluster():
    plan = replace(cheap_plan(flops_per_second=2e9), sample_seconds=3.0)
    found = estimate_cluster(plan, {**LARGE, "workers": 1})
    # Timed at twice the rate; a worker keeps strips for nothing that costs no operations, so tiles compute their own.
    assert found.compute_seconds == pytest.approx(2080 + found.plan.recompute_factor * 64 * 6.0)


def test_a_slow_disk_binds_and_its_time_counts():
    found = estimate_cluster(cheap_plan(), {**LARGE, "workers": 1000, "write_bytes_per_second": 1})
    assert found.binds == "disk"
    assert found.seconds == pytest.approx(START_SECONDS + 36 * 8**3)


def test_a_memory_that_is_too_small_is_said_with_both_numbers():
    found = estimate_cluster(cheap_plan(), {**LARGE, "workers": 2, "memory_limit": "100MiB"})
    assert found.binds == "memory"
    assert "the limit is 85.0 MiB" in dict(found.rows())["does not fit"]
    assert found.to_json()["problems"] == list(found.plan.problems)


def test_memory_binds_where_jacobians_are_computed_again_for_want_of_it():
    cost = Cost(10**6, 1, 0, 1, jacobian_flops=1e11, pair_flops=1e6)
    plan = cheap_plan(cost=cost)
    least = make_plan(plan.workload, replace(PLENTY, memory_limit=1)).memory_bytes
    few, many = (
        estimate_cluster(plan, {"workers": 1, "flops_per_second": 1e9, "memory_limit": limit})
        for limit in (int(least / 0.85) + 1, 10**12)
    )
    assert (few.binds, many.binds) == ("memory", "compute")
    assert few.seconds > many.seconds


def test_only_what_is_missing_takes_time():
    plan = make_plan(make_workload(64, 0, 8, 1, CHEAP), PLENTY, tiles_done=27, bytes_to_write=100)
    found = estimate_cluster(plan, {**LARGE, "workers": 1, "write_bytes_per_second": 1})
    assert found.compute_seconds == pytest.approx(2080 / 4)
    assert found.write_seconds == 100
    done = make_plan(make_workload(64, 0, 8, 1, CHEAP), PLENTY, tiles_done=36, bytes_to_write=0)
    assert estimate_cluster(done, {**LARGE, "workers": 1}).seconds == 0


def test_a_resumed_store_keeps_its_choices():
    plan = cheap_plan(
        memory_limit=make_plan(make_workload(64, 0, 8, 1, CHEAP), replace(PLENTY, memory_limit=1)).memory_bytes
    )
    resumed = make_plan(plan.workload, PLENTY, choices=plan.choices({}, "cpu", ""))
    assert plan.strip < 8
    assert estimate_cluster(plan, {**LARGE, "workers": 1}).plan.strip == 8
    assert estimate_cluster(resumed, {**LARGE, "workers": 1}).plan.strip == plan.strip


clusters = st.builds(
    ClusterSpec,
    workers=st.integers(1, 40),
    flops_per_second=st.floats(1e6, 1e12),
    memory_limit=st.integers(1, 10**9),
    write_bytes_per_second=st.integers(1, 10**9),
    price=st.floats(0, 10),
)


@given(workloads, clusters, st.integers(0, 100))
def test_more_workers_never_take_longer_than_what_smaller_blocks_compute_again(workload, cluster, more):
    plan = make_plan(workload, PLENTY)
    few = estimate_cluster(plan, cluster)
    many = estimate_cluster(plan, cluster.model_copy(update={"workers": cluster.workers + more}))
    again = max(1.0, many.compute_seconds / few.compute_seconds)
    assert many.seconds <= (few.seconds - START_SECONDS) * again * (1 + 1e-9) + START_SECONDS
    assert (many.plan.problems == ()) == (few.plan.problems == ())


@given(workloads, clusters, st.floats(1, 10))
def test_faster_devices_and_disks_never_take_longer(workload, cluster, factor):
    plan = make_plan(workload, PLENTY)
    slow = estimate_cluster(plan, cluster)
    faster = {"write_bytes_per_second": int(cluster.write_bytes_per_second * factor)}
    assert estimate_cluster(plan, cluster.model_copy(update=faster)).seconds <= slow.seconds
    assert slow.seconds >= START_SECONDS + max(slow.even_seconds, slow.write_seconds)
    assert slow.block_seconds <= slow.compute_seconds * (1 + 1e-9)
    assert slow.cost == pytest.approx(cluster.price * cluster.workers * slow.seconds / 3600)


def test_what_is_not_given_is_that_of_this_machine():
    plan = cheap_plan(workers=4, memory_limit=9 * 10**9, base_memory=10**9, flops_per_second=5e9)
    found = estimate_cluster(plan, ClusterSpec(workers=3))
    assert found.cluster.flops_per_second == 5e9
    assert found.plan.machine.memory_limit == pytest.approx(3 * 10**9)
    assert found.plan.machine.base_memory == 10**9
    assert found.cost is None
    assert "cost" not in dict(found.rows())


def test_another_device_needs_its_own_numbers():
    with pytest.raises(ConfigError, match=r"give cluster\.flops_per_second and cluster\.memory_limit as well"):
        estimate_cluster(cheap_plan(), {"workers": 3, "device": "cuda"})
    found = estimate_cluster(cheap_plan(), {**LARGE, "workers": 3, "device": "cuda", "memory_limit": "80GB"})
    assert found.plan.machine.sizes.piece_rows == 8192


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"workers": 0}, "cluster.workers|workers=0"), ({"worker": 3}, "nearest known key is 'workers'")],
)
def test_a_wrong_description_is_an_error(wrong, words):
    with pytest.raises(ConfigError, match=words):
        estimate_cluster(cheap_plan(), {"workers": 1, **wrong})


def test_the_plan_of_a_model(tmp_path):
    plan, _ = plan_kernel(mlp(), inputs(), store=tmp_path / "k.zarr", tile=4, workers=1)
    found = estimate_cluster(plan, ClusterSpec(workers=2, price=1.0))
    assert found.compute_seconds > 18 * plan.sample_seconds
    assert found.to_json()["workers"] == 2
