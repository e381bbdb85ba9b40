"""Which rows of a use belong to which sample, found on probe batches by pulling back one sample at a time."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ntkpipe.jacobian.tracing.recorder import Argument, Call
from ntkpipe.jacobian.tracing.rules.form import Lookup
from ntkpipe.jacobian.tracing.uses import Layout


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
        found = torch.autograd.grad(self.outputs, sources, covectors, retain_graph=keeps_graph, allow_unused=True)
        pairs = zip(edges, found, strict=False)
        return {n: grad.reshape(self.calls[n].shape) for n, grad in pairs if grad is not None}, found[len(edges) :]

    def layouts(self, other: "Pass | None") -> list[dict[str, set[Layout]]]:
        """Per call and role, the layouts that its rows allow; ``other`` had the last sample replaced."""
        rows = [_Rows(call, self.num_samples) for call in self.calls]
        covectors = draw_covectors(self.outputs, seed=0)
        for sample in range(self.num_samples):
            only = torch.zeros_like(self.outputs)
            only[sample] = covectors[sample]
            for number, grad in self.pulled(only)[0].items():
                rows[number].reached(sample, grad)
        if other is not None and len(other.calls) == len(self.calls):
            for mine, call, twin in zip(rows, self.calls, other.calls, strict=True):
                if twin.shape == call.shape and not call.input_was_changed():
                    mine.compare(twin)
        return [mine.layouts() for mine in rows]

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


class _Rows:
    """The rows of a call, and the layouts that agree with what has been seen of them."""

    def __init__(self, call: Call, num_samples: int) -> None:
        self._arguments, self._last = call.arguments, num_samples - 1
        self._shapes = {role: self._touched(role, call.blank()).shape for role in call.arguments}
        # By shape, which roles may share: each layout, and which sample every row belongs to by it.
        self._owners = {shape: dict(_possible(shape, num_samples)) for shape in self._shapes.values()}

    def _touched(self, role: str, grad: Tensor) -> Tensor:
        form = self._arguments[role].form
        with torch.no_grad():
            values = form.cotangents(grad)
        return (values.reshape(*values.shape[: form.row_dims], -1) != 0).any(dim=-1).cpu()

    def _belong(self, role: str, rows: Tensor, sample: int) -> None:
        shape = self._shapes[role]
        owners = self._owners[shape].items()
        self._owners[shape] = {layout: owner for layout, owner in owners if bool((owner[rows] == sample).all())}

    def reached(self, sample: int, grad: Tensor) -> None:
        """Rows that the gradient of a sample reaches belong to it."""
        for role in self._shapes:
            self._belong(role, self._touched(role, grad), sample)

    def compare(self, twin: Call) -> None:
        """Rows whose input is another one with another last sample belong to that."""
        for role, argument in self._arguments.items():
            other = twin.arguments.get(role)
            if argument.form.inputs is not None and other is not None and other.form.inputs is not None:
                rows = _rows_that_differ(argument, argument.form.inputs(), other.form.inputs())
                self._belong(role, rows, self._last)

    def layouts(self) -> dict[str, set[Layout]]:
        """What is left, per role."""
        return {role: set(self._owners[shape]) for role, shape in self._shapes.items()}


def _possible(rows: torch.Size, num_samples: int) -> Iterator[tuple[Layout, Tensor]]:
    """Every layout of rows of a shape, and the sample of each row by it."""
    for axis, length in enumerate(rows):
        positions = length // num_samples if length % num_samples == 0 else 0
        for trailing in (d for d in range(1, positions + 1) if positions % d == 0):
            along = torch.arange(length) // trailing % num_samples
            owner = along.reshape([-1 if each == axis else 1 for each in range(len(rows))]).expand(rows)
            yield Layout(axis, positions // trailing, trailing), owner


def _rows_that_differ(argument: Argument, values: Tensor, others: Tensor) -> Tensor:
    if isinstance(argument.form, Lookup):
        return (values != others).cpu()
    values, others = (value if value.is_floating_point() else value.to(torch.float64) for value in (values, others))
    rows = values.shape[: argument.form.row_dims]
    # Rounding may differ where nothing else does; a row that depends on the sample changes by far more.
    moved = (values - others).reshape(*rows, -1).abs().amax(dim=-1)
    return (moved > 1e-3 * values.abs().amax()).cpu()


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
