"""On a cluster: the bits of one machine, whoever dies; memory as it was given, and nothing left of it."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client
from matrices import matrix_with_spectrum, power_law
from stored import HereOnly, WatchedTiles, store_matrix

from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import ClusterError, ConfigError, ResourceError, TileError
from ntkpipe.base.operator import Operator
from ntkpipe.executors import connect, pool
from ntkpipe.operators.on_dask import operator as operator_module
from ntkpipe.operators.on_dask.operator import WorkerGroup, WorkersOperator, share_out
from ntkpipe.operators.on_dask.shard_worker import PassRequest, ShardWorker
from ntkpipe.operators.opening import as_operator
from ntkpipe.operators.streaming import PassStopped
from ntkpipe.operators.tiles import ArrayTiles, KernelTiles, TileReader
from ntkpipe.store.kernel import Kernel

NUM_ROWS, TILE = 210, 20  # 66 tiles in 16 shards, the last ones ragged
MIB = 2**20


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect.connect("local", RunSpec(workers=2, memory_limit=1024 * MIB)) as joined:
        joined.wait_for_workers(2)
        yield joined


@pytest.fixture
def both(client) -> Client:
    """The client, once both workers are there."""
    client.wait_for_workers(2, timeout=60)
    return client


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Kernel:
    matrix = matrix_with_spectrum(power_law(NUM_ROWS, condition=1e6)).astype(np.float32)
    return store_matrix(matrix, tmp_path_factory.mktemp("workers") / "a.zarr", tile=TILE)


@pytest.fixture
def here(kernel) -> Operator:
    return as_operator(kernel)


def watched(kernel: Kernel, folder: Path, seconds: float) -> WatchedTiles:
    (folder / "readers").mkdir()
    return WatchedTiles(KernelTiles(kernel), folder / "readers", seconds)


def kill_soon(victims: Callable[[], set[int]], *, count: int = 1) -> threading.Thread:
    """Kill processes as soon as they are there."""

    def act() -> None:
        while len(found := victims()) < count:
            time.sleep(0.01)
        for process in sorted(found)[:count]:
            os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def num_objects(name: str) -> int:
    gc.collect()
    return sum(type(each).__name__ == name for each in gc.get_objects())


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("columns", [1, 7, 400])
def test_products_have_the_bits_of_one_machine(both, kernel, here, rng, columns):
    operator = as_operator(kernel, client=both)
    assert operator.num_workers == 2
    block = rng.standard_normal((NUM_ROWS, columns))
    assert columns < 100 or block.nbytes > operator_module._SMALL_BLOCK
    np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
    assert operator.work.passes == 1
    assert operator.share_kept == 1
    read = operator.work.bytes_read
    np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
    assert (operator.work.passes, operator.work.bytes_read) == (2, read)


def test_everything_else_has_the_bits_of_one_machine(both, kernel, here, rng):
    operator = as_operator(kernel, client=both)
    np.testing.assert_array_equal(operator.diagonal(), here.diagonal())
    assert operator.frobenius() == here.frobenius()
    assert operator.identity() == here.identity()
    before = operator.work.passes
    numbers = [3, 209, 3, 77]
    np.testing.assert_array_equal(operator.columns(numbers), here.columns(numbers))
    assert before < operator.work.passes < before + 1
    assert operator.columns([]).shape == (NUM_ROWS, 0)
    for rows, columns in ((slice(0, 210), slice(5, 9)), (slice(30, 90), slice(60, 201)), (slice(4, 4), slice(0, 3))):
        np.testing.assert_array_equal(operator.block(rows, columns), here.block(rows, columns))
    for num_rows in (45, 160):
        block = rng.standard_normal((num_rows, 2))
        leading, expected = operator.leading(num_rows), here.leading(num_rows)
        np.testing.assert_array_equal(leading.matmat(block), expected.matmat(block))
        assert leading.frobenius() == expected.frobenius()
        assert leading.identity() == expected.identity()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_memory_change_no_bit(both, kernel, here, rng, threads):
    block = rng.standard_normal((NUM_ROWS, 5))
    tile_bytes = KernelTiles(kernel).tile_bytes
    operator = WorkersOperator(WorkerGroup(both, KernelTiles(kernel), cache_bytes=10 * tile_bytes, threads=threads))
    for _ in range(2):
        np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
    assert operator.share_kept == 20 / 66
    assert operator.work.bytes_read == (66 + 46) * tile_bytes


def test_a_worker_that_dies_costs_its_part_and_changes_no_bit(both, kernel, here, rng, tmp_path):
    source = watched(kernel, tmp_path, 0.02)
    operator = WorkersOperator(WorkerGroup(both, source, cache_bytes=0))
    block = rng.standard_normal((NUM_ROWS, 3))
    killer = kill_soon(source.readers)
    np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
    killer.join()
    assert operator.work.passes == 1.5
    both.wait_for_workers(2, timeout=60)
    time.sleep(pool.POLL_SECONDS)
    np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
    assert operator.work.passes == 2.5
    assert operator.num_workers == 2


def test_where_all_die_their_successors_do_it(both, kernel, here, rng, tmp_path):
    source = watched(kernel, tmp_path, 0.02)
    operator = WorkersOperator(WorkerGroup(both, source, cache_bytes=0))
    block = rng.standard_normal((NUM_ROWS, 300))  # the block is lost, too
    killer = kill_soon(source.readers, count=2)
    np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
    killer.join()
    assert operator.work.passes == 2


def test_a_long_run_with_a_death_in_it_has_equal_bits(both, kernel, here, tmp_path):
    source = watched(kernel, tmp_path, 0.005)

    def powers(operator: Operator) -> np.ndarray:
        vector = np.ones((NUM_ROWS, 2))
        for _ in range(20):
            vector = operator.matmat(vector)
            vector /= np.linalg.norm(vector)
        return vector

    operator = WorkersOperator(WorkerGroup(both, source, cache_bytes=10 * source.tile_bytes))
    killer = kill_soon(source.readers)
    np.testing.assert_array_equal(powers(operator), powers(here))
    killer.join()
    assert operator.work.passes > 20


def test_a_worker_that_leaves_is_missed_by_nobody(kernel, here, rng, monkeypatch, capsys):
    block = rng.standard_normal((NUM_ROWS, 3))
    with Client(
        processes=False, n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", set_as_default=False
    ) as client:
        operator = as_operator(kernel, client=client)
        np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
        client.retire_workers(list(client.nthreads())[:1])
        time.sleep(pool.POLL_SECONDS)
        np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
        client.cluster.scale(0)
        while client.nthreads():
            time.sleep(0.02)
        time.sleep(pool.POLL_SECONDS)
        monkeypatch.setattr(pool, "WAIT_SECONDS", 1.5)
        monkeypatch.setattr(pool, "_SAY_SECONDS", 0.5)
        with pytest.raises(ClusterError, match="the cluster is lost"):
            operator.matmat(block)
        assert "waiting up to" in capsys.readouterr().err


def test_workers_that_die_of_every_pass_end_it(both, kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(operator_module, "_MOST_LOSSES", 1)
    source = watched(kernel, tmp_path, 0.02)
    operator = WorkersOperator(WorkerGroup(both, source, cache_bytes=0))
    killer = kill_soon(source.readers, count=2)
    with pytest.raises(ClusterError, match=r"workers were lost 2 times .* give them more, or"):
        operator.matmat(np.ones(NUM_ROWS))
    killer.join()


def test_a_damaged_tile_is_named_and_the_cluster_stays_usable(both, tmp_path, rng):
    matrix = matrix_with_spectrum(power_law(50, condition=10.0))
    kernel = store_matrix(matrix, tmp_path / "a.zarr", tile=20)
    operator = as_operator(kernel, client=both)
    path = tmp_path / "a.zarr/kernel/train/c/1/2"
    whole = path.read_bytes()
    path.write_bytes(b"\1" + whole[1:])
    with pytest.raises(TileError, match=r"tile \(1, 2\) of kernel/train .* fails its crc32c"):
        operator.matmat(np.ones(50))
    path.write_bytes(whole)
    block = rng.standard_normal((50, 2))
    np.testing.assert_array_equal(operator.matmat(block), as_operator(kernel).matmat(block))


def test_an_interrupted_pass_is_left_by_the_workers(both, kernel, here, rng, tmp_path):
    source = watched(kernel, tmp_path, 0.2)
    operator = WorkersOperator(WorkerGroup(both, source, cache_bytes=0))
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        operator.matmat(np.ones(NUM_ROWS))
    interrupt.join()
    wait_until(lambda: not any(both.processing().values()), seconds=4)  # a whole part takes more than six
    block = rng.standard_normal((NUM_ROWS, 2))
    other = as_operator(kernel, client=both)
    np.testing.assert_array_equal(other.matmat(block), here.matmat(block))


def test_nothing_is_left_of_what_was_closed(both, kernel, here, rng):
    gc.collect()
    wait_until(lambda: set(both.run(num_objects, "TileReader").values()) == {0})
    operator = as_operator(kernel, client=both)
    block = rng.standard_normal((NUM_ROWS, 2))
    operator.matmat(block)
    assert set(both.run(num_objects, "TileReader").values()) == {1}
    operator.close()
    wait_until(lambda: set(both.run(num_objects, "TileReader").values()) == {0})
    assert operator.share_kept == 0
    np.testing.assert_array_equal(operator.matmat(block), here.matmat(block))
    assert operator.work.passes == 2


def test_memory_of_a_driver_that_is_gone_is_free(both, kernel):
    gc.collect()
    with Client(both.scheduler.address, set_as_default=False) as other:
        operator = as_operator(kernel, client=other)
        operator.matmat(np.ones(NUM_ROWS))
    wait_until(lambda: not any(both.run(num_objects, "ShardWorker").values()))
    assert operator.share_kept == 1  # as it was


def test_a_worker_that_does_not_reach_the_store(both, kernel, tmp_path, monkeypatch):
    source = HereOnly(KernelTiles(kernel), tmp_path, process=os.getpid())
    with pytest.raises(ClusterError, match=r"2 workers do not reach the matrix: tcp.*not here.* at the same path"):
        WorkersOperator(WorkerGroup(both, source))
    monkeypatch.setattr(pool, "version", lambda _: "0.0.1")
    with pytest.raises(
        ClusterError, match=r"versions of ntkpipe differ: 0\.0\.1 on .*\(this process\).*; install the same"
    ):
        WorkersOperator(WorkerGroup(both, KernelTiles(kernel)))
    monkeypatch.undo()
    monkeypatch.setattr(operator_module, "digest_of", lambda _: "another")
    with pytest.raises(ClusterError, match="another disk at the same path"):
        WorkersOperator(WorkerGroup(both, KernelTiles(kernel)))


def test_options_that_cannot_be(both, kernel):
    with pytest.raises(ConfigError, match="threads"):
        as_operator(kernel, client=both, threads=0)
    with pytest.raises(ConfigError, match=r"needed a distributed\.Client"):
        as_operator(kernel, client="tcp://127.0.0.1:8786")
    with pytest.raises(ResourceError, match="tiles in use by its 1 threads need"):
        as_operator(kernel, client=both, memory_limit=1000)
    wide = np.broadcast_to(np.float64(0), (NUM_ROWS, 10**6))
    operator = as_operator(kernel, client=both)
    this = operator_module._Pass(operator._group, operator._shards, NUM_ROWS, None, wide)
    with pytest.raises(ResourceError, match=r"a block of 1000000 columns needs .* give fewer columns at a time"):
        this._require_room(next(iter(operator._group.members.values())))


def test_a_large_block_takes_the_memory_of_tiles(both, kernel):
    operator = as_operator(kernel, client=both)
    handle = next(iter(operator._group.members.values()))
    before = handle.cache_bytes
    for columns, changes in ((10, False), (10_000, True)):
        wide = np.broadcast_to(np.float64(0), (NUM_ROWS, columns))
        this = operator_module._Pass(operator._group, operator._shards, NUM_ROWS, None, wide)
        this._require_room(handle)
        assert (handle.cache_bytes < before) == changes


def test_a_memory_map_travels_by_name(both, here, kernel, tmp_path, rng):
    values = kernel.to_numpy().astype(np.float64)
    np.save(tmp_path / "a.npy", values)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    operator = as_operator(mapped, client=both)
    block = rng.standard_normal((NUM_ROWS, 2))
    np.testing.assert_array_equal(operator.matmat(block), as_operator(mapped).matmat(block))
    part = np.load(tmp_path / "a.npy", mmap_mode="r")[:100, :100]
    with pytest.raises(ConfigError, match="part of a memory map"):
        as_operator(part, client=both)


def test_shards_move_only_where_they_must():
    numbers = list(range(16))
    one = share_out(numbers, {"a": 1}, {})
    assert set(one.values()) == {"a"}
    two = share_out(numbers, {"a": 1, "b": 1}, one)
    assert [n for n in numbers if two[n] == "a"] == list(range(8))
    assert share_out(numbers, {"a": 1, "b": 1}, two) == two
    three = share_out(numbers, {"a": 1, "b": 1, "c": 1}, two)
    assert sorted(list(three.values()).count(name) for name in "abc") == [5, 5, 6]
    assert all(three[n] in {two[n], "c"} for n in numbers)
    lost = share_out(numbers, {"a": 1, "c": 1}, three)
    assert all(lost[n] == three[n] for n in numbers if three[n] != "b")
    assert sorted(list(lost.values()).count(name) for name in "ac") == [8, 8]
    assert share_out(numbers, {"x": 3, "y": 1}, lost) == {n: "x" if n < 12 else "y" for n in numbers}
    assert len(set(share_out([0, 1], dict.fromkeys("abcd", 1), {}).values())) == 2


def test_what_is_not_wanted_any_more_is_left(kernel):
    worker = ShardWorker(KernelTiles(kernel))
    request = PassRequest(NUM_ROWS, tuple(range(16)), (), 0, 2, None)
    asked: list[int] = []

    def after_ten() -> bool:
        asked.append(0)
        return len(asked) > 10

    with pytest.raises(PassStopped):
        worker.run(request, np.ones((NUM_ROWS, 1)), after_ten)
    assert len(asked) < 20


def test_leading_blocks_share_the_memory(kernel):
    worker = ShardWorker(KernelTiles(kernel))
    size = KernelTiles(kernel).tile_bytes
    whole = PassRequest(NUM_ROWS, (0, 1), (0, 1), 8 * size, 1, None)
    part = PassRequest(100, (0,), (0,), 8 * size, 1, None)
    block = np.ones((NUM_ROWS, 1))
    assert worker.run(whole, block).num_kept == {NUM_ROWS: 8}
    found = worker.run(part, block[:100])
    assert found.num_kept[NUM_ROWS] == 0
    assert 0 < found.num_kept[100] <= 8
    again = worker.run(whole, block)
    assert again.num_kept == {NUM_ROWS: 8, 100: 0}
    assert again.bytes_read == 8 * size
    of_array = ShardWorker(ArrayTiles(np.eye(3))).run(PassRequest(3, (0,), (0,), 0, 1, None), None)
    assert (of_array.num_tiles, list(of_array.results)) == (1, [0])
    assert num_objects(TileReader.__name__) >= 2
