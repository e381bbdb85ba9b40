"""Two pieces of Jacobians become Gram entries: every way of holding them is contracted in its cheapest exact way.

Matrix products run over blocks that stay in a core's cache, into scratch that is allocated once; where a piece meets
itself, only blocks on or above the diagonal are computed. Sums over many parameters are cut into parts that are added
up in float64: a float32 product over a million parameters is off by 1e-5 on the diagonal, where all terms are positive.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import add_rows, sizes_of, without_tf32
from ntkpipe.jacobian.representations.factors import Dense, Factor, Late, Pairwise, Piece, Table
from ntkpipe.jacobian.representations.workspace import Workspace

# Which pairs of covectors are wanted: all S*S; the S equal ones, kept apart; or their sum.
Pairs = Literal["all", "same", "sum"]

# Terms of a float32 sum that are left to the matrix product.
_LONGEST_SUM = 8192
# Products of factors that are added up in their own dtype; more of them in float64.
_FEW = 8
# Outputs whose Jacobians are multiplied out late at a time, at least, with up to twice the scratch for that.
_LATE_OUTPUTS = 16

Cell = tuple[slice, slice]


def contract(
    left: Piece, right: Piece, workspace: Workspace, pairs: Pairs = "all", out: Tensor | None = None
) -> Tensor:
    """Gram entries of two pieces, ``sum_p J[a, c, p] J[b, d, p]``; float32 ones by true float32 products."""
    with without_tf32(left.device):
        return _Contraction(left, right, workspace, pairs).run(out)


def contract_planes(left: Piece, right: Piece, workspace: Workspace, pairs: Pairs, outs: Sequence[Tensor]) -> None:
    """As :func:`contract`, for every plane at once: by all parameters, and by each group of them.

    Factors are contracted once, group by group; the entries by all parameters are the sum, added up in float64.
    """
    apart = left.num_covectors if pairs == "same" else 1
    if len(outs) == 1 and pairs != "same":
        contract(left, right, workspace, pairs, outs[0])
        return
    whole, *groups = (outs[start : start + apart] for start in range(0, len(outs), apart))
    with without_tf32(left.device):
        if not groups:
            _spread(_Contraction(left, right, workspace, pairs).sums(), whole)
            return
        total = None
        for number in sorted({*left.groups, *range(len(groups))}):
            one = left.of_group(number)
            other = one if right is left else right.of_group(number)
            if not one.factors:
                for out in groups[number]:
                    out.zero_()
                continue
            found = _Contraction(one, other, workspace, pairs).sums()
            is_first = total is None
            if total is None:
                total = workspace.take("planes", found.shape, found, torch.float64)
            _spread(found, groups[number] if number < len(groups) else None, total, is_first=is_first)
        assert total is not None
        _spread(total, whole)


def _spread(
    found: Tensor, outs: Sequence[Tensor] | None, total: Tensor | None = None, *, is_first: bool = False
) -> None:
    """Copy sums (k, n, S, m, S) to k tensors, add them to ``total`` or begin it, a few rows at a time: in the cache."""
    entries = sizes_of(found.device).unfolded_bytes // 8
    for number, values in enumerate(found):
        size, covectors, width, _ = values.shape
        for rows in _cuts(0, size, max(1, entries // (covectors * width * covectors))):
            part = values[rows]
            if outs is not None:
                place = outs[number].unflatten(1, (width, covectors)).unflatten(0, (size, covectors))[rows]
                place.copy_(part)
                # Where that lost nothing, the entries are now in order.
                part = place if place.dtype in {part.dtype, torch.float64} else part
            if total is not None and is_first:
                total[number, rows].copy_(part)
            elif total is not None:
                total[number, rows].add_(part)


class _Contraction:
    """One call of :func:`contract`.

    Two sums are kept: ``total`` sample-major, (n, S, m, S), for what is multiplied by rows; ``factored``
    covector-major, (S, n, S, m), for products of Gram matrices, whose elementwise passes then run along memory.
    """

    def __init__(self, left: Piece, right: Piece, workspace: Workspace, pairs: Pairs) -> None:
        self.left, self.right, self.workspace, self.pairs = left, right, workspace, pairs
        self.covectors, self.rows, self.columns = left.num_covectors, left.num_samples, right.num_samples
        self.is_mirrored = left is right
        self.like = left.factors[0].tensors()[-1]
        self.sizes = sizes_of(self.like.device)
        high, wide = (1 if pairs == "sum" else self.covectors), (self.covectors if pairs == "all" else 1)
        self.shape = (high * self.rows, wide * self.columns)
        by_factors = [factor for factor in left.factors if isinstance(factor, Pairwise | Table)]
        # A table is added index by index, of which there may be thousands.
        is_long = len(by_factors) > _FEW or any(isinstance(factor, Table) for factor in by_factors)
        dtype = torch.float64 if is_long else self.like.dtype
        self.factored = self._zeros("factored", dtype) if by_factors else None
        is_all = len(by_factors) == len(left.factors)
        self.total = None if is_all else self._zeros("total", torch.float64)

    def _zeros(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.workspace.take(name, self.shape, self.like, dtype).zero_()

    def run(self, out: Tensor | None) -> Tensor:
        """All entries, in ``out``."""
        self._add_all()
        if out is None:
            out = self.like.new_empty(self.entries)
        assert out.shape == self.entries, f"{tuple(out.shape)} is not the shape {self.entries} of the entries"
        if self.total is None:
            self._add_factored(out, adds=False)
            return out
        return out.copy_(self.total.view(self.entries))

    def sums(self) -> Tensor:
        """All entries in scratch that the next contraction overwrites, shape (k, n, S, m, S), perhaps not contiguous.

        k is the number of covectors that are kept apart, or one; S is one unless all pairs are wanted.
        """
        if self.total is None and self.is_mirrored and self.pairs == "all" and self.covectors > 1:
            self.total = self._zeros("total", torch.float64)  # half of the covector-major blocks stand for the others
        self._add_all()
        apart, covectors = self.covectors if self.pairs == "same" else 1, self.covectors if self.pairs == "all" else 1
        if self.total is not None:
            return self.total.view(apart, self.rows, covectors, self.columns, covectors)
        return self._blocks().permute(1, 0, 3, 2)[None] if self.pairs == "all" else self._blocks()[..., None]

    @property
    def entries(self) -> tuple[int, ...]:
        """Shape of the result."""
        return (self.covectors, self.rows, self.columns) if self.pairs == "same" else self.shape

    def _add_all(self) -> None:
        for one, other in zip(self.left.factors, self.right.factors, strict=True):
            if isinstance(one, Dense) and isinstance(other, Dense):
                self._add_dense(one.matrix, other.matrix)
            elif isinstance(one, Pairwise) and isinstance(other, Pairwise):
                self._add_pairwise(one, other)
            elif isinstance(one, Late) and isinstance(other, Late):
                self._add_late(one, other)
            elif isinstance(one, Table) and isinstance(other, Table):
                self._add_table(one, other)
        if self.factored is not None and self.is_mirrored:
            blocks = self._blocks()
            for covector in range(len(blocks)):
                self._mirror(blocks[covector, :, covector if self.pairs == "all" else 0])
        if self.total is None:
            return
        entries = self.total.view(self.entries)
        if self.factored is not None:
            self._add_factored(entries, adds=True)
        if self.is_mirrored:
            for part in entries.view(-1, *self.entries[-2:]):
                self._mirror(part)

    def _mirror(self, entries: Tensor) -> None:
        """Copy what is above the diagonal below it."""
        for rows, columns in self._cells(*entries.shape):
            if rows.start == columns.start:
                upper = entries[rows, rows].triu()
                entries[rows, rows] = upper + upper.triu(1).T
            right = slice(max(rows.stop, columns.start), columns.stop)
            entries[right, rows] = entries[rows, right].T

    def _add_factored(self, target: Tensor, *, adds: bool) -> None:
        """Turn the covector-major sum sample-major: to ``target``, or added to it.

        Where a piece meets itself, blocks (c, d) of covectors with c < d stand for (d, c), too.
        """
        assert self.factored is not None
        if self.pairs != "all" or self.covectors == 1:
            values = self.factored.view(target.shape)
            target.add_(values) if adds else target.copy_(values)
            return
        count, blocks = self.covectors, self._blocks()
        apart = target.unflatten(1, (self.columns, count)).unflatten(0, (self.rows, count))
        if not self.is_mirrored:
            pairs = [(apart, blocks.permute(1, 0, 3, 2))]
        else:
            pairs = [(apart[:, c, :, c:], blocks[c, :, c:].transpose(1, 2)) for c in range(count)]
            pairs += [(apart[:, c + 1 :, :, c], blocks[c, :, c + 1 :].permute(2, 1, 0)) for c in range(count - 1)]
        for place, values in pairs:
            # A few rows at a time: torch converts values of another dtype in memory that is new each time.
            for rows in _cuts(0, len(place), max(1, self.sizes.unfolded_bytes // (8 * place[0].numel()))):
                place[rows].add_(values[rows]) if adds else place[rows].copy_(values[rows])

    def _product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        shape = left.shape[0], right.shape[0]
        out = self.workspace.take(name, shape, left)
        if left.shape[1] <= _LONGEST_SUM or left.dtype == torch.float64:
            return torch.mm(left, right.T, out=out)
        total = self.workspace.take("long sum", shape, left, torch.float64).zero_()
        for part in _cuts(0, left.shape[1], _LONGEST_SUM):
            total.add_(torch.mm(left[:, part], right[:, part].T, out=out))
        return out.copy_(total)

    def _cells(self, rows: int, columns: int, least: int = 1) -> tuple[Cell, ...]:
        """Blocks that cover (rows, columns), or what is on and above the diagonal; each index is ``least`` rows."""
        most = max(1, self.sizes.largest_block // least)
        if not self.is_mirrored:
            return _all_cells(rows, columns, most)
        return _upper_cells(rows, max(1, self.sizes.smallest_block // least), most)

    def _add_dense(self, left: Tensor, right: Tensor) -> None:
        """Jacobians (n, S, width) of the same parameters."""
        assert self.total is not None
        if self.pairs == "same":
            per_covector = self.total.view(self.covectors, self.rows, self.columns)
            for covector in range(self.covectors):
                self._add_products(per_covector[covector], left[:, covector], right[:, covector])
        elif self.pairs == "all":
            self._add_products(self.total, left.flatten(0, 1), right.flatten(0, 1))
        else:
            self._add_products(self.total, left.flatten(1), right.flatten(1))

    def _add_products(self, target: Tensor, left: Tensor, right: Tensor) -> None:
        cells = self._cells(left.shape[0], right.shape[0])
        length = left.shape[1]
        for part in _cuts(0, length, _LONGEST_SUM if left.dtype != torch.float64 else max(1, length)):
            one, other = left[:, part], right[:, part]
            for rows, columns in cells:
                target[rows, columns].add_(self._product("product", one[rows], other[columns]))

    def _add_pairwise(self, left: Pairwise, right: Pairwise) -> None:
        if left.is_constant:
            self._add_constant(left, right)
        elif left.inputs.shape[1] > 1:
            self._add_positions(left, right)
        elif self.covectors == 1:
            self._add_one_covector(left, right)
        else:
            self._add_one_position(left, right)

    def _blocks(self) -> Tensor:
        """The covector-major sum, (S, n, S, m), with ones where covectors are not kept apart.

        Where a piece meets itself only blocks (c, d) with c <= d are right, of those with c = d what is not below the
        diagonal.
        """
        assert self.factored is not None
        high = 1 if self.pairs == "sum" else self.covectors
        return self.factored.view(high, self.rows, self.shape[1] // self.columns, self.columns)

    def _input_gram(self, left: Pairwise, right: Pairwise) -> Tensor:
        """``A A' + 1``, of all positions."""
        entries = self._product("inputs", left.inputs.flatten(0, 1), right.inputs.flatten(0, 1))
        return entries.add_(1.0) if left.has_bias else entries

    def _add_constant(self, left: Pairwise, right: Pairwise) -> None:
        """Cotangents that are the covectors: their Gram matrix is known, and often diagonal."""
        target, gram = self._blocks(), left.covectors @ right.covectors.T
        wanted = [(c, d) for c, d in torch.nonzero(gram).tolist() if self.pairs == "all" or c == d]
        # Unit covectors are orthogonal; of other ones all blocks are needed.
        cells = self._cells(self.rows, self.columns)
        if any(c != d for c, d in wanted):
            cells = ((slice(0, self.rows), slice(0, self.columns)),)
        for rows, columns in cells:
            entries = self._product("inputs", left.inputs[rows, 0], right.inputs[columns, 0])
            if left.has_bias:
                entries.add_(1.0)
            for c, d in wanted:
                high, wide = (0 if self.pairs == "sum" else c), (d if self.pairs == "all" else 0)
                target[high, rows, wide, columns].add_(entries, alpha=float(gram[c, d]))

    def _add_one_covector(self, left: Pairwise, right: Pairwise) -> None:
        """``(A A' + 1) o (D D')``: n_in + n_out multiplications a pair instead of n_in * n_out."""
        assert self.factored is not None
        a, b, d, e = left.inputs[:, 0], right.inputs[:, 0], left.cotangents[0, :, 0], right.cotangents[0, :, 0]
        for rows, columns in self._cells(self.rows, self.columns):
            entries = self._product("inputs", a[rows], b[columns])
            if left.has_bias:
                entries.add_(1.0)
            _add_product(self.factored[rows, columns], self._product("product", d[rows], e[columns]), entries)

    def _add_one_position(self, left: Pairwise, right: Pairwise) -> None:
        """The same for several covectors: n_in + S*S*n_out multiplications a pair."""
        entries, target = self._input_gram(left, right), self._blocks()
        d, e = left.cotangents[:, :, 0], right.cotangents[:, :, 0]
        if self.pairs == "all":
            for high, wide in self._cells(self.covectors, self.covectors, least=self.rows):
                if self.is_mirrored and high == slice(wide.start, wide.start + 1):
                    # A covector with itself: half of it is enough.
                    self._add_equal_covectors(target[high.start, :, high.start], d[high.start], e[high.start], entries)
                    wide = slice(high.stop, wide.stop)
                    if wide.start == wide.stop:
                        continue
                part = self._product("product", d[high].flatten(0, 1), e[wide].flatten(0, 1))
                shape = (high.stop - high.start, self.rows, wide.stop - wide.start, self.columns)
                _add_product(target[high, :, wide], part.view(shape), entries[None, :, None, :])
            return
        for covector in range(self.covectors):
            place = target[covector if self.pairs == "same" else 0, :, 0]
            self._add_equal_covectors(place, d[covector], e[covector], entries)

    def _add_equal_covectors(self, target: Tensor, left: Tensor, right: Tensor, entries: Tensor) -> None:
        """Add ``entries * (left @ right.T)``."""
        for rows, columns in self._cells(self.rows, self.columns):
            part = self._product("product", left[rows], right[columns])
            _add_product(target[rows, columns], part, entries[rows, columns])

    def _add_positions(self, left: Pairwise, right: Pairwise) -> None:
        """``sum_tu (a_t a'_u + 1)(d_t d'_u)`` by products over all positions of a few samples."""
        target, positions, is_all = self._blocks(), (left.inputs.shape[1], right.inputs.shape[1]), self.pairs == "all"
        row_bytes = self.columns * positions[1] * left.inputs.element_size()
        step = max(1, min(self.sizes.position_rows, self.sizes.position_bytes // row_bytes) // positions[0])
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            first = start if self.is_mirrored and (self.covectors == 1 or self.pairs != "all") else 0
            inputs = self._product("inputs", left.inputs[rows].flatten(0, 1), right.inputs[first:].flatten(0, 1))
            if left.has_bias:
                inputs.add_(1.0)
            for row in range(self.covectors):
                for column in range(row if self.is_mirrored else 0, self.covectors) if is_all else (row,):
                    d, e = left.cotangents[row, rows], right.cotangents[column, first:]
                    part = self._product("product", d.flatten(0, 1), e.flatten(0, 1)).mul_(inputs)
                    summed = part.view(len(d), positions[0], -1).sum(dim=1).view(len(d), len(e), -1).sum(dim=2)
                    high, wide = (0 if self.pairs == "sum" else row), (column if self.pairs == "all" else 0)
                    target[high, rows, wide, first:] += summed

    def _add_late(self, left: Late, right: Late) -> None:
        """Multiply out the Jacobians of a few outputs at a time, then as :meth:`_add_dense`."""
        groups, n_in, n_out = left.inputs.shape[1], left.inputs.shape[3], left.cotangents.shape[4]
        output_bytes = max(self.rows, self.columns) * self.covectors * n_in * left.inputs.element_size()
        most = self.sizes.late_bytes
        few = min(_LATE_OUTPUTS, 2 * most // output_bytes)
        for group in range(groups):
            for outputs in _cuts(0, n_out, max(1, few, most // output_bytes)):
                one = self._multiplied("left", left, group, outputs)
                other = one if self.is_mirrored else self._multiplied("right", right, group, outputs)
                self._add_dense(one, other)

    def _multiplied(self, name: str, factor: Late, group: int, outputs: slice) -> Tensor:
        a, d = factor.inputs[:, group], factor.cotangents[:, :, group, :, outputs]
        num_samples, covectors, positions, n_out = d.shape
        rows = d.transpose(1, 2).reshape(num_samples, positions, covectors * n_out)
        target = self.workspace.take(name, (num_samples, covectors * n_out, a.shape[2]), a)
        torch.bmm(rows.transpose(1, 2), a, out=target)
        return target.view(num_samples, covectors, -1)

    def _add_table(self, left: Table, right: Table) -> None:
        """Index by index: the samples on either side that look it up, and the products of their summed cotangents."""
        target, ones, others = self._blocks(), _by_index(left), _by_index(right)
        high = torch.arange(self.covectors, device=target.device)
        for index in sorted(ones.keys() & others.keys()):
            (rows, d), (columns, e) = ones[index], others[index]
            if self.pairs == "all":
                found = (d.flatten(0, 1) @ e.flatten(0, 1).T).view(len(d), len(rows), len(e), len(columns))
                target[high[:, None, None, None], rows[:, None, None], high[:, None], columns] += found
            elif self.pairs == "same":
                target[high[:, None, None], rows[:, None], 0, columns] += d @ e.transpose(1, 2)
            else:
                target[0, rows[:, None], 0, columns] += (d @ e.transpose(1, 2)).sum(dim=0)


@cache
def _all_cells(rows: int, columns: int, most: int) -> tuple[Cell, ...]:
    """Blocks of about equal size that cover everything."""
    return tuple((row, column) for row in _cuts(0, rows, most) for column in _cuts(0, columns, most))


def _cuts(start: int, stop: int, most: int) -> list[slice]:
    """Parts of at most ``most``, of about equal size; multiples of 16, where that is possible, keep blocks aligned."""
    size = -(-(stop - start) // max(1, -(-(stop - start) // most)))
    size = min(most, -(-size // 16) * 16) if size >= 16 else size
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


@cache
def _upper_cells(size: int, leaf: int, most: int) -> tuple[Cell, ...]:
    """Blocks on and above the diagonal: few large ones by halving, strips of rows where little is left."""
    return tuple(_halved(0, size, leaf, most))


def _halved(start: int, stop: int, leaf: int, most: int) -> Iterator[Cell]:
    if stop - start <= 4 * leaf:
        # A strip wastes less than half a square of its height; lower ones multiply more slowly than that saves.
        height = max(1, 3 * leaf // 4)
        for first in range(start, stop, height):
            yield slice(first, min(first + height, stop)), slice(first, stop)
        return
    half = (stop - start) // 2
    middle = start + (-(-half // 16) * 16 if half >= 16 else half)
    for rows in _cuts(start, middle, most):
        for columns in _cuts(middle, stop, most):
            yield rows, columns
    yield from _halved(start, middle, leaf, most)
    yield from _halved(middle, stop, leaf, most)


def _add_product(target: Tensor, cotangents: Tensor, inputs: Tensor) -> None:
    if target.dtype == cotangents.dtype:
        target.addcmul_(cotangents, inputs)
    else:
        target.add_(cotangents.mul_(inputs))


def _by_index(table: Table) -> dict[int, tuple[Tensor, Tensor]]:
    """Index → the samples that have it, and their cotangents (S, samples, n_out), repeated ones added up."""
    num_samples, positions = table.indices.shape
    covectors, _, _, width = table.cotangents.shape
    sample = torch.arange(num_samples, device=table.indices.device).repeat_interleave(positions)
    keys, inverse = torch.unique(torch.stack([table.indices.reshape(-1), sample]), dim=1, return_inverse=True)
    summed = table.cotangents.new_zeros((covectors, keys.shape[1], width))
    add_rows(summed, 1, inverse, table.cotangents.reshape(covectors, -1, width))
    # One wait for a GPU, not one for each list.
    indices, counts = torch.stack(torch.unique_consecutive(keys[0], return_counts=True)).tolist()
    parts = zip(indices, keys[1].split(counts), summed.split(counts, dim=1), strict=True)
    return {index: (rows, d) for index, rows, d in parts}


def contract_diagonal(piece: Piece, pairs: Pairs = "all") -> Tensor:
    """Gram entries of each sample with itself, in the piece's dtype; sums over parameters are float64."""
    return _as_pairs(_diagonals(piece, pairs).sum(dim=0), pairs).to(_dtype(piece))


def contract_diagonal_planes(piece: Piece, pairs: Pairs, num_planes: int) -> list[Tensor]:
    """As :func:`contract_diagonal`, for every plane, in the order of :func:`contract_planes`."""
    by_factor, groups = _diagonals(piece, pairs), torch.tensor(piece.groups)
    num_groups = num_planes // (piece.num_covectors if pairs == "same" else 1) - 1
    parts = [by_factor, *(by_factor[groups == number] for number in range(num_groups))]
    found = [_as_pairs(part.sum(dim=0), pairs).to(_dtype(piece)) for part in parts]
    if pairs != "same":
        return found
    return [values[:, covector, None, None] for values in found for covector in range(piece.num_covectors)]


def _dtype(piece: Piece) -> torch.dtype:
    return piece.factors[0].tensors()[-1].dtype


def _as_pairs(total: Tensor, pairs: Pairs) -> Tensor:
    return total.sum(dim=1)[:, None, None] if pairs == "sum" else total


def _diagonals(piece: Piece, pairs: Pairs) -> Tensor:
    """Of each factor, first axis, the entries of each sample with itself."""
    with without_tf32(piece.device):
        return torch.stack(
            [
                torch.cat(
                    [
                        _diagonal(factor, samples, is_all=pairs == "all")
                        for samples in _cuts(0, piece.num_samples, _samples_at_once(factor))
                    ]
                )
                for factor in piece.factors
            ]
        )


def _samples_at_once(factor: Factor) -> int:
    """How many samples' factors, cotangents once more, and Gram matrices of positions stay small in float64."""
    if isinstance(factor, Dense):
        return len(factor.matrix)
    inputs = factor.tensors()[0]
    positions = inputs.shape[2] if isinstance(factor, Late) else inputs.shape[1]
    groups = inputs.shape[1] if isinstance(factor, Late) else 1
    per_sample = sum(tensor.numel() for tensor in factor.tensors()) // len(inputs)
    return max(1, sizes_of(inputs.device).late_bytes // (8 * (2 * per_sample + groups * positions**2)))


def _diagonal(factor: Factor, samples: slice, *, is_all: bool) -> Tensor:
    """Entries of each sample with itself: of all pairs of covectors (n, S, S), or of equal ones alone (n, S)."""
    if isinstance(factor, Dense):
        parts = factor.matrix[samples].split(_LONGEST_SUM, dim=2)
        if is_all:
            return torch.stack([(part @ part.transpose(1, 2)).double() for part in parts]).sum(dim=0)
        found = [(part[:, :, None] @ part[:, :, :, None])[:, :, 0, 0].double() for part in parts]
        return torch.stack(found).sum(dim=0)
    if isinstance(factor, Late):
        a, d = factor.inputs[samples].double(), factor.cotangents[samples].double()
        gram = a @ a.transpose(2, 3)
    else:
        inputs = factor.tensors()[0]
        # The same cotangents for all samples, or each its own.
        d = factor.cotangents.expand(-1, len(inputs), -1, -1)[:, samples].double().transpose(0, 1)[:, :, None]
        if isinstance(factor, Pairwise):
            a = inputs[samples].double()
            gram = (a @ a.transpose(1, 2) + float(factor.has_bias))[:, None]
        else:
            gram = (inputs[samples, :, None] == inputs[samples, None, :]).double()[:, None]
    # d is (n, S, groups, T, n_out) and the Gram matrix of the inputs (n, groups, T, T).
    other = gram[:, None] @ d
    return d.flatten(2) @ other.flatten(2).transpose(1, 2) if is_all else (d * other).flatten(2).sum(dim=2)
