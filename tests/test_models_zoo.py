"""Architectures that users bring, at tiny size: whole kernels through the public function, and every parameter."""

import math

import pytest
import torch
import torch.nn.functional as F
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
from engines import WAYS, check_model
from quiet import QUIET
from reference import Custom, draw_statistics, redraw
from torch import nn

from ntkpipe.jacobian.representations.interface import Rates

# The fallback warns of its loop.
pytestmark = QUIET

L = nn.Linear


@pytest.fixture(autouse=True)
def _no_benchmark(monkeypatch):
    """The planner measures this machine's speed for every kernel, which takes longer than these do."""
    monkeypatch.setattr("ntkpipe.build.prepare.measure_rates", lambda *_: Rates(32e9, 1e9))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DECODER = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
LARGER = {"pixel_values": drawn(7, 2, 16, 16)}
STAGES = {**VISION, "hidden_sizes": [4, 6], "depths": [1, 1]}

# Name → (class, fields of its config, inputs, forward hook).
TRANSFORMERS = {
    # text
    "roberta": ("RobertaForSequenceClassification", {**SMALL, "num_labels": 3, "pad_token_id": 0}, TEXT, logits),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "num_labels": 3},
        TEXT,
        logits,
    ),
    "electra": ("ElectraForSequenceClassification", {**SMALL, "embedding_size": 5, "num_labels": 3}, TEXT, logits),
    "albert, layers shared": (
        "AlbertForSequenceClassification",
        {**SMALL, "embedding_size": 5, "num_hidden_layers": 2, "num_labels": 3},
        TEXT,
        logits,
    ),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        {
            **SMALL,
            "num_labels": 3,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 6,
            "position_biased_input": False,
        },
        TEXT,
        logits,
    ),
    "fnet": ("FNetForSequenceClassification", {**SMALL, "num_labels": 3}, CAUSAL, logits),
    "bert, masked language model": ("BertForMaskedLM", SMALL, TEXT, all_logits),
    "bart": (
        "BartForSequenceClassification",
        {
            "vocab_size": 20,
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12,
            "max_position_embeddings": 9,
            "num_labels": 3,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        {"input_ids": torch.cat([IDS, torch.full((7, 1), 2)], 1)},
        logits,
    ),
    "t5, with decoder": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 20,
            "d_model": 8,
            "d_kv": 3,
            "d_ff": 12,
            "num_layers": 1,
            "num_heads": 2,
            "relative_attention_num_buckets": 6,
            "relative_attention_max_distance": 5,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]},
        last_logits,
    ),
    "gemma": ("GemmaForCausalLM", {**DECODER, "head_dim": 4}, CAUSAL, last_logits),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**DECODER, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 3},
        CAUSAL,
        last_logits,
    ),
    "qwen2": ("Qwen2ForCausalLM", DECODER, CAUSAL, last_logits),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 4}, CAUSAL, last_logits),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 3}, CAUSAL, last_logits),
    "mixtral": (
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "experts": "eager"},
        CAUSAL,
        last_logits,
    ),
    "mixtral, experts by bmm": (
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "experts": "batched_mm"},
        CAUSAL,
        last_logits,
    ),
    "phi": ("PhiForCausalLM", {**DECODER, "num_key_value_heads": 2}, CAUSAL, last_logits),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": 20,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 12,
            "max_position_embeddings": 9,
            "word_embed_proj_dim": 5,
            "do_layer_norm_before": False,
        },
        TEXT,
        last_logits,
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 20, "hidden_size": 8, "n_layer": 1, "n_head": 2}, TEXT, last_logits),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SMALL, "rotary_pct": 0.5}, CAUSAL, last_logits),
    "gptj": (
        "GPTJForCausalLM",
        {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 9, "rotary_dim": 2},
        CAUSAL,
        last_logits,
    ),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        CAUSAL,
        last_logits,
    ),
    "olmo2": ("Olmo2ForCausalLM", DECODER, CAUSAL, last_logits),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 20, "hidden_size": 6, "state_size": 3, "num_hidden_layers": 1, "time_step_rank": 2},
        CAUSAL,
        last_logits,
    ),
    # images
    "deit": ("DeiTForImageClassification", VIT, PIXELS, logits),
    "beit": (
        "BeitForImageClassification",
        {**VIT, "use_relative_position_bias": True, "use_mask_token": False, "layer_scale_init_value": 0.1},
        PIXELS,
        logits,
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        {**{k: v for k, v in VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2, "use_swiglu_ffn": False},
        PIXELS,
        logits,
    ),
    "clip vision": (
        "CLIPVisionModelWithProjection",
        {**{k: v for k, v in VIT.items() if k != "num_labels"}, "projection_dim": 3},
        PIXELS,
        lambda model, batch: model(**batch).image_embeds,
    ),
    "swin": (
        "SwinForImageClassification",
        {
            **VISION,
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 4,
            "depths": [2, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "mlp_ratio": 2.0,
        },
        LARGER,
        logits,
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        {
            **VISION,
            "image_size": 8,
            "patch_size": 2,
            "embed_dim": 4,
            "depths": [2],
            "num_heads": [2],
            "window_size": 2,
            "mlp_ratio": 2.0,
        },
        PIXELS,
        logits,
    ),
    "segformer": (
        "SegformerForImageClassification",
        {
            **VISION,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [4, 6],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        PIXELS,
        logits,
    ),
    "regnet": (
        "RegNetForImageClassification",
        {**STAGES, "embedding_size": 4, "groups_width": 2, "layer_type": "y"},
        PIXELS,
        logits,
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        {
            **VISION,
            "image_size": 16,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.3,
            "depth_divisor": 4,
            "kernel_sizes": [3, 5],
            "in_channels": [32, 32],
            "out_channels": [32, 48],
            "depthwise_padding": [],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 2],
            "hidden_dim": 320,
        },
        LARGER,
        logits,
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        {**STAGES, "patch_size": 2, "num_stages": 2},
        PIXELS,
        logits,
    ),
    "poolformer": (
        "PoolFormerForImageClassification",
        {
            **VISION,
            "depths": [1, 1],
            "hidden_sizes": [4, 6],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "padding": [1, 1],
            "num_encoder_blocks": 2,
            "layer_scale_init_value": 0.1,
        },
        PIXELS,
        logits,
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        {
            **VISION,
            "image_size": 32,
            "patch_size": 1,
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8],
            "num_attention_heads": 2,
            "expand_ratio": 1.0,
        },
        {"pixel_values": drawn(7, 2, 32, 32)},
        logits,
    ),
    # sound
    "whisper encoder": (
        "WhisperModel",
        {
            "vocab_size": 20,
            "num_mel_bins": 3,
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12,
            "max_source_positions": 5,
            "max_target_positions": 5,
            "pad_token_id": 0,
            "part": "encoder",
        },
        {"input_features": drawn(7, 3, 10)},
        mean_state,
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        {
            **SMALL,
            "conv_dim": [4, 6],
            "conv_kernel": [5, 3],
            "conv_stride": [3, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
            "layerdrop": 0.0,
        },
        {"input_values": drawn(7, 40)},
        mean_state,
    ),
    "audio spectrogram transformer": (
        "ASTForAudioClassification",
        {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "patch_size": 4,
            "num_mel_bins": 6,
            "max_length": 9,
            "frequency_stride": 2,
            "time_stride": 3,
            "num_labels": 3,
        },
        {"input_values": drawn(7, 9, 6)},
        logits,
    ),
    "video_mae": (
        "VideoMAEForVideoClassification",
        {**VIT, "num_frames": 2, "tubelet_size": 2},
        {"pixel_values": drawn(7, 2, 2, 8, 8)},
        logits,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name):
    model_class, config, inputs, forward = TRANSFORMERS[name]
    model = from_transformers(model_class, **config)
    # The rules' own tests hold every operation in every way.
    way = WAYS[list(TRANSFORMERS).index(name) % len(WAYS)]
    with double_inside(model):
        check_model(model, inputs, forward=forward, kinds=("ntk",), ways=(way,))


# --- models written by hand -----------------------------------------------------------------------------------------

X = drawn(7, 6)
POINTS = drawn(7, 9, 3)


def param(*shape):
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


def unet():
    """Down, up by a transposed convolution, skip connections, norms in eval mode."""

    def forward(m, x):
        one = F.relu(m.n(m.down(x)))
        two = F.relu(m.middle(F.max_pool2d(one, 2)))
        three = F.relu(m.out(torch.cat([one, m.up(two)], 1)))
        return m.head(three + F.interpolate(m.side(two), scale_factor=2, mode="bilinear")).mean((2, 3))

    return draw_statistics(
        Custom(
            forward,
            down=nn.Conv2d(2, 4, 3, padding=1, bias=False),
            n=nn.BatchNorm2d(4),
            middle=nn.Conv2d(4, 6, 3, padding=1),
            up=nn.ConvTranspose2d(6, 4, 2, stride=2),
            side=nn.Conv2d(6, 5, 1),
            out=nn.Conv2d(8, 5, 3, padding=1),
            head=nn.Conv2d(5, 3, 1),
        )
    )


def mixer():
    def block():
        return Custom(
            lambda m, x: (lambda y: y + m.c2(F.gelu(m.c1(m.n2(y)))))(
                x + m.t2(F.gelu(m.t1(m.n1(x).transpose(1, 2)))).transpose(1, 2)
            ),
            n1=nn.LayerNorm(6),
            t1=L(16, 5),
            t2=L(5, 16),
            n2=nn.LayerNorm(6),
            c1=L(6, 9),
            c2=L(9, 6),
        )

    return Custom(
        lambda m, x: m.head(m.n(m.blocks(m.stem(x).flatten(2).transpose(1, 2))).mean(1)),
        stem=nn.Conv2d(2, 6, 2, stride=2),
        blocks=nn.Sequential(block(), block()),
        n=nn.LayerNorm(6),
        head=L(6, 3),
    )


def pointnet():
    """Convolutions of width one over points, their maximum, and a transform that depends on the points."""

    def forward(m, x):
        turn = m.turn(F.relu(m.t(x.transpose(1, 2))).amax(2)).view(-1, 3, 3)
        h = (x @ turn).transpose(1, 2)
        return m.head(F.relu(m.n(m.c(F.relu(m.a(h))))).amax(2))

    return draw_statistics(
        Custom(
            forward,
            t=nn.Conv1d(3, 5, 1),
            turn=L(5, 9),
            a=nn.Conv1d(3, 4, 1),
            c=nn.Conv1d(4, 6, 1),
            n=nn.BatchNorm1d(6),
            head=L(6, 3),
        )
    )


def graph_network():
    """Two layers of a graph network over a constant adjacency; one weight for itself, one for its neighbours."""
    model = Custom(
        lambda m, x: m.head(F.relu(m.s2(h := F.relu(m.s1(x) + m.graph @ m.n1(x))) + m.graph @ m.n2(h)).sum(1)),
        s1=L(3, 5),
        n1=L(3, 5, bias=False),
        s2=L(5, 4),
        n2=L(5, 4, bias=False),
        head=L(4, 3),
    )
    model.register_buffer("graph", (drawn(9, 9) > 0.8).double() / 3)
    return model


def graph_attention():
    def forward(m, x):
        h = m.w(x)
        scores = F.leaky_relu((h @ m.left)[:, :, None] + (h @ m.right)[:, None], 0.2)
        return m.head(F.elu(scores.softmax(-1) @ h).mean(1))

    return Custom(forward, w=L(3, 5, bias=False), left=param(5), right=param(5), head=L(5, 3))


def film():
    """Features modulated by a condition that shares no layer with them."""

    def forward(m, x):
        gain, shift = m.condition(x[:, 0].mean((1, 2))[:, None]).chunk(2, 1)
        return m.head(F.relu(m.n(m.c(x)) * (1 + gain[..., None, None]) + shift[..., None, None]).mean((2, 3)))

    return Custom(forward, condition=L(1, 10), c=nn.Conv2d(2, 5, 3), n=nn.GroupNorm(1, 5, affine=False), head=L(5, 3))


def hypernetwork():
    """A network that gives the weights of another, sample by sample."""

    def forward(m, x):
        weights = m.two(torch.tanh(m.one(x[:, :2])))
        first, second = weights[:, :20].view(-1, 5, 4), weights[:, 20:].view(-1, 3, 5)
        return (second @ torch.tanh(first @ x[:, 2:, None]))[..., 0]

    return Custom(forward, one=L(2, 5), two=L(5, 35))


def kolmogorov_arnold():
    """Sums of learned functions of one variable each, on a fixed grid."""

    def layer(n_in, n_out):
        module = Custom(
            lambda m, x: (
                F.silu(x) @ m.base.T
                + torch.einsum("big,oig->bo", torch.exp(-(((x[..., None] - m.grid) / 0.7) ** 2)), m.spline)
            ),
            base=param(n_out, n_in),
            spline=param(n_out, n_in, 4),
        )
        module.register_buffer("grid", torch.linspace(-1.5, 1.5, 4, dtype=torch.float64))
        return module

    return nn.Sequential(layer(6, 5), layer(5, 3))


def experts_by_bmm():
    """A soft mixture of experts, their weights in one tensor each."""

    def forward(m, x):
        gates = m.gate(x).softmax(-1)
        h = torch.bmm(x.expand(4, -1, -1), m.w1) + m.b1
        out = torch.bmm(F.gelu(h), m.w2) + m.b2
        return (out * gates.T[..., None]).sum(0)

    return Custom(forward, gate=L(6, 4), w1=param(4, 6, 5), b1=param(4, 1, 5), w2=param(4, 5, 3), b2=param(4, 1, 3))


def normalisation_free():
    """Residual blocks with standardised weights, skip gains and no norms."""

    class Standardised(nn.Conv2d):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True) * self.gain
            return self._conv_forward(x, w / math.sqrt(w[0].numel()), self.bias)

    return Custom(
        lambda m, x: m.head((h := m.a(x)).add(m.skip_scale * m.c(F.relu(h))).mean((2, 3))),
        a=Standardised(2, 4, 3),
        c=Standardised(4, 4, 3, padding=1),
        skip_scale=param(1),
        head=L(4, 3),
    )


def perceiver():
    """Learned latents that attend to the inputs, then to each other."""
    return Custom(
        lambda m, x: m.head(
            m.own((z := m.cross(m.n(m.latents.expand(len(x), -1, -1)), (k := m.embed(x) + m.positions), k)[0]), z, z)[
                0
            ].mean(1)
        ),
        latents=param(1, 4, 6),
        positions=param(9, 6),
        embed=L(3, 6),
        n=nn.LayerNorm(6),
        cross=nn.MultiheadAttention(6, 2, batch_first=True),
        own=nn.MultiheadAttention(6, 3, batch_first=True),
        head=L(6, 3),
    )


def conditional_diffusion():
    """A residual block with an embedding of time, group norms and attention, as in diffusion models."""

    def forward(m, x):
        time = torch.arange(1, 4, dtype=x.dtype) * x[:, :1, 0, 0]
        emb = m.t2(F.silu(m.t1(torch.cat([time.sin(), time.cos()], 1))))
        h = m.c1(F.silu(m.n1(m.stem(x)))) + m.emb(F.silu(emb))[..., None, None]
        h = m.c2(F.silu(m.n2(h))) + m.skip(m.stem(x))
        q, k, v = m.qkv(m.n3(h)).flatten(2).chunk(3, 1)
        h = h + m.proj((v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).view_as(h))
        return m.out(h).mean((2, 3))

    return Custom(
        forward,
        stem=nn.Conv2d(2, 4, 3, stride=2, padding=1),
        t1=L(6, 5),
        t2=L(5, 5),
        emb=L(5, 6),
        n1=nn.GroupNorm(2, 4),
        c1=nn.Conv2d(4, 6, 3, padding=1),
        n2=nn.GroupNorm(2, 6),
        c2=nn.Conv2d(6, 6, 3, padding=1),
        skip=nn.Conv2d(4, 6, 1),
        n3=nn.GroupNorm(3, 6),
        qkv=nn.Conv2d(6, 18, 1),
        proj=nn.Conv2d(6, 6, 1),
        out=nn.Conv2d(6, 3, 3, padding=1),
    )


def wavenet():
    """Dilated causal convolutions, weight-normed and gated, with skips."""

    class Block(nn.Module):
        def __init__(self, dilation):
            super().__init__()
            self.pad = dilation
            norm = nn.utils.parametrizations.weight_norm
            self.both = norm(nn.Conv1d(4, 8, 2, dilation=dilation))
            self.skip = norm(nn.Conv1d(4, 4, 1))

        def forward(self, x):
            signal, gate = self.both(F.pad(x, (self.pad, 0))).chunk(2, 1)
            return x + self.skip(torch.tanh(signal) * torch.sigmoid(gate))

    return Custom(
        lambda m, x: m.head(F.relu(m.blocks(m.stem(x)))).mean(2),
        stem=nn.Conv1d(1, 4, 1),
        blocks=nn.Sequential(Block(1), Block(2), Block(4)),
        head=nn.Conv1d(4, 3, 1),
    )


def siamese():
    """One encoder on both halves of a sample."""
    return Custom(
        lambda m, x: m.head(torch.cat([(a := m.e(x[:, :3])) * (b := m.e(x[:, 3:])), (a - b).abs()], 1)),
        e=nn.Sequential(L(3, 5), nn.Tanh(), L(5, 4)),
        head=L(8, 3),
    )


def deep_equilibrium():
    """The same layer many times, to a fixed point."""

    def forward(m, x):
        z = torch.zeros(len(x), 5, dtype=x.dtype)
        for _ in range(12):
            z = torch.tanh(0.5 * m.z(z) + m.x(x))
        return m.head(z)

    return Custom(forward, z=L(5, 5), x=L(6, 5, bias=False), head=L(5, 3))


def low_rank_adapters():
    """A frozen transformer layer with trainable adapters beside its projections."""

    class Adapted(nn.Module):
        def __init__(self, base, rank):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.lora_a = nn.Linear(base.in_features, rank, bias=False)
            self.lora_b = nn.Linear(rank, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + 2.0 * self.lora_b(self.lora_a(x))

    return Custom(
        lambda m, x: m.head(
            F.scaled_dot_product_attention(m.q(h := m.embed(x)), m.k(h), m.v(h), is_causal=True).mean(1)
        ),
        embed=L(3, 6).requires_grad_(False),
        q=Adapted(L(6, 6), 2),
        k=L(6, 6).requires_grad_(False),
        v=Adapted(L(6, 6), 2),
        head=L(6, 3),
    )


# Name → (model, inputs).
BY_HAND = {
    "u-net": (unet, IMAGES),
    "mlp-mixer": (mixer, IMAGES),
    "pointnet": (pointnet, POINTS),
    "deep sets": (
        lambda: Custom(
            lambda m, x: m.rho(m.phi(x).sum(1)),
            phi=nn.Sequential(L(3, 5), nn.ReLU(), L(5, 4)),
            rho=nn.Sequential(nn.ReLU(), L(4, 3)),
        ),
        POINTS,
    ),
    "graph network": (graph_network, POINTS),
    "graph attention": (graph_attention, POINTS),
    "film": (film, IMAGES),
    "hypernetwork": (hypernetwork, X),
    "kolmogorov-arnold": (kolmogorov_arnold, X),
    "experts by bmm": (experts_by_bmm, X),
    "normalisation-free": (normalisation_free, IMAGES),
    "perceiver": (perceiver, POINTS),
    "diffusion block": (conditional_diffusion, IMAGES),
    "wavenet": (wavenet, drawn(7, 1, 11)),
    "siamese": (siamese, X),
    "deep equilibrium": (deep_equilibrium, X),
    "low-rank adapters": (low_rank_adapters, POINTS),
    "sine network": (
        lambda: Custom(lambda m, x: m.c(torch.sin(3 * m.b(torch.sin(3 * m.a(x))))), a=L(6, 5), b=L(5, 5), c=L(5, 3)),
        X,
    ),
    "gru": (lambda: Custom(lambda m, x: m.h(m.r(x)[1][-1]), r=nn.GRU(3, 4, 2, batch_first=True), h=L(4, 3)), POINTS),
    "text by convolution": (
        lambda: Custom(
            lambda m, x: m.h(torch.cat([F.relu(c(m.e(x).transpose(1, 2))).amax(2) for c in m.convolutions], 1)),
            e=nn.Embedding(20, 5, padding_idx=0),
            convolutions=nn.ModuleList([nn.Conv1d(5, 3, width) for width in (2, 3, 4)]),
            h=L(9, 3),
        ),
        IDS,
    ),
    "factorisation machine": (
        lambda: Custom(
            lambda m, x: m.w(x).sum(1) + 0.5 * (m.v(x).sum(1) ** 2 - (m.v(x) ** 2).sum(1)).sum(1, keepdim=True) + m.b,
            w=nn.Embedding(20, 1),
            v=nn.Embedding(20, 4),
            b=param(1),
        ),
        IDS,
    ),
    "masked mean of words": (
        lambda: Custom(
            lambda m, input_ids, attention_mask: m.h(
                (m.e(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
            ),
            e=nn.Embedding(20, 5),
            h=L(5, 3),
        ),
        {"input_ids": IDS, "attention_mask": MASK},
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_models_by_hand(name):
    make, inputs = BY_HAND[name]
    check_model(redraw(make().double()), inputs, kinds=("ntk",))
