"""A run that is stopped, killed, starved or joined by another ends with the bits of an undisturbed one."""

import contextlib
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import FORKS, slowly
from small import Allowance, WithoutRule, chunks, compute, mlp, times, with_sizes

from ntkpipe.base.errors import (
    Interrupted,
    ResourceError,
    SelfCheckError,
    StoreError,
    StoreExistsError,
    StoreFullError,
    StoreMismatchError,
)
from ntkpipe.build import life
from ntkpipe.build.tiles import BuildJob
from ntkpipe.jacobian.fallback import METHODS
from ntkpipe.store.kernel_store import open_kernel
from ntkpipe.store.verification import verify_store

FORKS.set_forkserver_preload(["torch._dynamo", "ntkpipe.build.compute", "small"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "undisturbed.zarr"
    compute(path)
    return path


@pytest.fixture
def refuse_to_compute(monkeypatch):
    """Make any computation of a tile an error."""

    def fail(*_):
        raise AssertionError("something was computed")

    monkeypatch.setattr(BuildJob, "open", fail)


@pytest.mark.parametrize("tiles", [0, 1, 5, 24])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch, undisturbed, tiles):
    path = tmp_path / "k.zarr"
    with monkeypatch.context() as patch:
        Allowance(patch, tiles, KeyboardInterrupt())
        with pytest.raises(Interrupted, match=rf"{tiles} of 25 tiles are in .*k\.zarr; .*resumes"):
            compute(path)
    assert open_kernel(path).progress.tiles_done == tiles
    before = times(path)
    compute(path)
    assert chunks(path) == chunks(undisturbed)
    assert before.items() <= times(path).items()


@pytest.mark.parametrize("changes", [{"tile": 1}, {"tile": 7}, {"tile": 100}, {"tile": 5, "kind": "ntk"}])
@pytest.mark.parametrize("tiles", [0, 3])
def test_resuming_is_exact_for_any_tile(tmp_path, monkeypatch, changes, tiles):
    compute(tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        Allowance(patch, tiles, KeyboardInterrupt())
        with contextlib.suppress(Interrupted):  # two tiles of 100 are all
            compute(tmp_path / "cut", **changes)
    compute(tmp_path / "cut", **changes)
    assert chunks(tmp_path / "cut") == chunks(tmp_path / "whole")


def limit_for_strips(path: Path, monkeypatch, **changes) -> int:
    """A memory limit that is too small for whole tiles; memory that is in use does not count, since it varies."""
    monkeypatch.setattr("ntkpipe.build.prepare.process_memory", lambda: 0)
    monkeypatch.setattr("ntkpipe.build.prepare._LIBRARY_BYTES", 0)
    with_sizes(monkeypatch, scratch_bytes=0)
    for limit in (size * 1024 for size in range(20, 2000, 4)):
        try:
            compute(path, memory_limit=limit, mode="w", **changes)
        except ResourceError:
            continue
        if open_kernel(path).manifest.choices.strip > 2:
            return limit
    raise AssertionError("no limit gives strips of a few samples")


def test_a_run_in_strips_resumes_to_the_same_bits_whatever_memory_and_workers_there_are(tmp_path, monkeypatch):
    limit = limit_for_strips(tmp_path / "whole", monkeypatch, tile=18, workers=1)
    choices = open_kernel(tmp_path / "whole").manifest.choices
    assert 2 < choices.strip < 18
    with monkeypatch.context() as patch:
        Allowance(patch, 0, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            compute(tmp_path / "cut", tile=18, workers=1, memory_limit=limit)
    compute(tmp_path / "cut", tile=18, workers=3, memory_limit="1GiB")
    assert open_kernel(tmp_path / "cut").manifest.choices == choices
    assert chunks(tmp_path / "cut") == chunks(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("memory_limit", [None, "2GiB"])
def test_bits_do_not_depend_on_workers_or_memory(tmp_path, undisturbed, workers, memory_limit):
    store = compute(tmp_path / "k.zarr", workers=workers, memory_limit=memory_limit)
    assert store.manifest.choices == open_kernel(undisturbed).manifest.choices
    assert chunks(store.path) == chunks(undisturbed)


def test_a_store_that_is_complete_is_returned_without_computing(undisturbed, refuse_to_compute):
    before = times(undisturbed)
    assert compute(undisturbed).progress.is_complete
    assert times(undisturbed) == before


REPAIRABLE = [
    "kernel/train/c/0/1",
    "kernel/train/c/2/2",
    "kernel/test_train/c/1/4",
    "kernel/test_diagonal/c/1/0/0",
    "outputs/train/c/0/0",
    "outputs/train/c/3/0",
    "outputs/test/c/0/0",
    "samples/train/input/c/1/0",
    "targets/train/c/0",
]


@pytest.mark.parametrize("name", REPAIRABLE)
@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_only_chunks_that_are_gone_or_cut_are_written_again(tmp_path, undisturbed, name, damage):
    path = tmp_path / "k.zarr"
    compute(path)
    (path / name).unlink() if damage == "delete" else os.truncate(path / name, 7)
    before = times(path)
    compute(path)
    after = times(path)
    assert {other for other in after if before.get(other) != after[other]} == {name}
    assert chunks(path) == chunks(undisturbed)


def test_a_run_whose_record_is_damaged_still_finishes(tmp_path, undisturbed):
    path = tmp_path / "k.zarr"
    compute(path)
    (path / "results/runs/zarr.json").write_text("{")
    (path / "kernel/train/c/0/0").unlink()
    compute(path)
    assert chunks(path) == chunks(undisturbed)
    assert [run["tiles"] for run in open_kernel(path).store.read_results("runs")] == [25, 1]


def test_runs_are_recorded_one_after_the_other(tmp_path, monkeypatch):
    compute(tmp_path / "k.zarr")
    (tmp_path / "k.zarr/kernel/train/c/0/0").unlink()
    compute(tmp_path / "k.zarr", workers=1)
    found = open_kernel(tmp_path / "k.zarr").store.read_results("runs")
    assert [(run["tiles"], run["workers"]) for run in found] == [(25, 2), (1, 1)]
    assert found[0]["flops"] > found[1]["flops"] > 0


@pytest.mark.parametrize("tiles", [0, 4])
def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, monkeypatch, undisturbed, tiles):
    path = tmp_path / "k.zarr"
    replace, left = os.replace, [tiles]

    def replace_while_there_is_room(source, target):
        if "/kernel/t" in str(target) and "/c/" in str(target):
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_while_there_is_room)
        with pytest.raises(StoreFullError, match=rf"disk is full.*{tiles} of 25 tiles are in .* once there is room"):
            compute(path, workers=1)
    assert not list(path.rglob("*.partial"))
    before = times(path)
    compute(path)
    assert chunks(path) == chunks(undisturbed)
    assert before.items() <= times(path).items()


def test_no_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("ntkpipe.store.media.folder.free_disk", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"the store needs .* KiB more, 1000 B of disk are free"):
        compute(tmp_path / "k.zarr")
    assert not (tmp_path / "k.zarr").exists()


def test_an_interrupt_in_the_progress_bar_stops_the_workers_first(tmp_path, monkeypatch, undisturbed):
    def interrupted(records, **_):
        next(records)
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(life, "show_progress", interrupted)
        with pytest.raises(Interrupted) as info:
            compute(tmp_path / "k.zarr", progress=True)
    done = open_kernel(tmp_path / "k.zarr").progress.tiles_done
    assert f"{done} of 25 tiles" in str(info.value)
    compute(tmp_path / "k.zarr")
    assert chunks(tmp_path / "k.zarr") == chunks(undisturbed)


def test_a_process_killed_at_any_moment_resumes_to_the_same_bits(tmp_path, undisturbed):
    path, rng, kills = tmp_path / "k.zarr", np.random.default_rng(), 0
    wanted = chunks(undisturbed)
    while kills < 5:
        before = times(path)
        whole = {name: when for name, when in before.items() if (path / name).stat().st_size == len(wanted[name])}
        child = FORKS.Process(target=slowly, args=(path, 0.01))
        child.start()
        while child.exitcode is None and len(times(path)) == len(before):
            time.sleep(0.002)
        child.join(rng.uniform(0.001, 0.08))
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        kills += 1
        assert whole.items() <= times(path).items()
    assert kills > 0
    before = times(path)
    compute(path)
    assert chunks(path) == wanted
    assert before.items() <= times(path).items()


def test_two_processes_on_one_store_end_with_the_same_bits(tmp_path, undisturbed):
    path = tmp_path / "k.zarr"
    children = [FORKS.Process(target=slowly, args=(path, 0.002)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert chunks(path) == chunks(undisturbed)


PEAK = """
import sys
sys.path.insert(0, {tests!r})
from small import compute, inputs, mlp
store = compute(sys.argv[1], model=mlp(width=64), inputs=inputs(3000), targets=None, test_inputs=None, tile=512,
                memory_limit=sys.argv[2] or None)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, store.store.read_results("runs")[0]["memory_bytes"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_stays_below_the_plan(tmp_path):
    script = PEAK.format(tests=str(Path(__file__).parents[1] / "helpers"))
    command = [sys.executable, "-c", script, str(tmp_path / "k.zarr"), ""]
    peak, bound = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert peak <= bound


def test_starting_over_is_refused_while_another_run_writes(tmp_path, undisturbed):
    path = tmp_path / "k.zarr"
    store = compute(path).store
    with store.in_use(), pytest.raises(StoreExistsError, match="another run is writing to"):
        compute(path, model=mlp(seed=1), mode="w")
    assert chunks(path) == chunks(undisturbed)
    compute(path, model=mlp(seed=1), mode="w")
    with pytest.raises(StoreError, match="was replaced by another run"), store.in_use():
        pass


def test_the_last_writer_removes_what_killed_ones_left(tmp_path):
    path = tmp_path / "k.zarr"
    compute(path)
    (path / "kernel/train/c/0/0").unlink()
    (path / "kernel/train/c/0/0.0123.partial").write_bytes(b"half")
    compute(path)
    assert open_kernel(path).store.medium.leftovers() == []
    assert verify_store(open_kernel(path).store).findings == ()


def test_a_resume_whose_self_check_refuses_the_recorded_way_stops(tmp_path, monkeypatch):
    """What was stored with the self-check off may be wrong: its way is not taken up again."""
    path, net = tmp_path / "k.zarr", torch.nn.Sequential(WithoutRule(4), mlp())
    by_vmap = METHODS["vmap"]
    monkeypatch.setitem(METHODS, "vmap", lambda *args: 1.05 * by_vmap(*args))
    compute(path, model=net)
    (path / "kernel/train/c/0/0").unlink()
    with pytest.raises(SelfCheckError, match="cannot be trusted"):
        compute(path, model=net, self_check=True)


def test_another_derivative_behind_the_same_outputs_is_refused(tmp_path):
    path = tmp_path / "k.zarr"
    compute(path)
    (path / "kernel/train/c/1/1").unlink()
    with pytest.raises(StoreMismatchError, match="differentiated in another way"):
        compute(path, forward=lambda model, x: 2 * model(x) - model(x).detach())


def test_the_caller_may_be_inside_no_grad_or_autocast(tmp_path, undisturbed):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        compute(tmp_path / "a.zarr")
    with torch.inference_mode():
        compute(tmp_path / "b.zarr")
    assert chunks(tmp_path / "a.zarr") == chunks(tmp_path / "b.zarr") == chunks(undisturbed)
