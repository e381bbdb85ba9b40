"""Terms fill pieces: the factors of each batch and covector go to where they are held."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import sizes_of
from ntkpipe.jacobian.representations.factors import Dense, Factor, Late, Pairwise, Table
from ntkpipe.jacobian.representations.terms import Term
from ntkpipe.jacobian.representations.workspace import Workspace
from ntkpipe.jacobian.tracing.recorder import Call
from ntkpipe.jacobian.tracing.uses import OUTER, Use, pull_back

# Gradients at the outputs of calls, by number: one for each of a run of covectors.
Grads = Mapping[int, Sequence[Tensor]]


class Filler(Protocol):
    """Takes the factors of a term, batch by batch and a few covectors at a time, into a piece."""

    def add_inputs(self, calls: list[Call], samples: slice) -> None:
        """A batch has these samples of the piece; called once for a batch."""
        ...

    def add_cotangents(self, calls: list[Call], grads: Grads, covectors: slice, samples: slice) -> None:
        """Some covectors, pulled back to the calls; calls that nothing flows back to are left out."""
        ...

    def factor(self) -> Factor:
        """What is held."""
        ...


def make_filler(
    term: Term, num_samples: int, covectors: Tensor, parameters: Mapping[str, Tensor], workspace: Workspace
) -> Filler:
    """The filler of a term for a piece."""
    if term.representation == "pairwise":
        return _PairwiseFiller(term, num_samples, covectors)
    if term.representation == "late":
        return _LateFiller(term, num_samples, covectors)
    if term.representation == "table":
        return _TableFiller(term, num_samples, covectors)
    matrix = covectors.new_empty((num_samples, len(covectors), term.width))
    return dense_filler(term, matrix, parameters, workspace)


def dense_filler(term: Term, matrix: Tensor, parameters: Mapping[str, Tensor], workspace: Workspace) -> Filler:
    """The filler of a term whose Jacobians go to ``matrix``, shape (n, S, width), perhaps a part of a wider one."""
    if term.representation == "joined":
        return _JoinedFiller(term, matrix, parameters)
    return _DenseFiller(term, matrix, workspace)


class _PairwiseFiller:
    def __init__(self, term: Term, num_samples: int, covectors: Tensor) -> None:
        self._term = term
        first, positions = term.uses[0], term.num_positions
        self._inputs = covectors.new_empty((num_samples, positions, first.n_in))
        self._cotangents = covectors[:, None, None]
        if not term.is_constant:
            self._cotangents = covectors.new_empty((len(covectors), num_samples, positions, first.n_out))

    def add_inputs(self, calls: list[Call], samples: slice) -> None:
        for use, at in _places(self._term):
            _copy(self._inputs[samples, at], use.inputs(calls[use.call], _count(samples)))

    def add_cotangents(self, calls: list[Call], grads: Grads, covectors: slice, samples: slice) -> None:
        for use, at in () if self._term.is_constant else _places(self._term):
            for number, grad in _each(grads, use, covectors):
                _copy_cotangents(self._cotangents[number, samples, at], use, calls, grad)

    def factor(self) -> Factor:
        return Pairwise(self._inputs, self._cotangents, self._term.has_bias, self._term.is_constant)


class _LateFiller:
    def __init__(self, term: Term, num_samples: int, covectors: Tensor) -> None:
        self._term = term
        first, positions = term.uses[0], term.num_positions
        self._inputs = covectors.new_empty((num_samples, first.groups, positions, first.n_in))
        shape = (num_samples, len(covectors), first.groups, positions, first.n_out)
        self._cotangents = covectors.new_empty(shape)

    def add_inputs(self, calls: list[Call], samples: slice) -> None:
        for use, at in _places(self._term):
            target = self._inputs[samples, :, at].transpose(1, 2)
            _copy(target, use.inputs(calls[use.call], _count(samples)))

    def add_cotangents(self, calls: list[Call], grads: Grads, covectors: slice, samples: slice) -> None:
        for use, at in _places(self._term):
            for number, grad in _each(grads, use, covectors):
                target = self._cotangents[samples, number, :, at].transpose(1, 2)
                _copy_cotangents(target, use, calls, grad)

    def factor(self) -> Factor:
        return Late(self._inputs, self._cotangents)


class _TableFiller:
    def __init__(self, term: Term, num_samples: int, covectors: Tensor) -> None:
        self._term = term
        positions, width = term.num_positions, term.uses[0].n_out
        self._indices = torch.empty((num_samples, positions), dtype=torch.int64, device=covectors.device)
        self._cotangents = covectors.new_empty((len(covectors), num_samples, positions, width))

    def add_inputs(self, calls: list[Call], samples: slice) -> None:
        for use, at in _places(self._term):
            _copy(self._indices[samples, at], use.inputs(calls[use.call], _count(samples)))

    def add_cotangents(self, calls: list[Call], grads: Grads, covectors: slice, samples: slice) -> None:
        for use, at in _places(self._term):
            for number, grad in _each(grads, use, covectors):
                _copy_cotangents(self._cotangents[number, samples, at], use, calls, grad)

    def factor(self) -> Factor:
        return Table(self._indices, self._cotangents)


class _DenseFiller:
    """Jacobians multiplied out, or summed, at once."""

    def __init__(self, term: Term, matrix: Tensor, workspace: Workspace) -> None:
        self._term = term
        self._matrix = matrix
        self._workspace = workspace

    def add_inputs(self, calls: list[Call], samples: slice) -> None:
        pass

    def add_cotangents(self, calls: list[Call], grads: Grads, covectors: slice, samples: slice) -> None:
        target = self._matrix[samples, covectors]
        live = [use for use in self._term.uses if use.call in grads]
        if not live:
            target.zero_()
        for number, use in enumerate(live):
            call, found = calls[use.call], grads[use.call]
            if use.kind == OUTER:
                _multiply_out(use, call, found, target, self._workspace, adds=number > 0)
                continue
            for covector, grad in enumerate(found):
                rows = use.jacobian(call, grad, _count(samples)).reshape(_count(samples), -1)
                if number:
                    target[:, covector] += rows
                else:
                    target[:, covector] = rows

    def factor(self) -> Factor:
        return Dense(self._matrix)


def _multiply_out(
    use: Use, call: Call, grads: Sequence[Tensor], target: Tensor, workspace: Workspace, *, adds: bool
) -> None:
    """``target[b, s] = sum_t d_t (x) a_t``, shape (n, s, groups * n_out * n_in); elements in the order of the factors.

    Inputs that are windows are unfolded a few samples at a time, so that they stay in the cache; the covectors of a
    sample are multiplied with them at once.
    """
    n, count = target.shape[:2]
    positions, groups, n_in, n_out = use.num_positions, use.groups, use.n_in, use.n_out
    inputs = use.inputs(call, n)
    cotangents = [use.cotangents(call, grad, n) for grad in grads]
    is_plain = groups == 1 and inputs.dtype == target.dtype and _is_viewable(inputs, n, positions, n_in)
    most = sizes_of(target.device).unfolded_bytes // (target.itemsize * positions * groups * n_in)
    step = n if is_plain and count == 1 else max(1, most)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        size = part.stop - start
        if is_plain:
            a = inputs[part].reshape(size, positions, groups, n_in)
        else:
            a = workspace.take("unfolded", (size, positions, groups, n_in), target)
            _copy(a, inputs[part])
        if count == 1:
            d = cotangents[0][part].reshape(size, positions, 1, groups, n_out).to(target.dtype)
        else:
            d = workspace.take("cotangents", (size, positions, count, groups, n_out), target)
            for number, each in enumerate(cotangents):
                _copy(d[:, :, number], each[part])
        _multiply(d, a, target[part], adds)


def _multiply(d: Tensor, a: Tensor, target: Tensor, adds: bool) -> None:
    """d (n, T, s, groups, n_out) and a (n, T, groups, n_in) to target (n, s, groups * n_out * n_in)."""
    n, positions, count, groups, n_out = d.shape
    n_in = a.shape[3]
    if groups == 1 and target.stride(1) == target.shape[2]:
        rows = d.reshape(n, positions, count * n_out).transpose(1, 2)
        out = (
            target.unflatten(2, (n_out, n_in)).flatten(1, 2) if count > 1 else target[:, 0].unflatten(1, (n_out, n_in))
        )
        torch.baddbmm(out, rows, a[:, :, 0], beta=1.0 if adds else 0.0, out=out)
        return
    found = (d.permute(0, 2, 3, 4, 1) @ a.permute(0, 2, 1, 3)[:, None]).flatten(2)
    if adds:
        target += found
    else:
        target.copy_(found)


def _is_viewable(values: Tensor, *shape: int) -> bool:
    """Whether values can be seen in a shape without a copy."""
    try:
        values.view(shape)
    except RuntimeError:
        return False
    return True


class _JoinedFiller:
    """Jacobians by what was made of parameters, or by several views of one, pulled back to the parameters and added."""

    def __init__(self, term: Term, matrix: Tensor, parameters: Mapping[str, Tensor]) -> None:
        self._term = term
        self._matrix = matrix
        self._parameters = {name: parameters[name] for name in term.parameters}
        widths = [value.numel() for value in self._parameters.values()]
        self._parts = dict(zip(self._parameters, matrix.split(widths, dim=2), strict=True))

    def add_inputs(self, calls: list[Call], samples: slice) -> None:
        pass

    def add_cotangents(self, calls: list[Call], grads: Grads, covectors: slice, samples: slice) -> None:
        self._matrix[samples, covectors] = 0.0
        for use in self._term.uses:
            call = calls[use.call]
            for number, grad in enumerate(grads.get(use.call, ()), covectors.start):
                rows = use.jacobian(call, grad, _count(samples))
                for name, found in pull_back(call.arguments[use.role], self._parameters, rows):
                    self._parts[name][samples, number] += found

    def factor(self) -> Factor:
        return Dense(self._matrix)


def _count(samples: slice) -> int:
    return int(samples.stop - samples.start)


def _places(term: Term) -> list[tuple[Use, slice]]:
    """The uses of a term, and their positions among all of its positions."""
    found, start = [], 0
    for use in term.uses:
        found.append((use, slice(start, start + use.num_positions)))
        start += use.num_positions
    return found


def _each(grads: Grads, use: Use, covectors: slice) -> Iterator[tuple[int, Tensor | None]]:
    """Covectors and their gradients at a use; none where nothing flows back to it."""
    found = grads.get(use.call)
    for position, number in enumerate(range(covectors.start, covectors.stop)):
        yield number, None if found is None else found[position]


def _copy_cotangents(target: Tensor, use: Use, calls: list[Call], grad: Tensor | None) -> None:
    if grad is None:
        target.zero_()
    else:
        _copy(target, use.cotangents(calls[use.call], grad, len(target)))


def _copy(target: Tensor, values: Tensor) -> None:
    """Copy values whose axes, some of them merged, are those of the target; nothing is copied in between."""
    target, values = target.squeeze(), values.squeeze()
    axis = values.ndim
    for number in reversed(range(target.ndim)):
        stop, size = axis, 1
        while size < target.shape[number]:
            axis -= 1
            size *= values.shape[axis]
        target = target.unflatten(number, values.shape[axis:stop])
    target.copy_(values)
