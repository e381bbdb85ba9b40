"""Products J'v and J u with the Jacobian of a whole data set, by plain ``torch.func``, without the Jacobian."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntkpipe.base.errors import ModelError
from ntkpipe.base.grid import Span
from ntkpipe.jacobian.fallback import take
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.model.samples import Source


@dataclass(frozen=True)
class JacobianProducts:
    """Products with J and J' over a set of samples; memory is one batch and two parameter vectors."""

    # They run in the compute dtype and in the batches of the run, so that an activation that rounds across a kink there
    # does so here, too; sums over batches are float64.
    model: FunctionalModel
    covectors: Tensor  # shape (S, O)
    tile: int  # this and the next three: numbers of samples, as in the manifest of the run
    strip: int
    subtile: int
    batch: int
    is_mapping: bool  # whether a sample is a dict

    def transposed(self, source: Source, vector: NDArray[np.float64], step: Callable[[], None]) -> dict[str, Tensor]:
        """``J' v`` as one float64 tensor for each parameter; v has shape (n*S,)."""
        parameters = self.model.parameters
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
        by_sample = torch.from_numpy(vector).reshape(-1, len(self.covectors))
        for span, batch in self.batches(source):
            outputs = self.model(batch)
            seed = torch.zeros_like(outputs)
            seed[: len(span)] = by_sample[span.start : span.stop].to(self.covectors) @ self.covectors
            grads = torch.autograd.grad(outputs, list(parameters.values()), seed, allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad
            step()
        return total

    def product(self, source: Source, direction: Mapping[str, Tensor], step: Callable[[], None]) -> NDArray[np.float64]:
        """``J u`` for a direction u in parameter space, shape (n*S,)."""
        parameters = {name: value.detach() for name, value in self.model.parameters.items()}
        norm = float(torch.stack([(value**2).sum() for value in direction.values()]).sum().sqrt())
        tangents = {name: (direction[name] / (norm or 1.0)).to(value) for name, value in parameters.items()}
        parts = []
        for span, batch in self.batches(source):
            derivatives = self._derivatives(parameters, tangents, batch).double() * norm
            parts.append((derivatives @ self.covectors.double().T)[: len(span)].reshape(-1).cpu())
            step()
        return torch.cat(parts).numpy()

    def _derivatives(self, parameters: dict[str, Tensor], tangents: dict[str, Tensor], batch: Batch) -> Tensor:
        """Derivatives of a batch's outputs along the tangents, shape (B, O)."""
        found: Tensor
        with contextlib.suppress(Exception):  # operations without forward-mode derivatives, parameters out of reach
            outputs, found = torch.func.jvp(lambda p: self.model.call_with(p, batch), (parameters,), (tangents,))[:2]
            self.model.require_replaced(outputs)
            return found
        # By reverse mode twice: J u is the derivative of (J'w)u by w.
        live = self.model.parameters
        outputs = self.model(batch)
        weights = torch.zeros_like(outputs, requires_grad=True)
        try:
            grads = torch.autograd.grad(outputs, list(live.values()), weights, create_graph=True, allow_unused=True)
            pairs = zip(live, grads, strict=True)
            dot = torch.stack([(grad * tangents[name]).sum() for name, grad in pairs if grad is not None]).sum()
            (derivatives,) = torch.autograd.grad(dot, weights)
        except RuntimeError as error:
            raise ModelError(
                f"this model cannot be certified: it has neither forward-mode nor second derivatives ({error})"
            ) from error
        return derivatives

    def spans(self, num_samples: int) -> list[Span]:
        """The batches of one pass, as in the run, where they begin anew at each tile, strip and subtile."""
        spans = [Span(0, num_samples)]
        for size in (self.tile, self.strip, self.subtile):
            spans = [part for span in spans for part in span.cut(size)]
        return [part for span in spans for part in span.batches(self.batch)]

    def batches(self, source: Source) -> Iterator[tuple[Span, Batch]]:
        """Samples and their batch, on the device; a single sample is in it twice."""
        for span in self.spans(source.num_samples):
            arrays = {name: torch.tensor(values) for name, values in source.read(span.start, span.stop).items()}
            batch = self.model.to_batch(arrays, self.is_mapping)
            yield span, take(batch, (0, 0)) if len(span) == 1 else batch  # as the engine does: never a batch of one
