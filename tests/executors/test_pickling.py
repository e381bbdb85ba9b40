"""What a worker gets is the model: the same outputs to the last bit, and the same parameters to differentiate."""

import pickle

import pytest
import torch
from small import inputs
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from ntkpipe.executors.pickling import dumps
from ntkpipe.jacobian.model.functional import prepare_model


class Shifted(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value + 0.5


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def several() -> nn.Module:
    layer = parametrizations.weight_norm(linear())
    parametrize.register_parametrization(layer, "bias", Shifted())
    return nn.Sequential(layer, nn.Tanh(), parametrizations.orthogonal(nn.Linear(3, 3)))


def tied() -> nn.Module:
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    last.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), last)


MODELS = {
    "plain": linear,
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()),
    "several": several,
    "old weight norm": lambda: weight_norm(linear()),
    "tied": tied,
    "lstm": lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 2)), nn.LSTM(2, 3, batch_first=True)),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_as_it_was(name):
    pick = (lambda output: output[0][:, -1]) if name == "lstm" else None
    options = {"dtype": torch.float64, "device": torch.device("cpu"), "forward": pick}
    model = prepare_model(MODELS[name]().eval(), **options)
    again = pickle.loads(dumps(model)).copy()
    batch = torch.from_numpy(inputs(6)).double()
    left, right = model(batch), again(batch)
    assert torch.equal(left, right)
    assert again.names == model.names
    for one, other in zip(
        torch.autograd.grad(left.sum(), list(model.parameters.values()), allow_unused=True),
        torch.autograd.grad(right.sum(), list(again.parameters.values()), allow_unused=True),
        strict=True,
    ):
        assert torch.equal(one, other)
