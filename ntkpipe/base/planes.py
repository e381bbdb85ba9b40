"""Planes: matrices of equal shape that one pass over the samples fills, tile by tile of the same grid."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.kinds import KINDS

MAX_PLANES = 65_536  # each has arrays and buffers of its own
_ANY = "kernel"  # stands for the folder of any plane in names of arrays that every plane has
_SHOWN = 8


@dataclass(frozen=True)
class Plane:
    """One of several matrices that are computed together."""

    prefix: str  # folder of its arrays in a store: `kernel`, `kernel/output_3`, `groups/head`, `groups/head/output_3`
    group: int | None = None  # number of the group of parameters that it sums over; None for all selected ones
    output: int | None = None  # number of the output, if each has a matrix of its own

    def array(self, name: str) -> str:
        """Array of the plane for ``kernel/train``, ``kernel/test_train`` or ``kernel/test_diagonal``."""
        return array_of(self.prefix, name)


def array_of(prefix: str, name: str) -> str:
    """Array of the plane at ``prefix`` that corresponds to ``name``, such as ``kernel/train``, of the first plane."""
    return prefix + name.removeprefix(_ANY)


def prefix_of(group: str | None = None, output: int | None = None) -> str:
    """Folder of a plane, from the name of its group and the number of its output."""
    folder = _ANY if group is None else f"groups/{group}"
    return folder if output is None else f"{folder}/output_{output}"


def planes_of(kind: str, num_outputs: int, groups: Iterable[str]) -> tuple[Plane, ...]:
    """All planes: that of all parameters, then one per group; each for every output if these are separate."""
    outputs, named = _outputs(kind, num_outputs), [(None, None), *enumerate(groups)]
    return tuple(Plane(prefix_of(name, output), number, output) for number, name in named for output in outputs)


def num_planes(kind: str, num_outputs: int, num_groups: int) -> int:
    """Number of :func:`planes_of`, without listing them."""
    return (1 + num_groups) * len(_outputs(kind, num_outputs))


def _outputs(kind: str, num_outputs: int) -> Sequence[int | None]:
    return range(num_outputs) if kind in KINDS and KINDS[kind].pairs == "same" else (None,)


def match_groups(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parameters of each group, from shell-style patterns; groups must be disjoint."""
    found: dict[str, tuple[str, ...]] = {}
    for group, patterns in sorted(groups.items()):  # their order determines the last bits of the total
        idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
        if idle:
            raise ConfigError(f"groups.{group}: {idle[0]!r} matches no selected parameter; these are {_shown(names)}")
        found[group] = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    owners: dict[str, str] = {}
    for group, members in found.items():
        for other in dict.fromkeys(owners[name] for name in members if name in owners):
            common = [name for name in members if owners.get(name) == other]
            raise ConfigError(
                f"groups {other!r} and {group!r} both have {_shown(common)}; a parameter may be in one group only"
            )
        owners |= dict.fromkeys(members, group)
    return found


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
