"""A run leaves a line for each block and a summary that the lines add up to."""

import json

import pytest
from small import compute

from ntkpipe import open_kernel


def lines_of(store):
    return [
        json.loads(line)
        for file in sorted(store.path.glob("results/runs/*/blocks.jsonl"))
        for line in file.read_text().splitlines()
    ]


def test_blocks_add_up_to_the_run_and_the_run_to_the_kernel(tmp_path):
    store = compute(tmp_path / "run.zarr", kind="ntk")
    (run,), lines = store.store.read_results("runs"), lines_of(store)
    kernels = [line for line in lines if not line["array"].endswith("test_diagonal")]
    assert sum(line["tiles"] for line in kernels) == run["tiles"] == store.progress.tiles_total
    for name in ("flops", "num_bytes"):
        assert run[name] == sum(line[name] for line in lines) > 0
    assert run["hosts"] == sorted({line["host"] for line in lines})
    assert run["peak_memory_bytes"] == max(line["peak_memory_bytes"] for line in lines)
    entries = sum(kernel.size for kernel in (store.train, store.test_train))
    assert run["num_bytes"] < 2 * entries * store.train.dtype.itemsize
    rate = run["flops"] / run["seconds"] / run["workers"]
    assert run["share_of_rate"] == pytest.approx(rate / run["flops_per_second"])
    assert all(line["seconds"] > 0 and line["started"] > 1.7e9 for line in lines)


def test_a_resumed_run_tells_of_its_own_blocks_alone(tmp_path):
    store = compute(tmp_path / "run.zarr")
    before = len(lines_of(store))
    (tmp_path / "run.zarr" / "kernel" / "train" / "c" / "1" / "2").unlink()
    compute(tmp_path / "run.zarr")
    (added,) = lines_of(open_kernel(tmp_path / "run.zarr"))[before:]
    assert (added["array"], added["tiles"]) == ("kernel/train", 1)
    assert len(store.store.read_results("runs")) == 2


def test_a_worker_of_another_type_that_joins_later_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ntkpipe.build.tiles.describe_arithmetic", lambda device: "SSE2")
    monkeypatch.setattr("ntkpipe.build.tiles.socket.gethostname", lambda: "late")
    with pytest.warns(UserWarning, match="late computes with SSE2, the store was begun with"):
        compute(tmp_path / "run.zarr")
