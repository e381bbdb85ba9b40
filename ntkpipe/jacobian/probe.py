"""From a model and a few samples to an engine: check outputs, trace uses, choose the fallback's method."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from ntkpipe.base.errors import ModelError, NonFiniteError, NtkpipeError
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.fallback import take
from ntkpipe.jacobian.learnt import Learnt, keep, recall
from ntkpipe.jacobian.mixing import (
    FLOOR,
    MIXES,
    covectors_of,
    distance,
    gradients_among,
    gradients_of,
    require_repeatable,
    require_single,
    warn_of_lower_precision,
)
from ntkpipe.jacobian.model.device import Alone, watched_gradients, watched_sharing
from ntkpipe.jacobian.model.functional import MIXING_TOLERANCE, Batch, FunctionalModel
from ntkpipe.jacobian.model.samples import show_samples
from ntkpipe.jacobian.representations.interface import Setup
from ntkpipe.jacobian.tracing.recorder import Recorder
from ntkpipe.jacobian.tracing.trace import (
    NO_RULE,
    NOT_WANTED,
    Pass,
    Tracing,
    leaves,
    next_expansion,
    nothing_traced,
    trace,
)

Load = Callable[[Sequence[int]], Batch]

# Sizes and orders differ, so that no layout of rows fits both by accident; the third batch differs from the first in
# its last sample alone.
_PROBES = ((4, 3, 2, 1, 0), (0, 1, 2), (4, 3, 2, 1, 4))


@dataclass(frozen=True)
class Probed:
    """What forward passes of a few samples show of a model."""

    model: FunctionalModel  # its convolutions channels last where that is faster
    num_outputs: int  # O
    learnt: Learnt  # what holds for other weights, too
    batch: Batch  # the samples

    @property
    def tracing(self) -> Tracing:
        """How it uses its parameters."""
        return self.learnt.tracing


def probe_samples(num_samples: int) -> list[int]:
    """Samples that are examined before a run: five, spread over the data, repeated where there are fewer."""
    return [int(i) for i in np.linspace(0, num_samples - 1, 5)]


def probe(
    model: FunctionalModel,
    load: Load,
    num_samples: int,
    *,
    structured: bool,
    key_of: Callable[[Batch], str | None] = lambda _: None,
) -> Probed:
    """Run the model on three batches of a few samples: check that it has a kernel, and find how it uses parameters.

    Under the key of a batch it is kept what code and shapes decide. All that looks at values is done each time.
    """
    with watched_sharing(model.parameters.values()) as is_sharing:
        probed = _probed(model, load, num_samples, structured, key_of)
    return replace(probed, model=replace(probed.model, turn=Alone())) if is_sharing() else probed


def _probed(
    given: FunctionalModel,
    load: Load,
    num_samples: int,
    structured: bool,
    key_of: Callable[[Batch], str | None],
) -> Probed:
    chosen = probe_samples(num_samples)
    batch = load(chosen)
    key = key_of(batch)
    if (known := recall(key)) is None:
        model = given.with_fast_layout(batch)
    else:
        model = given.channels_last() if known.is_channels_last else given
    limit = MIXING_TOLERANCE[model.arithmetic]
    parameters, batches = model.parameters, [take(batch, order) for order in _PROBES]
    problems, before = [] if structured else [NOT_WANTED], model.snapshot()
    with torch.enable_grad():
        with _added_to(problems):
            passes, expansions = record_passes(model, batches) if structured else ([], frozenset())
        if problems:
            passes = [Pass(model.explained(each), []) for each in batches]
    outputs = [each.outputs for each in passes]
    mixing, scale = _mixing([each.detach() for each in outputs], chosen)
    if model.snapshot().changed(before) or not mixing <= FLOOR[model.arithmetic] * scale:
        require_repeatable(model, batches[0], outputs[0].detach())
    if not mixing <= limit * scale:
        raise ModelError(MIXES.format("outputs", f"change by {mixing:.2g} (of {scale:.2g})"))
    warn_of_lower_precision(outputs[0], model.arithmetic)
    with watched_gradients(parameters.values()) as is_keeping:
        gradients, gap, is_finite = _gradients(model, outputs)
    if is_keeping():
        raise ModelError(
            "the model's backward pass adds gradients to parameters' .grad and does not return them, as a Function "
            "whose backward calls backward(): a kernel would lack them. Pass the parameters to its apply, and return "
            "their gradients"
        )
    if max(mixing / scale, gap) > FLOOR[model.arithmetic]:
        require_single(model, batches[0], range(len(chosen)), model.arithmetic, gap)
    reached = _reached(passes[:2], gradients, parameters, model.constants())
    tracing = None
    with _added_to(problems):
        if not problems and known is not None:
            tracing = trace(parameters, passes, reached, expansions, is_known=True)
        if not problems and (known is None or tracing != known.tracing):
            tracing = trace(parameters, passes, reached, expansions)
    tracing = tracing or nothing_traced(parameters, problems[0])
    # The cost of Jacobians that are not finite is measured, which names their samples; other reasons are of the data.
    is_kept = key is not None and is_finite and {NO_RULE, NOT_WANTED}.issuperset(tracing.fallback.values())
    learnt = known if known is not None and tracing == known.tracing else Learnt(model is not given, tracing)
    if key is not None and is_kept:
        keep(key, learnt)
    return Probed(model, outputs[0].shape[1], learnt if is_kept else replace(learnt, costs={}), batch)


def make_engine(probed: Probed, setup: Setup) -> Engine:
    """The engine of a model that was probed, with a method for the fallback."""
    with probed.model.turn:
        try:
            return Engine(probed.model, probed.tracing, "vmap", setup).with_working_method(probed.batch)
        except (NtkpipeError, MemoryError):
            raise
        except Exception as error:
            raise probed.model.failure(error, "where it was differentiated", probed.batch) from error


@contextlib.contextmanager
def _added_to(problems: list[str]) -> Iterator[None]:
    """Report what goes wrong in tracing: models that differentiate inside themselves may refuse to be watched."""
    try:
        yield
    except (NtkpipeError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - if the model alone raises it, it does again where it is run unwatched
        problems.append(f"tracing failed: {str(error).partition(chr(10))[0]:.120}")


def record_passes(model: FunctionalModel, batches: Sequence[Batch]) -> tuple[list[Pass], frozenset[int]]:
    """Forward passes of the probe batches, in the last of which uses are cut off from parameters; and expansions."""
    expansions, constants = frozenset[int](), model.constants()
    while True:
        passes, made = [], []
        for number, batch in enumerate(batches):
            with Recorder(model.parameters, constants, expansions=expansions, detach=number == 2) as recorder:
                passes.append(Pass(model(batch), recorder.calls))
            made.append(recorder.made)
        if not (more := next_expansion(*made[:2])):
            return passes, expansions
        expansions |= more


def _mixing(outputs: Sequence[Tensor], chosen: Sequence[int]) -> tuple[float, float]:
    """By how much outputs of the same sample differ between batches, and the largest output."""
    first, order = outputs[0], _PROBES[0]
    bad = {chosen[i] for place, i in enumerate(order) if not bool(torch.isfinite(first[place]).all())}
    if bad:
        raise NonFiniteError(
            f"the model's outputs are NaN or infinite on {show_samples(sorted(bad))}; leave those out, or correct "
            "them or the model"
        )
    pairs = [(found, first[[order.index(i) for i in each]]) for found, each in zip(outputs, _PROBES, strict=True)]
    gaps = [float((found - same).abs().max()) for found, same in pairs]
    return max(gaps, key=lambda gap: (gap != gap, gap)), float(first.abs().max()) or 1.0


def _gradients(model: FunctionalModel, outputs: Sequence[Tensor]) -> tuple[set[str], float, bool]:
    """Parameters that gradients of outputs arrive at, by how much those of two batches differ, if all are finite."""
    # Those of three samples by themselves; among five, pulled back together, as the difference to the other two.
    (first, second, _), parameters = _PROBES, model.parameters
    try:
        places = [place for place, sample in enumerate(first) if sample in second]
        among, whole = gradients_among(parameters, outputs[0], covectors_of(outputs[0], first), places)
        alone = gradients_of(parameters, outputs[1], covectors_of(outputs[1], second))
    except (NtkpipeError, MemoryError):
        raise
    except Exception as error:  # a backward of its own may raise anything
        raise model.failure(error, "where autograd differentiated it") from error
    is_finite = isfinite(sum(float(value.sum()) for value in whole.values()))
    return whole.keys() | alone.keys(), distance(among, alone, whole), is_finite


def _reached(
    passes: Sequence[Pass], reached: set[str], parameters: Mapping[str, Tensor], constants: Iterable[Tensor]
) -> set[str]:
    """Parameters that gradients of the outputs arrive at, if there are any and there is nothing else."""
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
