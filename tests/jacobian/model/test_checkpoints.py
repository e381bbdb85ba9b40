"""Checkpoints restore a state, are never executed, and say what does not fit."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from ntkpipe.base.errors import ModelError
from ntkpipe.jacobian.model.checkpoints import load_checkpoint


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_checkpoint_restores_the_state(model, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    state = {name: value + 1 for name, value in model.state_dict().items()}
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    load_checkpoint(model, path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def of_part(model):
    return nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:])


@pytest.mark.parametrize(
    "wrap",
    [lambda m: torch.compile(m, backend="eager"), of_part, nn.DataParallel, lambda m: nn.DataParallel(of_part(m))],
)
def test_names_of_compiled_and_parallel_models_are_those_of_what_they_wrap(model, tmp_path, wrap):
    other = copy.deepcopy(model)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({name: value + 1 for name, value in wrap(other).state_dict().items()}, tmp_path / "a.pt")
    load_checkpoint(model, tmp_path / "a.pt")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.save(state, tmp_path / "b.pt")
    load_checkpoint(wrap(other), tmp_path / "b.pt")
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    torch.save({**state, "module.0.bias": torch.ones(3)}, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"unexpected module\.0\.bias$"):
        load_checkpoint(model, tmp_path / "c.pt")


class _Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint was executed')",))


def test_a_checkpoint_is_never_executed(model, tmp_path):
    torch.save({"0.weight": _Payload()}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="cannot read the checkpoint"):
        load_checkpoint(model, tmp_path / "a.pt")


def test_a_checkpoint_that_does_not_fit_lists_every_key(model, tmp_path):
    state = {**model.state_dict(), "extra": torch.ones(1), "2.bias": torch.ones(3)}
    del state["0.bias"]
    torch.save(state, tmp_path / "a.pt")
    before = copy.deepcopy(model.state_dict())
    message = r"missing 0\.bias; unexpected extra; 2\.bias is \(3,\), the model needs \(2,\)"
    with pytest.raises(ModelError, match=message):
        load_checkpoint(model, tmp_path / "a.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"", r"needed a \.safetensors, \.pt or \.pth file"),
        ("a.pt", b"junk", "cannot read the checkpoint"),
        ("a.safetensors", b"junk", "cannot read the checkpoint"),
        ("none.pt", None, "cannot read the checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(model, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(model, tmp_path / name)


def test_a_checkpoint_with_more_than_tensors_is_refused(model, tmp_path):
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="holds state_dict, epoch; needed a state dict"):
        load_checkpoint(model, tmp_path / "a.pt")
