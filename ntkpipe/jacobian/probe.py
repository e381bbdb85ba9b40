"""From a model and a few samples to an engine: check outputs, trace uses, choose the fallback's method."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ntkpipe.base.errors import ModelError, NonFiniteError, NtkpipeError
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.fallback import batch_size, take
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.representations.interface import Setup
from ntkpipe.jacobian.tracing.layouts import leaves
from ntkpipe.jacobian.tracing.trace import nothing_traced, trace

Load = Callable[[Sequence[int]], Batch]

_PROBES = ((0, 1, 2), (4, 3, 2, 1, 0))  # sizes and orders differ, so that no layout of rows fits both by accident
_VMAP_TOLERANCE = 0.1  # Jacobians by vmap and by the loop agree to rounding, or vmap is wrong
# Outputs of one sample in two batches may differ by rounding only, on the scale of the largest output.
_MIXING_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}
_MANY_CHANNELS = 16  # input channels of a 1 x 1 convolution from which it may be channels last


def probe_samples(num_samples: int) -> list[int]:
    """Samples that are examined before a run: five, spread over the data, repeated where there are fewer."""
    return [int(i) for i in np.linspace(0, num_samples - 1, 5)]


def check_outputs(model: FunctionalModel, load: Load, num_samples: int) -> int:
    """Run the model on a few samples and return its number of outputs O."""
    chosen = probe_samples(num_samples)
    batch = load(chosen)
    with torch.no_grad():
        outputs, again = _run(model, batch), _run(model, batch)
        # Each sample once more, between other neighbours and in a batch of another size.
        partners = [_run(model, take(batch, (i, (i + 2) % 5, (i + 3) % 5)))[0] for i in range(5)]
    bad = [chosen[i] for i in range(5) if not bool(torch.isfinite(outputs[i]).all())]
    if bad:
        raise NonFiniteError(f"the model's outputs are NaN or infinite on samples {sorted(set(bad))}")
    scale = float(outputs.abs().max()) or 1.0
    tolerance = _MIXING_TOLERANCE[model.arithmetic] * scale
    if float((outputs - again).abs().max()) > tolerance:
        raise ModelError(
            "two runs of the model on the same batch give different outputs: something in it is random (functional "
            "dropout, sampling, noise); call model.eval(), or make it deterministic"
        )
    mixing = float((outputs - torch.stack(partners)).abs().max())
    if mixing > tolerance:
        raise ModelError(
            f"outputs of a sample change by {mixing:.2g} (of {scale:.2g}) with the other samples of its batch: a "
            "normalisation over the batch, or attention across it. A kernel of single samples is not defined for it"
        )
    return int(outputs.shape[1])


def _run(model: FunctionalModel, batch: Batch) -> Tensor:
    try:
        return model(batch)
    except NtkpipeError:
        raise
    except Exception as error:
        tensors = batch if isinstance(batch, dict) else {"input": batch}
        shown = ", ".join(f"{name}: {tuple(v.shape)} {v.dtype}" for name, v in tensors.items())
        raise ModelError(
            f"the model raised {type(error).__name__} on a batch of {batch_size(batch)} ({shown}): {error}. Real "
            "inputs take the compute dtype, integers and booleans are passed on as they are"
        ) from error


def with_fast_layout(model: FunctionalModel, load: Load, num_samples: int) -> FunctionalModel:
    """The model with its convolutions channels last, where that is faster and the model runs that way."""
    convolves = any(isinstance(module, nn.modules.conv._ConvNd) for module in model.module.modules())
    if not convolves or model.device.type != "cpu" or model.dtype != torch.float32:
        return model
    weights = [parameter for parameter in model.module.parameters() if parameter.ndim in {4, 5}]
    # In torch 2.13 the backward of a 1 x 1 convolution of two to seven channels, channels last and with stride 2,
    # writes beyond its memory; strides of functional calls are not known here, nor what other instruction sets do.
    if any(weight.shape[2:].numel() == 1 and 1 < weight.shape[1] < _MANY_CHANNELS for weight in weights):
        return model
    batch, changed = load(probe_samples(num_samples)), model.channels_last()
    with torch.no_grad():
        outputs = model(batch)
        try:
            again = changed(batch)
        except RuntimeError:  # it takes views of what a convolution returns, which need the usual layout
            return model
    scale = float(outputs.abs().max()) or 1.0
    return changed if float((again - outputs).abs().max()) <= _MIXING_TOLERANCE[model.arithmetic] * scale else model


def make_engine(model: FunctionalModel, load: Load, num_samples: int, setup: Setup, *, structured: bool) -> Engine:
    """Trace the model and choose the fallback's method."""
    batch = load(probe_samples(num_samples))
    _check_gradients(model, batch)
    tracing = nothing_traced(model.names, "structure was switched off")
    if structured:
        try:
            tracing = trace(model, [take(batch, order) for order in _PROBES], [len(order) for order in _PROBES])
        except (NtkpipeError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - reported; models that differentiate inside themselves may refuse
            tracing = nothing_traced(model.names, f"tracing failed: {str(error).partition(chr(10))[0]:.120}")
    return choose_method(Engine(model, tracing, "vmap", setup), batch)


def choose_method(engine: Engine, batch: Batch) -> Engine:
    """The engine with a method that works for the fallback's parameters: vmap, or else the loop."""
    if not engine.fallback or engine.method == "loop":
        return engine
    problem = _problem_of_vmap(engine, batch)
    if problem is not None:
        engine = engine.changed(method="loop")
        engine.fallback_jacobian(take(batch, (0, 1)))
        warnings.warn(
            f"torch.func.vmap cannot run this model ({problem}); the {len(engine.fallback)} parameters without a rule "
            "are differentiated sample by sample, which is exact but slow",
            stacklevel=2,
        )
    return engine


def _problem_of_vmap(engine: Engine, batch: Batch) -> str | None:
    if not engine.model.is_replaceable(batch):
        return "parameters are used out of reach of torch.func.functional_call"
    # Some batching rules of torch 2.13 work, or are right, only where there are as many samples as covectors.
    few = take(batch, [i % batch_size(batch) for i in range(3 if len(engine.covectors) != 3 else 4)])
    try:
        engine.fallback_jacobian(batch)
        found = engine.fallback_jacobian(few)
    except Exception as error:  # noqa: BLE001 - whatever vmap stumbles over, the loop is exact, and its errors are raised
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.120}"
    exact = engine.changed(method="loop").fallback_jacobian(few)
    gap = float((found - exact).norm(dim=-1).max() / exact.norm(dim=-1).max().clamp_min(1e-30))
    return None if gap <= _VMAP_TOLERANCE else f"its Jacobians are off by {gap:.1e}"


def _check_gradients(model: FunctionalModel, batch: Batch) -> None:
    selected = list(model.parameters().values())
    with torch.enable_grad():
        outputs, again = model(batch), model(batch)
    try:
        grads = torch.autograd.grad(outputs.sum(), selected, allow_unused=True) if outputs.requires_grad else ()
    except RuntimeError as error:
        raise ModelError(f"autograd cannot differentiate this model: {error}") from error
    # Leaves that a forward pass creates itself, as energy models do to differentiate by their input, are new each time.
    known = {id(value) for value in (*model.module.parameters(), *model.module.buffers())}
    persistent = {id(leaf) for leaf in leaves(again)} - known
    foreign = {id(leaf): leaf for leaf in leaves(outputs) if id(leaf) in persistent}
    if foreign:
        shown = ", ".join(str(tuple(leaf.shape)) for leaf in list(foreign.values())[:5])
        raise ModelError(
            f"the outputs depend on {len(foreign)} tensors that require a gradient and are not parameters of the model "
            f"(shapes {shown}): a module in a plain list, or another model in the forward hook. The hook is given a "
            "copy of the model: use forward=lambda model, inputs: …; register modules, as in nn.ModuleList; call "
            "requires_grad_(False) on what is meant to be constant"
        )
    if all(grad is None for grad in grads):
        raise ModelError(
            f"the outputs do not depend on any of the {len(selected)} selected parameters: the forward pass runs under "
            "torch.no_grad() or detaches what it computes, or parameters that it does not use were selected"
        )
