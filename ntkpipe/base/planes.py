"""Planes: the matrices of one shape that a single pass over the samples fills, tile by tile of the same grid."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.kinds import KINDS

# Each plane has its own arrays and its own buffers; more of them than this is no kernel that anybody stores.
MAX_PLANES = 65_536
# What stands for each plane's folder in the names of arrays that all planes have.
_ANY = "kernel"
_SHOWN = 8


@dataclass(frozen=True)
class Plane:
    """One matrix of several that are computed together."""

    prefix: str  # folder of its arrays in a store: `kernel`, `kernel/output_3`, `groups/head`, `groups/head/output_3`
    group: int | None = None  # number of the group of parameters that it sums over; none for all selected ones
    output: int | None = None  # number of the output, where each has a matrix of its own

    def array(self, name: str) -> str:
        """Its own array of the kind of ``kernel/train``, ``kernel/test_train`` or ``kernel/test_diagonal``."""
        return array_of(self.prefix, name)


def array_of(prefix: str, name: str) -> str:
    """The array of the plane at ``prefix`` that ``name``, as ``kernel/train``, is in a store of one plane."""
    return prefix + name.removeprefix(_ANY)


def prefix_of(group: str | None = None, output: int | None = None) -> str:
    """Folder of a plane by the name of its group and the number of its output."""
    folder = _ANY if group is None else f"groups/{group}"
    return folder if output is None else f"{folder}/output_{output}"


def planes_of(kind: str, num_outputs: int, groups: Iterable[str]) -> tuple[Plane, ...]:
    """Every plane: of all parameters, then of each group; of each output, if they are kept apart."""
    found = KINDS.get(kind)
    apart = [*range(num_outputs)] if found is not None and found.pairs == "same" else [None]
    named = [(None, None), *enumerate(groups)]
    return tuple(Plane(prefix_of(name, output), number, output) for number, name in named for output in apart)


def num_planes(kind: str, num_outputs: int, num_groups: int) -> int:
    """Number of :func:`planes_of`, without listing them."""
    found = KINDS.get(kind)
    return (1 + num_groups) * (1 if found is None else found.num_matrices(num_outputs))


def match_groups(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The parameters of each group by name, from shell-style patterns."""
    found: dict[str, tuple[str, ...]] = {}
    for group, patterns in sorted(groups.items()):  # their order decides the last bits of the total
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"groups.{group}: {pattern!r} matches no selected parameter; these are {_shown(names)}"
                )
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
