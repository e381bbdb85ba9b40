"""From a model and a few samples to an engine: check outputs, trace uses, choose the fallback's method."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ntkpipe.base.errors import ModelError, NonFiniteError, NtkpipeError
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.fallback import batch_size, take
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.representations.interface import Setup
from ntkpipe.jacobian.tracing.layouts import Pass, leaves
from ntkpipe.jacobian.tracing.recorder import Call, Recorder
from ntkpipe.jacobian.tracing.trace import Tracing, next_expansion, nothing_traced, trace

Load = Callable[[Sequence[int]], Batch]

# Sizes and orders differ, so that no layout of rows fits both by accident; the third batch differs from the first in
# its last sample alone.
_PROBES = ((4, 3, 2, 1, 0), (0, 1, 2), (4, 3, 2, 1, 4))
_VMAP_TOLERANCE = 0.1  # Jacobians by vmap and by the loop agree to rounding, or vmap is wrong
# Outputs of one sample in two batches may differ by rounding only, on the scale of the largest output.
_MIXING_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}
_MANY_CHANNELS = 16  # input channels of a 1 x 1 convolution from which it may be channels last


@dataclass(frozen=True)
class Probed:
    """What forward passes of a few samples show of a model."""

    model: FunctionalModel  # its convolutions channels last where that is faster
    num_outputs: int  # O
    tracing: Tracing
    batch: Batch  # the samples


def probe_samples(num_samples: int) -> list[int]:
    """Samples that are examined before a run: five, spread over the data, repeated where there are fewer."""
    return [int(i) for i in np.linspace(0, num_samples - 1, 5)]


def probe(model: FunctionalModel, load: Load, num_samples: int, *, structured: bool) -> Probed:
    """Run the model on three batches of a few samples: check that it has a kernel, and find how it uses parameters."""
    chosen, limit = probe_samples(num_samples), _MIXING_TOLERANCE[model.arithmetic]
    batch = load(chosen)
    model = _with_fast_layout(model, batch)
    parameters, constants, batches = model.parameters, model.constants(), [take(batch, order) for order in _PROBES]
    outputs, calls, expansions = list[Tensor](), [list[Call]() for _ in _PROBES], frozenset[int]()
    problem = "" if structured else "structure was switched off"
    with torch.enable_grad():
        while not problem:
            # In the last pass parameters are cut off from the calls that are recorded.
            recorders = [
                Recorder(parameters, constants, expansions=expansions, detach=is_cut) for is_cut in (False, False, True)
            ]
            outputs = []
            try:
                for each, recorder in zip(batches, recorders, strict=True):
                    with recorder:
                        outputs.append(model(each))
            except (NtkpipeError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - reported; if the model alone raises it, it does again below
                problem = _failed(error)
                break
            calls = [recorder.calls for recorder in recorders]
            if not (more := next_expansion(recorders[0].made, recorders[1].made)):
                break
            expansions |= more
        if problem:
            outputs = [_run(model, each) for each in batches]
    mixing, scale = _mixing([values.detach() for values in outputs], chosen)
    if not mixing <= limit * scale:
        is_random = not float((model(batches[0]) - outputs[0]).abs().max()) <= limit * scale
        raise ModelError(_RANDOM if is_random else _MIXES.format(mixing, scale))
    passes = [Pass(*each) for each in zip(outputs, calls, strict=True)]
    reached = _reached(passes[:2], parameters, constants)
    tracing = nothing_traced(list(parameters), problem)
    if not problem:
        try:
            tracing = trace(parameters, passes[:2], passes[2], reached, expansions)
        except (NtkpipeError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - reported; models that differentiate inside themselves may refuse
            tracing = nothing_traced(list(parameters), _failed(error))
    return Probed(model, outputs[0].shape[1], tracing, batch)


def make_engine(probed: Probed, setup: Setup) -> Engine:
    """The engine of a model that was probed, with a method for the fallback."""
    return choose_method(Engine(probed.model, probed.tracing, "vmap", setup), probed.batch)


_RANDOM = (
    "two runs of the model on the same batch give different outputs: something in it is random (functional "
    "dropout, sampling, noise); call model.eval(), or make it deterministic"
)
_MIXES = (
    "outputs of a sample change by {:.2g} (of {:.2g}) with the other samples of its batch: a normalisation over the "
    "batch, or attention across it. A kernel of single samples is not defined for it"
)


def _failed(error: Exception) -> str:
    return f"tracing failed: {str(error).partition(chr(10))[0]:.120}"


def _mixing(outputs: Sequence[Tensor], chosen: Sequence[int]) -> tuple[float, float]:
    """By how much outputs of the same sample differ between batches, and the largest output."""
    first, order = outputs[0], _PROBES[0]
    bad = {chosen[i] for place, i in enumerate(order) if not bool(torch.isfinite(first[place]).all())}
    if bad:
        raise NonFiniteError(f"the model's outputs are NaN or infinite on samples {sorted(bad)}")
    pairs = [(found, first[[order.index(i) for i in each]]) for found, each in zip(outputs, _PROBES, strict=True)]
    gaps = [float((found - same).abs().max()) for found, same in pairs]
    return max(gaps, key=lambda gap: (gap != gap, gap)), float(first.abs().max()) or 1.0


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
    return _with_fast_layout(model, load(probe_samples(num_samples)))


def _with_fast_layout(model: FunctionalModel, batch: Batch) -> FunctionalModel:
    convolves = any(isinstance(module, nn.modules.conv._ConvNd) for module in model.module.modules())
    if not convolves or model.device.type != "cpu" or model.dtype != torch.float32:
        return model
    weights = [parameter for parameter in model.module.parameters() if parameter.ndim in {4, 5}]
    # In torch 2.13 the backward of a 1 x 1 convolution of two to seven channels, channels last and with stride 2,
    # writes beyond its memory; strides of functional calls are not known here, nor what other instruction sets do.
    if any(weight.shape[2:].numel() == 1 and 1 < weight.shape[1] < _MANY_CHANNELS for weight in weights):
        return model
    changed = model.channels_last()
    with torch.no_grad():
        outputs = _run(model, batch)
        try:
            again = changed(batch)
        except RuntimeError:  # it takes views of what a convolution returns, which need the usual layout
            return model
    scale = float(outputs.abs().max()) or 1.0
    return changed if float((again - outputs).abs().max()) <= _MIXING_TOLERANCE[model.arithmetic] * scale else model


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


def _reached(passes: Sequence[Pass], parameters: Mapping[str, Tensor], constants: Iterable[Tensor]) -> set[str]:
    """Parameters that gradients of the outputs arrive at."""
    try:
        reached = set().union(*(each.reached(parameters) for each in passes))
    except RuntimeError as error:
        raise ModelError(f"autograd cannot differentiate this model: {error}") from error
    # Leaves that a forward pass creates itself, as energy models do to differentiate by their input, are new each time.
    known = {id(value) for value in (*parameters.values(), *constants)}
    found, again = ({id(leaf): leaf for leaf in leaves(each.outputs)} for each in passes)
    foreign = [leaf for key, leaf in found.items() if key in again and key not in known]
    if foreign:
        shown = ", ".join(str(tuple(leaf.shape)) for leaf in foreign[:5])
        raise ModelError(
            f"the outputs depend on {len(foreign)} tensors that require a gradient and are not parameters of the model "
            f"(shapes {shown}): a module in a plain list, or another model in the forward hook. The hook is given a "
            "copy of the model: use forward=lambda model, inputs: …; register modules, as in nn.ModuleList; call "
            "requires_grad_(False) on what is meant to be constant"
        )
    if not reached:
        raise ModelError(
            f"the outputs do not depend on any of the {len(parameters)} selected parameters: the forward pass runs "
            "under torch.no_grad() or detaches what it computes, or parameters that it does not use were selected"
        )
    return reached
