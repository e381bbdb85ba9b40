"""Kinds of kernels: the covectors of a sample, and the convention that defines an entry."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, nearest

_OUTPUT = "output:"


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
        unit: NDArray[np.float64] = np.eye(num_outputs)
        if self.name == "trace":
            unit *= num_outputs**-0.5
        if self.name in {"ntk", "diagonal", "trace"}:
            return unit
        if self.name.startswith(_OUTPUT):
            output = int(self.name.removeprefix(_OUTPUT))
            if output >= num_outputs:
                raise ConfigError(f"kind={self.name!r}: the model has outputs 0 to {num_outputs - 1}")
            return unit[output : output + 1]
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


def get_kind(name: str) -> Kind:
    """Return the kind called ``name``."""
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
