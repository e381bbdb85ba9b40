"""Exact per-sample Jacobians of any parameters by plain ``torch.func``, and by a plain loop where that fails."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ntkpipe.jacobian.model.functional import Batch, FunctionalModel


def batch_size(batch: Batch) -> int:
    """Number of samples of a batch."""
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch
    return first.shape[0]


def take(batch: Batch, samples: Sequence[int]) -> Batch:
    """Some samples of a batch, in the order given; a sample may be repeated."""
    taken: Batch = tree_map(lambda values: values[list(samples)], batch)
    return taken


def by_vmap(model: FunctionalModel, names: tuple[str, ...], batch: Batch, covectors: Tensor) -> Tensor:
    """Jacobians (S, B, P) by ``vmap`` over samples of ``vjp``."""
    parameters = {name: value.detach() for name, value in model.parameters.items() if name in names}

    def one_sample(sample: Batch) -> Tensor:
        single = tree_map(lambda values: values.unsqueeze(0), sample)

        def outputs(values: dict[str, Tensor]) -> Tensor:
            return model.call_with(values, single)[0]

        pull_back = torch.func.vjp(outputs, parameters)[1]

        def one_covector(covector: Tensor) -> Tensor:
            (grads,) = pull_back(covector)
            return torch.cat([grads[name].reshape(-1) for name in names])

        return one_covector(covectors[0])[None] if len(covectors) == 1 else torch.func.vmap(one_covector)(covectors)

    # Not out_dims=1: vmap cannot expand there what does not depend on the sample, as the Jacobian of a last bias.
    return torch.func.vmap(one_sample)(batch).transpose(0, 1)


def by_loop(model: FunctionalModel, names: tuple[str, ...], batch: Batch, covectors: Tensor) -> Tensor:
    """The same, one sample at a time by plain autograd: slower, for models that vmap cannot run."""
    # Each sample is run beside a copy of itself: in torch 2.13 on the CPU the backward of batch_norm and instance_norm
    # is wrong for a batch of one where input and gradient differ in memory layout.
    parameters = [model.parameters[name] for name in names]
    samples = []
    for sample in range(batch_size(batch)):
        outputs = model(take(batch, (sample, sample)))[0]
        rows = []
        for number, covector in enumerate(covectors):
            grads: Sequence[Tensor | None] = [None] * len(parameters)
            if outputs.requires_grad:
                keep = number + 1 < len(covectors)
                grads = torch.autograd.grad(outputs, parameters, covector, retain_graph=keep, allow_unused=True)
            pairs = zip(parameters, grads, strict=True)
            dense = [torch.zeros_like(value) if grad is None else grad.to_dense() for value, grad in pairs]
            rows.append(torch.cat([each.reshape(-1) for each in dense]))
        samples.append(torch.stack(rows))
    return torch.stack(samples, dim=1)


METHODS = {"vmap": by_vmap, "loop": by_loop}
