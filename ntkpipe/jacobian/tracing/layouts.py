"""Which rows of a use belong to which sample, found on probe batches by pulling back one sample at a time."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ntkpipe.jacobian.fallback import batch_size, take
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.tracing.recorder import Argument, Call, watch
from ntkpipe.jacobian.tracing.rules.form import Lookup
from ntkpipe.jacobian.tracing.uses import Layout

_SHARED = -2  # owner of a row that several samples reach, which no layout allows; -1 where none does


@dataclass(frozen=True)
class Probed:
    """What one probe batch shows."""

    calls: list[Call]
    layouts: list[dict[str, set[Layout]]]  # per call and role, the layouts that the rows allow
    is_output: list[bool]  # per call, whether it returned the model's output
    edges: dict[str, int]  # see :func:`count_edges`


def probe(model: FunctionalModel, expansions: frozenset[int], batch: Batch, num_samples: int) -> Probed:
    """Pull back one sample at a time to see which rows of each call it reaches; count the edges to parameters."""
    outputs, recorder = watch(model, batch, expansions)
    calls = recorder.calls
    owners = [_Owners(call) for call in calls]
    live = {number: call.edge for number, call in enumerate(calls) if call.edge is not None}
    covectors = draw_covectors(outputs, seed=0)
    for sample in range(num_samples if outputs.requires_grad and live else 0):
        only = torch.zeros_like(outputs)
        only[sample] = covectors[sample]
        grads = torch.autograd.grad(outputs, list(live.values()), only, retain_graph=True, allow_unused=True)
        for number, grad in zip(live, grads, strict=True):
            if grad is not None:
                owners[number].add(sample, grad.reshape(calls[number].shape))
    changed = _changed_inputs(model, expansions, batch, calls)
    layouts = [owner.layouts(change, num_samples) for owner, change in zip(owners, changed, strict=True)]
    edges = count_edges(outputs, model.parameters())
    return Probed(calls, layouts, [is_output_of(call, outputs) for call in calls], edges)


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


def _changed_inputs(
    model: FunctionalModel, expansions: frozenset[int], batch: Batch, calls: list[Call]
) -> list[dict[str, Tensor]]:
    """Per call and role, the rows of its input that change when the last sample is replaced by the first."""
    others = watch(model, take(batch, [*range(batch_size(batch) - 1), 0]), expansions)[1].calls
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
