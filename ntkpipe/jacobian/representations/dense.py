"""``dense``: the Jacobians themselves, multiplied out and summed as soon as their factors are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import sizes_of
from ntkpipe.jacobian.representations.interface import Pulled, Representation, Term
from ntkpipe.jacobian.representations.sums import LONGEST_SUM, GramSums, Workspace, copy_merged, cuts
from ntkpipe.jacobian.tracing.recorder import Call
from ntkpipe.jacobian.tracing.rules.form import Outer
from ntkpipe.jacobian.tracing.uses import Use


@dataclass(frozen=True)
class Dense(Representation):
    """The Jacobians themselves, contracted by a matrix product over parameters."""

    matrix: Tensor  # shape (n, S, width), perhaps a part of a wider one; rows are sample-major, as in a tile

    word: ClassVar[str] = "dense"
    meaning: ClassVar[str] = "the Jacobian itself, summed over positions: n_in × n_out numbers"
    sample_axes: ClassVar[tuple[int, ...]] = (0,)

    @classmethod
    def empty(cls, term: Term, num_samples: int, covectors: Tensor) -> "Dense":
        """Room for Jacobians, shape (n, S, width)."""
        return cls(covectors.new_empty((num_samples, len(covectors), term.width)))

    def fill(self, term: Term, pulled: Pulled) -> None:
        """Add up the Jacobians of all uses."""
        target = self.matrix[pulled.samples, pulled.covectors]
        size = len(target)
        live = [use for use in term.uses if use.call in pulled.grads]
        if not live:
            target.zero_()
        for number, use in enumerate(live):
            call, grads = pulled.calls[use.call], pulled.grads[use.call]
            if use.kind == Outer.kind:
                _multiply_out(use, call, grads, target, pulled.workspace, adds=number > 0)
                continue
            for covector, grad in enumerate(grads):
                rows = use.jacobian(call, grad, size).reshape(size, -1)
                target[:, covector].add_(rows) if number else target[:, covector].copy_(rows)

    def add_gram(self, other: "Dense", sums: GramSums) -> None:
        """Multiply rows."""
        add_products(self.matrix, other.matrix, sums)

    def diagonal(self, *, is_all: bool) -> Tensor:
        """Products of rows, cut like other long sums."""
        parts = self.matrix.split(LONGEST_SUM, dim=2)
        if is_all:
            return torch.stack([(part @ part.transpose(1, 2)).double() for part in parts]).sum(dim=0)
        return torch.stack([(p[:, :, None] @ p[:, :, :, None])[:, :, 0, 0].double() for p in parts]).sum(dim=0)


def add_products(left: Tensor, right: Tensor, sums: GramSums) -> None:
    """Add the Gram entries of Jacobians (n, S, width) and (m, S, width)."""
    total = sums.total()
    if sums.pairs == "same":
        for covector in range(sums.covectors):
            _add_rows(total[covector], left[:, covector], right[:, covector], sums)
    elif sums.pairs == "all":
        _add_rows(total, left.flatten(0, 1), right.flatten(0, 1), sums)
    else:
        _add_rows(total, left.flatten(1), right.flatten(1), sums)


def _add_rows(target: Tensor, left: Tensor, right: Tensor, sums: GramSums) -> None:
    cells, length = sums.cells(left.shape[0], right.shape[0]), left.shape[1]
    for part in cuts(0, length, LONGEST_SUM if left.dtype != torch.float64 else max(1, length)):
        one, other = left[:, part], right[:, part]
        for rows, columns in cells:
            target[rows, columns].add_(sums.product("product", one[rows], other[columns]))


def _multiply_out(
    use: Use, call: Call, grads: Sequence[Tensor], target: Tensor, workspace: Workspace, *, adds: bool
) -> None:
    """``target[b, s] = sum_t d_t (x) a_t``, shape (n, s, groups * n_out * n_in), elements in the factors' order."""
    # Inputs that are windows are unfolded a few samples at a time, so that they stay in the cache; the covectors of a
    # sample are multiplied with them at once.
    n, covectors = target.shape[:2]
    positions, groups, n_in, n_out = use.num_positions, use.groups, use.n_in, use.n_out
    inputs = use.inputs(call, n)
    cotangents = [use.cotangents(call, grad, n) for grad in grads]
    is_plain = groups == 1 and inputs.dtype == target.dtype and _is_viewable(inputs, n, positions, n_in)
    most = sizes_of(target.device).unfolded_bytes // (target.itemsize * positions * groups * n_in)
    step = n if is_plain and covectors == 1 else max(1, most)
    for start in range(0, n, step):
        size = min(step, n - start)
        part = slice(start, start + size)
        if is_plain:
            a = inputs[part].reshape(size, positions, groups, n_in)
        else:
            a = workspace.take("unfolded", (size, positions, groups, n_in), target)
            copy_merged(a, inputs[part])
        if covectors == 1:
            d = cotangents[0][part].reshape(size, positions, 1, groups, n_out).to(target.dtype)
        else:
            d = workspace.take("cotangents", (size, positions, covectors, groups, n_out), target)
            for number, each in enumerate(cotangents):
                copy_merged(d[:, :, number], each[part])
        _multiply(d, a, target[part], adds)


def _multiply(d: Tensor, a: Tensor, target: Tensor, adds: bool) -> None:
    """d (n, T, s, groups, n_out) and a (n, T, groups, n_in) to target (n, s, groups * n_out * n_in)."""
    n, positions, covectors, groups, n_out = d.shape
    shape = n_out, a.shape[3]
    if groups == 1 and target.stride(1) == target.shape[2]:
        rows = d.reshape(n, positions, covectors * n_out).transpose(1, 2)
        out = target.unflatten(2, shape).flatten(1, 2) if covectors > 1 else target[:, 0].unflatten(1, shape)
        torch.baddbmm(out, rows, a[:, :, 0], beta=1.0 if adds else 0.0, out=out)
        return
    found = (d.permute(0, 2, 3, 4, 1) @ a.permute(0, 2, 1, 3)[:, None]).flatten(2)
    target.add_(found) if adds else target.copy_(found)


def _is_viewable(values: Tensor, *shape: int) -> bool:
    try:
        values.view(shape)
    except RuntimeError:
        return False
    return True
