"""Workloads to plan, drawn and made."""

from hypothesis import strategies as st

from ntkpipe.base.grid import Axis, Grid
from ntkpipe.build.plan import Machine, Workload
from ntkpipe.jacobian.cost import Cost

PLENTY = Machine(workers=1, memory_limit=10**9, base_memory=0, free_disk=None, flops_per_second=1e9)


def make_workload(num_train: int, num_test: int, tile: int, width: int, cost: Cost) -> Workload:
    tile = min(tile, num_train)
    train, test = Axis(num_train, width, tile), Axis(num_test, width, tile)
    grids = {"kernel/train": Grid(train, train, symmetric=True)}
    if num_test:
        grids["kernel/test_train"] = Grid(test, train, symmetric=False)
    return Workload(grids, num_test, tile, width, store_itemsize=8, cost=cost)


costs = st.builds(
    Cost,
    block_bytes=st.integers(1, 10**6),
    workspace_bytes=st.integers(1, 10**6),
    fixed_workspace_bytes=st.integers(0, 10**6),
    largest_bytes=st.integers(1, 10**6),
    jacobian_flops=st.floats(0, 1e9),
    pair_flops=st.floats(1, 1e9),
)


workloads = st.builds(
    make_workload, st.integers(1, 70), st.integers(0, 30), st.integers(1, 80), st.integers(1, 4), costs
)
