"""Terms: which parameters' Jacobians are found and held together, and in which representation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Representation, Setup, Term
from ntkpipe.jacobian.representations.joined import Joined
from ntkpipe.jacobian.representations.late import Late
from ntkpipe.jacobian.representations.pairwise import Pairwise
from ntkpipe.jacobian.representations.table import LookupTable
from ntkpipe.jacobian.tracing.trace import Tracing
from ntkpipe.jacobian.tracing.uses import SCALE, Use

# The first that suits is chosen; the last suits everything.
CHOICES: tuple[type[Representation], ...] = (Pairwise, Late, LookupTable, Dense)
REPRESENTATIONS: tuple[type[Representation], ...] = (*CHOICES, Joined)


def choose_representation(uses: Sequence[Use], setup: Setup) -> type[Representation]:
    """The cheapest exact way to hold the Jacobians of a term's uses."""
    return next(each for each in CHOICES if each.suits(uses, setup))


def recorded_representation(word: str) -> type[Representation]:
    """The choice that a manifest records by its word; ``dense`` for any other word."""
    return next((each for each in CHOICES if each.word == word), Dense)


def make_terms(
    tracing: Tracing,
    parameters: Mapping[str, Tensor],
    choose: Callable[[str, tuple[Use, ...]], type[Representation]],
    group_of: Callable[[str], int],
) -> Iterator[Term]:
    """The terms of a tracing; weights first, then the biases that are part of no weight's term."""
    units = [unit for names in _connected(tracing) for unit in _units(names, tracing.uses, parameters)]
    biases = [unit for unit in units if unit.is_bias]
    for unit in units:
        if unit.is_bias:
            continue
        held_as = Joined if unit.is_joined else choose(unit.name, unit.uses)
        name, names, partner = unit.name, unit.parameters, None
        if held_as.takes_bias:
            owner = group_of(names[0])
            own = (bias for bias in biases if group_of(bias.parameters[0]) == owner)
            partner = next((bias for bias in own if bias.is_of(unit)), None)
        if partner is not None:
            name, names = f"{name} + {partner.name}", names + partner.parameters
            biases = [bias for bias in biases if bias is not partner]
        yield Term(name, names, unit.uses, partner is not None, held_as, unit.width(parameters))
    for bias in biases:
        yield Term(bias.name, bias.parameters, bias.uses, False, Dense, bias.width(parameters))


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
