"""Strips in files: the same bits as computed ones, never believed when damaged, and gone when their users are."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client
from small import DictSink, LinearEngine, chunks, compute
from workloads import PLENTY, make_workload

from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import Interrupted
from ntkpipe.base.grid import Span
from ntkpipe.base.resources import free_disk, local_disk_room
from ntkpipe.build import from_samples, life, plan, scratch, workers
from ntkpipe.build.plan import BlockTask, Plan, make_plan
from ntkpipe.build.records import BuildRecord
from ntkpipe.build.scratch import Scratch
from ntkpipe.build.tiles import BuildJob, StripCache
from ntkpipe.executors.connect import connect
from ntkpipe.executors.threads import ThreadExecutor
from ntkpipe.jacobian.cost import Cost
from ntkpipe.jacobian.model.samples import ArraySource

KEY = ("train", Span(0, 4))
ROOM = 10**12


def other_process(one: Scratch) -> Scratch:
    return pickle.loads(pickle.dumps(one))


def memory(value: int = 0) -> list[torch.Tensor]:
    """Two runs of bytes, one longer than what is checked at a time."""
    return [torch.full((size,), value, dtype=torch.uint8) for size in (5, 2**18 + 3)]


@pytest.fixture
def pair(tmp_path) -> tuple[Scratch, Scratch]:
    """As two processes have it; the first has kept a strip."""
    one = Scratch()
    other = other_process(one)
    for each in (one, other):
        each.open(tmp_path)
    one.put(KEY, memory(7))
    return one, other


def strip_file(base: Path) -> Path:
    (found,) = base.glob("*/train-*")
    return found


def test_what_one_process_keeps_another_reads(pair, tmp_path):
    found = memory()
    assert pair[1].has(KEY)
    assert pair[1].get(KEY, found)
    assert all(map(torch.equal, found, memory(7)))
    for other in (("test", Span(0, 4)), ("train", Span(0, 5))):
        assert not pair[1].has(other)
        assert not pair[1].get(other, memory())
    assert strip_file(tmp_path).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["truncated", "longer", "flipped", "swapped", "empty", "unlike"])
def test_a_damaged_file_is_not_believed(pair, tmp_path, damage):
    path, found = strip_file(tmp_path), memory()
    raw = bytearray(path.read_bytes())
    if damage == "swapped":  # the whole strip of others
        pair[0].put(("train", Span(4, 8)), memory(8))
        raw = bytearray((path.parent / "train-4-8").read_bytes())
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 1
    elif damage == "unlike":
        found.append(torch.zeros(1, dtype=torch.uint8))
    else:
        raw = {"truncated": raw[:-1], "longer": raw + b"0", "empty": bytearray()}[damage]
    path.write_bytes(raw)
    assert not pair[1].get(KEY, found)


def test_reading_takes_no_memory_beside_the_strip(pair):
    strip = [torch.zeros(2**24, dtype=torch.uint8)]
    pair[0].put(KEY, strip)
    tracemalloc.start()
    assert pair[1].get(KEY, strip)
    pair[1].put(("train", Span(4, 8)), strip)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_the_last_to_leave_removes_the_files(pair, tmp_path):
    pair[0].close()
    assert pair[1].get(KEY, memory())
    assert not pair[0].has(KEY)
    pair[1].close()
    pair[1].close()
    pair[1].put(KEY, memory(7))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_forgets_its_files_removes_them(tmp_path):
    one = Scratch()
    one.open(tmp_path)
    del one
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_process_are_removed_by_the_next_run_and_not_before(tmp_path):
    program = (
        "import sys, torch; from pathlib import Path; from ntkpipe.build.scratch import Scratch\n"
        "from ntkpipe.base.grid import Span\n"
        "one = Scratch(); one.open(Path(sys.argv[1])); one.put(('train', Span(0, 4)), [torch.ones(9)])\n"
        "print('kept', flush=True); input()"
    )
    program = program.replace("torch.ones(9)", "torch.ones(9, dtype=torch.uint8)")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "kept\n"
        left = strip_file(tmp_path)
        first = Scratch()
        first.open(tmp_path)
        assert left.exists()
        process.send_signal(signal.SIGKILL)
    assert left.exists()
    second = Scratch()
    second.open(tmp_path)
    assert not left.parent.exists()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("obstacle", ["missing", "a file", "another user's", "open to others"])
def test_where_no_folder_can_be_made_nothing_is_kept_and_that_is_said_once(tmp_path, capsys, monkeypatch, obstacle):
    one, base = Scratch(token="t"), tmp_path / "base"
    if obstacle == "a file":
        base.touch()
    elif obstacle != "missing":
        (base / f"ntkpipe-strips-{os.getuid()}-t").mkdir(parents=True, mode=0o700)
    if obstacle == "another user's":
        (base / f"ntkpipe-strips-{os.getuid() + 1}-t").mkdir(mode=0o700)
        monkeypatch.setattr(os, "getuid", lambda: base.stat().st_uid + 1)
    elif obstacle == "open to others":
        (base / f"ntkpipe-strips-{os.getuid()}-t").chmod(0o755)
    for _ in range(2):
        one.open(base)
        one.put(KEY, memory(7))
        assert not one.get(KEY, memory())
    assert capsys.readouterr().err.count(f"Jacobians are computed again instead of kept in {base}: ") == 1


def test_where_there_is_no_room_nothing_more_is_kept_and_that_is_said_once(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scratch, "free_disk", lambda path: 2**18)
    for start in (4, 8):
        pair[0].put(("train", Span(start, start + 4)), memory())
        assert not pair[1].has(("train", Span(start, start + 4)))
    assert capsys.readouterr().err.count("no room beside the store") == 1
    assert pair[1].get(KEY, memory())


def test_room_that_the_store_needs_is_left_to_it(tmp_path, capsys):
    free = free_disk(tmp_path)
    assert free is not None
    one = Scratch(tmp_path, store_bytes=free)
    one.open(tmp_path)
    one.put(KEY, memory())
    assert not one.has(KEY)
    assert "no room beside the store" in capsys.readouterr().err


def test_files_are_left_on_disks_of_this_machine_alone(tmp_path, monkeypatch):
    assert local_disk_room(tmp_path / "missing") == 0
    for kind, room in (("ext4", True), ("tmpfs", False), ("nfs4", False)):
        mounts = [scratch_mount("/", "tmpfs" if room else "ext4"), scratch_mount(str(tmp_path), kind)]
        monkeypatch.setattr("psutil.disk_partitions", lambda mounts=mounts, **options: mounts)
        assert (local_disk_room(tmp_path) > 0) == room


def scratch_mount(mountpoint: str, fstype: str) -> object:
    return type("Mount", (), {"mountpoint": mountpoint, "fstype": fstype})


# A plan.

WORKLOAD = make_workload(64, 0, 4, 1, Cost(10**5, 1, 0, 1, jacobian_flops=1e8, pair_flops=1e6))
LEAST = make_plan(WORKLOAD, replace(PLENTY, memory_limit=1)).memory_bytes
TIGHT = replace(PLENTY, memory_limit=LEAST + 2 * 10**6, processes=2, is_remote=True, scratch_bytes=ROOM)


def test_files_are_planned_where_they_save_work():
    found, without = make_plan(WORKLOAD, TIGHT), make_plan(WORKLOAD, replace(TIGHT, scratch_bytes=0))
    assert without.scratch_bytes == 0
    assert without.recompute_factor > 1.5
    assert found.scratch_bytes == found.to_json()["scratch_bytes"] == 64 * 10**5
    assert found.recompute_factor == 1.0
    assert found.seconds < without.seconds
    assert "; 6.1 MiB of files for all" in str(found)
    assert "of files" not in str(without)
    for each in (found, without):
        assert not each.problems


@pytest.mark.parametrize(
    "machine",
    [
        replace(TIGHT, scratch_bytes=64 * 10**5),  # no margin
        replace(TIGHT, device="cuda:0"),
        replace(TIGHT, memory_limit=10**9, processes=1),
        replace(TIGHT, num_scratch=50),  # each host computes all
    ],
)
def test_files_are_not_planned_where_they_do_not(machine):
    assert make_plan(WORKLOAD, machine).scratch_bytes == 0


def test_jacobians_that_cost_less_than_reading_them_are_computed():
    cheap = replace(WORKLOAD, cost=replace(WORKLOAD.cost, jacobian_flops=1e6))
    assert make_plan(cheap, TIGHT).scratch_bytes == 0


@pytest.mark.parametrize("memory_limit", [1, LEAST + 10**6, LEAST + 3 * 10**6, 10**9])
def test_files_change_nothing_that_decides_numbers(memory_limit):
    sizes = [
        make_plan(WORKLOAD, replace(TIGHT, memory_limit=memory_limit, scratch_bytes=room)).choices({}, "cpu", "")
        for room in (0, ROOM)
    ]
    assert sizes[0] == sizes[1]


# Runs.


def run(job: BuildJob, folder: Path, tasks: list[BlockTask], monkeypatch) -> list[BuildRecord]:
    """Tasks on a thread, as one of several processes."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    executor: ThreadExecutor[BlockTask, BuildRecord] = ThreadExecutor(1)
    return list(executor.run(job, tasks))


def linear_job(planned: Plan, sink: DictSink, x: np.ndarray, shared: Scratch) -> BuildJob:
    sources = {"train": ArraySource({"input": x}, len(x))}
    job = BuildJob(LinearEngine(), planned, sources, False, sink, StripCache(0), np.dtype("float64"))
    return replace(job, scratch=other_process(shared))


@pytest.mark.parametrize("damages", [False, True])
def test_processes_compute_each_jacobian_once_unless_a_file_is_damaged(tmp_path, monkeypatch, damages):
    planned = make_plan(WORKLOAD, replace(TIGHT, is_remote=False))
    assert planned.scratch_bytes
    x = np.random.default_rng(0).integers(-9, 9, (64, 3)).astype(np.float64)
    x[:, 0] = np.arange(64)
    sink, shared = DictSink(), Scratch()
    jobs = [linear_job(planned, sink, x, shared) for _ in range(2)]
    for job in jobs:
        job.engine.width = 3
    tasks = list(planned.tasks())
    run(jobs[0], tmp_path, tasks[::2], monkeypatch)
    if damages:
        for path in tmp_path.glob("*/train-0-*"):
            path.write_bytes(path.read_bytes()[::-1])
    run(jobs[1], tmp_path, tasks[1::2], monkeypatch)
    counts = [sum(job.engine.counts.values()) for job in jobs]
    assert counts[0] > 0
    again = counts[0] + counts[1] - 64
    assert again > 0 if damages else again == 0
    for (_, index), values in sink.chunks.items():
        if values.shape == (4, 4):
            rows, columns = (x[4 * i : 4 * i + 4] for i in index)
            np.testing.assert_array_equal(values, rows @ columns.T)
    for job in jobs:
        job.close()
    assert list(tmp_path.iterdir()) == []


def test_smaller_work_after_a_kill_reads_and_leaves_no_files(tmp_path, monkeypatch):
    """Its strips have other last bits."""
    planned, sink = make_plan(WORKLOAD, replace(TIGHT, is_remote=False)), DictSink()
    job = linear_job(planned, sink, np.ones((64, 3)), Scratch()).shrunk()
    run(job, tmp_path, list(planned.tasks())[:1], monkeypatch)
    assert sink.chunks
    assert list(tmp_path.iterdir()) == []


def test_strips_of_smaller_batches_are_not_kept(tmp_path, monkeypatch):
    class Starved(LinearEngine):
        def block(self, *args, **options):
            block, batch = super().block(*args, **options)
            return block, batch // 2

    planned = make_plan(WORKLOAD, replace(TIGHT, is_remote=False))
    job = linear_job(planned, DictSink(), np.ones((64, 3)), Scratch())
    run(replace(job, engine=Starved()), tmp_path, list(planned.tasks()), monkeypatch)
    assert not list(tmp_path.glob("*/train-*"))


@pytest.fixture
def granted(monkeypatch) -> list[Plan]:
    """Plans of small runs, which are granted files; no strip stays in the memory of a process for others."""
    monkeypatch.setattr(plan, "_RECOMPUTE_SHARE", np.inf)
    monkeypatch.setattr(plan, "_READ_FLOPS", 0)
    monkeypatch.setattr(workers, "local_disk_room", lambda folder: ROOM)
    inspect = workers.inspect_workers
    monkeypatch.setattr(workers, "inspect_workers", lambda *arguments: replace(inspect(*arguments), scratch_bytes=ROOM))
    seen, make = [], from_samples.make_plan
    monkeypatch.setattr(from_samples, "make_plan", lambda *a, **k: seen.append(make(*a, **k)) or seen[-1])
    return seen


OPTIONS = {"kind": "ntk", "groups": {"first": "0.*"}}  # pieces of one sample, too, and matrices of several groups


def test_a_run_with_files_has_the_bits_of_one_without(tmp_path, monkeypatch, request):
    wanted = chunks(compute(tmp_path / "without.zarr", **OPTIONS).path)
    granted, temporary = request.getfixturevalue("granted"), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    kept, put = [], Scratch.put
    monkeypatch.setattr(Scratch, "put", lambda self, key, memory: kept.append(key) or put(self, key, memory))
    read, get = [], Scratch.get
    monkeypatch.setattr(Scratch, "get", lambda self, key, memory: read.append(get(self, key, memory)) or read[-1])
    assert chunks(compute(tmp_path / "with.zarr", **OPTIONS).path) == wanted
    assert granted[-1].scratch_bytes
    assert len(kept) >= 7
    assert read
    assert all(read)
    assert list(temporary.iterdir()) == []


def test_an_interrupted_run_leaves_no_files(tmp_path, monkeypatch, granted):
    temporary, drain = tmp_path / "temporary", life.drain
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def interrupted(tiles, *arguments):
        drain((next(tiles) for _ in range(3)), *arguments)
        assert list(temporary.glob("*/train-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(life, "drain", interrupted)
    with pytest.raises(Interrupted):
        compute(tmp_path / "k.zarr", **OPTIONS)
    assert granted[-1].scratch_bytes
    assert list(temporary.iterdir()) == []


def kept_below(dask_worker) -> list[str]:
    """Folders of strips beside those of a worker."""
    return [path.name for path in Path(dask_worker.local_directory).parent.glob("ntkpipe-strips-*")]


@pytest.fixture(scope="module")
def client():
    with connect("local", RunSpec(workers=2, memory_limit=1536 * 2**20)) as joined:
        yield joined


def test_workers_share_files_and_one_that_is_killed_changes_no_bit(client: Client, tmp_path, granted, monkeypatch):
    wanted = chunks(compute(tmp_path / "threads.zarr", **OPTIONS).path)

    def names() -> set[str]:
        return {name for found in client.run(kept_below).values() for name in found}

    before = names()
    pids, drain = list(client.run(os.getpid).values()), life.drain

    def killing(tiles, *arguments):
        drain((next(tiles) for _ in range(2)), *arguments)
        assert names() > before
        os.kill(pids[0], signal.SIGKILL)
        drain(tiles, *arguments)

    monkeypatch.setattr(life, "drain", killing)
    there = compute(tmp_path / "cluster.zarr", client=client, **OPTIONS)
    assert granted[-1].scratch_bytes
    assert chunks(there.path) == wanted
    client.wait_for_workers(2)
    assert names() <= before
