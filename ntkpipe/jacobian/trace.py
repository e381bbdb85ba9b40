"""Where a model uses its parameters: found by watching torch functions, not by looking at modules.

A :class:`Recorder` sees every torch function of a forward pass. Where an argument *is* a selected parameter and the
function has a rule, it notes the input and the place of the output in the autograd graph. That a parameter has no
other use is not assumed: on a probe batch its recorded uses are cut (the parameter is detached there), and any
gradient that still arrives came another way. Which rows of a use belong to which sample is found, too, by pulling back
one sample at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ntkpipe.jacobian.rules import BIAS, RULES, WEIGHT, Rule
from ntkpipe.models import Batch, FunctionalModel


@dataclass
class Call:
    """One recorded call: the live tensors of one forward pass.

    Attributes
    ----------
    rule
        The function's rule.
    names
        Names of the selected parameters by role.
    input
        What the weight was applied to.
    version
        Version counter of the input at the call; another one later means that it was changed in place.
    edge
        Place of the output in the autograd graph; none if nothing flows back to it. An edge stays right where the
        output is changed in place afterwards; the tensor would not.
    num_rows
        Rows of the output.
    """

    rule: Rule
    names: dict[str, str]
    input: Tensor
    version: int
    edge: GradientEdge | None
    num_rows: int

    def input_was_changed(self) -> bool:
        """Whether the input was changed in place after the call, so that it is not what the weight saw."""
        return self.input._version != self.version


class Recorder(TorchFunctionMode):
    """Record the calls that have a rule and use a selected parameter.

    Parameters
    ----------
    parameters
        The selected parameters by name; recognised by identity.
    detach
        Cut the recorded uses, so that only gradients of other uses arrive at the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, detach: bool = False) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._detach = detach
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func)
        if rule is None or torch.is_inference_mode_enabled():
            return func(*args, **(kwargs or {}))
        bound = rule.bind(*args, **(kwargs or {}))
        names = {role: self._names[id(value)] for role, value in bound.operands.items() if id(value) in self._names}
        if not names or bound.input.is_nested or bound.input.layout != torch.strided:
            return func(*args, **(kwargs or {}))
        version = bound.input._version
        if self._detach:
            operands = bound.operands
            output = bound.call({role: v.detach() if role in names else v for role, v in operands.items()})
        else:
            output = func(*args, **(kwargs or {}))
        edge = get_gradient_edge(output) if output.requires_grad else None
        num_rows = rule.output_rows(output).shape[0]
        self.calls.append(Call(rule, names, bound.input.detach(), version, edge, num_rows))
        return output


@dataclass(frozen=True)
class Use:
    """One use of parameters, the same in every batch.

    Attributes
    ----------
    rule
        The function's rule.
    names
        Names of the covered parameters by role.
    leading, trailing
        Layout of the rows: (leading, samples, trailing). A batch-first layer over T tokens has trailing = T, a
        time-first one leading = T.
    """

    rule: Rule
    names: tuple[tuple[str, str], ...]
    leading: int
    trailing: int

    @property
    def num_positions(self) -> int:
        """Rows a sample, T."""
        return self.leading * self.trailing

    def by_position(self, rows: Tensor, num_samples: int) -> Tensor:
        """Reorder (rows, n) to (positions, samples, n)."""
        grouped = rows.reshape(self.leading, num_samples, self.trailing, -1)
        return grouped.transpose(1, 2).reshape(self.num_positions, num_samples, -1)


@dataclass(frozen=True)
class Tracing:
    """What tracing found.

    Attributes
    ----------
    uses
        Every recorded call in order; one whose parameters all went to the fallback has no names.
    covered
        Parameters that all their uses account for.
    fallback
        Parameters that are left to plain ``torch.func``, with the reason.
    unused
        Parameters that the outputs do not depend on.
    edges
        How many edges of the autograd graph lead to each covered parameter: more in another batch are uses that no
        rule has seen.
    """

    uses: tuple[Use, ...]
    covered: tuple[str, ...]
    fallback: dict[str, str]
    unused: tuple[str, ...]
    edges: Mapping[str, int] = field(default_factory=dict)

    def matches(self, calls: list[Call], edges: Mapping[str, int], num_samples: int) -> bool:
        """Whether a forward pass, by its calls and its edges to parameters, is the one that was traced."""
        if any(edges[name] != self.edges[name] for name in self.covered):
            return False
        return len(calls) == len(self.uses) and all(
            call.rule.name == use.rule.name
            and (not use.names or call.num_rows == use.num_positions * num_samples)
            and dict(use.names).items() <= call.names.items()
            for call, use in zip(calls, self.uses, strict=True)
        )

    def without(self, names: Mapping[str, str]) -> "Tracing":
        """The same with some covered parameters moved to the fallback, with the reasons."""
        uses = tuple(
            Use(
                use.rule,
                tuple((role, name) for role, name in use.names if name not in names),
                use.leading,
                use.trailing,
            )
            for use in self.uses
        )
        covered = tuple(name for name in self.covered if name not in names)
        return Tracing(uses, covered, {**self.fallback, **names}, self.unused, self.edges)


def trace(model: FunctionalModel, probes: list[Batch], sizes: list[int]) -> Tracing:
    """Find the uses of the selected parameters.

    Parameters
    ----------
    model
        The model; its selected parameters require a gradient.
    probes
        At least two batches of different sizes, with the samples in different orders.
    sizes
        Number of samples of each.

    Returns
    -------
    What must hold for every later batch; :meth:`Tracing.matches` checks it.
    """
    parameters = model.parameters()
    reached = _gradients(model, parameters, probes, detach=False)
    elsewhere = _gradients(model, parameters, probes, detach=True)
    unused = tuple(name for name in parameters if name not in reached)
    probed = [_probe(model, parameters, batch, size) for batch, size in zip(probes, sizes, strict=True)]
    findings, edges = [found for found, _ in probed], [counted for _, counted in probed]
    first = findings[0]
    same = all(
        len(other) == len(first)
        and all(a.rule is b.rule and a.names == b.names for a, b in zip(first, other, strict=True))
        for other in findings[1:]
    )
    if not same:
        reasons = dict.fromkeys(parameters, "the operations of the forward pass depend on the data")
        return Tracing((), (), {name: why for name, why in reasons.items() if name not in unused}, unused)
    reasons = dict.fromkeys((name for name in parameters if name in elsewhere), "used by an operation without a rule")
    for name in parameters:
        if any(other[name] != edges[0][name] for other in edges[1:]):
            reasons.setdefault(name, "how often it is used depends on the data")
    layouts = []
    for position in range(len(first)):
        candidates = set.intersection(*(finding[position].layouts for finding in findings))
        changed = any(finding[position].input_was_changed for finding in findings)
        layouts.append(min(candidates) if len(candidates) == 1 else (1, 1))
        for name in first[position].names.values():
            if changed:
                reasons.setdefault(name, "an input was changed in place after its use")
            elif len(candidates) != 1:
                what = "no fixed layout" if not candidates else "more than one possible layout"
                reasons.setdefault(name, f"the rows of a use have {what} of samples")
    roles = {(role, name) for call in first for role, name in call.names.items()}
    used = {name for _, name in roles}
    for name in used:
        if {(WEIGHT, name), (BIAS, name)} <= roles:
            reasons.setdefault(name, "used both as a weight and as a bias")
    fallback = {
        name: reasons.get(name, "used by an operation without a rule")
        for name in parameters
        if name not in unused and (name in reasons or name not in used)
    }
    covered = tuple(name for name in parameters if name in used and name not in fallback and name not in unused)
    uses = tuple(
        Use(call.rule, tuple((role, name) for role, name in call.names.items() if name in covered), *layout)
        for call, layout in zip(first, layouts, strict=True)
    )
    tracing = Tracing(uses, covered, fallback, unused, {name: edges[0][name] for name in covered})
    incomplete = _incomplete(model, parameters, tracing, probes[0])
    return tracing.without(dict.fromkeys(incomplete, "its recorded uses do not add up to its gradient"))


def _incomplete(model: FunctionalModel, parameters: Mapping[str, Tensor], tracing: Tracing, batch: Batch) -> list[str]:
    """Covered parameters whose gradient is not what their uses add up to, as where a model differentiates itself.

    Rounding is far below what is tolerated here; a missing use is far above it.
    """
    if not tracing.covered:
        return []
    with Recorder(parameters) as recorder:
        outputs = model(batch)
    live = [(c, use) for c, use in zip(recorder.calls, tracing.uses, strict=True) if use.names and c.edge is not None]
    generator = torch.Generator().manual_seed(1)
    covectors = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    sources: list[Any] = [parameters[name] for name in tracing.covered] + [call.edge for call, _ in live]
    found: Sequence[Tensor | None] = torch.autograd.grad(outputs, sources, covectors, allow_unused=True)
    exact = {
        name: torch.zeros_like(parameters[name]) if grad is None else grad
        for name, grad in zip(tracing.covered, found, strict=False)
    }
    left = {name: grad.clone() for name, grad in exact.items()}
    for (call, use), grad in zip(live, found[len(tracing.covered) :], strict=True):
        if grad is None:
            continue
        rows = call.rule.output_rows(grad).to(outputs.dtype)
        for role, name in use.names:
            inputs = call.rule.input_rows(call.input).to(outputs.dtype)
            left[name] -= rows.T @ inputs if role == WEIGHT else rows.sum(dim=0)
    # Below this is what is zero but for rounding, as the gradient of a key's bias under softmax.
    whole = sum(float(grad.norm()) ** 2 for grad in exact.values()) ** 0.5
    floor = torch.finfo(outputs.dtype).eps ** 0.5 * whole
    return [name for name, rest in left.items() if float(rest.norm()) > 0.1 * float(exact[name].norm()) + floor]


def count_edges(outputs: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """How many edges of the autograd graph of ``outputs`` lead to each parameter."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    counts = dict.fromkeys(parameters, 0)
    for leaf in leaves(outputs):
        if id(leaf) in names:
            counts[names[id(leaf)]] += 1
    return counts


def leaves(outputs: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that ``outputs`` depend on, once for each edge of the autograd graph that leads to them."""
    if outputs.grad_fn is None:
        return
    seen, stack = {outputs.grad_fn}, [outputs.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and hasattr(node, "variable"):
                yield node.variable
            elif node is not None and node not in seen:
                seen.add(node)
                stack.append(node)


def _gradients(
    model: FunctionalModel, parameters: Mapping[str, Tensor], probes: list[Batch], *, detach: bool
) -> set[str]:
    """Names of the parameters that autograd finds a way to from the outputs of any probe."""
    reached = set()
    for batch in probes:
        with Recorder(parameters, detach=detach):
            outputs = model(batch)
        if outputs.requires_grad:
            grads = torch.autograd.grad(outputs.sum(), list(parameters.values()), allow_unused=True)
            reached |= {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return reached


@dataclass
class _Finding:
    """What one probe says of one call: the layouts (leading, trailing) that its rows allow."""

    rule: Rule
    names: dict[str, str]
    layouts: set[tuple[int, int]]
    input_was_changed: bool


def _probe(
    model: FunctionalModel, parameters: Mapping[str, Tensor], batch: Batch, num_samples: int
) -> tuple[list[_Finding], dict[str, int]]:
    """Pull back one sample at a time and see which rows of each call it reaches; count the edges to parameters."""
    with Recorder(parameters) as recorder:
        outputs = model(batch)
    edges = count_edges(outputs, parameters)
    calls = recorder.calls
    live = [(number, call.edge) for number, call in enumerate(calls) if call.edge is not None]
    owners = [torch.full((call.num_rows,), -1) for call in calls]
    shared = [False] * len(calls)
    generator = torch.Generator().manual_seed(0)
    covectors = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    for sample in range(num_samples if outputs.requires_grad and live else 0):
        seed = torch.zeros_like(outputs)
        seed[sample] = covectors[sample]
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, [edge for _, edge in live], grad_outputs=seed, retain_graph=True, allow_unused=True
        )
        for (number, _), grad in zip(live, grads, strict=True):
            if grad is None:
                continue
            touched = (calls[number].rule.output_rows(grad) != 0).any(dim=1).cpu()
            shared[number] |= bool((owners[number][touched] >= 0).any())
            owners[number][touched] = sample
    changes = _changed_inputs(model, parameters, batch, calls, num_samples)
    return [
        _Finding(
            call.rule,
            call.names,
            set() if shared[number] else _layouts(owners[number], changes[number], num_samples),
            call.input_was_changed(),
        )
        for number, call in enumerate(calls)
    ], edges


def _changed_inputs(
    model: FunctionalModel, parameters: Mapping[str, Tensor], batch: Batch, calls: list[Call], num_samples: int
) -> list[Tensor]:
    """Per call, the rows of its input that change when the last sample is replaced by the first; none if unknown."""
    other = (
        {k: _with_last_replaced(v) for k, v in batch.items()} if isinstance(batch, dict) else _with_last_replaced(batch)
    )
    with torch.no_grad(), Recorder(parameters) as recorder:
        model(other)
    found = []
    comparable = len(recorder.calls) == len(calls)
    for number, call in enumerate(calls):
        rows = call.rule.input_rows(call.input)
        changed = torch.zeros(rows.shape[0], dtype=torch.bool)
        if comparable and recorder.calls[number].input.shape == call.input.shape:
            # Rounding may differ where nothing else does; a row that depends on the sample changes by far more.
            moved = (recorder.calls[number].rule.input_rows(recorder.calls[number].input) - rows).abs().amax(dim=1)
            changed = (moved > 1e-3 * rows.abs().amax()).cpu()
        found.append(changed)
    return found


def _with_last_replaced(values: Tensor) -> Tensor:
    replaced = values.clone()
    replaced[-1] = values[0]
    return replaced


def _layouts(owners: Tensor, changed: Tensor, num_samples: int) -> set[tuple[int, int]]:
    """Every (leading, trailing) that agrees with the rows whose owner is known."""
    num_rows = owners.numel()
    if num_rows % num_samples or num_rows == 0:
        return set()
    positions = num_rows // num_samples
    rows = torch.arange(num_rows)
    known = owners >= 0
    found = set()
    for trailing in (d for d in range(1, positions + 1) if positions % d == 0):
        owner = rows // trailing % num_samples
        agrees = bool((owner[known] == owners[known]).all())
        if agrees and bool((owner[changed] == num_samples - 1).all()):
            found.add((positions // trailing, trailing))
    return found


def weights_and_biases(uses: tuple[Use, ...]) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The uses (by number) of each covered weight and of each covered bias."""
    weights: dict[str, tuple[int, ...]] = {}
    biases: dict[str, tuple[int, ...]] = {}
    for number, use in enumerate(uses):
        for role, name in use.names:
            target = weights if role == WEIGHT else biases
            target[name] = (*target.get(name, ()), number)
    return weights, biases
