"""What a model returns is picked by keys, numbers and attributes; what does not fit is an error with the way out."""

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ntkpipe import kernel_matrix
from ntkpipe.base.errors import ConfigError, ModelError

Pair = namedtuple("Pair", ["logits", "hidden"])


@dataclasses.dataclass
class Output:
    """As libraries return it."""

    logits: Tensor
    hidden: Any


class Net(nn.Module):
    """Runs a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear, self.table, self.norm = nn.Linear(4, 3), nn.Embedding(10, 4), nn.LayerNorm(4)
        self.conv, self.gru = nn.Conv2d(3, 2, 1), nn.GRU(4, 3, batch_first=True)

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.function(self, *args, **named)


INPUTS = np.random.default_rng(0).standard_normal((6, 4))


def kernel(function: Callable[..., Any], inputs: Any = INPUTS, **options: Any) -> np.ndarray:
    options = {"compute_dtype": "float64", "kind": "ntk", "progress": False, **options}
    return kernel_matrix(Net(function).eval(), inputs, **options)


def expected() -> np.ndarray:
    """Of the linear layer alone, from its formula: x·x' + 1 where the outputs agree, else zero."""
    return np.kron(INPUTS @ INPUTS.T + 1, np.eye(3))


@pytest.mark.parametrize(
    ("returned", "forward"),
    [
        (lambda y, x: {"logits": y, "hidden": x}, ".logits"),
        (lambda y, x: {"logits": y}, "logits"),
        (lambda y, x: {"out": {"values": y, "items": x}}, ".out.values"),
        (lambda y, x: {"out": [x, (x, y)]}, ".out.1.1"),
        (lambda y, x: {0: y, 1: x}, ".0"),
        (lambda y, x: {"head.weight": y}, ".head.weight"),
        (lambda y, x: (y, x), ".0"),
        (lambda y, x: [x, y], ".1"),
        (lambda y, x: Pair(y, x), ".logits"),
        (lambda y, x: Pair(x, y), ".1"),
        (lambda y, x: Output(y, (x, x)), ".logits"),
        (lambda y, x: Output(x, {"a": y}), ".hidden.a"),
        (lambda y, x: OrderedDict(logits=y), ".logits"),
        (lambda y, x: y.T, ".T"),
    ],
)
def test_a_part_of_any_output_is_picked(returned, forward):
    found = kernel(lambda net, x: returned(net.linear(x), x), forward=forward)
    np.testing.assert_allclose(found, expected(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("returned", "forward", "error", "words"),
    [
        (lambda y: {"logits": y}, ".logit", ModelError, "returned dict, without 'logit'; did you mean 'logits'"),
        (lambda y: {"logits": y}, ".values", ModelError, "without 'values'; it has logits"),
        (lambda y: (y, y), ".5", ModelError, "returned tuple, without '5'; it has 0, 1"),
        (lambda y: Output(y, y), ".out", ModelError, "returned Output, without 'out'; did you mean 'logits'"),
        (lambda y: y, ".sum", ModelError, "returned Tensor, without 'sum'"),
        (lambda y: y, "", ConfigError, r"needed '\.name'"),
        (lambda y: y, "..", ConfigError, r"needed '\.name'"),
        (lambda y: {"a": y}, None, ModelError, r"returned dict with \.a \(5, 3\).*forward='\.a'"),
        (lambda y: (y[:, 0], y), None, ModelError, r"returned tuple with .*forward='\.1'"),
        (lambda y: Output(y.sum(), {"b": y}), None, ModelError, r"forward='\.hidden\.b'"),
        (lambda y: None, None, ModelError, "returned NoneType; .* Pick it with a function of the model's output"),
        (lambda y: y[:, 0], None, ModelError, r"give forward=lambda output: output\[:, None\]$"),
        (lambda y: y[:, :, None].expand(-1, -1, 2), None, ModelError, r"lambda output: output.flatten\(1\)$"),
        (lambda y: y.T, None, ModelError, r"give forward=lambda output: output.T$"),
        (lambda y: y.sum(), None, ModelError, r"shape \(\).*A single number"),
        (lambda y: y > 0, None, ModelError, "dtype torch.bool; .*before argmax"),
        (lambda y: y, lambda: 1, ConfigError, r"forward takes \(\); needed '\.attribute'"),
        (lambda y: y, lambda a, b, c: a, ConfigError, r"forward takes \(a, b, c\); needed"),
        (lambda y: y, lambda a, *, b: a, ConfigError, r"forward takes \(a, \*, b\); needed"),
        (lambda y: y.to_sparse(), None, ModelError, r"layout torch.sparse_coo; .*lambda output: output.to_dense\(\)$"),
        (lambda y: torch.complex(y, y), None, ModelError, r"torch.view_as_real\(output\).flatten\(1\)$"),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit_say_what_to_pass(returned, forward, error, words):
    with pytest.raises(error, match=words):
        kernel(lambda net, x: returned(net.linear(x)), forward=forward)


def test_what_an_error_advises_works():
    for returned, hook in (
        (lambda y: y[:, 0], lambda output: output[:, None]),
        (lambda y: y[:, :, None].expand(-1, -1, 2), lambda output: output.flatten(1)),
        (lambda y: y.T, lambda output: output.T),
        (lambda y: y.to_sparse(), lambda output: output.to_dense()),
        (lambda y: torch.complex(y, y), lambda output: torch.view_as_real(output).flatten(1)),
    ):
        found = kernel(lambda net, x, returned=returned: returned(net.linear(x)), forward=hook, kind="trace")
        assert np.isfinite(found).all()


_COMPUTE = r"take the compute dtype, float64: where .*x\.new_zeros\(n\); or, .*compute_dtype='float32'$"
_REAL = r"give real inputs, as inputs\.astype\(numpy\.float32\)$"
_MADE = r"makes or keeps integers .*: cast them to the dtype of weights, or of x$"
_DENSE = r"keep it as \.to_sparse_csr\(\), or dense as \.to_dense\(\)$"
_INTEGER = r"give what is looked up as integers, as inputs\.astype\(numpy\.int64\)$"
_NUMBERS = np.arange(24).reshape(6, 4) % 10


@pytest.mark.parametrize(
    ("function", "inputs", "words"),
    [
        (lambda net, x: net.linear(x.float()), INPUTS, _COMPUTE),
        (lambda net, x: net.linear(x.half()), INPUTS, _COMPUTE),
        (lambda net, x: net.linear(net.norm(x.float())), INPUTS, _COMPUTE),
        (lambda net, x: net.gru(x.float()[:, None])[0].flatten(1), INPUTS, _COMPUTE),
        (lambda net, x: net.conv(x.float()).flatten(1), np.ones((6, 3, 4, 4)), _COMPUTE),
        (lambda net, x: net.linear(x) @ torch.zeros(3, 2), INPUTS, _COMPUTE),
        (lambda net, x: net.linear(x), _NUMBERS, _REAL),
        (lambda net, x: net.linear(x), _NUMBERS > 3, _REAL),
        (lambda net, x: net.linear(x), _NUMBERS.astype(np.uint8), _REAL),
        (lambda net, x: net.linear(one_hot(torch.arange(len(x)) % 4)), INPUTS, _MADE),
        (lambda net, x: net.linear(x) @ torch.ones(3, 2, dtype=torch.int8), INPUTS, _MADE),
        (lambda net, x: torch.ones(2, 4).to_sparse_bsc((1, 1)) @ x.T, INPUTS.astype(np.float32), _DENSE),
        (lambda net, x: net.linear(net.table(x).mean(1)), INPUTS, _INTEGER),
        (lambda net, x: net.linear(net.table(x).mean(1)), _NUMBERS.astype(np.int16), _INTEGER),
        (lambda net, a, b: net.linear(a + b), {"a": INPUTS, "c": INPUTS}, "by their names, here a, c; the model takes"),
        (lambda net, a, b: net.linear(a + b), {"a": INPUTS}, "missing .*'b'. .* by their names, here a;"),
        (lambda net, a, b: net.linear(a + b), INPUTS, "passed as the only argument; .* give a mapping by name$"),
        (lambda net, x: net.linear(x + torch.zeros(4, device="meta")), INPUTS, "keep constants as buffers"),
        (lambda net, x: net.conv(x).flatten(1), np.ones((6, 1, 4, 4)), r"\(5, 1, 4, 4\).* got 1 channels instead$"),
        (lambda net, x: net.linear(x), np.ones((6, 5)), r"cannot be multiplied \(5x5 and 4x3\)$"),
    ],
)
def test_what_a_model_raises_is_told_with_what_helps_and_nothing_else(function, inputs, words):
    with pytest.raises(ModelError, match=r"the model raised \w+ on a batch of 5 \(") as failure:
        kernel(function, inputs)
    assert failure.match(words)
    assert ".." not in str(failure.value).replace("…", "")


def fails(text: str) -> Callable[..., Any]:
    def function(net: Net, x: Tensor) -> Tensor:
        raise ValueError(text)

    return function


@pytest.mark.parametrize(
    ("text", "told"),
    [("too bad.", "too bad"), ("", "ValueError"), ("a\nb.\n", "a\nb"), ("a!\n\nb", "a"), (500 * "a", 400 * "a" + "…")],
)
def test_words_of_an_error_end_without_a_full_stop(text, told):
    with pytest.raises(ModelError) as failure:
        kernel(fails(text))
    assert str(failure.value).endswith(f": {told}")


def test_float32_models_that_cast_are_computed_in_float32():
    found = kernel(lambda net, x: net.linear(x.float()), compute_dtype="float32")
    np.testing.assert_allclose(found, expected(), rtol=1e-5, atol=1e-5)
