"""The CUDA path; runs where a GPU is. What can be tested without one is in test_device.py and test_transfer.py."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference import redraw
from torch import nn

import ntkpipe
from ntkpipe.build import tiles as build
from ntkpipe.build.transfer import DeviceTiles, SideStream, to_host_tensor
from ntkpipe.jacobian.model.device import add_rows, exact_math
from ntkpipe.jacobian.model.functional import prepare_model
from ntkpipe.jacobian.tracing.uses import looked_up

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def cnn() -> nn.Module:
    layers = [
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))


class Tokens(nn.Module):
    """An embedding, with a transformer behind it or without."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.embed, self.head = nn.Embedding(60, 16), nn.Linear(16, 3)
        self.encode = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False) if depth else nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(self.embed(x)).mean(dim=1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 12, num_layers=2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[np.random.Generator], np.ndarray]]] = {
    "cnn": (cnn, lambda rng: rng.standard_normal((50, 64))),
    "transformer": (lambda: Tokens(2), lambda rng: rng.integers(0, 60, (50, 9))),
    "embedding": (lambda: Tokens(0), lambda rng: rng.integers(0, 60, (50, 9))),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda rng: rng.standard_normal((50, 5, 8))),
    "gru": (lambda: Recurrent(nn.GRU), lambda rng: rng.standard_normal((50, 5, 8))),
}
# vmap runs cuDNN's stand-ins one sample at a time, or the fallback does; it says so.
QUIET = pytest.mark.filterwarnings("ignore:.*(performance drop|vmap cannot run this model)")


def pair(name: str, rng: np.random.Generator, **options: object) -> tuple[np.ndarray, np.ndarray]:
    """The kernel of a model by the GPU, and by the CPU in float64."""
    make, draw = MODELS[name]
    model, x = redraw(make()), draw(rng)
    found = ntkpipe.kernel_matrix(model, x, device="cuda", **options)
    exact = ntkpipe.kernel_matrix(model, x, device="cpu", **{**options, "compute_dtype": "float64"})
    return found, exact


def error(found: np.ndarray, exact: np.ndarray) -> float:
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    return float(np.max(np.abs(found - exact) / scale))


@QUIET
@pytest.mark.parametrize("kind", ["pntk", "ntk"])
@pytest.mark.parametrize("name", MODELS)
def test_gpu_and_cpu_agree_in_float64(name: str, kind: str, rng: np.random.Generator) -> None:
    found, exact = pair(name, rng, kind=kind, compute_dtype="float64", tile=16)
    assert found.dtype == np.float64
    assert error(found, exact) <= 1e-11


@QUIET
@pytest.mark.parametrize("kind", ["pntk", "ntk"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_is_as_good_as_float32_can_be(name: str, kind: str, rng: np.random.Generator) -> None:
    found, exact = pair(name, rng, kind=kind, tile=16)
    assert error(found, exact) <= 1e-4


@pytest.mark.parametrize("name", ["cnn", "transformer", "embedding"])
def test_a_run_repeats_itself_to_the_last_bit(name: str, rng: np.random.Generator, tmp_path) -> None:
    make, draw = MODELS[name]
    model, x = redraw(make()), draw(rng)
    first = ntkpipe.compute_kernel(model, x, store=tmp_path / "k.zarr", device="cuda", tile=16, progress=False)
    before = first.train.to_numpy()
    for tile in (tmp_path / "k.zarr" / "kernel" / "train" / "c").rglob("*"):
        if tile.is_file():
            tile.unlink()
    again = ntkpipe.compute_kernel(model, x, store=tmp_path / "k.zarr", device="cuda", progress=False)
    assert np.array_equal(again.train.to_numpy(), before)


def test_a_store_made_on_a_gpu_is_certified(rng: np.random.Generator, tmp_path) -> None:
    x, net = rng.standard_normal((50, 64)), redraw(cnn())
    store = ntkpipe.compute_kernel(net, x, test_inputs=x[:7], store=tmp_path / "k.zarr", device="cuda", tile=16)
    assert store.manifest.choices.device == "cuda"
    assert ntkpipe.verify(store, net, x, test_inputs=x[:7], device="cuda").is_good


class Stopping(SideStream):
    """A stream whose every copy is waited for."""

    def copy(self, source, target):
        event = super().copy(source, target)
        torch.cuda.synchronize()
        return event


def test_tiles_by_the_side_stream_are_those_of_copies_that_are_waited_for(
    rng: np.random.Generator, monkeypatch
) -> None:
    model, x = (
        redraw(nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 3))),
        rng.standard_normal((4000, 64)),
    )
    options = {"device": "cuda", "tile": 500, "self_check": False}
    found = ntkpipe.kernel_matrix(model, x, **options)
    monkeypatch.setattr(build, "tile_buffers", lambda device, rows, dtype: DeviceTiles(Stopping(device), rows, dtype))
    # Representations may be chosen otherwise by rates that are measured anew; copies that fail are off by far more.
    assert error(found, ntkpipe.kernel_matrix(model, x, **options)) <= 1e-5


def test_device_tiles_arrive_whole_while_the_next_ones_are_computed() -> None:
    tiles, arrivals = DeviceTiles(SideStream(torch.device("cuda:0")), 2048, np.dtype("float32")), []
    for number in range(20):
        tile = tiles.take((2048, 1024 + number), None)
        tile.copy_(torch.full(tile.shape, float(number), dtype=torch.float64, device="cuda"))
        arrivals.append(tiles.send())
        other = tiles.fetch(torch.full((5, 3), number, device="cuda"))
        assert (other() == number).all()
        if number:
            values = arrivals[number - 1]()
            assert values.shape == (2048, 1023 + number)
            assert (values == number - 1).all()


def test_samples_travel_through_pinned_memory() -> None:
    device = torch.device("cuda:0")
    model = prepare_model(nn.Linear(3, 2).eval(), dtype=torch.float32, device=device)
    values = {"a": np.arange(6.0).reshape(2, 3)[::-1], "b": np.array([[1], [2]]), "c": np.array([True, False])}
    hosted = {name: to_host_tensor(value, device) for name, value in values.items()}
    assert all(value.is_pinned() for value in hosted.values())
    batch = model.to_batch(hosted, is_mapping=True)
    assert [value.dtype for value in batch.values()] == [torch.float32, torch.int64, torch.bool]
    for name, value in values.items():
        np.testing.assert_array_equal(batch[name].cpu().numpy(), value)


def test_rows_are_added_up_in_the_same_order_each_time() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    values = torch.randn(2, 20000, 8, device="cuda", generator=generator)
    index = torch.randint(0, 7, (20000,), device="cuda", generator=generator)
    first, again = (add_rows(torch.zeros(2, 7, 8, device="cuda"), 1, index, values) for _ in range(2))
    assert torch.equal(first, again)
    exact = torch.zeros(2, 7, 8, dtype=torch.float64).index_add_(1, index.cpu(), values.double().cpu())
    torch.testing.assert_close(first.double().cpu(), exact, rtol=1e-4, atol=1e-3)


def test_looked_up_jacobians_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 4, (6, 9), generator=generator)
    rows = torch.randn(6, 9, 3, generator=generator, dtype=torch.float64)
    found = looked_up(indices.cuda(), rows.cuda(), (4, 3)).cpu()
    torch.testing.assert_close(found, looked_up(indices, rows, (4, 3)), rtol=1e-13, atol=1e-13)


class Hungry(nn.Module):
    """Few parameters, and 0.6 MiB of activations a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.first(x).repeat(1, 256)
        for _ in range(10):
            wide = torch.tanh(wide)
        return self.last(wide.unflatten(1, (256, 64)).mean(dim=1))


def test_a_gpu_that_runs_out_of_memory_halves_the_batch_and_says_so(rng: np.random.Generator, tmp_path) -> None:
    model, x = redraw(Hungry()), rng.standard_normal((4096, 64)).astype(np.float32)
    options = {"device": "cuda", "tile": 2048, "self_check": False, "progress": False}
    exact = ntkpipe.kernel_matrix(model, x[:64], **{**options, "tile": 64})
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        # The plan sees all of the device's memory; tiles and sums fit below this, a whole batch does not.
        torch.cuda.set_per_process_memory_fraction(min(1.0, 2**30 / total))
        with pytest.warns(UserWarning, match="memory ran out, so work was halved"):
            store = ntkpipe.compute_kernel(model, x, store=tmp_path / "k.zarr", **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (noted,) = store.store.read_results("runs")
    assert noted["batch_used"] < noted["batch"]
    assert noted["subtile_used"] == noted["subtile"]
    np.testing.assert_allclose(store.train[:64, :64], exact, rtol=1e-3, atol=1e-5)


def product_error() -> float:
    a = torch.randn(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    exact = a.double() @ a.double()
    return float((a @ a - exact).abs().max() / exact.abs().max())


def test_float32_products_are_float32() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with exact_math():
            assert product_error() < 1e-5
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="this GPU has no TF32"
)
def test_tf32_is_used_where_it_is_asked_for(rng: np.random.Generator, tmp_path) -> None:
    with exact_math(tf32=True):
        assert product_error() > 1e-5
    model = redraw(nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 3)))
    x = rng.standard_normal((64, 64))
    exact = ntkpipe.kernel_matrix(model, x, device="cpu", compute_dtype="float64")
    errors = {
        dtype: error(ntkpipe.kernel_matrix(model, x, device="cuda", compute_dtype=dtype), exact)
        for dtype in ("float32", "tf32")
    }
    assert errors["float32"] < 1e-5 < errors["tf32"] < 1e-2
    store = ntkpipe.compute_kernel(model, x, store=tmp_path / "k.zarr", device="cuda", compute_dtype="tf32")
    assert ntkpipe.verify(store, model, device="cuda").is_good
