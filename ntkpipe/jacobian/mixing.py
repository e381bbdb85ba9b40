"""Whether f(x) or its gradient depends on the rest of a batch: the same sample, at its place, in other company.

Rounding depends on the size of a batch and on the place of a sample in it, but not on what its companions are. So a
sample is looked at among copies of itself, in a batch of the same size, and the *noise* is the change where the same
companions are permuted. This costs passes of its own, and is done where a cheap comparison sees more than rounding.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ntkpipe.base.config import ComputeDtype
from ntkpipe.base.errors import ModelError
from ntkpipe.jacobian.fallback import batch_size, take
from ntkpipe.jacobian.model.functional import DTYPES, MIXING_TOLERANCE, Batch, FunctionalModel
from ntkpipe.jacobian.model.gradients import autograd_vjp

# Relative changes up to these are rounding, of deep models too; larger ones are looked into.
FLOOR = {"float64": 1e-12, "float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
# Gradients may change by this with the size of a batch: where a unit rounds to the other side of a kink, by much.
_SIZE_TOLERANCE = {"float64": 1e-6, "float32": 0.1, "tf32": 0.5, "bfloat16": 0.5}
_EPSILON: dict[ComputeDtype, float] = {"float64": 2.2e-16, "float32": 1.2e-7, "tf32": 9.8e-4, "bfloat16": 7.8e-3}
_NOISES, _LIKE_NOISE = 1000.0, 10.0
SMALL = 1e-2  # of the whole gradient's norm; smaller parts are measured by that

_RANDOM = (
    "two runs of the model on the same batch give different outputs: something in it is random (functional "
    "dropout, sampling, noise); call model.eval(), or make it deterministic"
)
_STATE = (
    "two runs of the model on the same batch give different outputs: it keeps state from call to call{}. Reset that at "
    "the start of each forward pass, in the model or by forward=lambda model, inputs: …"
)
MIXES = (
    "{} of a sample {} with the other samples of its batch: a normalisation over the batch, attention across it, or a "
    "solver whose steps or end depend on all of them. A kernel of single samples is not defined for it; let the model "
    "treat each sample by itself, or give its solver a tolerance near rounding"
)

Gradients = Mapping[str, Tensor]  # by parameter; those that no gradient arrives at are missing


@dataclass(frozen=True)
class Company:
    """A sample among others."""

    outputs: Tensor  # of the sample
    gradients: Gradients  # of a covector times its outputs, where those of its companions are pulled back with it
    whole: Gradients  # of the whole batch


def distance(found: Gradients, other: Gradients, scale: Gradients) -> float:
    """The largest difference of a parameter's gradients, relative to its norm or a share of that of all."""
    norms = {name: float(value.norm()) for name, value in scale.items()}
    small = SMALL * sum(norm**2 for norm in norms.values()) ** 0.5
    gaps = [0.0]
    for name in found.keys() | other.keys():
        one, two = found.get(name), other.get(name)
        gap = one - two if one is not None and two is not None else one if one is not None else two
        size = max(norms.get(name, 0.0), small)
        gaps.append(float(gap.norm()) / size if gap is not None and size > 0 else 0.0)
    return max(gap for gap in gaps if gap == gap)  # gradients that are not finite are found, and named, later


def require_repeatable(model: FunctionalModel, batch: Batch, outputs: Tensor) -> None:
    """Check that the model gives the same outputs again; else say whether it is random, or keeps state."""
    limit = FLOOR[model.arithmetic] * (float(outputs.abs().max()) or 1.0)
    before = model.snapshot()
    with torch.no_grad():
        if float((model(batch) - outputs).abs().max()) <= limit:
            return
        changed = model.snapshot().changed(before)
        fresh, again = model.copy(), model.copy()
        is_same = float((fresh(batch) - again(batch)).abs().max()) <= limit
    if not is_same:
        raise ModelError(_RANDOM)
    raise ModelError(_STATE.format(f", in {', '.join(map(repr, changed[:5]))}" if changed else ""))


def require_single(
    model: FunctionalModel, batch: Batch, places: Sequence[int], arithmetic: ComputeDtype, seen: float = 0.0
) -> None:
    """Refuse, or warn of, a model whose outputs or gradients at some places of a batch depend on the other samples.

    ``seen`` is by how much gradients changed in a batch of another size.
    """
    with torch.enable_grad():
        sums = max(arithmetic, lowest_precision(model(batch)), key=lambda each: FLOOR[each])
        changes = [_changes(model, batch, place) for place in places]
    # Gradients are differences of sums over the batch, which round in the lowest precision on their way.
    kinds = zip(("outputs", "gradients"), (arithmetic, sums), zip(*changes, strict=True), strict=True)
    for what, precision, found in kinds:
        change, noise = (max(values) for values in zip(*found, strict=True))
        if change > FLOOR[precision]:
            limit = _NOISES * max(noise, _EPSILON[precision])
            if change > min(limit, MIXING_TOLERANCE[precision]):
                raise ModelError(MIXES.format(what, f"change by {change:.2g}, relative,"))
            if change > _LIKE_NOISE * noise:
                warnings.warn(
                    f"{what} of a sample change by {change:.1e}, relative, with the other samples of its batch, and by "
                    f"{noise:.1e} where these are permuted: entries of the kernel are no more exact than that",
                    stacklevel=2,
                )
    if seen > _SIZE_TOLERANCE[sums]:
        raise ModelError(MIXES.format("gradients", f"change by {seen:.2g}, relative,"))


def warn_of_lower_precision(outputs: Tensor, arithmetic: ComputeDtype) -> None:
    """Say so where a model computes in a lower precision than it was asked to."""
    found = lowest_precision(outputs)
    if DTYPES[found].itemsize < DTYPES[arithmetic].itemsize:
        dtype = found if DTYPES[found].itemsize > 2 else "16 bits or less"
        warnings.warn(
            f"the model computes a part in {dtype} although compute_dtype={arithmetic!r} (autocast, .float(), .half(), "
            f"a dtype= of its own): outputs and entries of the kernel are exact to about {_EPSILON[found]:.0e} alone. "
            "Let that part take the dtype of its input",
            stacklevel=2,
        )


def lowest_precision(outputs: Tensor) -> ComputeDtype:
    """The lowest precision on the way from parameters to outputs: some models compute parts in float32 whatever."""
    seen, stack, size = set(), [outputs.grad_fn], outputs.itemsize
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            floats = [each.dtype.itemsize for each in node._input_metadata if each.dtype.is_floating_point]
            size = min([size, *floats])
            stack += [each for each, _ in node.next_functions]
    return next((name for name, dtype in DTYPES.items() if dtype.itemsize == size), "bfloat16")


def _changes(model: FunctionalModel, batch: Batch, place: int) -> list[tuple[float, float]]:
    """By how much outputs, and gradients, of a sample change among other companions, and among the same permuted."""
    size = batch_size(batch)
    others = [n for n in range(size) if n != place][::-1]
    base = in_company(model, batch, range(size), place)
    among_copies = in_company(model, batch, [place] * size, place)
    permuted = in_company(model, batch, [*others[:place], place, *others[place:]], place)
    top = float(base.outputs.abs().max()) or 1.0
    outputs = [float((each.outputs - base.outputs).abs().max()) / top for each in (among_copies, permuted)]
    gradients = [distance(each.gradients, base.gradients, base.whole) for each in (among_copies, permuted)]
    return [(outputs[0], outputs[1]), (gradients[0], gradients[1])]


def in_company(model: FunctionalModel, batch: Batch, order: Sequence[int], place: int) -> Company:
    """Run some samples of a batch, and pull covectors back: of all, and of all but the sample at a place."""
    outputs = model(take(batch, order))
    own, whole = gradients_among(model.parameters, outputs, covectors_of(outputs, order), [place])
    return Company(outputs[place].detach(), own, whole)


def gradients_among(
    parameters: Mapping[str, Tensor], outputs: Tensor, seeds: Tensor, places: Sequence[int]
) -> tuple[Gradients, Gradients]:
    """Gradients of the samples at some places, pulled back together with the others of a batch; and of all of them."""
    whole, others = gradients_of(parameters, outputs, seeds), seeds.clone()
    others[places] = 0
    rest = gradients_of(parameters, outputs, others)
    return {name: value - rest[name] if name in rest else value for name, value in whole.items()}, whole


def covectors_of(outputs: Tensor, samples: Sequence[int]) -> Tensor:
    """A random covector for each sample by its number, equal in every batch and on every device."""
    drawn = np.random.default_rng(0).standard_normal((max(samples) + 1, outputs.shape[1]))
    return torch.from_numpy(drawn[list(samples)]).to(outputs)


def gradients_of(parameters: Mapping[str, Tensor], outputs: Tensor, seeds: Tensor) -> dict[str, Tensor]:
    """Gradients of the parameters that any arrive at, by one backward pass."""
    if not outputs.requires_grad:
        return {}
    found = autograd_vjp(outputs, seeds, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: each.to_dense() for name, each in zip(parameters, found, strict=True) if each is not None}
