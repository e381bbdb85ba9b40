"""``joined``: the Jacobians themselves, pulled back from the uses to the parameters of which they are made."""

from dataclasses import dataclass
from typing import ClassVar

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Pulled, Term
from ntkpipe.jacobian.tracing.uses import pull_back


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
        parameters = {name: pulled.parameters[name] for name in term.parameters}
        widths = [value.numel() for value in parameters.values()]
        parts = dict(zip(parameters, self.matrix.split(widths, dim=2), strict=True))
        self.matrix[pulled.samples, pulled.covectors] = 0.0
        for use in term.uses:
            call = pulled.calls[use.call]
            for number, grad in enumerate(pulled.grads.get(use.call, ()), pulled.covectors.start):
                rows = use.jacobian(call, grad, pulled.samples.stop - pulled.samples.start)
                for name, found in pull_back(call.arguments[use.role], parameters, rows):
                    parts[name][pulled.samples, number] += found
