"""A kernel by hand-written hooks: what one writes who knows which layers the model has.

Forward hooks keep inputs and outputs of each layer, plain autograd pulls the covectors back to the outputs. A linear
layer of one position is kept as factors, (A A' + 1) o (D D'); everything else becomes a Jacobian in memory, unfold and
bmm for convolutions, and one matrix product a layer at the end. It supports the layers of ``work.py`` and nothing else.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BATCH = 64


class Attention(nn.Module):
    """``nn.MultiheadAttention`` as two linear layers that hooks can see."""

    # What nn.TransformerEncoder asks before it takes its fused path, which has no layers.
    batch_first, in_proj_bias, _qkv_same_embed_dim = True, None, True

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        width, self.num_heads = source.embed_dim, source.num_heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.in_proj.weight, self.in_proj.bias = source.in_proj_weight, source.in_proj_bias
        self.out_proj.weight, self.out_proj.bias = source.out_proj.weight, source.out_proj.bias

    def forward(self, x: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        heads = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)), None


def hooked_kernel(model: nn.Module, inputs: Tensor, covectors: Tensor) -> Tensor:
    """K of (sample, covector) rows."""
    model = with_visible_attention(model)
    layers = [module for module in model.modules() if isinstance(module, tuple(_DENSE))]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        layer.register_forward_hook(lambda module, given, output: seen.update({module: (given[0].detach(), output)}))
    rows = len(inputs) * len(covectors)
    factors: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    dense: dict[nn.Module, Tensor] = {}
    for start in range(0, len(inputs), _BATCH):
        batch = inputs[start : start + _BATCH]
        outputs = model(batch)
        nodes = [seen[layer][1] for layer in layers]
        pulled = [torch.autograd.grad(outputs, nodes, c.expand_as(outputs), retain_graph=True) for c in covectors]
        for layer, *grads in zip(layers, *pulled, strict=True):
            given, cotangents = seen[layer][0], torch.stack(grads, dim=1)
            if isinstance(layer, nn.Linear) and given.ndim == 2:
                factors[layer].append((given, cotangents.flatten(0, 1)))
                continue
            if layer not in dense:
                dense[layer] = inputs.new_empty(rows, sum(p.numel() for p in layer.parameters()))
            held = dense[layer][start * len(covectors) : (start + len(batch)) * len(covectors)]
            torch.cat(
                [part.flatten(0, 1).flatten(1) for part in _DENSE[type(layer)](layer, given, cotangents)], 1, out=held
            )
    kernel = inputs.new_zeros(rows, rows)
    blocks = kernel.view(len(inputs), len(covectors), len(inputs), len(covectors))
    for layer in layers:
        if layer in dense:
            kernel.addmm_(dense[layer], dense[layer].T)
        else:
            a, d = (torch.cat(part) for part in zip(*factors[layer], strict=True))
            blocks += (d @ d.T).view(blocks.shape).mul_((a @ a.T + 1.0)[:, None, :, None])
    return kernel


def with_visible_attention(model: nn.Module) -> nn.Module:
    """A copy without ``nn.MultiheadAttention``."""
    model = deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, Attention(child))
    return model


def _linear(layer: nn.Linear, given: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    size, width, positions, _ = d.shape
    weight = torch.bmm(d.transpose(2, 3).reshape(size, -1, positions), given)
    return weight.view(size, width, -1), d.sum(dim=2)


def _conv(layer: nn.Conv2d, given: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    size, width = d.shape[:2]
    patches = F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    weight = torch.bmm(d.reshape(size, -1, patches.shape[2]), patches.transpose(1, 2)).view(size, width, -1)
    return (weight,) if layer.bias is None else (weight, d.sum(dim=(3, 4)))


def _batch_norm(layer: nn.BatchNorm2d, given: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    normal = F.batch_norm(given, layer.running_mean, layer.running_var, eps=layer.eps)
    return (d * normal[:, None]).sum(dim=(3, 4)), d.sum(dim=(3, 4))


def _layer_norm(layer: nn.LayerNorm, given: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    normal = F.layer_norm(given, layer.normalized_shape, eps=layer.eps)
    return (d * normal[:, None]).sum(dim=2), d.sum(dim=2)


_DENSE = {nn.Linear: _linear, nn.Conv2d: _conv, nn.BatchNorm2d: _batch_norm, nn.LayerNorm: _layer_norm}
