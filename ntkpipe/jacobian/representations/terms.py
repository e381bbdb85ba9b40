"""Terms: parameters whose Jacobians are found and held together, and the cheapest exact way to hold them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.contract import Pairs
from ntkpipe.jacobian.tracing.trace import Tracing
from ntkpipe.jacobian.tracing.uses import LOOKUP, OUTER, SCALE, Use

# How a term's Jacobians are held: as in factors.py, or dense after a detour through what was made of the parameters
# (``joined``).
Representation = Literal["pairwise", "late", "table", "dense", "joined"]

# Jacobians that are multiplied out late are so for each pair of pieces, which is left alone while it costs less than
# this share of the contraction.
_LATE_SHARE = 0.25
# A table is contracted row by row, which costs about as much as the product of this many times as many rows.
_TABLE_GAIN = 4
# How many times smaller than the Jacobians the factors must be.
_LATE_GAIN = 2


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, for choosing between representations; only ratios matter."""

    product: float  # operations of a large matrix product
    elementwise: float  # entries that are multiplied and added to others


@dataclass(frozen=True)
class Term:
    """Parameters whose Jacobians are found together: a weight, the bias of the same calls, both, or all that joins."""

    name: str  # for manifests: the parameters; a part of one has its number
    parameters: tuple[str, ...]  # their names
    uses: tuple[Use, ...]  # uses whose positions are summed; of the weight where there is a bias, too
    has_bias: bool  # whether the bias of the same calls is part of it
    representation: Representation  # how its Jacobians are held
    width: int  # entries of a covector's Jacobian

    @property
    def num_positions(self) -> int:
        """Rows of a sample, over all uses."""
        return sum(use.num_positions for use in self.uses)

    @property
    def is_dense(self) -> bool:
        """Whether the Jacobians themselves are held."""
        return self.representation in {"dense", "joined"}

    @property
    def is_constant(self) -> bool:
        """Whether its cotangents are the covectors themselves, the same for all samples."""
        return self.representation == "pairwise" and len(self.uses) == 1 and self.uses[0].is_output

    @property
    def label(self) -> str:
        """Functions and representation, for manifests and reports."""
        functions = "+".join(dict.fromkeys(use.function for use in self.uses))
        return f"{functions}:{self.representation}"


def make_terms(
    tracing: Tracing,
    parameters: Mapping[str, Tensor],
    choose: Callable[[str, tuple[Use, ...]], Representation],
    group_of: Mapping[str, int] | None = None,
) -> list[Term]:
    """The terms of a tracing."""
    owners = group_of or {}
    found = []
    units = [unit for names in _connected(tracing) for unit in _units(names, tracing.uses, parameters)]
    biases = [unit for unit in units if unit.is_bias]
    taken: set[int] = set()
    for unit in units:
        if unit.is_bias:
            continue
        owner = owners.get(unit.parameters[0])
        own_biases = (b for b in biases if owners.get(b.parameters[0]) == owner and id(b) not in taken)
        partner = next((b for b in own_biases if b.is_of(unit)), None)
        representation: Representation = "joined" if unit.is_joined else choose(unit.name, unit.uses)
        name = unit.name
        if partner is not None and representation == "pairwise":
            name = f"{unit.name} + {partner.name}"
            taken.add(id(partner))
        else:
            partner = None
        names = unit.parameters + (partner.parameters if partner is not None else ())
        found.append(Term(name, names, unit.uses, partner is not None, representation, unit.width(parameters)))
    for unit in biases:
        if id(unit) not in taken:
            representation = "joined" if unit.is_joined else "dense"
            found.append(Term(unit.name, unit.parameters, unit.uses, False, representation, unit.width(parameters)))
    return found


@dataclass(frozen=True)
class _Unit:
    """Uses whose Jacobians add up before anything is contracted."""

    name: str
    parameters: tuple[str, ...]
    uses: tuple[Use, ...]
    is_joined: bool

    @property
    def is_bias(self) -> bool:
        """Whether it could be part of the term of a weight."""
        return not self.is_joined and all(use.role == "bias" and use.kind == SCALE for use in self.uses)

    def is_of(self, weight: "_Unit") -> bool:
        """Whether it is the bias of exactly the linear layers of ``weight``."""
        pairs = list(zip(self.uses, weight.uses, strict=False))
        return len(self.uses) == len(weight.uses) and all(
            bias.call == use.call and use.function == bias.function == "linear" and bias.layout == use.layout
            for bias, use in pairs
        )

    def width(self, parameters: Mapping[str, Tensor]) -> int:
        """Entries of a covector's Jacobian."""
        if self.is_joined:
            return sum(parameters[name].numel() for name in self.parameters)
        return self.uses[0].numel


def _connected(tracing: Tracing) -> list[tuple[str, ...]]:
    """Covered parameters, those together from which something is made."""
    groups = {name: {name} for name in tracing.covered}
    for use in tracing.uses:
        joined = set().union(*(groups[name] for name in use.sources))
        for name in joined:
            groups[name] = joined
    found = {id(group): tuple(name for name in tracing.covered if name in group) for group in groups.values()}
    return list(found.values())


def _units(names: tuple[str, ...], uses: Sequence[Use], parameters: Mapping[str, Tensor]) -> list[_Unit]:
    own = tuple(use for use in uses if use.sources[0] in names)
    if len(names) > 1 or not all(use.is_parameter for use in own):
        return [_Unit(" + ".join(names), names, own, is_joined=True)]
    (name,) = names
    parts: dict[object, list[Use]] = {}
    for use in own:
        parts.setdefault(use.geometry, []).append(use)
    if not all(_is_alike(part) for part in parts.values()) or not _is_disjoint(parts, parameters[name]):
        return [_Unit(name, names, own, is_joined=True)]
    return [
        _Unit(name if len(parts) == 1 else f"{name}[{number}]", names, tuple(part), is_joined=False)
        for number, part in enumerate(parts.values())
    ]


def _is_alike(uses: Sequence[Use]) -> bool:
    """Whether the Jacobians of several uses can be added up by putting their positions side by side."""
    first = uses[0]
    return all(
        (use.function, use.role, use.kind, use.groups, use.n_in, use.n_out, use.order)
        == (first.function, first.role, first.kind, first.groups, first.n_in, first.n_out, first.order)
        for use in uses
    )


def _is_disjoint(parts: Mapping[object, list[Use]], parameter: Tensor) -> bool:
    """Whether several views of a parameter have no element in common, nor one of them an element twice."""
    if set(parts) == {None}:
        return True
    if None in parts:
        return False
    seen = torch.zeros(parameter.numel(), dtype=torch.int32)
    for uses in parts.values():
        geometry = uses[0].geometry
        assert geometry is not None
        offset, size, stride = geometry
        numbers = torch.arange(parameter.numel()).as_strided(size, stride, offset)
        seen.index_add_(0, numbers.reshape(-1), torch.ones(prod(size), dtype=torch.int32))
    return bool((seen <= 1).all())


def kept_numbers(term: Term, num_covectors: int) -> int:
    """Numbers held for a sample of all covectors, beside the dense matrix or in it."""
    first, positions = term.uses[0], term.num_positions
    if term.is_dense:
        return num_covectors * term.width
    inputs = positions if term.representation == "table" else positions * first.groups * first.n_in
    if term.is_constant:
        return inputs
    return inputs + num_covectors * positions * first.groups * first.n_out


def covector_pairs(num_covectors: int, pairs: Pairs) -> int:
    """How many pairs of covectors are contracted."""
    return num_covectors**2 if pairs == "all" else num_covectors


def pair_flops(term: Term, num_covectors: int, pairs: Pairs) -> float:
    """Operations to contract one pair of samples."""
    first, positions, squared = term.uses[0], term.num_positions, covector_pairs(num_covectors, pairs)
    if term.representation == "pairwise":
        cotangents = 0 if term.is_constant else squared * (first.n_out + 1)
        return 2.0 * positions**2 * (first.n_in + cotangents)
    if term.representation == "table":
        # Only positions with the same index meet; few do.
        return 2.0 * squared * positions * first.n_out
    return 2.0 * squared * term.width


def sample_flops(term: Term, num_covectors: int) -> float:
    """Operations to multiply out the Jacobians of one sample, beside its forward and backward pass.

    Of those held in factors none, but for ``late``, where it is done whenever they are contracted; of what is joined
    without the way back through what was made of parameters.
    """
    if term.representation in {"pairwise", "table"}:
        return 0.0
    return sum(2.0 * num_covectors * use.num_positions * use.numel for use in term.uses if use.kind == OUTER)


def contraction_flops(term: Term, num_covectors: int, pairs: Pairs, num_samples: int, piece_rows: int) -> float:
    """Operations of a contraction that fall on one pair of samples: :func:`pair_flops`, and multiplying out late."""
    flops = pair_flops(term, num_covectors, pairs)
    if term.representation == "late":
        # Two pieces of n samples are multiplied out for n^2 pairs, one with itself for half as many.
        at_a_time = max(1, min(num_samples, piece_rows // num_covectors))
        flops += 2.0 * sample_flops(term, num_covectors) / at_a_time
    return flops


def choose_representation(
    uses: tuple[Use, ...],
    num_covectors: int,
    pairs: Pairs,
    rates: Rates,
    num_samples: int,
    memory_bytes: float,
    piece_rows: int,
) -> Representation:
    """The cheapest exact way to hold the Jacobians of a term's uses.

    Factored, each pair of positions takes n_in + S^2 n_out multiplications and an elementwise pass over S^2 entries;
    the Jacobian itself takes S^2 n_in n_out for a pair of samples, and S T n_in n_out once for each sample. Jacobians
    that are larger than their factors are multiplied out late, a part at a time, where that adds little to the work.
    """
    first = uses[0]
    positions = sum(use.num_positions for use in uses)
    if first.kind == LOOKUP:
        return "table" if first.shape[0] > _TABLE_GAIN * positions else "dense"
    if first.kind == SCALE:
        return "dense"
    squared = covector_pairs(num_covectors, pairs)
    width = first.groups * first.n_in * first.n_out
    once = 2.0 * num_covectors * positions * width / rates.product  # to multiply out one sample
    if first.groups == 1:
        per_pair = positions**2 * (2.0 * (first.n_in + squared * first.n_out) / rates.product)
        per_pair += positions**2 * squared / rates.elementwise
        if per_pair <= 2.0 * squared * width / rates.product + 2.0 * once / max(1, num_samples):
            return "pairwise"
    factors = positions * first.groups * (first.n_in + num_covectors * first.n_out)
    if factors * _LATE_GAIN > num_covectors * width:
        return "dense"
    rows = num_samples * (num_covectors if pairs == "all" else 1)
    late_share = 2.0 * positions / piece_rows if rows > piece_rows else 0.0
    return "late" if late_share <= _LATE_SHARE or width * num_covectors * 4.0 * num_samples > memory_bytes else "dense"
