"""The engine: terms, pieces, batches of any size, what memory and operations cost."""

import pytest
import reference
import torch
from reference import redraw
from torch import nn

from ntkpipe.errors import ModelError
from ntkpipe.jacobian.block import Engine
from ntkpipe.jacobian.factors import Workspace, contract
from ntkpipe.jacobian.probe import make_engine
from ntkpipe.models import prepare_model

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def mlp():
    return redraw(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)))


def engine_of(model, *, structured=True, inputs=X, covectors=EYE):
    functional = prepare_model(model, dtype=torch.float64, device=torch.device("cpu"))
    return make_engine(
        functional, lambda n: inputs[list(n)], len(inputs), covectors, torch.float64, structured=structured
    )


def load(start, stop):
    return X[start:stop]


def kernel_of(block):
    """The kernel of a block's samples, from its pieces, sample-major."""
    rows = []
    for left in block.pieces:
        row = [
            contract(left, right, Workspace()).view(3, left.num_samples, 3, right.num_samples).permute(1, 0, 3, 2)
            for right in block.pieces
        ]
        rows.append(torch.cat([part.reshape(left.num_samples * 3, -1) for part in row], dim=1))
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("subtile", "batch"), [(7, 7), (3, 2), (4, 3), (1, 1), (2, 8)])
def test_blocks_give_the_same_kernel_however_they_are_cut(subtile, batch, structured):
    model = mlp()
    block, used = engine_of(model, structured=structured).block(load, 0, 7, subtile=subtile, batch=batch)
    assert used == batch
    assert [piece.num_samples for piece in block.pieces] == [min(subtile, 7 - i) for i in range(0, 7, subtile)]
    assert reference.error(kernel_of(block), reference.kernel(model, X)) <= 1e-12
    assert torch.allclose(block.outputs, model.double()(X), rtol=1e-12)
    assert block.num_bytes() == sum(piece.num_bytes() for piece in block.pieces) + block.outputs.nbytes


def test_weight_and_bias_of_the_same_uses_are_one_term():
    terms = engine_of(mlp()).terms
    assert [(term.weight, term.bias) for term in terms] == [("0.weight", "0.bias"), ("3.weight", "3.bias")]
    wide = redraw(nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 300), nn.Linear(300, 3)))
    assert engine_of(wide).representations["2.weight + 2.bias"] == "linear:factors"


def test_memory_that_runs_out_halves_the_batch(monkeypatch):
    original, tried = Engine.piece, []

    def piece(self, batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("as a test")
        return original(self, batch)

    model = mlp()
    engine = engine_of(model)
    monkeypatch.setattr(Engine, "piece", piece)
    block, used = engine.block(load, 0, 7, subtile=7, batch=7)
    assert tried[:2] == [7, 3]  # 3 is too much, too
    assert used == 1
    assert reference.error(kernel_of(block), reference.kernel(model, X)) <= 1e-12


def test_memory_that_runs_out_for_two_samples_is_an_error(monkeypatch):
    def piece(self, batch):
        raise torch.OutOfMemoryError("as a test")

    engine = engine_of(mlp())
    monkeypatch.setattr(Engine, "piece", piece)
    with pytest.raises(torch.OutOfMemoryError):
        engine.block(load, 0, 7, subtile=7, batch=7)


class Branching(nn.Module):
    """Uses its parameters in another way where an input is large."""

    def __init__(self, branch):
        super().__init__()
        self.a, self.b, self.branch = nn.Linear(6, 3), nn.Linear(6, 3), branch

    def forward(self, x):
        return self.branch(self, x) if (x > 9).any() else self.a(x)


BRANCHES = {
    "another call": lambda m, x: m.a(x) + m.a(x * 2),
    "an operation without a rule": lambda m, x: m.a(x) + x @ m.a.weight.T,
    "a parameter unused before": lambda m, x: m.a(x) + x @ m.b.weight.T,
    "more rows": lambda m, x: m.a(torch.cat([x, x]))[: len(x)],
}


@pytest.mark.parametrize("name", BRANCHES)
def test_operations_that_depend_on_the_data_are_refused(name):
    engine = engine_of(Branching(BRANCHES[name]))
    engine.piece(X)
    with pytest.raises(ModelError, match="jacobian='fallback'"):
        engine.piece(X + 10)


def test_recorded_choices_are_reused():
    engine = engine_of(mlp())
    recorded = {**engine.representations, "0.weight + 0.bias": "linear:factors"}
    again = engine.reusing(recorded)
    assert again.representations == recorded
    assert again.copy().representations == recorded
    moved = engine.reusing(dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), "torch.func:loop"))
    assert moved.fallback == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert moved.method == "loop"


def test_cost_counts_operations_and_bytes():
    wide = redraw(nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 3)))
    engine = engine_of(wide)
    cost = engine.cost(X)
    piece, outputs = engine.piece(X)
    assert cost.block_bytes == (piece.num_bytes() + outputs.nbytes) // 7
    assert cost.workspace_bytes >= cost.block_bytes
    # Forward 2 * (6*200 + 200*3), and one pull-back through the second layer a covector.
    assert cost.jacobian_flops >= 2 * (6 * 200 + 200 * 3) + 3 * 2 * 200 * 3


@pytest.mark.filterwarnings("ignore")  # vmap warns of an operation that it runs in a loop
def test_cost_of_parametrised_modules_can_be_measured():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))
    assert engine_of(redraw(model)).cost(X).jacobian_flops > 0


@pytest.mark.parametrize("method", ["structured", "loop"])
def test_autograd_never_sees_a_batch_of_one(method):
    """Where torch 2.13 has wrong gradients: batch and instance norm on the CPU, layouts mismatched."""
    engine, seen = engine_of(redraw(nn.Linear(6, 3))), []
    if method == "loop":
        engine = engine.reusing(dict.fromkeys(("weight", "bias"), "torch.func:loop"))
    engine.model.module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    piece, outputs = engine.piece(X[:1])
    assert (piece.num_samples, piece.dense.shape[1], len(outputs)) == (1, 1, 1)
    assert seen
    assert min(seen) == 2
