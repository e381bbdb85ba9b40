"""``joined``: the Jacobians themselves, pulled back from the uses to the parameters of which they are made."""

from dataclasses import dataclass
from typing import ClassVar

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Pulled, Term


@dataclass(frozen=True)
class Joined(Dense):
    """Jacobians by all parameters of a term side by side, pulled back to them from the arguments of calls."""

    # For what a model makes of parameters (a weight norm), overlapping views, and unlike uses: held in no other way.

    word: ClassVar[str] = "joined"
    meaning: ClassVar[str] = (
        "the Jacobian itself, pulled back through what the model makes of parameters before it uses them"
    )
    needs_graph: ClassVar[bool] = True

    def fill(self, term: Term, pulled: Pulled) -> None:
        """Add up the Jacobians of all uses, pulled back to the parameters."""
        widths = [pulled.parameters[name].numel() for name in term.parameters]
        self.matrix[pulled.samples, pulled.covectors] = 0.0
        parts = self.matrix[pulled.samples].transpose(0, 1).split(widths, dim=2)
        pulled.add_jacobians(term.uses, dict(zip(term.parameters, parts, strict=True)))
