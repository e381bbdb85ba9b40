"""The engine on a device that is not there: shapes and devices are followed, numbers are not.

Run by test_device.py in a process of its own. A tensor of the host that meets one of the device, and a host that waits
for a number of the device, are errors here.
"""

import copy
from dataclasses import replace

import engines
import torch
from reference import redraw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.functional import FunctionalModel
from ntkpipe.jacobian.representations import dense
from ntkpipe.jacobian.representations.pieces import contract_diagonal_planes, contract_planes
from ntkpipe.jacobian.representations.sums import Workspace
from ntkpipe.jacobian.tracing.uses import looked_up

backend_registration._setup_privateuseone_for_python_backend("fakegpu")
GPU = torch.device("fakegpu:0")


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)
        self.encode = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encode(self.embed(x)).mean(1))


def models():
    generator = torch.Generator().manual_seed(0)
    norm = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    image = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2)]
    return {
        "mlp": (norm, torch.randn(7, 6, generator=generator)),
        "cnn": (nn.Sequential(*image, nn.Flatten(), nn.Linear(128, 3)), torch.randn(7, 64, generator=generator)),
        "tokens": (Tokens(), torch.randint(0, 50, (7, 5), generator=generator)),
    }


def moved(engine, module):
    """An engine on the device, with a copy of its module; to be called under a FakeTensorMode."""
    for child in module.modules():
        for name, value in child._parameters.items():
            if value is not None:
                there = torch.empty(tuple(value.shape), dtype=value.dtype, device=GPU)
                child._parameters[name] = nn.Parameter(there, requires_grad=value.requires_grad)
        for name, value in child._buffers.items():
            child._buffers[name] = torch.empty(tuple(value.shape), dtype=value.dtype, device=GPU)
    model = FunctionalModel(module, engine.model.names, engine.model.dtype, GPU)
    covectors = torch.empty(tuple(engine.setup.covectors.shape), dtype=torch.float64)
    setup = replace(engine.setup, covectors=covectors)
    return Engine(model, engine.tracing, engine.method, setup, engine.representations)


def is_viewable(values, *shape):
    try:
        values.view(shape)
    except (RuntimeError, ValueError):  # as fake tensors say it
        return False
    return True


def run(engine, size, inputs):
    """Compute a block of some samples and contract it; what was not looked into, as its numbers decide shapes."""
    skipped, module = set(), copy.deepcopy(engine.model.module)
    with FakeTensorMode():
        there = moved(engine, module)
        x = torch.zeros(tuple(inputs.shape), dtype=torch.float64 if inputs.is_floating_point() else torch.int64)
        x = x.to(GPU)
        block, _ = there.block(lambda start, stop: x[start:stop], 0, size, subtile=4, batch=3)
        count = len(there.covectors)
        assert block.outputs.device == GPU
        for left in block.pieces:
            assert left.has_finite_sums().device == GPU
            assert left.is_finite().device == GPU
            assert contract_diagonal_planes(left, "all", 1)[0].device == GPU
            for right in (*block.pieces, replace(left)) if len(block.pieces) == 1 else block.pieces:
                for number, (one, other) in enumerate(zip(left.factors, right.factors, strict=True)):
                    if getattr(one, "is_constant", False) or type(one).__name__ == "LookupTable":
                        skipped.add(number)
                        continue
                    # A piece of this factor alone, the same one on both sides where it is.
                    a = replace(left, factors=(one,))
                    b = a if left is right else replace(right, factors=(other,))
                    shape = a.num_samples * count, b.num_samples * count
                    out = torch.empty(shape, dtype=torch.float32, device=GPU)
                    contract_planes(a, b, Workspace(), "all", [out])
    return skipped


def main():
    with FakeTensorMode():
        indices, rows = torch.zeros(7, 5, dtype=torch.int64, device=GPU), torch.zeros(7, 5, 3, device=GPU)
        assert looked_up(indices, rows, (4, 3)).shape == (7, 4, 3)
    dense._is_viewable = is_viewable
    looked_into = 0
    for model, inputs in models().values():
        redraw(model)
        for covectors in (torch.eye(3, dtype=torch.float64), torch.full((1, 3), 3**-0.5, dtype=torch.float64)):
            for way, engine in engines.forced(engines.engine_of(model, inputs, covectors)).items():
                # Pieces of unlike sizes are contracted alike, however they are held.
                assert len(run(engine, 7 if way == "chosen" else 4, inputs)) <= 2
                looked_into += 1
    print(f"{looked_into} engines")


if __name__ == "__main__":
    main()
