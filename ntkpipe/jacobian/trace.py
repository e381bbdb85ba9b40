"""Where a model uses its parameters: found by watching torch functions, not by looking at modules.

That a parameter has no other use than the recorded ones is not assumed: on probe batches the recorded uses are cut (the
parameter is detached there), and any gradient that still arrives came another way; and what the uses add up to must be
the gradient. Which rows of a use belong to which sample is found, too, by pulling back one sample at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ntkpipe.jacobian.recorder import Argument, Call, Recorder
from ntkpipe.jacobian.rules.form import Lookup, Outer
from ntkpipe.jacobian.uses import Layout, Use, kind_of, total_gradient
from ntkpipe.models import Batch, FunctionalModel

NO_RULE = "used by an operation without a rule"


@dataclass(frozen=True)
class Pattern:
    """What a recorded call looks like in every batch.

    Attributes
    ----------
    function
        Name of the torch function.
    sources
        Per role, the parameters that the argument is made of.
    shape
        Of the output: per axis (size, multiple): the size where it is fixed, else how often the batch size.
    """

    function: str
    sources: dict[str, tuple[str, ...]]
    shape: tuple[tuple[int, int], ...]

    def matches(self, call: Call, num_samples: int) -> bool:
        """Whether a call of another batch is the same."""
        sizes = tuple(size + multiple * num_samples for size, multiple in self.shape)
        return call.name == self.function and call.shape == sizes and _sources(call) == self.sources


def _sources(call: Call) -> dict[str, tuple[str, ...]]:
    return {role: argument.sources for role, argument in call.arguments.items()}


@dataclass(frozen=True)
class Tracing:
    """What tracing found.

    Attributes
    ----------
    patterns
        Every recorded call, in order.
    uses
        Those of covered parameters, one for each such argument of a call.
    covered
        Parameters that all their uses account for.
    fallback
        Parameters that are left to plain ``torch.func``, with the reason.
    unused
        Parameters that the outputs do not depend on.
    edges
        How many edges of the autograd graph lead to each covered parameter: more in another batch are uses that no
        rule has seen.
    expansions
        Numbers for :class:`~ntkpipe.jacobian.recorder.Recorder`.
    """

    patterns: tuple[Pattern, ...]
    uses: tuple[Use, ...]
    covered: tuple[str, ...]
    fallback: dict[str, str]
    unused: tuple[str, ...]
    edges: Mapping[str, int] = field(default_factory=dict)
    expansions: frozenset[int] = frozenset()

    def record(self, model: FunctionalModel, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Run the model on a batch: its outputs, and the recorded calls."""
        with recorder_of(model, uses=self.expansions) as recorder:
            outputs = model(batch)
        return outputs, recorder.calls

    def matches(self, calls: list[Call], outputs: Tensor, parameters: Mapping[str, Tensor], num_samples: int) -> bool:
        """Whether a forward pass, by its calls and its edges to parameters, is the one that was traced."""
        edges = count_edges(outputs, parameters)
        return (
            all(edges[name] == self.edges[name] for name in self.covered)
            and len(calls) == len(self.patterns)
            and all(p.matches(call, num_samples) for p, call in zip(self.patterns, calls, strict=True))
            and all(_is_output(calls[use.call], outputs) for use in self.uses if use.is_output)
        )

    def without(self, names: Mapping[str, str]) -> "Tracing":
        """The same with some covered parameters moved to the fallback, with the reasons."""
        joined = {
            name: why
            for use in self.uses
            for why in (names[source] for source in use.sources if source in names)
            for name in use.sources
        }
        moved = {**joined, **names}
        return replace(
            self,
            uses=tuple(use for use in self.uses if not moved.keys() & set(use.sources)),
            covered=tuple(name for name in self.covered if name not in moved),
            fallback={**self.fallback, **moved},
        )


def nothing_traced(names: Sequence[str], reason: str, unused: tuple[str, ...] = ()) -> Tracing:
    """A tracing that leaves every parameter to the fallback."""
    return Tracing((), (), (), dict.fromkeys((name for name in names if name not in unused), reason), unused)


def recorder_of(model: FunctionalModel, *, uses: frozenset[int] = frozenset(), detach: bool = False) -> Recorder:
    """A recorder for a model's selected parameters."""
    parameters = model.parameters()
    selected = {id(parameter) for parameter in parameters.values()}
    every = (*model.module.parameters(), *model.module.buffers())
    return Recorder(parameters, (value for value in every if id(value) not in selected), uses=uses, detach=detach)


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
    expansions = _expansions(model, probes)
    reached = _gradients(model, parameters, probes, expansions, detach=False)
    elsewhere = _gradients(model, parameters, probes, expansions, detach=True)
    unused = tuple(name for name in parameters if name not in reached)
    probed = [_probe(model, expansions, batch, size) for batch, size in zip(probes, sizes, strict=True)]
    patterns = _patterns([found.calls for found in probed], sizes)
    if patterns is None:
        return nothing_traced(list(parameters), "the operations of the forward pass depend on the data", unused)
    reasons = dict.fromkeys((name for name in parameters if name in elsewhere), NO_RULE)
    for name in parameters:
        if any(found.edges[name] != probed[0].edges[name] for found in probed[1:]):
            reasons.setdefault(name, "how often it is used depends on the data")
    uses = []
    for number in range(len(patterns)):
        for role, argument in probed[0].calls[number].arguments.items():
            found, problem = _layout([(each.layouts[number][role], each.calls[number]) for each in probed])
            needless = set(argument.sources) & set(unused)
            if needless:
                problem = f"made together with {min(needless)}, which the outputs do not depend on"
            if found is None or needless:
                for name in argument.sources:
                    reasons.setdefault(name, problem)
            else:
                call = probed[0].calls[number]
                uses.append(_use(call, number, role, found, sizes[0], all(each.is_output[number] for each in probed)))
    used = {name for use in uses for name in use.sources}
    left = {
        name: reasons.get(name, NO_RULE)
        for name in parameters
        if name not in unused and (name in reasons or name not in used)
    }
    covered = tuple(name for name in parameters if name in used and name not in unused)
    edges = {name: probed[0].edges[name] for name in parameters}
    tracing = Tracing(patterns, tuple(uses), covered, {}, unused, edges, expansions).without(left)
    incomplete = _incomplete(model, parameters, tracing, probes[0])
    return tracing.without(dict.fromkeys(incomplete, "its recorded uses do not add up to its gradient"))


def _expansions(model: FunctionalModel, probes: list[Batch]) -> frozenset[int]:
    """Calls that see parameters alone but return something with a sample axis: its shape depends on the batch size."""
    found: frozenset[int] = frozenset()
    while True:
        made = []
        for batch in probes:
            with recorder_of(model, uses=found) as recorder:
                model(batch)
            made.append(recorder.made)
        differing = [n for n in sorted(made[0]) if any(other.get(n, made[0][n]) != made[0][n] for other in made[1:])]
        if not differing:
            return found
        # What comes after the first is numbered anew once that is a use.
        found |= {differing[0]}


def _gradients(
    model: FunctionalModel,
    parameters: Mapping[str, Tensor],
    probes: list[Batch],
    expansions: frozenset[int],
    *,
    detach: bool,
) -> set[str]:
    """Names of the parameters that autograd finds a way to from the outputs of any probe."""
    reached = set()
    for batch in probes:
        with recorder_of(model, uses=expansions, detach=detach):
            outputs = model(batch)
        if outputs.requires_grad:
            grads = torch.autograd.grad(outputs.sum(), list(parameters.values()), allow_unused=True)
            reached |= {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return reached


def _patterns(probed: list[list[Call]], sizes: list[int]) -> tuple[Pattern, ...] | None:
    """What the calls of all probes have in common; none if they differ by more than the batch size."""
    first = probed[0]
    if any(len(calls) != len(first) for calls in probed[1:]):
        return None
    found = []
    for calls in zip(*probed, strict=True):
        one = calls[0]
        same = all(
            call.name == one.name
            and len(call.shape) == len(one.shape)
            and {r: (a.sources, a.geometry, a.shape, kind_of(a.form)) for r, a in call.arguments.items()}
            == {r: (a.sources, a.geometry, a.shape, kind_of(a.form)) for r, a in one.arguments.items()}
            for call in calls[1:]
        )
        shape = [_size(axis, sizes) for axis in zip(*(call.shape for call in calls), strict=True)] if same else [None]
        if any(axis is None for axis in shape):
            return None
        found.append(Pattern(one.name, _sources(one), tuple(axis for axis in shape if axis is not None)))
    return tuple(found)


def _size(axis: tuple[int, ...], sizes: list[int]) -> tuple[int, int] | None:
    """``(size, 0)`` of an axis that is the same in all probes, ``(0, multiple)`` of one that grows with the batch."""
    if len(set(axis)) == 1:
        return axis[0], 0
    multiples = {divmod(length, size) for length, size in zip(axis, sizes, strict=True)}
    return (0, min(multiples)[0]) if len(multiples) == 1 and min(multiples)[1] == 0 else None


def _use(call: Call, number: int, role: str, layout: Layout, num_samples: int, is_output: bool) -> Use:
    argument = call.arguments[role]
    form = argument.form
    with torch.no_grad():
        d = form.cotangents(call.blank())
    rows, width = d.shape[: form.row_dims], d.shape[form.row_dims :]
    groups, n_in, n_out, order = 1, 0, width.numel(), ()
    if isinstance(form, Outer):
        groups, n_out, order = width[0], width[1:].numel(), form.order
        n_in = form.inputs().shape[form.row_dims + 1 :].numel()
    return Use(
        call=number,
        role=role,
        function=call.name,
        kind=kind_of(form),
        sources=argument.sources,
        is_parameter=argument.is_parameter,
        geometry=argument.geometry,
        shape=argument.shape,
        layout=layout,
        num_positions=rows.numel() // num_samples,
        groups=groups,
        n_in=n_in,
        n_out=n_out,
        order=order,
        is_output=is_output,
    )


def _layout(found: list[tuple[set[Layout], Call]]) -> tuple[Layout | None, str]:
    """The one layout that all probes allow, or why there is none."""
    if any(call.input_was_changed() for _, call in found):
        return None, "an input was changed in place after its use"
    candidates = set.intersection(*(layouts for layouts, _ in found))
    if len(candidates) == 1:
        return candidates.pop(), ""
    what = "no fixed layout" if not candidates else "more than one possible layout"
    return None, f"the rows of a use have {what} of samples"


@dataclass(frozen=True)
class _Probed:
    """What one probe says: the calls, the layouts that the rows of each argument allow, the edges to parameters."""

    calls: list[Call]
    layouts: list[dict[str, set[Layout]]]
    is_output: list[bool]
    edges: dict[str, int]


def _probe(model: FunctionalModel, expansions: frozenset[int], batch: Batch, num_samples: int) -> _Probed:
    """Pull back one sample at a time and see which rows of each call it reaches; count the edges to parameters."""
    with recorder_of(model, uses=expansions) as recorder:
        outputs = model(batch)
    calls = recorder.calls
    edges = count_edges(outputs, model.parameters())
    owners = [_Owners(call) for call in calls]
    live = [(number, call.edge) for number, call in enumerate(calls) if call.edge is not None]
    generator = torch.Generator().manual_seed(0)
    covectors = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    for sample in range(num_samples if outputs.requires_grad and live else 0):
        seed = torch.zeros_like(outputs)
        seed[sample] = covectors[sample]
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, [edge for _, edge in live], grad_outputs=seed, retain_graph=True, allow_unused=True
        )
        for (number, _), grad in zip(live, grads, strict=True):
            if grad is not None:
                owners[number].add(sample, grad.reshape(calls[number].shape))
    changed = _changed_inputs(model, expansions, batch, calls)
    layouts = [
        owner.layouts(call, change, num_samples) for owner, call, change in zip(owners, calls, changed, strict=True)
    ]
    return _Probed(calls, layouts, [_is_output(call, outputs) for call in calls], edges)


def _is_output(call: Call, outputs: Tensor) -> bool:
    if call.edge is None or not outputs.requires_grad:
        return False
    edge = get_gradient_edge(outputs)
    return call.edge.node is edge.node and call.edge.output_nr == edge.output_nr


class _Owners:
    """Which sample each row of a call belongs to, as far as gradients have reached it."""

    def __init__(self, call: Call) -> None:
        self._forms = {role: argument.form for role, argument in call.arguments.items()}
        self._rows = {role: self._touched(role, call.blank()).shape for role in self._forms}
        # Roles with the same rows share what is known of them.
        self._owners = {rows: torch.full(rows, -1) for rows in self._rows.values()}
        self._shared = dict.fromkeys(self._owners, False)

    def _touched(self, role: str, grad: Tensor) -> Tensor:
        form = self._forms[role]
        with torch.no_grad():
            values = form.cotangents(grad)
        return (values.reshape(*values.shape[: form.row_dims], -1) != 0).any(dim=-1).cpu()

    def add(self, sample: int, grad: Tensor) -> None:
        """Note the rows that the gradient of one sample's outputs reaches."""
        for role, rows in self._rows.items():
            touched = self._touched(role, grad)
            self._shared[rows] |= bool(((self._owners[rows] >= 0) & (self._owners[rows] != sample) & touched).any())
            self._owners[rows][touched] = sample

    def layouts(self, call: Call, changed: dict[str, Tensor], num_samples: int) -> dict[str, set[Layout]]:
        """Per role, every layout that agrees with what is known."""
        evidence = {rows: torch.zeros(rows, dtype=torch.bool) for rows in self._owners}
        for role, rows in self._rows.items():
            if role in changed:
                evidence[rows] |= changed[role]
        return {
            role: set() if self._shared[rows] else _layouts(self._owners[rows], evidence[rows], num_samples)
            for role, rows in self._rows.items()
        }


def _layouts(owners: Tensor, changed: Tensor, num_samples: int) -> set[Layout]:
    """Every layout that agrees with the rows whose owner is known; a row that changed is the last sample's."""
    found = set()
    known = owners >= 0
    for axis, length in enumerate(owners.shape):
        positions, rest = divmod(length, num_samples)
        if rest or not positions:
            continue
        for trailing in (d for d in range(1, positions + 1) if positions % d == 0):
            along = torch.arange(length) // trailing % num_samples
            owner = along.reshape([-1 if each == axis else 1 for each in range(owners.ndim)]).expand_as(owners)
            if bool((owner[known] == owners[known]).all()) and bool((owner[changed] == num_samples - 1).all()):
                found.add(Layout(axis, positions // trailing, trailing))
    return found


def _changed_inputs(
    model: FunctionalModel, expansions: frozenset[int], batch: Batch, calls: list[Call]
) -> list[dict[str, Tensor]]:
    """Per call and role, the rows of its input that change when the last sample is replaced by the first."""
    replaced = (
        {k: _with_last_replaced(v) for k, v in batch.items()} if isinstance(batch, dict) else _with_last_replaced(batch)
    )
    with recorder_of(model, uses=expansions) as recorder:
        model(replaced)
    others = recorder.calls
    found: list[dict[str, Tensor]] = []
    for number, call in enumerate(calls):
        found.append({})
        if len(others) != len(calls) or others[number].shape != call.shape or call.input_was_changed():
            continue
        for role, argument in call.arguments.items():
            other = others[number].arguments.get(role)
            if argument.form.inputs is not None and other is not None and other.form.inputs is not None:
                found[-1][role] = _rows_that_differ(argument, argument.form.inputs(), other.form.inputs())
    return found


def _rows_that_differ(argument: Argument, values: Tensor, others: Tensor) -> Tensor:
    if isinstance(argument.form, Lookup):
        return (values != others).cpu()
    values, others = (value if value.is_floating_point() else value.to(torch.float64) for value in (values, others))
    rows = values.shape[: argument.form.row_dims]
    # Rounding may differ where nothing else does; a row that depends on the sample changes by far more.
    moved = (values - others).reshape(*rows, -1).abs().amax(dim=-1)
    return (moved > 1e-3 * values.abs().amax()).cpu()


def _with_last_replaced(values: Tensor) -> Tensor:
    replaced = values.clone()
    replaced[-1] = values[0]
    return replaced


def _incomplete(model: FunctionalModel, parameters: Mapping[str, Tensor], tracing: Tracing, batch: Batch) -> list[str]:
    """Covered parameters whose gradient is not what their uses add up to, as where a model differentiates itself.

    Rounding is far below what is tolerated here; a missing use is far above it.
    """
    if not tracing.covered:
        return []
    outputs, calls = tracing.record(model, batch)
    live = {number: call.edge for number, call in enumerate(calls) if call.edge is not None}
    generator = torch.Generator().manual_seed(1)
    covectors = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    covered = [parameters[name] for name in tracing.covered]
    found: Sequence[Tensor | None] = torch.autograd.grad(
        outputs, [*covered, *live.values()], covectors, allow_unused=True, retain_graph=True
    )
    exact = {
        name: torch.zeros_like(parameter) if grad is None else grad.to_dense()
        for name, parameter, grad in zip(tracing.covered, covered, found, strict=False)
    }
    grads = dict(zip(live, found[len(covered) :], strict=True))
    left = {name: grad.clone() for name, grad in exact.items()}
    for use in tracing.uses:
        grad = grads.get(use.call)
        if grad is None:
            continue
        argument = calls[use.call].arguments[use.role]
        with torch.no_grad():
            total = total_gradient(argument.form, grad.reshape(calls[use.call].shape), argument.shape)
        sources = [parameters[name] for name in use.sources]
        parts = torch.autograd.grad([argument.edge], sources, [total.to(outputs.dtype)], retain_graph=True)
        for name, part in zip(use.sources, parts, strict=True):
            left[name] -= part.to_dense()
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
