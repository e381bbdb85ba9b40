"""Blocks become tiles: the kernel does not depend on how it is cut, and nothing that is not finite is kept."""

import pickle
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Reschedule
from hypothesis import given, settings
from hypothesis import strategies as st
from small import DictSink, LinearEngine, compute

from ntkpipe.base.errors import ModelError, NonFiniteError, StoreExistsError
from ntkpipe.base.grid import Axis, Grid, Span
from ntkpipe.build.plan import Machine, Plan, Workload, make_plan
from ntkpipe.build.tiles import BuildJob, StripCache
from ntkpipe.executors.payload import Leaving
from ntkpipe.executors.threads import ThreadExecutor
from ntkpipe.jacobian.cost import Cost
from ntkpipe.jacobian.engine import JacobianBlock
from ntkpipe.jacobian.model.samples import ArraySource
from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.pieces import Piece
from ntkpipe.store.store import prepare_path

CPU = Machine(workers=1, memory_limit=10**9, base_memory=0, free_disk=None, flops_per_second=1e9)
COST = Cost(
    block_bytes=16, workspace_bytes=1, fixed_workspace_bytes=0, largest_bytes=1, jacobian_flops=0.0, pair_flops=1.0
)


def make_plan_of(num_train: int, num_test: int = 0, *, tile: int, width: int = 1, **changes: Any) -> Plan:
    train, test = Axis(num_train, width, tile), Axis(num_test, width, tile)
    grids = {"kernel/train": Grid(train, train, symmetric=True)}
    if num_test:
        grids["kernel/test_train"] = Grid(test, train, symmetric=False)
    plan = make_plan(Workload(grids, num_test, tile, width, 8, COST), CPU)
    workers = changes.pop("workers", 1)
    return replace(plan, machine=replace(CPU, workers=workers), **changes)


def draw(num_samples: int, width: int = 1, seed: int = 0) -> np.ndarray:
    """Samples whose kernel is exact: small integers, the first entry another one for each sample."""
    x = np.random.default_rng(seed).integers(-9, 9, (num_samples, 3 * width)).astype(np.float64)
    x[:, 0] = 100 * seed + np.arange(num_samples)
    return x


def run(plan: Plan, sink: DictSink, train: np.ndarray, test: np.ndarray | None = None, **changes: Any) -> LinearEngine:
    engine = changes.pop("engine", None) or LinearEngine(plan.workload.num_covectors)
    sources = {"train": ArraySource({"input": train}, len(train))}
    if test is not None:
        sources["test"] = ArraySource({"input": test}, len(test))
    dtype = np.dtype(changes.pop("store_dtype", "float64"))
    job = BuildJob(engine, plan, sources, False, sink, StripCache(plan.cache_bytes), dtype)
    list(ThreadExecutor(plan.machine.workers).run(job, plan.tasks()))
    return engine


def expected(plan: Plan, train: np.ndarray, test: np.ndarray | None = None) -> dict[Any, np.ndarray]:
    """Every chunk by the definition of the kernel."""
    width, found = plan.workload.num_covectors, {}
    rows = {"kernel/train": train.reshape(len(train) * width, -1)}
    if test is not None:
        rows["kernel/test_train"] = test.reshape(len(test) * width, -1)
        whole = rows["kernel/test_train"] @ rows["kernel/test_train"].T
        for span in Span(0, len(test)).cut(plan.workload.tile):
            at = range(span.start, span.stop)
            blocks = [whole[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in at]
            found["kernel/test_diagonal", (span.start // plan.workload.tile, 0, 0)] = np.array(blocks)
    for name, left in rows.items():
        matrix, grid = left @ rows["kernel/train"].T, plan.workload.grids[name]
        for row, column in grid.tiles():
            r, c = grid.rows.rows(row), grid.columns.rows(column)
            found[name, (row, column)] = matrix[r.start : r.stop, c.start : c.stop]
    for split, samples in (("train", train), ("test", test)):
        for span in Span(0, 0 if samples is None else len(samples)).cut(plan.workload.tile):
            index = (span.start // plan.workload.tile, 0)
            found[f"outputs/{split}", index] = samples[span.start : span.stop, :2]
    return found


def assert_equal(sink: DictSink, wanted: dict[Any, np.ndarray]) -> None:
    assert sink.chunks.keys() == wanted.keys()
    for key, values in wanted.items():
        np.testing.assert_array_equal(sink.chunks[key], values, err_msg=str(key))


@settings(deadline=None, max_examples=50)
@given(
    num_train=st.integers(1, 20),
    num_test=st.integers(0, 8),
    tile=st.integers(1, 9),
    width=st.integers(1, 3),
    strip=st.integers(1, 9),
    subtile=st.integers(1, 9),
    hold=st.integers(1, 4),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cache_bytes=st.sampled_from([0, 100, 10**6]),
    workers=st.integers(1, 3),
)
def test_the_kernel_does_not_depend_on_how_it_is_cut(
    num_train, num_test, tile, width, strip, subtile, block, **changes
):
    tile = min(tile, num_train)
    changes |= {"strip": min(strip, tile), "subtile": min(subtile, strip, tile)}
    plan = make_plan_of(num_train, num_test, tile=tile, width=width, **changes)
    plan = replace(plan, height=block[0], width=block[1])
    train, test = draw(num_train, width), draw(num_test, width, seed=1) if num_test else None
    sink = DictSink()
    run(plan, sink, train, test)
    assert_equal(sink, expected(plan, train, test))
    assert len(sink.writes) == len(sink.chunks)


@pytest.mark.parametrize("missing", [("kernel/train", (1, 2)), ("kernel/train", (1, 1)), ("kernel/test_train", (0, 2))])
def test_only_what_is_missing_is_computed(missing):
    plan = make_plan_of(12, 5, tile=4)
    train, test = draw(12), draw(5, seed=1)
    sink = DictSink()
    sink.chunks = expected(plan, train, test)
    removed = sink.chunks.pop(missing)
    engine = run(plan, sink, train, test)
    assert sink.writes == [missing]
    np.testing.assert_array_equal(sink.chunks[missing], removed)
    assert sum(engine.counts.values()) == len({*range(removed.shape[0])}) * (1 if missing[1] == (1, 1) else 2)


@pytest.mark.parametrize("missing", [("outputs/train", (1, 0)), ("outputs/test", (0, 0))])
def test_missing_outputs_are_written_and_their_kernel_stays_as_it_is(missing):
    plan = make_plan_of(12, 4, tile=4)
    train, test = draw(12), draw(4, seed=1)
    sink = DictSink()
    sink.chunks = expected(plan, train, test)
    removed = sink.chunks.pop(missing)
    run(plan, sink, train, test)
    assert sink.writes == [missing]
    np.testing.assert_array_equal(sink.chunks[missing], removed)


def test_nothing_is_computed_where_nothing_is_missing():
    plan = make_plan_of(12, 5, tile=4)
    train, test = draw(12), draw(5, seed=1)
    sink = DictSink()
    sink.chunks = expected(plan, train, test)
    assert run(plan, sink, train, test).counts == {}
    assert sink.writes == []


def test_a_jacobian_that_is_not_finite_is_named_and_not_kept():
    train = draw(12)
    train[[6, 7], 2] = [np.nan, np.inf]
    sink = DictSink()
    with pytest.raises(NonFiniteError, match=r"Jacobians or outputs of train samples 6, 7 are NaN or infinite"):
        run(make_plan_of(12, tile=4), sink, train)
    assert all(np.isfinite(values).all() for values in sink.chunks.values())
    assert not any(1 in index for array, index in sink.chunks if array == "kernel/train")


@pytest.mark.parametrize(
    ("train_scale", "test_scale", "array", "samples"),
    [(1e25, 1.0, "kernel/train", "sample 5 "), (1.0, 1e25, "kernel/test_diagonal", "sample 2 ")],
)
def test_what_overflows_the_store_is_named_and_not_kept(train_scale, test_scale, array, samples):
    train, test = np.ones((8, 3)), np.ones((4, 3))
    train[5] *= train_scale
    test[2] *= test_scale
    sink = DictSink()
    with pytest.raises(NonFiniteError, match=rf"{array}: entries of {samples}overflow float32"):
        run(make_plan_of(8, 4, tile=4), sink, train, test, store_dtype="float32")
    assert all(np.isfinite(values).all() for values in sink.chunks.values())


def test_outputs_that_overflow_the_store_are_named_and_not_kept():
    class Loud(LinearEngine):
        def block(self, *args, **options):
            block, batch = super().block(*args, **options)
            return replace(block, outputs=block.outputs * 1e39), batch

    sink = DictSink()
    with pytest.raises(NonFiniteError, match=r"outputs/train: entries of samples 0, 1, 2, 3 overflow float32"):
        run(make_plan_of(8, tile=4), sink, draw(8), engine=Loud(), store_dtype="float32")
    assert sink.chunks == {}


def test_what_a_model_raises_in_mid_run_is_an_error_of_the_model_and_names_samples():
    class Fragile(LinearEngine):
        def failure(self, error, where):
            return ModelError(f"the model raised {type(error).__name__} {where}: {error}")

        def to_batch(self, arrays, is_mapping):
            if 7.0 in arrays["input"][:, 0]:
                raise IndexError("index out of range in self")
            return super().to_batch(arrays, is_mapping)

    with pytest.raises(ModelError, match=r"IndexError on train samples 4:8, of which .*: index out") as info:
        run(make_plan_of(12, tile=4), DictSink(), draw(12), engine=Fragile())
    assert isinstance(info.value.__cause__, IndexError)


@pytest.mark.parametrize("strides", [np.s_[::-1], np.s_[:, ::-1], np.s_[::2]])
def test_samples_of_any_strides_are_taken(strides):
    train = np.asfortranarray(draw(12))[strides]
    sink = DictSink()
    plan = make_plan_of(len(train), tile=4)
    run(plan, sink, train)
    assert_equal(sink, expected(plan, np.ascontiguousarray(train)))


def block(num_bytes: int) -> JacobianBlock:
    return JacobianBlock((Piece(1, 1, (Dense(torch.zeros(1, 1, num_bytes, dtype=torch.uint8)),)),), torch.zeros(1, 0))


def test_a_cache_keeps_the_latest_strips_within_its_capacity():
    cache, made = StripCache(100), []

    def get(number: int) -> None:
        cache.get(("train", Span(number, number + 1)), lambda: made.append(number) or block(40))

    for number in (0, 1, 0, 2, 0, 1):
        get(number)
    assert made == [0, 1, 2, 1]


@pytest.mark.parametrize("capacity", [0, 39])
def test_a_cache_that_is_too_small_keeps_nothing(capacity):
    cache, made = StripCache(capacity), []
    for _ in range(3):
        assert cache.get(("train", Span(0, 1)), lambda: made.append(0) or block(40)).num_bytes() == 40
    assert len(made) == 3


def test_two_workers_compute_a_strip_once():
    cache, made, barrier = StripCache(100), [], threading.Barrier(2)

    def make() -> JacobianBlock:
        made.append(0)
        threading.Event().wait(0.05)
        return block(40)

    def get() -> None:
        barrier.wait()
        cache.get(("train", Span(0, 1)), make)

    threads = [threading.Thread(target=get) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [0]


def test_a_strip_whose_computation_fails_can_be_had_again():
    cache = StripCache(100)
    with pytest.raises(ArithmeticError):
        cache.get(("train", Span(0, 1)), lambda: (_ for _ in ()).throw(ArithmeticError))
    assert cache.get(("train", Span(0, 1)), lambda: block(40)).num_bytes() == 40


def test_a_worker_that_outlives_its_driver_keeps_the_store_from_being_replaced(tmp_path):
    store = compute(tmp_path / "run.zarr").store
    plan = make_plan_of(4, tile=2)
    job = BuildJob(LinearEngine(), plan, {}, False, DictSink(), StripCache(0), np.dtype("float32"), in_use=store.in_use)
    session = pickle.loads(pickle.dumps(job.session))
    with session(), pytest.raises(StoreExistsError, match="another run is writing"):
        prepare_path(store.root, "w")
    assert prepare_path(store.root, "w") is None


def test_a_worker_that_leaves_while_the_model_works_does_not_blame_the_model():
    """For Dask it is a key to be done elsewhere, in the middle of a model's samples as between tiles."""
    plan = make_plan_of(8, 4, tile=4)
    sources = {"train": ArraySource({"input": draw(8)}, 8), "test": ArraySource({"input": draw(4, seed=1)}, 4)}

    def times_paused(most: float) -> int:
        num = 0

        def pause() -> None:
            nonlocal num
            num += 1
            if num > most:
                raise Leaving

        do = BuildJob(LinearEngine(), plan, sources, False, DictSink(), StripCache(0), np.dtype("float64")).open(pause)
        for task in plan.tasks():
            list(do(task))
        return num

    for most in range(times_paused(np.inf)):
        with pytest.raises(Reschedule):
            times_paused(most)


def test_a_process_of_its_own_has_the_default_dtype_of_the_driver():
    job = BuildJob(LinearEngine(), make_plan_of(4, tile=4), {}, False, DictSink(), StripCache(0), np.dtype("float64"))
    with replace(job, default_dtype=torch.float64).session():
        assert torch.tensor([0.1]).dtype == torch.float64
    assert torch.tensor([0.1]).dtype == torch.float32
