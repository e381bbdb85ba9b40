"""The Gram entries of two pieces while representations add to them.

Matrix products run over blocks that stay in a core's cache, into scratch that is allocated once; where a piece meets
itself, only blocks on or above the diagonal are computed. Parts of sums over many parameters are added up in float64: a
float32 product over a million is off by 1e-5 on the diagonal, where all terms are positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import sizes_of

Pairs = Literal["all", "same", "sum"]  # which pairs of covectors are wanted: all S*S, the S equal ones, or their sum
LONGEST_SUM = 8192  # terms of a float32 sum that are left to the matrix product
Cell = tuple[slice, slice]


class Workspace:
    """Scratch tensors by name, for one thread: fresh pages for each product cost more than the product."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def clear(self) -> None:
        """Free all scratch tensors."""
        self._tensors.clear()

    def take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor on the device of ``like``, in its dtype unless one is given; its content is undefined."""
        dtype = dtype or like.dtype
        size = torch.Size(shape).numel()
        key = name, dtype, like.device
        flat = self._tensors.get(key)
        if flat is None or flat.numel() < size:
            flat = self._tensors[key] = torch.empty(size, dtype=dtype, device=like.device)
        return flat[:size].view(shape)


def copy_merged(target: Tensor, values: Tensor) -> None:
    """Copy values whose axes, some of them merged, are those of the target, without a temporary copy."""
    target, values = target.squeeze(), values.squeeze()
    axis = values.ndim
    for number in reversed(range(target.ndim)):
        stop, size = axis, 1
        while size < target.shape[number]:
            axis -= 1
            size *= values.shape[axis]
        target = target.unflatten(number, values.shape[axis:stop])
    target.copy_(values)


@dataclass
class GramSums:
    """Gram entries of a piece of n samples with one of m, added up in two sums, each allocated when first used."""

    # ``total`` is sample-major, (n, S, m, S), for products of rows. ``blocks`` is covector-major, (S, n, S, m), for
    # products of Gram matrices, whose elementwise passes then run along memory.

    rows: int  # n
    columns: int  # m
    covectors: int  # S
    pairs: Pairs
    like: Tensor  # says in which dtype and on which device pieces are
    workspace: Workspace
    is_mirrored: bool  # whether the piece meets itself
    is_long: bool  # whether many products are added to the covector-major sum
    _total: Tensor | None = field(default=None, init=False)
    _blocks: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.sizes = sizes_of(self.like.device)
        self._high = 1 if self.pairs == "sum" else self.covectors
        self._wide = self.covectors if self.pairs == "all" else 1
        self._shape = (self._high * self.rows, self._wide * self.columns)

    def total(self) -> Tensor:
        """The sample-major sum in float64, (n*S, m*S), (S, n, m) of equal covectors, (n, m) of their sum."""
        if self._total is None:
            self._total = self.workspace.take("total", self._shape, self.like, torch.float64).zero_()
        return self._total.view((self.covectors, self.rows, self.columns) if self.pairs == "same" else self._shape)

    def blocks(self) -> Tensor:
        """The covector-major sum, (S, n, S, m), with ones where covectors are not kept apart."""
        # Where a piece meets itself, only blocks (c, d) with c <= d are valid, and with c = d what is not below the
        # diagonal.
        if self._blocks is None:
            dtype = torch.float64 if self.is_long else self.like.dtype
            self._blocks = self.workspace.take("factored", self._shape, self.like, dtype).zero_()
        return self._blocks.view(self._high, self.rows, self._wide, self.columns)

    def place(self, covector: int, other: int) -> tuple[int, int]:
        """Where a pair of covectors is added in ``blocks``: indices of the first and the third axis."""
        return 0 if self.pairs == "sum" else covector, other if self.pairs == "all" else 0

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right.T`` in the scratch of a name; long sums by way of float64."""
        shape = left.shape[0], right.shape[0]
        out = self.workspace.take(name, shape, left)
        if left.shape[1] <= LONGEST_SUM or left.dtype == torch.float64:
            return torch.mm(left, right.T, out=out)
        total = self.workspace.take("long sum", shape, left, torch.float64).zero_()
        for part in cuts(0, left.shape[1], LONGEST_SUM):
            total.add_(torch.mm(left[:, part], right[:, part].T, out=out))
        return out.copy_(total)

    def cells(self, rows: int, columns: int, least: int = 1) -> tuple[Cell, ...]:
        """Blocks that cover (rows, columns), or what is on and above the diagonal; each index is ``least`` rows."""
        most = max(1, self.sizes.largest_block // least)
        if not self.is_mirrored:
            return tuple((row, column) for row in cuts(0, rows, most) for column in cuts(0, columns, most))
        return _upper_cells(0, rows, max(1, self.sizes.smallest_block // least), most)

    def apart(self) -> Tensor:
        """All entries, finished, in scratch that the next contraction overwrites; shape (k, n, S, m, S)."""
        # k is the number of covectors that are kept apart, or one; S is one unless all pairs are wanted.
        if self._blocks is not None and self.is_mirrored:
            blocks = self.blocks()
            for covector in range(len(blocks)):
                self._mirror(blocks[covector, :, covector if self.pairs == "all" else 0])
                if self.pairs == "all":
                    blocks[covector + 1 :, :, covector] = blocks[covector, :, covector + 1 :].permute(1, 2, 0)
        if self._total is None:
            return self.blocks().permute(1, 0, 3, 2)[None] if self.pairs == "all" else self.blocks()[..., None]
        entries = self.total()
        if self._blocks is not None:
            self._turn_blocks(entries)
        if self.is_mirrored:
            for part in entries.view(-1, *entries.shape[-2:]):
                self._mirror(part)
        first = self.covectors if self.pairs == "same" else 1
        return self._total.view(first, self.rows, self._wide, self.columns, self._wide)

    def _mirror(self, entries: Tensor) -> None:
        for rows, columns in self.cells(*entries.shape):
            if rows.start == columns.start:
                upper = entries[rows, rows].triu()
                entries[rows, rows] = upper + upper.triu(1).T
            right = slice(max(rows.stop, columns.start), columns.stop)
            entries[right, rows] = entries[rows, right].T

    def _turn_blocks(self, target: Tensor) -> None:
        """Add the covector-major sum to the sample-major ``target``."""
        blocks, count = self.blocks(), self.covectors
        if self.pairs != "all" or count == 1:
            target.add_(blocks.view(target.shape))
            return
        apart = target.unflatten(1, (self.columns, count)).unflatten(0, (self.rows, count))
        # A few rows at a time: torch converts values of another dtype in memory that is new each time.
        for rows in cuts(0, self.rows, max(1, self.sizes.unfolded_bytes // (8 * apart[0].numel()))):
            apart[rows].add_(blocks[:, rows].permute(1, 0, 3, 2))


def cuts(start: int, stop: int, most: int) -> list[slice]:
    """Parts of at most ``most``, of about equal size; multiples of 16, where that is possible, keep blocks aligned."""
    size = -(-(stop - start) // max(1, -(-(stop - start) // most)))
    size = min(most, -(-size // 16) * 16) if size >= 16 else size
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


@cache
def _upper_cells(start: int, stop: int, leaf: int, most: int) -> tuple[Cell, ...]:
    """Blocks on and above the diagonal: few large ones by halving, strips of rows where little is left."""
    if stop - start <= 4 * leaf:
        # A strip wastes less than half a square of its height; lower ones multiply more slowly than that saves.
        height = max(1, 3 * leaf // 4)
        return tuple((slice(i, min(i + height, stop)), slice(i, stop)) for i in range(start, stop, height))
    half = (stop - start) // 2
    middle = start + (-(-half // 16) * 16 if half >= 16 else half)
    corner = [(rows, columns) for rows in cuts(start, middle, most) for columns in cuts(middle, stop, most)]
    return (*corner, *_upper_cells(start, middle, leaf, most), *_upper_cells(middle, stop, leaf, most))
