"""Workflow files from text to steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import ntkpipe
from ntkpipe.app import workflow
from ntkpipe.base.errors import ConfigError, ModelError

FACTORIES = """
import numpy as np
import torch

def net(width=8, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3)).eval()

def data(samples=20):
    rng = np.random.default_rng(0)
    draw = lambda n: (rng.standard_normal((n, 4)).astype("float32"), rng.integers(0, 3, n))
    (x, y), (u, v) = draw(samples), draw(7)
    return {"inputs": x, "targets": y, "test_inputs": u, "test_targets": v}

def no_inputs():
    return {"x": 1}

def raises():
    raise FileNotFoundError("digits.csv")

class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        return {"logits": self.net(x)}

def pick(output):
    return output["logits"]
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a workflow file beside its factories, with some keys replaced, and return its path."""
    (tmp_path / "study_factories.py").write_text(FACTORIES)

    def write(**changes: Mapping[str, Any]) -> Path:
        raw = {
            "store": str(tmp_path / "k.zarr"),
            "model": {"factory": "study_factories:net"},
            "data": {"factory": "study_factories:data"},
            **changes,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def run(path: Path, *overrides: str) -> list[workflow.StepResult]:
    return list(workflow.run(workflow.load(path, overrides), progress=False))


def test_run_computes_the_kernel_and_does_its_steps_in_order(write: Any, tmp_path: Path) -> None:
    path = write(kernel={"kind": "ntk", "tile": 6}, steps=[{"step": "verify"}, {"step": "summary"}])
    results = run(path)
    assert [result.step for result in results] == ["kernel", "verify", "summary"]
    assert all(result.is_good for result in results)
    store = ntkpipe.open_kernel(tmp_path / "k.zarr")
    assert store.train.shape == (60, 60)
    assert store.store.read_result("certificate") is not None
    assert store.store.read_result("summary") is not None


def test_arguments_and_overrides_reach_the_factories(write: Any, tmp_path: Path) -> None:
    run(write(model={"factory": "study_factories:net", "arguments": {"width": 5}}), "data.arguments.samples=9")
    manifest = ntkpipe.open_kernel(tmp_path / "k.zarr").manifest
    assert manifest.train.num_samples == 9
    assert manifest.model.num_parameters == 4 * 5 + 5 + 5 * 3 + 3


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_checkpoint_is_loaded_relative_to_the_file(write: Any, tmp_path: Path, suffix: str) -> None:
    trained = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    if suffix == ".pt":
        torch.save(trained.state_dict(), tmp_path / "net.pt")
    else:
        safetensors.torch.save_file(trained.state_dict(), tmp_path / "net.safetensors")
    loaded = workflow.load(write(model={"factory": "study_factories:net", "checkpoint": f"net{suffix}"}))
    torch.testing.assert_close(loaded.model.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_checkpoint_that_does_not_fit_lists_what_differs(write: Any, tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 7)).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"(?s)missing 2\.weight.*0\.weight is \(7, 4\), the model needs \(8, 4\)"):
        workflow.load(write(model={"factory": "study_factories:net", "checkpoint": "net.pt"}))


def test_pickled_objects_are_not_loaded(write: Any, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(4, 3), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="cannot read the checkpoint"):
        workflow.load(write(model={"factory": "study_factories:net", "checkpoint": "net.pt"}))


def test_forward_hook_by_import_string(write: Any, tmp_path: Path) -> None:
    wrapped = write(model={"factory": "study_factories:Wrapped", "forward": "study_factories:pick"})
    run(wrapped)
    hooked = ntkpipe.open_kernel(tmp_path / "k.zarr").train.to_numpy()
    run(write(store=str(tmp_path / "plain.zarr")))
    np.testing.assert_array_equal(hooked, ntkpipe.open_kernel(tmp_path / "plain.zarr").train.to_numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [{"step": "sumary"}]}, "has no step 'sumary'; the nearest is 'summary'"),
        ({"steps": [{"step": "summary", "options": {"rigde": 1}}]}, "no option 'rigde'; the nearest is 'ridge'"),
        ({"data": {"factory": "study_factories:no_inputs"}}, "returned the keys 'x'; needed a mapping with 'inputs'"),
        ({"data": {"factory": "study_factories:raises"}}, "raised FileNotFoundError: digits.csv"),
        ({"data": {"factory": "study_factories:dat"}}, "did you mean 'data'"),
        ({"data": {"factory": "nowhere:data"}}, "cannot import 'nowhere'"),
        ({"model": {"factory": "study_factories:data"}}, "returned dict; needed a torch.nn.Module"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    write: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(write(**changes))
    assert not (tmp_path / "k.zarr").exists()


def test_plan_writes_nothing(write: Any, tmp_path: Path) -> None:
    planned, jacobians = workflow.plan(workflow.load(write(kernel={"tile": 6})))
    assert planned.workload.num_tiles == 10 + 2 * 4
    assert [name for each in jacobians for name in each.parameters] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert {each.rule for each in jacobians} == {"linear"}
    assert not (tmp_path / "k.zarr").exists()
