"""Where a model uses its parameters, found by watching torch functions, not by looking at modules.

That a parameter has no uses beside the recorded ones is verified: on probe batches the parameter is detached in the
recorded uses, so that any gradient that still arrives came another way; and the uses must add up to the gradient.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ntkpipe.jacobian.model.gradients import autograd_vjp
from ntkpipe.jacobian.tracing.recorder import Call
from ntkpipe.jacobian.tracing.rules.form import Form, Lookup, Outer
from ntkpipe.jacobian.tracing.uses import Layout, Use, pull_back, total_gradient


@dataclass(frozen=True)
class Pass:
    """One recorded forward pass."""

    outputs: Tensor  # with their graph
    calls: list[Call]

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.outputs)

    def pulled(
        self,
        covectors: Tensor,
        others: Sequence[Tensor] = (),
        numbers: Iterable[int] | None = None,
        *,
        keeps_graph: bool = True,
    ) -> tuple[dict[int, Tensor], Sequence[Tensor | None]]:
        """Gradients at the outputs of calls by their number, where any arrive, and at other tensors."""
        numbers = range(len(self.calls)) if numbers is None else numbers
        edges = {number: edge for number in numbers if (edge := self.calls[number].edge) is not None}
        sources: list[Any] = [*edges.values(), *others]
        if not self.outputs.requires_grad or not sources:
            return {}, [None] * len(others)
        found = autograd_vjp(self.outputs, covectors, sources, retain_graph=keeps_graph, allow_unused=True)
        pairs = zip(edges, found, strict=False)
        return {n: grad.reshape(self.calls[n].shape) for n, grad in pairs if grad is not None}, found[len(edges) :]

    def layouts(self, other: "Pass | None", samples: Iterable[int]) -> list[dict[str, set[Layout]]]:
        """Per call and role, the layouts that the rows of samples allow; ``other`` had the last sample replaced."""
        owned = [list[tuple[Tensor, int]]() for _ in self.calls]  # rows that belong to a sample
        covectors = draw_covectors(self.outputs, seed=0)
        for sample in samples:
            only = torch.zeros_like(self.outputs)
            only[sample] = covectors[sample]
            for number, grad in self.pulled(only)[0].items():
                forms = [argument.form for argument in self.calls[number].arguments.values()]
                owned[number] += [(_rows_reached(form, grad), sample) for form in forms]
        if other is not None and len(other.calls) == len(self.calls):
            for rows, call, twin in zip(owned, self.calls, other.calls, strict=True):
                if twin.shape == call.shape and not call.input_was_changed():
                    rows += [(differing, self.num_samples - 1) for differing in _rows_that_differ(call, twin)]
        return [self._allowed(call, rows) for call, rows in zip(self.calls, owned, strict=True)]

    def _allowed(self, call: Call, owned: Sequence[tuple[Tensor, int]]) -> dict[str, set[Layout]]:
        """Per role, the layouts by which all rows belong to their sample; roles share what is known by shape."""
        shapes, found = {role: _rows_reached(a.form, call.blank()).shape for role, a in call.arguments.items()}, {}
        for shape in set(shapes.values()):
            same = [(rows, sample) for rows, sample in owned if rows.shape == shape]
            found[shape] = {
                layout
                for layout, owner in _possible(shape, self.num_samples)
                if all(bool((owner[rows] == sample).all()) for rows, sample in same)
            }
        return {role: found[shape] for role, shape in shapes.items()}

    def reached(self, parameters: Mapping[str, Tensor]) -> set[str]:
        """Parameters that a gradient of the outputs arrives at."""
        grads = self.pulled(torch.ones_like(self.outputs), list(parameters.values()), ())[1]
        return {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}

    def returns(self, number: int) -> bool:
        """Whether what a call returned is the model's output itself."""
        edge = self.calls[number].edge
        if edge is None or not self.outputs.requires_grad:
            return False
        last = get_gradient_edge(self.outputs)
        return edge.node is last.node and edge.output_nr == last.output_nr


def draw_covectors(outputs: Tensor, seed: int) -> Tensor:
    """Random covectors, one for each sample, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def _rows_reached(form: Form, grad: Tensor) -> Tensor:
    values = form.cotangents(grad)
    return (values.reshape(*values.shape[: form.row_dims], -1) != 0).any(dim=-1).cpu()


def _possible(rows: torch.Size, num_samples: int) -> Iterator[tuple[Layout, Tensor]]:
    """Every layout of rows of a shape, and the sample of each row by it."""
    for axis, length in enumerate(rows):
        positions = length // num_samples if length % num_samples == 0 else 0
        for trailing in (d for d in range(1, positions + 1) if positions % d == 0):
            along = torch.arange(length) // trailing % num_samples
            owner = along.reshape([-1 if each == axis else 1 for each in range(len(rows))]).expand(rows)
            yield Layout(axis, positions // trailing, trailing), owner


def _rows_that_differ(call: Call, twin: Call) -> Iterator[Tensor]:
    """Rows of each argument whose input is another one."""
    for role, argument in call.arguments.items():
        form, other = argument.form, twin.arguments[role].form if role in twin.arguments else None
        if form.inputs is None or other is None or other.inputs is None:
            continue
        values, others = form.inputs(), other.inputs()
        if isinstance(form, Lookup):
            yield (values != others).cpu()
            continue
        values, others = (each if each.is_floating_point() else each.double() for each in (values, others))
        # Rounding may differ where nothing else does; a row that depends on the sample changes by far more.
        moved = (values - others).reshape(*values.shape[: form.row_dims], -1).abs().amax(dim=-1)
        yield (moved > 1e-3 * values.abs().amax()).cpu()


def count_edges(outputs: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """How many edges of the autograd graph of ``outputs`` lead to each parameter."""
    counts = Counter(id(leaf) for leaf in leaves(outputs))
    return {name: counts[id(parameter)] for name, parameter in parameters.items()}


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


NO_RULE, NOT_WANTED = "used by an operation without a rule", "structure was switched off"
DEPENDS_ON_DATA = "the operations of the forward pass depend on the data"


@dataclass(frozen=True)
class Pattern:
    """What a recorded call looks like in every batch."""

    fixed: tuple[Any, ...]  # see :func:`_fixed`
    shape: tuple[tuple[int, int], ...]  # per axis of the output, its fixed size and 0, or 0 and a multiple of samples

    @classmethod
    def of(cls, call: Call, num_samples: int, other: Call) -> "Pattern":
        """The only pattern that a call and its twin in a batch of another size may both follow."""
        axes = zip(call.shape, other.shape, strict=False)
        return cls(_fixed(call), tuple((size, 0) if size == twin else (0, size // num_samples) for size, twin in axes))

    def matches(self, call: Call, num_samples: int) -> bool:
        """Whether a call of another batch is the same."""
        sizes = tuple(size + multiple * num_samples for size, multiple in self.shape)
        return call.shape == sizes and _fixed(call) == self.fixed


def _follows(recorded: Pass, patterns: Sequence[Pattern]) -> bool:
    calls = recorded.calls
    return len(calls) == len(patterns) and all(map(Pattern.matches, patterns, calls, repeat(recorded.num_samples)))


def _fixed(call: Call) -> tuple[Any, ...]:
    """The function, the number of axes, and what each argument is, all of which no batch may change."""
    arguments = {r: (a.sources, a.geometry, a.shape, type(a.form)) for r, a in call.arguments.items()}
    return call.name, len(call.shape), arguments


@dataclass(frozen=True)
class Tracing:
    """How a model uses its parameters, in every batch."""

    patterns: tuple[Pattern, ...]  # every recorded call, in order
    uses: tuple[Use, ...]  # those of covered parameters, one for each such argument of a call
    covered: tuple[str, ...]  # parameters whose every use has a rule
    fallback: dict[str, str]  # parameters that are left to plain `torch.func`, with the reason
    unused: tuple[str, ...]  # parameters that the outputs do not depend on
    edges: Mapping[str, int] = field(default_factory=dict)  # of the graph to each parameter; more are untraced uses
    expansions: frozenset[int] = frozenset()  # as in :class:`~ntkpipe.jacobian.tracing.recorder.Recorder`

    def matches(self, recorded: Pass, parameters: Mapping[str, Tensor]) -> bool:
        """Whether a forward pass has the calls, and the edges to parameters, that were traced."""
        edges = count_edges(recorded.outputs, parameters)
        return (
            all(edges[name] == self.edges[name] for name in self.covered)
            and _follows(recorded, self.patterns)
            and all(recorded.returns(use.call) for use in self.uses if use.is_output)
        )

    def without(self, names: Mapping[str, str]) -> "Tracing":
        """The same with parameters, and those used together with them, moved to the fallback for a reason."""
        shared = [(use, names[source]) for use in self.uses for source in use.sources if source in names]
        moved = {**{name: why for use, why in shared for name in use.sources}, **names}
        return replace(
            self,
            uses=tuple(use for use in self.uses if not moved.keys() & set(use.sources)),
            covered=tuple(name for name in self.covered if name not in moved),
            fallback={**self.fallback, **moved},
            unused=tuple(name for name in self.unused if name not in moved),
        )

    def without_use(self, names: Iterable[str]) -> "Tracing":
        """The same where parameters of the fallback are among those that the outputs do not depend on."""
        gone = {*names}
        left = {name: why for name, why in self.fallback.items() if name not in gone}
        return replace(self, fallback=left, unused=(*self.unused, *(n for n in self.fallback if n in gone)))


def nothing_traced(names: Iterable[str], reason: str) -> Tracing:
    """A tracing that leaves every parameter to the fallback."""
    return Tracing((), (), (), dict.fromkeys(names, reason), ())


def next_expansion(*made: Mapping[int, tuple[torch.Size, ...]]) -> frozenset[int]:
    """The first call that sees parameters alone but returns something with a sample axis: its shape differs."""
    differing = [n for n in sorted(made[0]) if any(other.get(n, made[0][n]) != made[0][n] for other in made[1:])]
    return frozenset(differing[:1])  # calls after it are numbered anew once it is a use


def trace(
    parameters: Mapping[str, Tensor],
    recorded: Sequence[Pass],
    reached: Collection[str],
    expansions: frozenset[int],
    *,
    is_known: bool = False,
) -> Tracing:
    """Find the uses of parameters in three recorded passes; gradients reach the parameters in ``reached``.

    Two passes are of unlike sizes and orders. The third differs from the first in its last sample, and parameters were
    detached in its recorded uses. If it ``is_known`` that a row has one sample, shapes or one sample say which.
    """
    first, second, cut = recorded
    passes = first, second
    unused = tuple(name for name in parameters if name not in reached)
    calls = zip(first.calls, second.calls, strict=False)
    patterns = tuple(Pattern.of(call, first.num_samples, other) for call, other in calls)
    if not all(_follows(each, patterns) for each in passes):
        return nothing_traced(parameters, DEPENDS_ON_DATA)  # what few samples do not use, others may
    layouts = list[dict[str, set[Layout]]]()
    for few, others in ((0, 0), (1, 0)) if is_known else ((first.num_samples, second.num_samples),):
        both = zip(first.layouts(cut, range(few)), second.layouts(None, range(others)), strict=True)
        layouts = [{role: one[role] & other[role] for role in one} for one, other in both]
        if all(len(found) == 1 for each in layouts for found in each.values()):  # by shapes alone
            break
    edges = [count_edges(each.outputs, parameters) for each in passes]
    varying = [name for name in parameters if len({each[name] for each in edges}) > 1]
    reasons = dict.fromkeys(varying, "how often it is used depends on the data")
    reasons |= dict.fromkeys(cut.reached(parameters), NO_RULE)
    uses = []
    for number, call in enumerate(first.calls):
        for role, argument in call.arguments.items():
            candidates = layouts[number][role]
            problem = _problem([each.calls[number] for each in passes], candidates)
            needless = set(argument.sources) & set(unused)
            if needless:
                problem = f"made together with {min(needless)}, which the outputs do not depend on"
            if problem:
                reasons = {**dict.fromkeys(argument.sources, problem), **reasons}
            else:
                is_output = all(each.returns(number) for each in passes)
                uses.append(_use(call, number, role, candidates.pop(), first.num_samples, is_output))
    live = [name for name in parameters if name not in unused]
    used = {name for use in uses for name in use.sources}
    left = {name: reasons.get(name, NO_RULE) for name in live if name in reasons or name not in used}
    covered = tuple(name for name in live if name in used)
    tracing = Tracing(patterns, tuple(uses), covered, {}, unused, edges[0], expansions).without(left)
    incomplete = _incomplete(second, parameters, tracing)
    return tracing.without(dict.fromkeys(incomplete, "its recorded uses do not add up to its gradient"))


def _use(call: Call, number: int, role: str, layout: Layout, num_samples: int, is_output: bool) -> Use:
    argument = call.arguments[role]
    form = argument.form
    d = form.cotangents(call.blank())
    rows, width = d.shape[: form.row_dims], d.shape[form.row_dims :]
    order: tuple[int, ...] = ()
    groups, n_in, n_out = 1, 0, width.numel()
    if isinstance(form, Outer) and form.inputs is not None:
        groups, n_out, order = width[0], width[1:].numel(), form.order
        n_in = form.inputs().shape[form.row_dims + 1 :].numel()
    return Use(
        argument.sources,
        argument.is_parameter,
        argument.geometry,
        argument.shape,
        call=number,
        role=role,
        function=call.name,
        kind=form.kind,
        layout=layout,
        num_positions=rows.numel() // num_samples,
        groups=groups,
        n_in=n_in,
        n_out=n_out,
        order=order,
        is_output=is_output,
    )


def _problem(calls: list[Call], layouts: Collection[Layout]) -> str:
    if any(call.input_was_changed() for call in calls):
        return "an input was changed in place after its use"
    what = "no fixed layout" if not layouts else "more than one possible layout"
    return "" if len(layouts) == 1 else f"the rows of a use have {what} of samples"


def _incomplete(recorded: Pass, parameters: Mapping[str, Tensor], tracing: Tracing) -> list[str]:
    """Covered parameters whose uses do not add up to their gradient, for example if a model differentiates itself."""
    # Rounding is far below the tolerance, a missing use far above it.
    if not tracing.covered:
        return []
    covered = [parameters[name] for name in tracing.covered]
    grads, found = recorded.pulled(draw_covectors(recorded.outputs, seed=1), covered)
    exact = {
        name: torch.zeros_like(parameter) if grad is None else grad.to_dense()
        for name, parameter, grad in zip(tracing.covered, covered, found, strict=True)
    }
    left = {name: grad.reshape(-1).clone() for name, grad in exact.items()}
    for use in tracing.uses:
        if use.call in grads:
            argument = recorded.calls[use.call].arguments[use.role]
            with torch.no_grad():
                total = total_gradient(argument.form, grads[use.call], argument.shape)
            for name, part in pull_back(argument, parameters, total[None].to(recorded.outputs.dtype)):
                left[name] -= part[0]
    # Smaller gradients are zero but for rounding, as that of a key's bias under softmax.
    whole = sum(float(grad.norm()) ** 2 for grad in exact.values()) ** 0.5
    floor = torch.finfo(recorded.outputs.dtype).eps ** 0.5 * whole
    return [name for name, rest in left.items() if float(rest.norm()) > 0.1 * float(exact[name].norm()) + floor]
