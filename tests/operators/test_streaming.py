"""Tiles stream in order, some are kept, memory is used again, errors leave nothing behind; threads change no bit."""

import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law
from numpy.typing import NDArray
from stored import store_matrix

from ntkpipe.base import config
from ntkpipe.base.errors import ConfigError, NonFiniteError, ResourceError, TileError
from ntkpipe.base.grid import Axis, Grid
from ntkpipe.base.resources import process_memory
from ntkpipe.operators.opening import as_operator
from ntkpipe.operators.streaming import (
    PairwiseSum,
    PassStopped,
    ShardThreads,
    StreamingOperator,
    cut_shards,
    scratch_bytes,
)
from ntkpipe.operators.tiles import ArrayTiles, KernelTiles, TileIndex, TileReader, buffer_bytes

EDGE, NUM_TILES = 4, 6
EVERY = [(row, column) for row in range(NUM_TILES) for column in range(row, NUM_TILES)]


@dataclass
class Counting:
    """Tiles of a matrix in memory; counts what is read, and into which memory.

    Attributes
    ----------
    bad
        Tiles that cannot be read.
    is_local
        As the medium says.
    """

    bad: set[TileIndex] = field(default_factory=set)
    is_local: bool = True
    reads: Counter[TileIndex] = field(default_factory=Counter)
    buffers: set[int] = field(default_factory=set)
    num_reading: int = 0

    grid = Grid(Axis(EDGE * NUM_TILES, 1, EDGE), Axis(EDGE * NUM_TILES, 1, EDGE), symmetric=True)
    dtype = np.dtype(np.float64)
    tile_bytes = EDGE * EDGE * 8

    def identity(self) -> str:
        return "counting"

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        self.num_reading += 1
        time.sleep(0.001)
        self.reads[index] += 1
        if buffer is None:
            buffer = np.empty(self.tile_bytes, np.uint8)
        else:
            self.buffers.add(buffer.ctypes.data)
        self.num_reading -= 1
        if index in self.bad:
            raise TileError(f"tile {index} is damaged")
        tile = buffer.view(np.float64).reshape(EDGE, EDGE)
        tile[:] = 100 * index[0] + index[1]
        return tile


def reader_of(source: Counting, *, num_kept: int = 0, streams: int = 1) -> TileReader:
    return TileReader(source, EVERY, cache_bytes=num_kept * source.tile_bytes, streams=streams)


def check_stream(reader: TileReader, tiles: list[TileIndex]) -> None:
    found = []
    for index, tile in reader.tiles(tiles):
        assert (tile == 100 * index[0] + index[1]).all()
        found.append(index)
    assert found == tiles


@pytest.mark.parametrize("is_local", [True, False])
def test_tiles_come_in_order_into_memory_that_is_used_again(is_local):
    source = Counting(is_local=is_local)
    reader = reader_of(source)
    for _ in range(3):
        check_stream(reader, EVERY)
    assert set(source.reads.values()) == {3}
    assert len(source.buffers) * source.tile_bytes <= buffer_bytes(source, 1)
    assert reader.work.passes == 3
    assert reader.work.bytes_read == 3 * len(EVERY) * source.tile_bytes
    assert reader.share_kept == 0
    check_stream(reader, EVERY[::-1][:5])
    assert reader.work.passes == pytest.approx(3 + 5 / len(EVERY))


@pytest.mark.parametrize("num_kept", [1, 2, 7, 20, 21, 50])
def test_a_part_is_kept_evenly_and_read_once(num_kept):
    source = Counting()
    reader = reader_of(source, num_kept=num_kept)
    for _ in range(4):
        check_stream(reader, EVERY)
    kept = [number for number, index in enumerate(EVERY) if source.reads[index] == 1]
    assert len(kept) == min(num_kept, len(EVERY)) == reader.num_kept
    assert reader.share_kept == len(kept) / len(EVERY)
    assert set(source.reads.values()) <= {1, 4}
    gaps = {after - before for before, after in itertools.pairwise(kept)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
    assert reader.work.bytes_read == source.tile_bytes * source.reads.total()
    assert reader.work.passes == 4


def test_what_is_kept_is_chosen_anew():
    source = Counting()
    reader = reader_of(source, num_kept=21)
    check_stream(reader, EVERY)
    reader.keep(5 * source.tile_bytes)
    assert reader.num_kept == 5
    reader.keep(5 * source.tile_bytes, EVERY[:5])
    assert 1 <= reader.num_kept < 5
    check_stream(reader, EVERY)
    assert reader.num_kept == 5
    before = source.reads.total()
    check_stream(reader, EVERY[:5])
    assert source.reads.total() == before
    reader.close()
    assert reader.num_kept == 0
    check_stream(reader, EVERY)
    assert source.reads.total() == before + len(EVERY)


def test_tiles_that_are_dropped_while_they_are_in_use_stay_whole():
    source = Counting()
    reader = reader_of(source, num_kept=21)
    check_stream(reader, EVERY)
    found = 0
    for index, tile in reader.tiles(EVERY):
        reader.keep(0)
        reader.close()
        assert (tile == 100 * index[0] + index[1]).all()
        found += 1
    assert found == len(EVERY)


@pytest.mark.parametrize("num_kept", [0, 10, 21])
def test_an_error_names_its_tile_and_leaves_the_reader_usable(num_kept):
    bad = (1, 3)
    source = Counting(bad={bad})
    reader = reader_of(source, num_kept=num_kept)
    found: list[TileIndex] = []
    with pytest.raises(TileError, match=r"tile \(1, 3\) is damaged"):
        found.extend(index for index, _ in reader.tiles(EVERY))
    assert found == EVERY[: EVERY.index(bad)]
    assert source.num_reading == 0
    source.bad.clear()
    for _ in range(2):
        check_stream(reader, EVERY)
    assert len(source.buffers) * source.tile_bytes <= buffer_bytes(source, 1)


def test_a_stream_that_is_left_gives_its_memory_back():
    source = Counting(is_local=False)
    reader = reader_of(source)
    for length in range(1, 12):
        stream = reader.tiles(EVERY)
        for _ in range(length):
            next(stream)
        stream.close()
        assert source.num_reading == 0
    check_stream(reader, EVERY)
    assert len(source.buffers) * source.tile_bytes <= buffer_bytes(source, 1)


def test_streams_do_not_disturb_each_other():
    source = Counting()
    reader = reader_of(source, num_kept=8, streams=3)
    errors: list[BaseException] = []

    def run(tiles: list[TileIndex]) -> None:
        try:
            for _ in range(5):
                check_stream(reader, tiles)
        except BaseException as error:  # noqa: BLE001 - raised by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(EVERY[start:],)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert reader.num_kept == 8
    assert len(source.buffers) * source.tile_bytes <= buffer_bytes(source, 3)
    assert reader.work.bytes_read == source.reads.total() * source.tile_bytes


def test_tiles_are_read_while_others_are_in_use():
    source = Counting()
    reader = reader_of(source)
    stream = reader.tiles(EVERY)
    next(stream)
    deadline = time.monotonic() + 10
    while source.reads.total() < 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.02)
    assert source.reads.total() == 3
    stream.close()


def test_the_first_tile_of_a_stream_that_waits_is_on_its_way_and_may_be_dropped():
    source = Counting()
    reader = reader_of(source)
    waiting = reader.tiles(EVERY[4:])
    deadline = time.monotonic() + 10
    while source.reads.total() < 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.02)
    assert source.reads.total() == 1
    check_stream(reader, EVERY)
    assert [index for index, _ in waiting] == EVERY[4:]
    del waiting
    reader.tiles(EVERY[4:])
    check_stream(reader, EVERY)
    assert list(reader.tiles([])) == []


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    matrix = matrix_with_spectrum(power_law(300, condition=1e6)).astype(np.float32)
    return store_matrix(matrix, tmp_path_factory.mktemp("streaming") / "a.zarr", tile=25)


def operator_of(kernel, threads: int, num_kept: int = 0) -> StreamingOperator:
    source = KernelTiles(kernel)
    cache_bytes = num_kept * source.tile_bytes
    reader = TileReader(source, source.grid.tiles(), cache_bytes=cache_bytes, streams=threads)
    return StreamingOperator(source, reader, threads=threads)


def test_threads_and_what_is_kept_change_no_bit(kernel, rng):
    block = rng.standard_normal((300, 6))
    one = operator_of(kernel, 1)
    product = one.matmat(block)
    leading = one.leading(130).matmat(block[:130])
    for threads, num_kept in itertools.product((1, 2, 3, 5), (0, 40, 100)):
        other = operator_of(kernel, threads, num_kept)
        for _ in range(2):
            np.testing.assert_array_equal(other.matmat(block), product)
        np.testing.assert_array_equal(other.leading(130).matmat(block[:130]), leading)
        assert other.frobenius() == one.frobenius()
        np.testing.assert_array_equal(other.columns([7, 250]), one.columns([7, 250]))


def test_a_damaged_tile_ends_a_pass_and_the_operator_stays_usable(tmp_path, rng):
    matrix = matrix_with_spectrum(power_law(60, condition=1e3))
    kernel = store_matrix(matrix, tmp_path / "a.zarr", tile=10)
    operator = operator_of(kernel, 3)
    block = rng.standard_normal((60, 2))
    product = operator.matmat(block)
    path = tmp_path / "a.zarr/kernel/train/c/2/4"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(TileError, match=r"tile \(2, 4\) of kernel/train .* fails its crc32c checksum"):
        operator.matmat(block)
    path.unlink()
    with pytest.raises(TileError, match=r"tile \(2, 4\) of kernel/train .* is missing"):
        operator.statistics()
    path.write_bytes(whole)
    np.testing.assert_array_equal(operator.matmat(block), product)


def test_shards_hold_every_tile_once_and_depend_on_the_matrix_alone():
    for num_tiles in (1, 2, 3, 8, 30):
        axis = Axis(num_tiles * EDGE - 1, 1, EDGE)
        grid = Grid(axis, axis, symmetric=True)
        for num_rows in (1, axis.num_samples // 2 + 1, axis.num_samples):
            found = cut_shards(grid, num_rows)
            tiles = [tile for shard in found for tile in shard.tiles]
            assert tiles == [index for index in grid.tiles() if max(index) * EDGE < num_rows]
            assert [shard.number for shard in found] == list(range(len(found)))
            sizes = [len(shard.tiles) for shard in found]
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 4 or len(found) == 1
            assert len(found) in {1, 2, 4, 8, 16}
    axis = Axis(70 * EDGE, 1, EDGE)
    assert len(cut_shards(Grid(axis, axis, symmetric=True), 70 * EDGE)) == 128


def test_sums_by_pairs_have_the_same_bits_whoever_adds_in_whatever_order(rng):
    for count in (1, 2, 8, 64):
        parts = [rng.standard_normal((count - row, 3)) * 10.0 ** rng.integers(-8, 8) for row in range(count)]
        exact = sum(np.pad(part, ((row, 0), (0, 0))) for row, part in enumerate(parts))
        found = []
        for order in (range(count), range(count)[::-1], *(rng.permutation(count) for _ in range(5))):
            # Some are added elsewhere, and arrive as sums.
            elsewhere, here = PairwiseSum(), PairwiseSum()
            for number in order:
                sums = elsewhere if number < count // 3 else here
                sums.add((0, int(number)), parts[number].copy())
            for node, part in elsewhere.parts.items():
                here.add(node, part)
            found.append(here.total)
        assert all(np.array_equal(found[0], each) for each in found)
        np.testing.assert_allclose(found[0], exact, rtol=1e-12, atol=1e-6)


def test_a_shard_that_fails_stops_the_others():
    source = Counting()
    reader = reader_of(source)
    every = cut_shards(source.grid, EDGE * NUM_TILES)
    assert len(every) > 2

    def work(tiles: Any) -> int:
        for index, _ in tiles:
            if index == (0, 1):
                raise ZeroDivisionError
        return 0

    with pytest.raises(ZeroDivisionError):
        list(ShardThreads(source.grid, reader.tiles, 2).map(work, every))
    assert source.reads.total() < len(EVERY)
    with pytest.raises(PassStopped):
        list(ShardThreads(source.grid, reader.tiles, 2, lambda: True).map(lambda tiles: len(list(tiles)), every))
    assert sum(ShardThreads(source.grid, reader.tiles, 2).map(lambda tiles: len(list(tiles)), every)) == len(EVERY)


def test_memory_is_what_was_given(kernel, monkeypatch):
    source = KernelTiles(kernel)
    in_use = buffer_bytes(source, 2)
    monkeypatch.setattr(config, "process_memory", lambda: 10**6)
    with pytest.raises(ResourceError, match=r"what 2 threads read at a time takes .* may be used; .* or threads=1"):
        as_operator(kernel, memory_limit=10**6 + in_use - 1, threads=2)
    num_tiles = source.grid.num_tiles
    for num_kept in (0, 10, num_tiles):
        found = as_operator(kernel, memory_limit=10**6 + in_use + num_kept * source.tile_bytes, threads=2)
        assert isinstance(found, StreamingOperator)
        assert found.share_kept == num_kept / num_tiles
    monkeypatch.setattr(config, "available_memory", lambda: 2 * in_use + 20 * source.tile_bytes)
    found = as_operator(kernel, threads=2)
    assert isinstance(found, StreamingOperator)
    assert found.share_kept == 10 / num_tiles
    assert process_memory() > 0


def test_tiles_give_way_to_products(kernel, rng, monkeypatch):
    source = KernelTiles(kernel)
    monkeypatch.setattr(config, "process_memory", lambda: 10**6)
    num_tiles, in_use = source.grid.num_tiles, buffer_bytes(source, 2)
    column = 8 * 300
    found = as_operator(kernel, memory_limit=10**6 + in_use + num_tiles * source.tile_bytes, threads=2)
    assert isinstance(found, StreamingOperator)
    block = rng.standard_normal((300, 4))
    product = found.matmat(block)
    products = 2 + 1 + len(found._shards).bit_length()
    needed = products * 4 * column + 2 * scratch_bytes(25, 4)
    kept = num_tiles - -(-needed // source.tile_bytes)
    assert 0 < kept < num_tiles
    assert found.share_kept == kept / num_tiles
    found.matmat(block[:, :3])
    assert found.share_kept == kept / num_tiles
    found.leading(100).matmat(np.ones((100, 1000)))
    assert found.share_kept < kept / num_tiles
    found.matmat(np.ones((300, 1000)))
    assert found.share_kept == 0
    np.testing.assert_array_equal(found.matmat(block), product)


def test_matrices_that_are_none(tmp_path, make_manifest):
    with pytest.raises(ConfigError, match="not symmetric"):
        as_operator(np.arange(9.0).reshape(3, 3))
    with pytest.raises(ConfigError, match="needed \\(n, n\\)"):
        as_operator(np.ones((3, 4)))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        as_operator(np.array([[np.nan]]))
    with pytest.raises(ConfigError, match="real numbers"):
        ArrayTiles(np.ones((3, 3), complex))
    with pytest.raises(ConfigError, match="threads"):
        as_operator(np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float64, (3, 3)), threads=0)
