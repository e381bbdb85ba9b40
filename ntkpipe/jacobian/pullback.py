"""What an engine is without its model: from a recorded forward pass to gradients at the calls that use parameters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkpipe.base.errors import ModelError
from ntkpipe.jacobian.model.device import sizes_of
from ntkpipe.jacobian.representations.interface import Grads, Pulled, Setup, Term
from ntkpipe.jacobian.representations.pieces import PieceFilling
from ntkpipe.jacobian.representations.workspace import Workspace
from ntkpipe.jacobian.tracing.layouts import Pass
from ntkpipe.jacobian.tracing.trace import Tracing
from ntkpipe.jacobian.tracing.uses import pull_back

_WHY = (
    "the operations of the forward pass depend on the data. Pass jacobian='fallback' to compute this model without "
    "structure"
)


@dataclass(frozen=True)
class Pullback:
    """Covectors, and the terms of parameters that they are pulled back to."""

    tracing: Tracing
    setup: Setup
    parameters: Mapping[str, Tensor]  # that are selected, by name
    covectors: Tensor  # shape (S, O), in the compute dtype, on the device of the model
    terms: tuple[Term, ...]
    fallback_terms: tuple[Term, ...]

    @property
    def needs_graph(self) -> bool:
        """Whether forward passes are differentiated by what is recorded of them."""
        return bool(self.terms or self.tracing.unused)

    def check(self, recorded: Pass) -> None:
        """Check that a forward pass used its parameters as those on probe batches did."""
        if self.terms and not self.tracing.matches(recorded, self.parameters):
            raise ModelError(f"the forward pass used its parameters in another way than on the probe batch: {_WHY}")
        if any(recorded.calls[use.call].input_was_changed() for use in self.tracing.uses):
            raise ModelError("an input of a layer was changed in place after its use; it was not on the probe batch")

    def grads(self, recorded: Pass, *, every_use: bool = False) -> Iterator[tuple[slice, Grads]]:
        """Covectors pulled back to the output of each use, a few at a time: gradients by number of the call."""
        numbers = sorted({use.call for term in self.terms if every_use or not term.is_constant for use in term.uses})
        # Some terms go on from here, through what was made of parameters.
        keeps_graph = every_use or any(term.held_as.needs_graph for term in self.terms)
        outputs, calls, count = recorded.outputs, recorded.calls, len(self.covectors)
        unused = [self.parameters[name] for name in self.tracing.unused]
        num_bytes = sum(calls[n].blank().numel() for n in numbers if calls[n].edge is not None) * outputs.itemsize
        step = max(1, min(count, sizes_of(self.covectors.device).gradient_bytes // max(1, num_bytes)))
        for start in range(0, count, step):
            found = []
            for number in range(start, min(start + step, count)):
                covectors, keeps = self.covectors[number].to(outputs.dtype).expand_as(outputs), number + 1 < count
                grads, others = recorded.pulled(covectors, unused, numbers, keeps_graph=keeps or keeps_graph)
                if any(grad is not None for grad in others):
                    raise ModelError(f"a parameter that the probe batch did not use is used by another batch: {_WHY}")
                found.append(grads)
            reached = [number for number in numbers if any(number in grads for grads in found)]
            by_call = {number: [grads.get(number, calls[number].blank()) for grads in found] for number in reached}
            yield slice(start, start + len(found)), by_call

    def filling(self, num_samples: int) -> PieceFilling:
        """A piece of some samples, to be filled."""
        covectors = self.covectors.to(self.setup.accumulate_dtype)
        return PieceFilling(self.terms, self.fallback_terms, self.parameters, self.setup, covectors, num_samples)

    def fill(self, filling: PieceFilling, recorded: Pass, samples: slice, workspace: Workspace) -> None:
        """Fill in the Jacobians of some samples of a piece, from a recorded pass of these."""
        for covectors, grads in self.grads(recorded):
            filling.fill(Pulled(recorded.calls, grads, covectors, samples, self.parameters, workspace))

    def by_parameter(self, recorded: Pass, places: list[int]) -> dict[str, Tensor]:
        """Jacobians (S, n, P) of every traced or unused parameter for the samples at ``places`` of a recorded pass."""
        shape = (len(self.covectors), len(places))
        names = (*self.tracing.covered, *self.tracing.unused)
        found = {n: self.parameters[n].new_zeros((*shape, self.parameters[n].numel())) for n in names}
        for covectors, grads in self.grads(recorded, every_use=True):
            for use in self.tracing.uses:
                call = recorded.calls[use.call]
                for number, grad in enumerate(grads.get(use.call, ()), covectors.start):
                    with torch.no_grad():
                        rows = use.jacobian(call, grad, recorded.num_samples, places)
                    for name, jacobian in pull_back(call.arguments[use.role], self.parameters, rows):
                        found[name][number] += jacobian
        return found

    def pair_flops(self) -> float:
        """Operations of a contraction that fall on one pair of samples."""
        return sum((term.held_as.pair_flops(term, self.setup) for term in (*self.terms, *self.fallback_terms)), 0.0)

    def block_bytes(self) -> int:
        """Bytes that a block holds for a sample."""
        every, covectors = (*self.terms, *self.fallback_terms), self.setup.num_covectors
        numbers = sum(term.held_as.num_numbers(term, covectors) for term in every)
        return max(1, numbers * self.setup.accumulate_dtype.itemsize + self.covectors[0].nbytes)
