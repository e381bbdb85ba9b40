"""Kinds of kernels: covectors, the convention that defines an entry, and planes, the matrices that one pass fills."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, nearest

MAX_PLANES = 65_536  # each has arrays and buffers of its own
_OUTPUT = "output:"
_ANY = "kernel"  # stands for the folder of any plane in names of arrays that every plane has
_SHOWN = 8


@dataclass(frozen=True)
class Kind:
    """One kind of empirical neural tangent kernel."""

    name: str  # as users type it, and as `kind` in the manifest
    # Definition of an entry, as text for the manifest: implementations differ by factors of the number of outputs.
    convention: str
    # Pairs of covectors of two samples that are contracted: `all`, each an entry; or equal ones, each an entry of a
    # matrix of its own (`same`) or all summed to one entry (`sum`). Other pairs cost nothing.
    pairs: Literal["all", "same", "sum"] = "all"

    def num_covectors(self, num_outputs: int) -> int:
        """Rows per sample, S; the kernel of N samples has N*S rows."""
        return num_outputs if self.name == "ntk" else 1

    def num_matrices(self, num_outputs: int) -> int:
        """Number of matrices: one per output if outputs have kernels of their own, else one."""
        return num_outputs if self.pairs == "same" else 1

    def covectors(self, num_outputs: int) -> NDArray[np.float64]:
        """Vectors in output space that are pulled back to the parameters, one per row, shape (S, O)."""
        if self.name in {"ntk", "diagonal", "trace"}:
            unit: NDArray[np.float64] = np.eye(num_outputs)
            if self.name == "trace":
                unit *= num_outputs**-0.5
            return unit
        if self.name.startswith(_OUTPUT):
            output = int(self.name.removeprefix(_OUTPUT))
            if output >= num_outputs:
                raise ConfigError(f"kind={self.name!r}: the model has outputs 0 to {num_outputs - 1}")
            return np.eye(1, num_outputs, output)
        return np.full((1, num_outputs), num_outputs**-0.5)


KINDS = {
    "ntk": Kind(
        "ntk",
        "K[i*O + o, j*O + p] = <d f_o(x_i) / d theta, d f_p(x_j) / d theta>, summed over the selected parameters; "
        "no normalisation",
    ),
    "pntk": Kind(
        "pntk",
        "K[i, j] = <g(x_i), g(x_j)> with g(x) = d (sum_o f_o(x) / sqrt(O)) / d theta over the selected parameters "
        "(Mohamadi, Bae, Sutherland 2023, arXiv 2206.12543, Eq. 2)",
    ),
    "trace": Kind(
        "trace",
        "K[i, j] = 1/O sum_o <d f_o(x_i) / d theta, d f_o(x_j) / d theta> over the selected parameters: the mean over "
        "outputs of the diagonal of each O x O block",
        pairs="sum",
    ),
    "diagonal": Kind(
        "diagonal",
        "K_o[i, j] = <d f_o(x_i) / d theta, d f_o(x_j) / d theta> over the selected parameters, a matrix of its own "
        "for each output o; no normalisation",
        pairs="same",
    ),
}

# Of :func:`ntkpipe.compute_infinite_kernel` alone; a manifest has the convention of its network.
INFINITE = Kind("infinite_ntk", "K[i, j] = Theta(x_i, x_j), the NTK of a network of infinite width")


def get_kind(name: str) -> Kind:
    """Return the kind called ``name``."""
    if name == INFINITE.name:
        return INFINITE
    if name in KINDS:
        return KINDS[name]
    output = name.removeprefix(_OUTPUT)
    if output != name and output.isascii() and output.isdecimal():
        number = int(output)
        return Kind(
            f"{_OUTPUT}{number}",
            f"K[i, j] = <d f_{number}(x_i) / d theta, d f_{number}(x_j) / d theta> over the selected parameters",
        )
    needed = f"needed one of {', '.join(map(repr, KINDS))}, or 'output:k' for one output"
    raise ConfigError(f"kind={name!r} is unknown; {needed}{nearest(name, [*KINDS, _OUTPUT])}")


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
