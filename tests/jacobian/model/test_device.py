"""What differs between devices, as far as it can be tested without a GPU."""

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from time import sleep

import engines
import numpy as np
import pytest
import torch
from reference import redraw
from streams import LateStream
from torch import nn
from torch.utils import backend_registration

import ntkpipe
from ntkpipe.base.errors import ResourceError
from ntkpipe.build import prepare
from ntkpipe.build import tiles as build
from ntkpipe.build.life import StoreSink
from ntkpipe.build.plan import Machine
from ntkpipe.build.tiles import Gram
from ntkpipe.build.transfer import DeviceTiles
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.device import (
    SIZES,
    add_rows,
    exact_math,
    is_out_of_memory,
    sizes_of,
    without_cudnn_rnns,
    without_tf32,
)
from ntkpipe.jacobian.model.functional import prepare_model
from ntkpipe.jacobian.representations.interface import Rates
from ntkpipe.jacobian.representations.pieces import contract, contract_planes
from ntkpipe.jacobian.representations.sums import Workspace

CPU_ALLOCATION = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
FAILURES = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU_ALLOCATION)]
X = torch.randn(13, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def mlp() -> nn.Module:
    return redraw(nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 3)))


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_memory_that_ran_out_is_recognised(failure):
    assert is_out_of_memory(failure)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("x"), ResourceError("needs more")])
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_a_real_allocation_that_is_too_large_is_recognised():
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**50)
    assert is_out_of_memory(info.value)


def test_a_gpu_gets_larger_work():
    assert sizes_of("cuda:1") is SIZES["cuda"]
    machine = Machine(workers=1, memory_limit=1, base_memory=0, free_disk=None, flops_per_second=1.0)
    assert machine.sizes is SIZES["cpu"]
    assert replace(machine, device="cuda:0").sizes.piece_rows > machine.sizes.piece_rows


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch has no fake devices"
)
def test_the_engine_mixes_no_devices_and_waits_for_no_numbers():
    environment = {**os.environ, "PYTHONPATH": str(Path(ntkpipe.__file__).parents[1])}
    script = Path(__file__).parents[2] / "helpers" / "fake_gpu.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith(" engines\n")


def test_rows_are_added_alike_on_every_device(monkeypatch):
    values, index = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([1, 0, 1, 3, 1])
    wanted = torch.zeros(2, 4, 3, dtype=torch.float64).index_add_(1, index, values)
    found = torch.zeros(2, 4, 3, dtype=torch.float64)
    assert torch.equal(add_rows(found.clone(), 1, index, values), wanted)

    class Elsewhere:  # a device that is no CPU
        device = torch.device("cuda:0")

        def movedim(self, source, target):
            return found.movedim(source, target)

    add_rows(Elsewhere(), 1, index, values)
    torch.testing.assert_close(found, wanted)


def halving(monkeypatch, failure, most):
    """An engine whose forward passes of more than ``most`` samples fail, and what it has tried."""
    engine, tried, original = engines.engine_of(mlp(), X, EYE), [], Engine.forward

    def forward(self, batch):
        tried.append(len(batch))
        if len(batch) > most:
            raise failure
        return original(self, batch)

    monkeypatch.setattr(Engine, "forward", forward)
    return engine, tried


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_in_a_forward_pass_halves_the_batch(monkeypatch, failure):
    exact = engines.engine_kernel(engines.engine_of(mlp(), X, EYE), X)
    engine, tried = halving(monkeypatch, failure, most=3)
    block, used = engine.block(lambda start, stop: X[start:stop], 0, 13, subtile=8, batch=100)
    assert used == 2
    assert tried == [8, 4, 2, 2, 2, 2, 2, 3]
    rows = [torch.cat([contract(one, other, Workspace()) for other in block.pieces], dim=1) for one in block.pieces]
    assert np.max(np.abs(torch.cat(rows).numpy() - exact)) <= 1e-12 * np.max(exact)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_for_two_samples_is_an_error(monkeypatch, failure):
    engine, tried = halving(monkeypatch, failure, most=1)
    with pytest.raises(type(failure)):
        engine.block(lambda start, stop: X[start:stop], 0, 13, subtile=8, batch=8)
    assert tried == [8, 4, 2]


def test_another_error_is_not_tried_again(monkeypatch):
    engine, tried = halving(monkeypatch, RuntimeError("index out of range"), most=3)
    with pytest.raises(RuntimeError, match="index out of range"):
        engine.block(lambda start, stop: X[start:stop], 0, 13, subtile=8, batch=8)
    assert tried == [8]


def test_nothing_of_a_failed_attempt_is_alive_when_the_next_begins(monkeypatch):
    engine, left, alive = engines.engine_of(mlp(), X, EYE), [], []
    original = Engine.forward

    def forward(self, batch):
        gc.disable()  # reference counts alone
        alive.append([reference() is not None for reference in left])
        if len(batch) > 3:
            activations = batch.clone()
            left.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("as a test")
        return original(self, batch)

    monkeypatch.setattr(Engine, "forward", forward)
    try:
        engine.block(lambda start, stop: X[start:stop], 0, 8, subtile=8, batch=8)
    finally:
        gc.enable()
    assert [any(each) for each in alive] == [False] * len(alive)
    assert len(left) == 2


@pytest.mark.parametrize(
    ("way", "failure"),
    [*(("chosen", failure) for failure in FAILURES), *((way, FAILURES[0]) for way in engines.WAYS)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_memory_that_runs_out_in_a_contraction_halves_the_pieces(failure, way):
    held = engines.forced(engines.engine_of(mlp(), X, EYE))
    engine = held.get(way, held["chosen"])
    block, _ = engine.block(lambda start, stop: X[start:stop], 0, 13, subtile=8, batch=8)
    other, _ = engine.block(lambda start, stop: X[start:stop] + 1, 0, 5, subtile=8, batch=8)

    def fill(right, width, is_mirrored, contract=contract_planes):
        tile = torch.full((39, 3 * width), torch.nan, dtype=torch.float64)
        filler = Gram(3, "all", pause=lambda: None, contract=contract)
        filler.fill(block, right, [tile], 0, 0, mirror=is_mirrored)
        return tile, filler.most

    whole = [fill(block, 13, True), fill(other, 5, False)]
    assert [most for _, most in whole] == [None, None]

    def limited(one, two, *args, **changes):
        if max(one.num_samples, two.num_samples) > 3:
            raise failure
        contract_planes(one, two, *args, **changes)

    halved = [fill(block, 13, True, limited), fill(other, 5, False, limited)]
    assert [most for _, most in halved] == [2, 2]
    for (tile, _), (wanted, _) in zip(halved, whole, strict=True):
        torch.testing.assert_close(tile, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(halved[0][0], halved[0][0].T)


def test_a_contraction_of_single_samples_that_does_not_fit_is_an_error():
    def failing(*args, **options):
        raise MemoryError

    block, _ = engines.engine_of(mlp(), X, EYE).block(lambda start, stop: X[start:stop], 0, 5, subtile=8, batch=8)
    with pytest.raises(MemoryError):
        Gram(3, "all", pause=lambda: None, contract=failing).fill(
            block, block, [torch.empty(15, 15)], 0, 0, mirror=True
        )


def limit_batches(monkeypatch, most):
    original = Engine.forward

    def forward(self, batch):
        if len(batch) > most:
            raise torch.OutOfMemoryError("as a test")
        return original(self, batch)

    monkeypatch.setattr(Engine, "forward", forward)


def test_a_run_whose_batch_was_halved_says_so_once_and_notes_it(monkeypatch, tmp_path):
    x = X.float().repeat(4, 1)
    options = {"tile": 16, "workers": 2, "progress": False, "self_check": False}
    calm = ntkpipe.compute_kernel(mlp(), x, store=tmp_path / "calm.zarr", **options)
    (noted,) = calm.store.read_results("runs")
    assert (noted["batch"], noted["subtile"]) == (noted["batch_used"], noted["subtile_used"]) == (16, 16)
    limit_batches(monkeypatch, 8)
    with pytest.warns(UserWarning, match=r"batch 16 → 8, subtile 16 → 16\).*rounding, not to the last bit") as caught:
        store = ntkpipe.compute_kernel(mlp(), x, store=tmp_path / "k.zarr", **options)
    assert len(caught) == 1
    (noted,) = store.store.read_results("runs")
    assert (noted["batch"], noted["batch_used"]) == (16, 8)
    np.testing.assert_allclose(store.train.to_numpy(), calm.train.to_numpy(), rtol=1e-5)


def test_a_kernel_in_memory_whose_batch_was_halved_says_so(monkeypatch):
    limit_batches(monkeypatch, 8)
    with pytest.warns(UserWarning, match="memory ran out, so work was halved"):
        ntkpipe.kernel_matrix(mlp(), X.float().repeat(4, 1), tile=16, workers=1, self_check=False)


def test_memory_of_the_host_that_ran_out_is_no_error_of_the_model(monkeypatch):
    limit_batches(monkeypatch, 8)
    original = Engine.forward

    def forward(self, batch):
        if len(batch) > 8:
            return original(self, batch)
        raise RuntimeError(CPU_ALLOCATION)

    options = {"tile": 16, "workers": 1, "self_check": False, "compute_dtype": "float64"}
    prepared_forward = Engine.block

    def block(self, *args, **changes):
        monkeypatch.setattr(Engine, "forward", forward)
        return prepared_forward(self, *args, **changes)

    monkeypatch.setattr(Engine, "block", block)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        ntkpipe.kernel_matrix(mlp(), X.repeat(4, 1), **options)


def test_tiles_through_device_buffers_are_those_of_the_host(monkeypatch, tmp_path):
    """The path of a GPU, its copies as late as they may be, to the last bit."""
    x = X.float().repeat(5, 1)
    monkeypatch.setattr(prepare, "measure_rates", lambda *_: Rates(32e9, 1e9))
    options = {"kind": "ntk", "workers": 2, "self_check": False, "progress": False}
    matrix = ntkpipe.kernel_matrix(mlp(), x, tile=16, **options)
    host = ntkpipe.compute_kernel(mlp(), x, test_inputs=x[:20], store=tmp_path / "host.zarr", tile=16, **options)
    monkeypatch.setattr(build, "tile_buffers", lambda device, rows, dtype: DeviceTiles(LateStream(), rows, dtype))
    write = StoreSink.write

    def slow(self, array, index, values):
        before = values.copy()
        sleep(0.001)
        assert np.array_equal(values, before), "overwritten while it was read"
        write(self, array, index, values)

    monkeypatch.setattr(StoreSink, "write", slow)
    assert np.array_equal(ntkpipe.kernel_matrix(mlp(), x, tile=16, **options), matrix)
    found = ntkpipe.compute_kernel(mlp(), x, test_inputs=x[:20], store=tmp_path / "k.zarr", tile=16, **options)
    for name in ("train", "test_train", "test_diagonal"):
        assert np.array_equal(np.asarray(getattr(found, name)), np.asarray(getattr(host, name))), name
    assert np.array_equal(np.asarray(found.outputs), np.asarray(host.outputs))


def gpu_precisions():
    backends = torch.backends
    return [each.fp32_precision for each in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]


def test_tf32_is_on_where_it_is_asked_for_and_off_in_contractions():
    before = gpu_precisions()
    with exact_math():
        assert gpu_precisions() == ["ieee"] * 3
    with exact_math(tf32=True):
        assert gpu_precisions() == ["tf32"] * 3
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # a CPU computes float32
        with without_tf32(torch.device("cuda:0")):
            assert gpu_precisions()[0] == "ieee"
        assert gpu_precisions()[0] == "tf32"
        with without_tf32(torch.device("cpu")):
            assert gpu_precisions()[0] == "tf32"
    assert gpu_precisions() == before


def test_a_run_in_tf32_is_one_in_float32_on_a_cpu_and_says_what_was_asked(tmp_path):
    x, options = X.float(), {"tile": 8, "workers": 1, "progress": False}
    plain = ntkpipe.compute_kernel(mlp(), x, store=tmp_path / "plain.zarr", **options)
    store = ntkpipe.compute_kernel(mlp(), x, store=tmp_path / "k.zarr", compute_dtype="tf32", **options)
    assert (store.manifest.compute_dtype, store.manifest.accumulate_dtype) == ("tf32", "float32")
    np.testing.assert_allclose(store.train.to_numpy(), plain.train.to_numpy(), rtol=1e-6)
    (certificate,) = ntkpipe.verify(store, mlp(), progress=False).certificates
    assert certificate["is_good"]
    assert certificate["tolerance"] > 2e-5
    with pytest.raises(ntkpipe.base.errors.StoreMismatchError, match="compute_dtype"):
        ntkpipe.compute_kernel(mlp(), x, store=tmp_path / "plain.zarr", compute_dtype="tf32", **options)


def test_tolerances_go_by_the_compute_dtype():
    def arithmetic(dtype, **options):
        return prepare_model(nn.Linear(2, 2).eval(), dtype=dtype, device=torch.device("cpu"), **options)

    model = arithmetic(torch.float32, tf32=True)
    assert model.arithmetic == model.copy().arithmetic == model.channels_last().arithmetic == "tf32"
    assert model.converted(torch.float64).arithmetic == "float64"
    assert arithmetic(torch.float32).arithmetic == "float32"
    assert arithmetic(torch.bfloat16).arithmetic == "bfloat16"


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_cudnn_is_off_while_an_rnn_runs_and_on_for_everything_else(kind):
    seen, rnn = [], kind(4, 3)
    model = nn.Sequential(nn.Linear(4, 4), rnn)
    without_cudnn_rnns(model)
    rnn.register_forward_pre_hook(lambda module, args: seen.append(torch.backends.cudnn.enabled))
    model[0].register_forward_pre_hook(lambda module, args: seen.append(torch.backends.cudnn.enabled))
    model(torch.ones(2, 4))
    assert seen == [True, False]
    assert torch.backends.cudnn.enabled
    with pytest.raises(RuntimeError):
        rnn(torch.ones(2, 5))
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("kind", ["ntk", "pntk"])
def test_float64_goes_from_end_to_end(kind, tmp_path):
    options = {"kind": kind, "compute_dtype": "float64", "tile": 8, "workers": 1, "progress": False}
    store = ntkpipe.compute_kernel(mlp(), X, store=tmp_path / "k.zarr", **options)
    assert store.train.dtype == np.float64
    exact = engines.engine_kernel(engines.engine_of(mlp(), X, EYE), X)
    if kind == "pntk":
        exact = exact.reshape(13, 3, 13, 3).sum(axis=(1, 3)) / 3
    assert np.max(np.abs(store.train.to_numpy() - exact)) <= 1e-13 * np.max(exact)
    assert ntkpipe.verify(store, mlp(), progress=False).is_good
