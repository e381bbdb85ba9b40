"""Terms: which parameters' Jacobians are found and held together, and in which representation."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Representation, Setup, Term
from ntkpipe.jacobian.representations.joined import Joined
from ntkpipe.jacobian.representations.late import Late
from ntkpipe.jacobian.representations.pairwise import Pairwise
from ntkpipe.jacobian.representations.table import LookupTable
from ntkpipe.jacobian.tracing.recorder import Geometry
from ntkpipe.jacobian.tracing.rules.form import Scale
from ntkpipe.jacobian.tracing.trace import Tracing
from ntkpipe.jacobian.tracing.uses import Use

# The first that suits is chosen; the last suits everything.
CHOICES: tuple[type[Representation], ...] = (Pairwise, Late, LookupTable, Dense)
REPRESENTATIONS: tuple[type[Representation], ...] = (*CHOICES, Joined)


def choose_representation(term: Term, setup: Setup) -> type[Representation]:
    """The cheapest exact way to hold the Jacobians of a term."""
    return next(each for each in CHOICES if each.suits(term, setup))


def make_terms(
    tracing: Tracing, parameters: Mapping[str, Tensor], setup: Setup, recorded: Mapping[str, str] | None
) -> Iterator[Term]:
    """The terms of a tracing; weights first, then the biases that are part of no weight's term."""
    # A weight that is held with its bias keeps its recorded way where the bias goes to the fallback.
    words = {name.partition(" + ")[0]: label.rpartition(":")[2] for name, label in (recorded or {}).items()}
    units = [unit for names in _connected(tracing) for unit in _units(names, tracing.uses, parameters)]
    biases = [unit for unit in units if _is_bias(unit)]
    for unit in units:
        if _is_bias(unit):
            continue
        if unit.held_as is Joined:
            yield unit
            continue
        kept = next((each for each in CHOICES if each.word == words.get(unit.name)), Dense)
        term = replace(unit, held_as=choose_representation(unit, setup) if recorded is None else kept)
        if term.held_as.takes_bias:
            owner = setup.group_of(term.parameters[0])
            own = (bias for bias in biases if setup.group_of(bias.parameters[0]) == owner)
            if partner := next((bias for bias in own if _is_of(bias, term)), None):
                biases.remove(partner)
                name, names = f"{term.name} + {partner.name}", term.parameters + partner.parameters
                term = replace(term, name=name, parameters=names, has_bias=True)
        yield term
    yield from biases


def _is_bias(term: Term) -> bool:
    return term.held_as is not Joined and all(use.role == "bias" and use.kind == Scale.kind for use in term.uses)


def _is_of(bias: Term, weight: Term) -> bool:
    """Whether it is the bias of exactly the linear layers of ``weight``."""
    own, others = ([(use.call, use.function, use.layout) for use in term.uses] for term in (bias, weight))
    return own == others and all(use.function == "linear" for use in weight.uses)


def _connected(tracing: Tracing) -> list[tuple[str, ...]]:
    groups = {name: {name} for name in tracing.covered}
    for use in tracing.uses:
        joined = set().union(*(groups[name] for name in use.sources))
        for name in joined:
            groups[name] = joined
    found = {id(group): tuple(name for name in tracing.covered if name in group) for group in groups.values()}
    return list(found.values())


def _units(names: tuple[str, ...], uses: Sequence[Use], parameters: Mapping[str, Tensor]) -> list[Term]:
    """Terms for uses whose Jacobians add up, before it is known how they are held and which have a bias."""
    own = tuple(use for use in uses if use.sources[0] in names)
    parts: dict[Geometry | None, list[Use]] = {}
    for use in own:
        parts.setdefault(use.geometry, []).append(use)
    width = sum(parameters[name].numel() for name in names)
    is_apart = len(names) == 1 and all(use.is_parameter for use in own) and all(map(_is_alike, parts.values()))
    if not is_apart or not _is_disjoint(parts, width):
        return [Term(" + ".join(names), names, own, width, Joined)]
    numbers = [f"[{number}]" for number in range(len(parts))] if len(parts) > 1 else [""]
    return [
        Term(names[0] + number, names, tuple(part), part[0].numel, Dense)
        for number, part in zip(numbers, parts.values(), strict=True)
    ]


def _is_alike(uses: Sequence[Use]) -> bool:
    """Whether the Jacobians of several uses can be added up by putting their positions side by side."""
    return len({(use.function, use.role, use.kind, use.groups, use.n_in, use.n_out, use.order) for use in uses}) == 1


def _is_disjoint(views: Collection[Geometry | None], num_entries: int) -> bool:
    """Whether several views of a parameter have no element in common, nor one of them an element twice."""
    geometries = [view for view in views if view is not None]
    if len(geometries) < len(views):
        return len(views) == 1
    entries = torch.arange(num_entries)
    seen = torch.cat([entries.as_strided(size, stride, offset).reshape(-1) for offset, size, stride in geometries])
    return len(seen.unique()) == len(seen)
