"""Which rows of a use belong to which sample, found on probe batches by pulling back one sample at a time."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ntkpipe.jacobian.tracing.recorder import Argument, Call
from ntkpipe.jacobian.tracing.rules.form import Lookup
from ntkpipe.jacobian.tracing.uses import Layout

_SHARED = -2  # owner of a row that several samples reach, which no layout allows; -1 where none does


@dataclass(frozen=True)
class Pass:
    """One recorded forward pass."""

    outputs: Tensor  # with their graph
    calls: list[Call]

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.outputs)

    def layouts(self, other: "Pass | None") -> list[dict[str, set[Layout]]]:
        """Per call and role, the layouts that its rows allow; ``other`` had the last sample replaced."""
        owners = [_Owners(call) for call in self.calls]
        live = {number: call.edge for number, call in enumerate(self.calls) if call.edge is not None}
        covectors = draw_covectors(self.outputs, seed=0)
        for sample in range(self.num_samples if self.outputs.requires_grad and live else 0):
            only = torch.zeros_like(self.outputs)
            only[sample] = covectors[sample]
            grads = torch.autograd.grad(self.outputs, list(live.values()), only, retain_graph=True, allow_unused=True)
            for number, grad in zip(live, grads, strict=True):
                if grad is not None:
                    owners[number].add(sample, grad.reshape(self.calls[number].shape))
        twins = [None] * len(self.calls) if other is None or len(other.calls) != len(self.calls) else other.calls
        changed = [_changed(call, twin) for call, twin in zip(self.calls, twins, strict=True)]
        return [owner.layouts(change, self.num_samples) for owner, change in zip(owners, changed, strict=True)]

    def reached(self, parameters: Mapping[str, Tensor]) -> set[str]:
        """Parameters that a gradient of the outputs arrives at."""
        if not self.outputs.requires_grad:
            return set()
        grads = torch.autograd.grad(self.outputs.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        return {name for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def draw_covectors(outputs: Tensor, seed: int) -> Tensor:
    """Random covectors, one for each sample, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)


def is_output_of(call: Call, outputs: Tensor) -> bool:
    """Whether what a call returned is the model's output itself."""
    if call.edge is None or not outputs.requires_grad:
        return False
    edge = get_gradient_edge(outputs)
    return call.edge.node is edge.node and call.edge.output_nr == edge.output_nr


class _Owners:
    """Which sample each row of a call belongs to, as far as gradients have reached it."""

    def __init__(self, call: Call) -> None:
        self._forms = {role: argument.form for role, argument in call.arguments.items()}
        self._rows = {role: self._touched(role, call.blank()).shape for role in self._forms}
        self._owners = {rows: torch.full(rows, -1) for rows in self._rows.values()}  # by shape, shared by roles

    def _touched(self, role: str, grad: Tensor) -> Tensor:
        form = self._forms[role]
        with torch.no_grad():
            values = form.cotangents(grad)
        return (values.reshape(*values.shape[: form.row_dims], -1) != 0).any(dim=-1).cpu()

    def add(self, sample: int, grad: Tensor) -> None:
        for role, rows in self._rows.items():
            touched, owners = self._touched(role, grad), self._owners[rows]
            owners[touched] = torch.where((owners == -1) | (owners == sample), sample, _SHARED)[touched]

    def layouts(self, changed: dict[str, Tensor], num_samples: int) -> dict[str, set[Layout]]:
        """Per role, every layout that agrees with the owners found, and with the rows that changed."""
        evidence = {rows: torch.zeros(rows, dtype=torch.bool) for rows in self._owners}
        for role, rows_that_changed in changed.items():
            evidence[self._rows[role]] |= rows_that_changed
        return {role: _layouts(self._owners[rows], evidence[rows], num_samples) for role, rows in self._rows.items()}


def _layouts(owners: Tensor, changed: Tensor, num_samples: int) -> set[Layout]:
    """Every layout that agrees with the rows whose owner is known; a row that changed belongs to the last sample."""
    found = set()
    known = owners != -1
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


def _changed(call: Call, other: Call | None) -> dict[str, Tensor]:
    """Per role, the rows of a call's input that change when the last sample is replaced."""
    found: dict[str, Tensor] = {}
    if other is None or other.shape != call.shape or call.input_was_changed():
        return found
    for role, argument in call.arguments.items():
        twin = other.arguments.get(role)
        if argument.form.inputs is not None and twin is not None and twin.form.inputs is not None:
            found[role] = _rows_that_differ(argument, argument.form.inputs(), twin.form.inputs())
    return found


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
