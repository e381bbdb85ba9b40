"""Both methods of the fallback give the per-sample Jacobians of the reference."""

import pytest
import reference
import torch
from reference import redraw
from torch import nn

from ntkpipe.jacobian.fallback import METHODS, batch_size, by_loop, by_vjp, by_vmap, take
from ntkpipe.jacobian.model.functional import prepare_model

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
    "convnet": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2).eval(), nn.Flatten(), nn.Linear(8, 3)
    ),
    "sparse gradients": lambda: nn.Sequential(Long(), nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3)),
}


class Long(nn.Module):
    def forward(self, x):
        return (x.abs() * 3).long().clamp(max=8)


def functional(model):
    return prepare_model(model, dtype=torch.float64, device=torch.device("cpu"))


WAYS = {**METHODS, "vjp": by_vjp}


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_jacobians_are_those_of_the_reference(name, method):
    if name == "sparse gradients" and method != "loop":
        pytest.skip("torch.func has no sparse gradients; the engine takes the loop then")
    model = redraw(MODELS[name]())
    names = tuple(dict(model.named_parameters()))[::-1]  # side by side in the order asked for
    found = WAYS[method](functional(model), names, X, EYE)
    exact = reference.jacobians(model, X)
    wanted = torch.cat([torch.from_numpy(exact[name]).view(4, 3, -1) for name in names], dim=2)
    assert torch.allclose(found, wanted.transpose(0, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("covectors", [EYE[:1], EYE])
def test_vmap_repeats_what_does_not_depend_on_the_sample(covectors):
    model = functional(redraw(MODELS["mlp"]()))
    found = by_vmap(model, ("2.bias",), X, covectors)
    assert torch.equal(found, covectors[:, None].expand(-1, 4, -1))


def test_loop_takes_parameters_without_a_gradient_as_zero():
    model = functional(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3)))
    assert not by_loop(model, ("0.weight",), X, torch.zeros(1, 3, dtype=torch.float64)).any()


def test_samples_are_taken_from_tensors_and_dicts():
    assert torch.equal(take(X, (2, 2)), X[[2, 2]])
    assert torch.equal(take({"a": X}, (3, 0))["a"], X[[3, 0]])
    assert batch_size({"a": X, "b": X}) == batch_size(X) == 4
