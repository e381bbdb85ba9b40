"""Kernels of many models through the public function, against the slow reference, for both kinds."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from architectures import (
    CAUSAL,
    IDS,
    IMAGES,
    MASK,
    PIXELS,
    SMALL,
    TEXT,
    VISION,
    VIT,
    all_logits,
    double_inside,
    from_transformers,
    last_logits,
    logits,
    mean_state,
)
from engines import check_every_parameter, check_model
from quiet import QUIET
from reference import Custom, draw_statistics, error, redraw
from torch import nn
from torch.utils.checkpoint import checkpoint

import ntkpipe
from ntkpipe.jacobian.representations.interface import Rates

# The fallback warns of its loop, torch of what it deprecates and of a tensor that a model asks about.
pytestmark = QUIET

L = nn.Linear
# Seven samples: more than the probes have.
X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def param(*shape):
    return nn.Parameter(torch.zeros(shape))


def mlp():
    return nn.Sequential(L(6, 7), nn.Tanh(), L(7, 3))


def tied():
    model = nn.Sequential(L(6, 6), nn.Tanh(), L(6, 6))
    model[2].weight = model[0].weight
    return model


def in_a_list():
    model = Custom(lambda m, x: torch.tanh(x @ m.kept[0].T) @ m.b.T, a=param(5, 6), b=param(3, 5))
    model.kept = [model.a]
    return model


def frozen():
    model = mlp()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


class Doubled(torch.autograd.Function):
    """A linear whose backward is not what its forward says; autograd is right by definition."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, 2 * grad.T @ x


def gated(m, x):
    with torch.no_grad():
        gate = torch.sigmoid(m.a(x))
    return m.b(gate * torch.tanh(m.a(x)))


def relu_in_place(m, x):
    h = F.relu_(m.a(x))
    return m.b(h)


def residual_in_place(m, x):
    h = m.a(x)
    h += x
    h[:, 0] = 0
    return m.b(h)


def routed(m, x):
    out = x.new_zeros(len(x), 3)
    for sign, expert in zip((True, False), m.experts, strict=True):
        mine = (x[:, 0] > 0) == sign
        out[mine] = torch.tanh(expert(x[mine]))
    return out


def sorted_inside(m, x):
    order = torch.argsort(x[:, 0])
    return torch.tanh(m.a(x[order]))[torch.argsort(order)]


def energy(m, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        total = m.b(torch.tanh(m.a(x))).sum()
        (slope,) = torch.autograd.grad(total, x, create_graph=True)
    return slope


def tokens(x):
    return x.view(-1, 3, 2)


def experts():
    return Custom(routed, experts=nn.ModuleList([L(6, 3), L(6, 3)]))


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=False)
    return Custom(
        lambda m, x: m.e(m.l(tokens(x)).transpose(0, 1)).transpose(0, 1).flatten(1),
        l=L(2, 4),
        e=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
    )


def lstm():
    return Custom(lambda m, x: m.h(m.r(tokens(x))[0][:, -1]), r=nn.LSTM(2, 3, batch_first=True), h=L(3, 2))


def convnet():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, groups=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        L(16, 2),
    )
    model[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    model[1].running_var.copy_(torch.tensor([0.5, 1.5, 2.0]))
    return model


def all_convolutions():
    """A network of every option that convolutions have."""
    return draw_statistics(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect", bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Conv2d(4, 6, 1, bias=False),
            nn.GroupNorm(3, 6),
            nn.SiLU(),
            nn.Conv2d(6, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.InstanceNorm2d(4, affine=True),
            nn.Conv2d(4, 3, 3, stride=2, padding=1, padding_mode="circular"),
            nn.Flatten(2),
            nn.Conv1d(3, 4, 3, stride=2, padding="valid"),
            nn.GELU(),
            nn.Conv1d(4, 4, 3, padding=2, padding_mode="replicate", dilation=2, groups=2, bias=False),
            nn.Unflatten(2, (-1, 1, 1)),
            nn.Conv3d(4, 2, (3, 1, 1), padding="same"),
            nn.AdaptiveAvgPool3d((3, 1, 1)),
            nn.Flatten(),
            L(6, 3),
        )
    )


def normed_weights():
    """Old and new weight norm, of linear and convolution, one of them used twice."""
    norm = nn.utils.parametrizations.weight_norm
    return Custom(
        lambda m, x: m.h(torch.tanh(m.l(torch.tanh(m.l(torch.relu(m.c(torch.relu(m.d(x)))).mean((2, 3))))))),
        d=nn.utils.weight_norm(nn.Conv2d(2, 3, 3)),
        c=norm(nn.Conv2d(3, 5, 3, stride=2)),
        l=norm(L(5, 5)),
        h=L(5, 3),
    )


def beside_modules():
    """Parameters of the root: class token, positions, scale, a matrix on either side."""

    def forward(m, x):
        h = torch.cat([m.token.expand(len(x), -1, -1), m.l(tokens(x))], 1) + m.positions[:, :4]
        h = h + m.gamma * torch.tanh(m.mix @ h @ m.w)
        return h[:, 0] @ m.head.T + m.bias

    return Custom(
        forward,
        l=L(2, 5),
        token=param(1, 1, 5),
        positions=param(1, 9, 5),
        gamma=param(5),
        mix=param(4, 4),
        w=param(5, 5),
        head=param(3, 5),
        bias=param(3),
    )


def partly_frozen():
    """A frozen backbone but for its norms and biases, and a head that learns."""
    model = all_convolutions()
    for module in model:
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            module.weight.requires_grad_(False)
    return model


# Name → (model, inputs).
CASES = {
    "mlp": (mlp, X),
    "one output": (lambda: nn.Sequential(L(6, 4), nn.Tanh(), L(4, 1)), X),
    "frozen": (frozen, X),
    "tied": (tied, X),
    "module used twice": (lambda: Custom(lambda m, x: m.a(torch.tanh(m.a(x))), a=L(6, 6)), X),
    "recurrence by hand": (
        lambda: Custom(lambda m, x: torch.tanh(m.a(torch.cat([torch.tanh(m.a(x)), x[:, :2]], 1)[:, 2:])), a=L(6, 6)),
        X,
    ),
    "relu in place": (lambda: Custom(relu_in_place, a=L(6, 6), b=L(6, 3)), X),
    "residual in place": (lambda: Custom(residual_in_place, a=L(6, 6), b=L(6, 3)), X),
    "transposed": (lambda: Custom(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t()), a=L(6, 4)), X),
    "masked": (lambda: Custom(lambda m, x: F.linear(x, m.a.weight * (m.a.weight > 0), m.a.bias), a=L(6, 4)), X),
    "outside modules": (lambda: Custom(lambda m, x: torch.einsum("bi,oij,bj->bo", x, m.w, x), w=param(3, 6, 6)), X),
    "bilinear": (lambda: nn.Sequential(Custom(lambda m, x: m.b(x[:, :3], x[:, 3:]), b=nn.Bilinear(3, 3, 4))), X),
    "weight as bias": (
        lambda: Custom(
            lambda m, x: F.linear(F.linear(x, m.w, m.v), m.w) + F.linear(m.v.expand(len(x), 6), m.w),
            w=param(6, 6),
            v=param(6),
        ),
        X,
    ),
    "weight through a linear": (
        lambda: Custom(lambda m, x: F.linear(x, F.linear(m.a, m.b.weight)), a=param(4, 3), b=L(3, 6)),
        X,
    ),
    "detached weight": (lambda: Custom(lambda m, x: F.linear(x, m.w.detach(), m.b), w=param(3, 6), b=param(3)), X),
    "used under no_grad too": (lambda: Custom(gated, a=L(6, 6), b=L(6, 3)), X),
    "custom backward": (
        lambda: Custom(lambda m, x: Doubled.apply(torch.tanh(m.a(x)), m.b.weight), a=L(6, 5), b=L(5, 3)),
        X,
    ),
    "checkpoint": (
        lambda: Custom(
            lambda m, x: m.b(checkpoint(lambda v: torch.tanh(m.a(v)), x, use_reentrant=False)), a=L(6, 5), b=L(5, 3)
        ),
        X,
    ),
    "experts": (experts, X),
    "sorted inside": (lambda: Custom(sorted_inside, a=L(6, 3)), X),
    "differentiates itself": (lambda: Custom(energy, a=L(6, 5), b=L(5, 1)), X),
    "parameter in a list": (in_a_list, X),
    "class token": (lambda: Custom(lambda m, x: m.h(torch.tanh(m.l(tokens(x)))[:, 0]), l=L(2, 4), h=L(4, 2)), X),
    "class token, time first": (
        lambda: Custom(lambda m, x: m.h(torch.tanh(m.l(tokens(x).transpose(0, 1)))[0]), l=L(2, 4), h=L(4, 2)),
        X,
    ),
    "projected positions": (
        lambda: Custom(
            lambda m, x: torch.tanh(m.l(tokens(x)) + m.p(m.e)).flatten(1), l=L(2, 4), p=L(3, 4), e=param(3, 3)
        ),
        X,
    ),
    "fifteen shared rows": (  # as many as divide by both probe batches
        lambda: Custom(lambda m, x: m.l(x) * m.p(m.e).sum(0), l=L(6, 4), p=L(3, 4), e=param(15, 3)),
        X,
    ),
    "constant input": (lambda: Custom(lambda m, x: x[:, :3] * m.a(torch.ones_like(x)), a=L(6, 3)), X),
    "weight_norm, old": (lambda: nn.Sequential(nn.utils.weight_norm(L(6, 5)), nn.Tanh(), L(5, 2)), X),
    "weight_norm, new": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(L(6, 5)), nn.Tanh(), L(5, 2)),
        X,
    ),
    "spectral_norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(L(6, 5)), nn.Tanh(), L(5, 2)), X),
    "pruned": (
        lambda: nn.Sequential(torch.nn.utils.prune.l1_unstructured(L(6, 5), "weight", 0.4), nn.Tanh(), L(5, 2)),
        X,
    ),
    "convnet": (convnet, IMAGES),
    "every convolution": (all_convolutions, IMAGES),
    "biases and norms only": (partly_frozen, IMAGES),
    "normed weights": (normed_weights, IMAGES),
    "parameters of the root": (beside_modules, X),
    "instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True), nn.ReLU(), nn.Flatten(), L(108, 2)
        ),
        IMAGES,
    ),
    "embedding": (lambda: Custom(lambda m, x: m.l(m.e(x).mean(1)), e=nn.Embedding(20, 4, sparse=True), l=L(4, 3)), IDS),
    "tied embedding": (
        lambda: Custom(lambda m, x: F.linear(torch.tanh(m.e(x).sum(1)), m.e.weight[:5]), e=nn.Embedding(20, 4)),
        IDS,
    ),
    "lstm": (lstm, X),
    "dict of samples": (
        lambda: Custom(lambda m, x, mask: m.a(x) * mask[:, :3], a=L(6, 3)),
        {"x": X, "mask": MASK},
    ),
    "integers": (lambda: Custom(lambda m, x: m.a(x.to(m.a.weight.dtype)), a=L(4, 3)), IDS),
    "two samples": (mlp, X[:2]),
    "one sample": (mlp, X[:1]),
    "encoder, time first": (encoder, X),
    "encoder, as many tokens as samples": (encoder, X[:3]),
}


@pytest.fixture(autouse=True)
def _no_benchmark(monkeypatch):
    """The planner measures this machine's speed for every kernel, which takes longer than these do."""
    monkeypatch.setattr("ntkpipe.build.prepare.measure_rates", lambda *_: Rates(32e9, 1e9))


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_equals_the_reference(name):
    make, inputs = CASES[name]
    check_every_parameter(redraw(make()), inputs)


@pytest.mark.parametrize("kind", ["ntk", "pntk"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_reference_in_float64(name, kind):
    make, inputs = CASES[name]
    model = redraw(make())
    found = ntkpipe.kernel_matrix(model, inputs, kind=kind, compute_dtype="float64", workers=1)
    assert error(found, reference.kernel(model, inputs, kind=kind)) <= 1e-12
    assert found.any()


GPT2 = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 9}

# Name → (class, fields of its config, inputs, forward hook).
TRANSFORMERS = {
    "resnet": (
        "ResNetForImageClassification",
        {**VISION, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2], "layer_type": "basic"},
        PIXELS,
        logits,
    ),
    "resnet, bottleneck": (
        "ResNetForImageClassification",
        {**VISION, "embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "bottleneck"},
        PIXELS,
        logits,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {**VISION, "hidden_sizes": [4, 6], "depths": [1, 2], "patch_size": 2, "num_stages": 2},
        PIXELS,
        logits,
    ),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification",
        {**VISION, "depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4, "expand_ratio": 2},
        PIXELS,
        logits,
    ),
    "vit": ("ViTForImageClassification", {**VIT, "num_hidden_layers": 2}, PIXELS, logits),
    "t5 encoder": (
        "T5EncoderModel",
        {
            "vocab_size": 20,
            "d_model": 8,
            "d_kv": 3,
            "d_ff": 12,
            "num_layers": 2,
            "num_heads": 2,
            "relative_attention_num_buckets": 6,
            "relative_attention_max_distance": 5,
        },
        TEXT,
        mean_state,
    ),
    "bert": ("BertForSequenceClassification", {**SMALL, "num_labels": 3}, TEXT, logits),
    "gpt2, tied": ("GPT2LMHeadModel", GPT2, CAUSAL, last_logits),
    "gpt2, tied, every token": ("GPT2LMHeadModel", {**GPT2, "n_layer": 1}, CAUSAL, all_logits),
    "gpt2, untied": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False}, CAUSAL, last_logits),
    "llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1}, CAUSAL, last_logits),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_kernels_of_transformers(name):
    model_class, config, inputs, forward = TRANSFORMERS[name]
    model = from_transformers(model_class, **config)
    with double_inside(model):
        check_model(model, inputs, forward=forward)


@pytest.mark.parametrize("name", ["llama", "t5 encoder"])
def test_kernels_of_transformers_with_parts_in_float32(name):
    model_class, config, inputs, forward = TRANSFORMERS[name]
    model = from_transformers(model_class, **config)
    with pytest.warns(UserWarning, match="computes a part in float32 although compute_dtype='float64'"):
        found = ntkpipe.kernel_matrix(model, inputs, kind="ntk", forward=forward, compute_dtype="float64", workers=1)
    assert error(found, reference.kernel(model, inputs, forward=forward)) <= 1e-6


def per_sample_float32(model, inputs):
    """The kernel as torch.func finds it in float32, one sample at a time, its sums in float64."""
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    rows = []
    for sample in inputs:
        jacobian = torch.func.jacrev(lambda values, x=sample: torch.func.functional_call(model, values, (x[None],))[0])
        rows.append(torch.cat([grad.flatten(1) for grad in jacobian(parameters).values()], dim=1))
    joined = torch.cat(rows).double()
    return (joined @ joined.T).numpy()


@pytest.mark.parametrize("name", ["mlp", "convnet", "class token", "encoder, time first", "weight_norm, new", "tied"])
def test_float32_is_as_good_as_torch_func(name):
    make, inputs = CASES[name]
    model = redraw(make())
    exact = reference.kernel(model, inputs)
    found = ntkpipe.kernel_matrix(model, inputs, kind="ntk", workers=1)
    assert found.dtype == np.float32
    assert error(found.astype(float), exact) <= max(1e-6, 3 * error(per_sample_float32(model, inputs), exact))


def test_float32_sums_over_many_parameters_stay_accurate():
    model = redraw(nn.Sequential(L(6, 300), nn.ReLU(), L(300, 300), nn.ReLU(), L(300, 1)))
    x = X.abs() + 1  # all terms of the sums positive: the worst case of rounding
    found = ntkpipe.kernel_matrix(model, x, jacobian="fallback", workers=1)
    assert error(found.astype(float), reference.kernel(model, x)) <= 1e-6


@pytest.mark.parametrize("name", ["mlp", "class token", "lstm"])
@pytest.mark.parametrize(
    "options",
    [{"tile": 2}, {"tile": 3, "workers": 2}, {"tile": 1}, {"jacobian": "fallback"}, {"self_check": False}],
    ids=str,
)
def test_no_option_changes_the_kernel(name, options):
    make, inputs = CASES[name]
    model = redraw(make())
    found = ntkpipe.kernel_matrix(model, inputs, kind="ntk", compute_dtype="float64", **options)
    assert error(found, reference.kernel(model, inputs)) <= 1e-12
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("name", ["mlp", "convnet", "encoder, time first", "embedding", "lstm", "module used twice"])
def test_the_other_kinds_are_parts_of_the_full_kernel(name):
    make, inputs = CASES[name]
    model = redraw(make())
    size = reference.size_of(inputs)
    full = reference.kernel(model, inputs)
    blocks = full.reshape(size, len(full) // size, size, -1)
    parts = {"trace": np.einsum("iojo->ij", blocks) / blocks.shape[1], "output:1": blocks[:, 1, :, 1]}
    for kind, exact in parts.items():
        found = ntkpipe.kernel_matrix(model, inputs, kind=kind, compute_dtype="float64", workers=1)
        assert error(found, exact) <= 1e-12


@pytest.mark.parametrize("patterns", ["2.*", "*.bias", ("0.weight", "2.bias")])
def test_selected_parameters_are_the_only_ones(patterns):
    model = redraw(mlp())
    found = ntkpipe.kernel_matrix(model, X, kind="ntk", parameters=patterns, compute_dtype="float64", workers=1)
    chosen = {"2.*": ["2.weight", "2.bias"], "*.bias": ["0.bias", "2.bias"]}.get(patterns, patterns)
    grams = reference.grams(reference.jacobians(model, X))
    assert error(found, sum(grams[name] for name in chosen)) <= 1e-12


@pytest.mark.parametrize("kind", ["ntk", "pntk"])
def test_kernel_between_other_samples(kind):
    model, other = redraw(mlp()), torch.cos(X[:3])
    found = ntkpipe.kernel_matrix(model, X, other, kind=kind, compute_dtype="float64", tile=2, workers=1)
    both = torch.cat([X, other])
    width = len(found) // len(X)
    exact = reference.kernel(model, both, kind=kind)
    rows = len(X) * width
    assert np.abs(found - exact[:rows, rows:]).max() <= 1e-12 * exact.diagonal().max()


def test_linear_model_has_the_kernel_of_the_textbook():
    found = ntkpipe.kernel_matrix(L(6, 2), X, kind="ntk", compute_dtype="float64", workers=1)
    x = X.double().numpy()
    assert np.allclose(found, np.kron(x @ x.T + 1, np.eye(2)), atol=1e-13)
    mean = ntkpipe.kernel_matrix(L(6, 2), X, kind="pntk", compute_dtype="float64", workers=1)
    assert np.allclose(mean, x @ x.T + 1, atol=1e-13)


def test_complex_buffers_keep_their_imaginary_part():
    model = Custom(
        lambda m, x: torch.view_as_real(torch.view_as_complex(tokens(m.l(x)).contiguous()) * m.turn).flatten(1),
        l=L(6, 6),
    )
    model.register_buffer("turn", torch.polar(torch.ones(3), torch.tensor([0.3, 1.0, 2.0])))
    found = ntkpipe.kernel_matrix(redraw(model), X, kind="ntk", compute_dtype="float64", workers=1)
    model.turn, turn = None, model.turn.to(torch.complex128)
    exact = reference.kernel(model, X, forward=lambda m, x: setattr(m, "turn", turn) or m(x))
    assert error(found, exact) <= 1e-12


def test_scripted_models():
    plain = redraw(mlp())
    found = ntkpipe.kernel_matrix(torch.jit.script(plain), X, kind="ntk", compute_dtype="float64", workers=1)
    assert error(found, reference.kernel(plain, X)) <= 1e-12


def test_bfloat16_is_roughly_right():
    model = redraw(mlp())
    found = ntkpipe.kernel_matrix(model, X, compute_dtype="bfloat16", workers=1)
    assert found.dtype == np.float32
    assert error(found.astype(float), reference.kernel(model, X, kind="pntk")) <= 0.1
