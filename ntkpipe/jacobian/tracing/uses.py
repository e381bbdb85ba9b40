"""One use of a parameter, the same in every batch, and the Jacobians of samples by it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import add_rows
from ntkpipe.jacobian.tracing.recorder import Argument, Call, Operand
from ntkpipe.jacobian.tracing.rules.form import Form, Lookup, Outer, Scale

_PULLED_BYTES = 64 * 2**20  # Jacobians that are pulled back through a computation of parameters at a time


@dataclass(frozen=True, order=True)
class Layout:
    """Where the samples are among the rows: axis ``axis`` of the rows is (leading, samples, trailing)."""

    # A batch-first layer over T tokens has (0, 1, 1) and an axis of T behind it, a time-first one (1, 1, 1); where
    # samples and tokens share an axis, trailing or leading is T.
    axis: int
    leading: int
    trailing: int

    def split(self, values: Tensor, num_samples: int) -> Tensor:
        """Values (*rows, *rest) as (samples, *positions, *rest), without a copy."""
        apart: Tensor = values.unflatten(self.axis, (self.leading, num_samples, self.trailing))
        return apart.movedim(self.axis + 1, 0)


@dataclass(frozen=True)
class Use(Operand):
    """One argument of one call that is a parameter, or is computed from parameters."""

    call: int  # number of the call among those that are recorded
    role: str  # which argument
    function: str  # name of the torch function
    kind: str  # which form: `outer`, `scale` or `lookup`
    layout: Layout
    num_positions: int  # rows of a sample, T
    groups: int
    n_in: int  # width of the inputs in each group; 0 for a scale or a lookup
    n_out: int  # width of the cotangents in each group
    order: tuple[int, ...]  # of the Jacobian's elements, as in :class:`~ntkpipe.jacobian.tracing.rules.form.Outer`
    is_output: bool  # whether the call's output is the model's, so that its cotangents are the covectors themselves

    @property
    def numel(self) -> int:
        """Elements of the argument."""
        return prod(self.shape)

    def inputs(self, call: Call, num_samples: int) -> Tensor:
        """Inputs by sample, a strided view: (n, *positions, groups, *in), (n, *positions, n_out) or (n, *positions)."""
        form = call.arguments[self.role].form
        assert form.inputs is not None
        with torch.no_grad():
            return self.layout.split(form.inputs(), num_samples)

    def cotangents(self, call: Call, grad: Tensor, num_samples: int) -> Tensor:
        """Cotangents by sample, a strided view: (n, *positions, groups, *out) or (n, *positions, n_out)."""
        return self.layout.split(call.arguments[self.role].form.cotangents(grad), num_samples)

    def jacobian(self, call: Call, grad: Tensor, num_samples: int, places: Sequence[int] | None = None) -> Tensor:
        """Jacobians of the samples, or those at some places, by the argument, (n, *shape), in the gradient's dtype."""
        form, d = call.arguments[self.role].form, self.cotangents(call, grad, num_samples)
        inputs = None if form.inputs is None else self.inputs(call, num_samples)
        if places is not None:
            d, inputs, num_samples = d[places], None if inputs is None else inputs[places], len(places)
        return _summed(form, d, inputs, (num_samples, form.row_dims + 2), self.shape)


def _summed(form: Form, d: Tensor, inputs: Tensor | None, rows: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Jacobians (n, *shape), summed over positions; ``rows`` is n and how many leading axes number the rows."""
    num_samples, lead = rows
    num_positions = d.shape[:lead].numel() // num_samples
    if isinstance(form, Scale):
        d = d if inputs is None else d * inputs
        return d.reshape(num_samples, num_positions, -1).sum(dim=1).reshape(num_samples, *shape)
    assert inputs is not None
    if isinstance(form, Lookup):
        return looked_up(inputs.reshape(num_samples, -1).long(), d.reshape(num_samples, num_positions, -1), shape)
    a, d = (
        values.reshape(num_samples, num_positions, values.shape[lead], values.shape[lead + 1 :].numel())
        for values in (inputs.to(d.dtype), d)
    )
    assert isinstance(form, Outer)
    return form.arrange(d.permute(0, 2, 3, 1) @ a.transpose(1, 2))


def looked_up(indices: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Jacobians (n, *shape) of a table: rows (n, T, width) added up at their indices (n, T)."""
    num_samples, found = len(rows), rows.new_zeros((len(rows), *shape))
    if rows.device.type == "cpu":
        return found.scatter_add_(1, indices[:, :, None].expand_as(rows), rows)
    # One long table of all samples: scatter_add_ adds in any order there.
    places = indices + shape[0] * torch.arange(num_samples, device=rows.device)[:, None]
    add_rows(found.flatten(0, 1), 0, places.reshape(-1), rows.flatten(0, 1))
    return found


def total_gradient(form: Form, grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gradient by an argument, summed over all rows."""
    inputs = None if form.inputs is None else form.inputs()
    return _summed(form, form.cotangents(grad), inputs, (1, form.row_dims), shape)[0]


def pull_back(argument: Argument, parameters: Mapping[str, Tensor], rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Pull Jacobians (m, *shape) by an argument back to the parameters that it is computed from, by autograd."""
    if argument.is_parameter and argument.geometry is None:
        yield argument.sources[0], rows.reshape(len(rows), -1)
        return
    sources = [parameters[name] for name in argument.sources]
    step = max(1, _PULLED_BYTES // max(1, rows[0].nbytes))
    parts = [_pulled(argument, sources, chunk) for chunk in rows.split(step)]
    for position, name in enumerate(argument.sources):
        yield name, torch.cat([part[position] for part in parts])


def _pulled(argument: Argument, sources: list[Tensor], rows: Tensor) -> list[Tensor]:
    def grads(outputs: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            [argument.edge], sources, [outputs], retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    try:
        found = grads(rows, batched=True)
    except RuntimeError:  # an operation without a batching rule
        single = [grads(row, batched=False) for row in rows]
        found = tuple(None if all_rows[0] is None else torch.stack(all_rows) for all_rows in zip(*single, strict=True))
    return [
        rows.new_zeros((len(rows), source.numel())) if grad is None else grad.reshape(len(rows), -1)
        for grad, source in zip(found, sources, strict=True)
    ]
