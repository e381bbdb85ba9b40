"""Which kernel is computed: the covectors of a sample, and the convention that says what an entry means."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """One kind of empirical neural tangent kernel.

    Attributes
    ----------
    name
        What users type, and the manifest's ``kind``.
    convention
        What one entry of the stored matrix is, as text for the manifest. Implementations differ by factors of
        the number of outputs and do not say so.
    """

    name: str
    convention: str
    pairs: Literal["all", "same", "sum"] = "all"

    def num_covectors(self, num_outputs: int) -> int:
        """Covectors a sample, S; the kernel of N samples has N*S rows."""
        return num_outputs if self.name == "ntk" else 1

    def covectors(self, num_outputs: int) -> NDArray[np.float64]:
        """Vectors in output space that are pulled back to the parameters, shape (S, O)."""
        if self.name == "ntk":
            return np.eye(num_outputs)
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
}


def get_kind(name: str) -> Kind:
    """Return the kind called ``name``.

    Raises
    ------
    ConfigError
        If there is no such kind; the message lists those that exist.
    """
    if name not in KINDS:
        close = get_close_matches(name, KINDS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"kind={name!r} is unknown; needed one of {', '.join(map(repr, KINDS))}{hint}")
    return KINDS[name]
