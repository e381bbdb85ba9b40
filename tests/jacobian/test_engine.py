"""The engine: pieces, batches of any size, recorded choices, what memory and operations cost."""

from dataclasses import replace

import pytest
import reference
import torch
from architectures import CAUSAL, IDS, IMAGES, from_transformers, last_logits
from engines import block_kernel, copied, engine_kernel, engine_of, forced, take
from reference import Custom, redraw
from small import with_sizes
from torch import nn

from ntkpipe.base.errors import ModelError, NonFiniteError
from ntkpipe.jacobian.engine import Engine

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def mlp():
    return redraw(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)))


def load(start, stop):
    return X[start:stop]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("subtile", "batch"), [(7, 7), (3, 2), (4, 3), (1, 1), (2, 8)])
def test_blocks_give_the_same_kernel_however_they_are_cut(subtile, batch, structured):
    model = mlp()
    block, used = engine_of(model, X, EYE, structured=structured).block(load, 0, 7, subtile=subtile, batch=batch)
    assert used == batch
    assert [piece.num_samples for piece in block.pieces] == [min(subtile, 7 - i) for i in range(0, 7, subtile)]
    assert reference.error(block_kernel(block), reference.kernel(model, X)) <= 1e-12
    assert torch.allclose(block.outputs, model.double()(X), rtol=1e-12)
    assert block.num_bytes() == sum(piece.num_bytes() for piece in block.pieces) + block.outputs.nbytes


@pytest.mark.parametrize("way", ["chosen", "pairwise", "late", "dense"])
@pytest.mark.parametrize(("subtile", "batch"), [(3, 2), (2, 7), (1, 1)])
def test_jacobians_held_in_any_way_give_the_same_kernel(way, subtile, batch):
    model = mlp()
    ways = forced(engine_of(model, X, EYE))
    engine = ways.get(way, ways["chosen"])
    assert way == "chosen" or {label for label in engine.representations.values() if "linear" in label} == {
        f"linear:{way}"
    } | ({"linear:dense"} if way == "late" else set())
    block, _ = engine.block(load, 0, 7, subtile=subtile, batch=batch)
    assert reference.error(block_kernel(block), reference.kernel(model, X)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("subtile", "batch"), [(7, 7), (3, 2), (1, 1)])
@pytest.mark.parametrize("changes", [{}, {"groups": (("0.weight", "2.weight"), ("3.bias",))}, {"pairs": "same"}])
def test_a_block_is_all_in_its_memory(changes, subtile, batch, dtype):
    """Of pieces of one sample, of groups and of sums in another dtype, too."""
    for structured in (True, False):
        engine = engine_of(mlp(), X, EYE, structured=structured)
        engine = engine.changed(setup=replace(engine.setup, accumulate_dtype=dtype, **changes))
        for held in forced(engine).values():
            block, _ = held.block(load, 0, 7, subtile=subtile, batch=batch)
            again = copied(held, block, subtile)
            assert torch.equal(again.outputs, block.outputs)
            for one, other in zip(again.pieces, block.pieces, strict=True):
                assert (one.num_samples, one.groups) == (other.num_samples, other.groups)
                for mine, theirs in zip(one.factors, other.factors, strict=True):
                    assert type(mine) is type(theirs)
                    assert all(map(torch.equal, mine.tensors(), theirs.tensors()))


@pytest.mark.parametrize(("numbers", "runs"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3])])
def test_covectors_are_pulled_back_a_few_at_a_time(numbers, runs, monkeypatch):
    model = mlp()
    engine = engine_of(model, X, EYE)
    recorded = engine.forward(X)
    with_sizes(monkeypatch, gradient_bytes=8 * numbers * sum(call.blank().numel() for call in recorded.calls))
    found = [pulled.covectors for pulled in engine.pulled(recorded, slice(0, 7))]
    assert [covectors.stop - covectors.start for covectors in found] == runs
    block, _ = engine.block(load, 0, 7, subtile=7, batch=7)
    assert reference.error(block_kernel(block), reference.kernel(model, X)) <= 1e-12


def starved(monkeypatch, most):
    """Let forward passes of more than ``most`` samples run out of memory; the sizes that are tried."""
    original, tried = Engine.forward, []

    def forward(self, batch):
        tried.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("as a test")
        return original(self, batch)

    monkeypatch.setattr(Engine, "forward", forward)
    return tried


def test_memory_that_runs_out_halves_the_batch(monkeypatch):
    model = mlp()
    engine = engine_of(model, X, EYE)
    tried = starved(monkeypatch, 3)
    block, used = engine.block(load, 0, 7, subtile=7, batch=7)
    assert tried == [7, 3, 4, 2, 2, 3]  # a last sample is never alone
    assert used == 2
    assert reference.error(block_kernel(block), reference.kernel(model, X)) <= 1e-12


def test_memory_that_runs_out_for_two_samples_is_an_error(monkeypatch):
    engine = engine_of(mlp(), X, EYE)
    tried = starved(monkeypatch, 1)
    with pytest.raises(torch.OutOfMemoryError):
        engine.block(load, 0, 7, subtile=7, batch=7)
    assert tried == [7, 3, 2]


class Branching(nn.Module):
    """Uses its parameters in another way where an input is large."""

    def __init__(self, branch):
        super().__init__()
        self.a, self.b, self.branch = nn.Linear(6, 3), nn.Linear(6, 3), branch

    def forward(self, x):
        return self.branch(self, x) if (x > 9).any() else self.a(x)


BRANCHES = {
    "another call": lambda m, x: m.a(x) + m.a(x * 2),
    "an operation without a rule": lambda m, x: m.a(x) + torch.logaddexp(x[:, :3], m.a.bias),
    "another product": lambda m, x: m.a(x) + x @ m.a.weight.T,
    "another made parameter": lambda m, x: nn.functional.linear(x, m.b.weight, m.a.bias),
    "a parameter unused before": lambda m, x: m.a(x) + x @ m.b.weight.T,
    "more rows": lambda m, x: m.a(torch.cat([x, x]))[: len(x)],
}


@pytest.mark.parametrize("name", BRANCHES)
def test_operations_that_depend_on_the_data_are_refused(name):
    engine = engine_of(Branching(BRANCHES[name]), X, EYE)
    engine.piece(X)
    with pytest.raises(ModelError, match="jacobian='fallback'"):
        engine.piece(X + 10)


def test_recorded_choices_are_reused():
    engine = engine_of(mlp(), X, EYE)
    names = tuple(name for name, _ in mlp().named_parameters())
    for held in forced(engine).values():
        recorded = held.representations
        assert {name for term in recorded for name in term.split(" + ")} == set(names)
        for again in (engine.reusing(recorded), held.copy(), held.changed(method="loop")):
            assert again.representations == recorded
        assert held.with_covectors(EYE[:1], "sum").representations == recorded
    moved = engine.reusing(dict.fromkeys(names, "torch.func:loop"))
    assert (moved.fallback, moved.method, moved.terms) == (names, "loop", ())


def test_parameters_that_move_to_the_fallback_leave_the_others_as_they_are():
    model = mlp()
    for held in forced(engine_of(model, X, EYE)).values():
        moved = held.changed(tracing=held.tracing.without({"0.bias": "as a test"}))
        assert moved.fallback == ("0.bias",)
        ways = {n: label for term, label in held.representations.items() for n in term.split(" + ")}
        again = {n: label for term, label in moved.representations.items() for n in term.split(" + ")}
        assert again == {**ways, "0.bias": "torch.func:vmap"}
        assert reference.error(engine_kernel(moved, X), reference.kernel(model, X)) <= 1e-12


def transformer():
    return from_transformers("GPT2LMHeadModel", vocab_size=20, n_positions=9, n_embd=8, n_layer=1, n_head=2)


# Model, inputs and forward hook.
HELD = {
    "MLP": lambda: (nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 3)), X, None),
    "CNN": lambda: (
        nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 40, 3), nn.Flatten(), nn.Linear(640, 3)),
        IMAGES,
        None,
    ),
    "depthwise CNN": lambda: (
        nn.Sequential(nn.Conv2d(2, 32, 1), nn.Conv2d(32, 64, 3, groups=32), nn.Flatten(), nn.Linear(2304, 3)),
        IMAGES,
        None,
    ),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(500, 16), nn.Linear(16, 16), nn.Flatten(), nn.Linear(64, 3)),
        IDS,
        None,
    ),
    "small table": lambda: (nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(64, 3)), IDS, None),
    "transformer": lambda: (transformer(), CAUSAL, last_logits),
    "normalised weights": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 30)), nn.Tanh(), nn.Linear(30, 3)),
        X,
        None,
    ),
    "without rules": lambda: (
        nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.LSTM(6, 5, batch_first=True), Custom(lambda m, x: x[0][:, 0]), nn.Linear(5, 3)
        ),
        X,
        None,
    ),
}


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model:UserWarning")
@pytest.mark.parametrize("kind", ["ntk", "pntk"])
@pytest.mark.parametrize("name", HELD)
def test_blocks_take_the_memory_that_is_planned_for(name, kind):
    model, inputs, forward = HELD[name]()
    size = reference.size_of(inputs)
    covectors = EYE if kind == "ntk" else torch.full((1, 3), 3**-0.5, dtype=torch.float64)
    for engine in forced(engine_of(redraw(model), inputs, covectors, forward=forward)).values():
        block, _ = engine.block(lambda a, b: take(inputs, range(a, b)), 0, size, subtile=4, batch=3)
        assert block.num_bytes() == pytest.approx(engine.block_bytes() * size, rel=0.2)


def test_cost_counts_operations_and_bytes():
    wide = redraw(nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 3)))
    engine = engine_of(wide, X, EYE)
    cost = engine.cost(X)
    piece, outputs = engine.piece(X)
    assert cost.block_bytes == engine.block_bytes() == pytest.approx((piece.num_bytes() + outputs.nbytes) / 7, rel=0.2)
    assert cost.workspace_bytes >= cost.block_bytes
    # Forward 2 * (6*200 + 200*3), and one pull-back through the second layer a covector.
    assert cost.jacobian_flops >= 2 * (6 * 200 + 200 * 3) + 3 * 2 * 200 * 3


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("pairs", ["all", "same", "sum"])
def test_costs_of_many_covectors_are_measured_by_a_few(pairs, structured, monkeypatch):
    model = redraw(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 40)))
    engine = engine_of(model, X, torch.eye(40, dtype=torch.float64), structured=structured).with_covectors(
        torch.eye(40, dtype=torch.float64), pairs
    )
    whole = engine.cost(X)
    monkeypatch.setattr("ntkpipe.jacobian.engine._METERED", 8)
    # Which tensor is the largest may change with the number of covectors, and only speed depends on it.
    assert replace(engine.cost(X), largest_bytes=whole.largest_bytes) == whole


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run")
def test_outputs_beyond_the_measured_covectors_must_be_finite(monkeypatch):
    monkeypatch.setattr("ntkpipe.jacobian.engine._METERED", 4)
    model = reference.Custom(lambda m, x: torch.cat([m.a(x), (m.a(x)[:, :1] * 0).sqrt()], dim=1), a=nn.Linear(6, 9))
    engine = engine_of(model, X, torch.eye(10, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        engine.cost(X)


def test_the_fallback_costs_its_width():
    engine = engine_of(mlp(), X, EYE, structured=False)
    cost = engine.cost(X)
    width = sum(value.numel() for value in mlp().parameters())
    assert cost.pair_flops == 2 * 3 * 3 * width
    assert engine.with_covectors(EYE, "sum").cost(X).pair_flops == 2 * 3 * width
    assert cost.block_bytes == 8 * (3 * width + 3)


def test_cost_of_parametrised_modules_can_be_measured():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))
    assert engine_of(redraw(model), X, EYE).cost(X).jacobian_flops > 0


@pytest.mark.parametrize("method", ["structured", "loop"])
def test_autograd_never_sees_a_batch_of_one(method):
    """Where torch 2.13 has wrong gradients: batch and instance norm on the CPU, layouts mismatched."""
    engine, seen = engine_of(redraw(nn.Linear(6, 3)), X, EYE), []
    if method == "loop":
        engine = engine.reusing(dict.fromkeys(("weight", "bias"), "torch.func:loop"))
    engine.model.module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    piece, outputs = engine.piece(X[:1])
    assert (piece.num_samples, len(outputs)) == (1, 1)
    assert piece.is_finite().shape == (1,)
    engine.block(load, 0, 7, subtile=4, batch=1)
    engine.block(load, 0, 7, subtile=3, batch=2)
    assert seen
    assert min(seen) == 2
