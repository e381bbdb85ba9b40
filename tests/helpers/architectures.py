"""Small models of well-known architectures, their inputs and the outputs that are looked at."""

import contextlib
import sys
from unittest import mock

import pytest
import torch
from reference import draw_statistics, redraw

# Seven samples: more than the probes have.
IDS = torch.randint(3, 20, (7, 4), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(7, 2, 8, 8, generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 4, [1, 1, 1, 0], [1] * 4, [1, 0, 0, 0], [1] * 4, [1, 1, 0, 0], [1] * 4])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
CAUSAL = {"input_ids": IDS}
PIXELS = {"pixel_values": IMAGES}

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
}
VISION = {"num_channels": 2, "num_labels": 3}
VIT = {
    **VISION,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
}


def logits(model, batch):
    return model(**batch).logits


def last_logits(model, batch):
    return model(**batch).logits[:, -1, :3]


def all_logits(model, batch):
    return model(**batch).logits[..., 3:5].flatten(1)


def mean_state(model, batch):
    return model(**batch).last_hidden_state.mean(1)[:, :3]


class _Double:
    """What a modelling file sees as torch: everything as it is, but float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def double_inside(model):
    """In float64 these models still compute softmax, norms and rotations in float32; not in here.

    Otherwise the order of float32 sums would show in the seventh digit, whatever engine is right.
    """
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        for file in files:
            if file.__name__.startswith("transformers.") and getattr(file, "torch", None) is torch:
                stack.enter_context(mock.patch.object(file, "torch", _Double()))
        yield


def from_transformers(name, *, part=None, experts=None, **fields):
    """A model of transformers, drawn anew.

    ``part`` picks a submodule, ``experts`` how experts are run: not by default, which is float32 only.
    """
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**fields))
    if experts is not None:
        model.set_experts_implementation(experts)
    model = model if part is None else model.get_submodule(part)
    return redraw(draw_statistics(model))
