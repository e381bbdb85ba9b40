"""From samples to a Jacobian block: the engine that joins traced terms and the fallback."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ntkpipe.base.errors import ModelError
from ntkpipe.base.grid import Span
from ntkpipe.jacobian.cost import Cost, Meter
from ntkpipe.jacobian.fallback import METHODS, batch_size, take
from ntkpipe.jacobian.model.device import is_out_of_memory, release_memory, sizes_of
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Grads, Pulled, Setup, Term
from ntkpipe.jacobian.representations.pieces import Piece, PieceFilling
from ntkpipe.jacobian.representations.sums import Pairs
from ntkpipe.jacobian.representations.terms import make_terms
from ntkpipe.jacobian.representations.workspace import Workspace
from ntkpipe.jacobian.tracing.recorder import Call
from ntkpipe.jacobian.tracing.trace import Tracing

_WHY = (
    "the operations of the forward pass depend on the data. Pass jacobian='fallback' to compute this model without "
    "structure"
)


@dataclass(frozen=True)
class JacobianBlock:
    """Jacobians of a strip of samples."""

    pieces: tuple[Piece, ...]  # the strip cut into pieces of equal size; the last may be smaller
    outputs: Tensor  # f of each sample, shape (n, O), in the compute dtype

    def num_bytes(self) -> int:
        """Bytes that the block holds."""
        return sum(piece.num_bytes() for piece in self.pieces) + self.outputs.nbytes


class Engine:
    """Computes Jacobian blocks of one model for one set of covectors. One thread each; see :meth:`copy`."""

    def __init__(
        self,
        model: FunctionalModel,
        tracing: Tracing,
        method: str,
        setup: Setup,
        representations: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.tracing, self.method, self.setup = model, tracing, method, setup
        self.covectors = setup.covectors.to(device=model.device, dtype=model.dtype)
        self.fallback = tuple(name for name in model.names if name in tracing.fallback)
        parameters = model.parameters()
        self.terms = tuple(make_terms(tracing, parameters, setup, representations))
        self.fallback_terms = tuple(Term(name, (name,), (), parameters[name].numel(), Dense) for name in self.fallback)
        self.workspace = Workspace()

    @property
    def representations(self) -> dict[str, str]:
        """How each term's Jacobian is found and kept, for the manifest."""
        return {t.name: t.label for t in self.terms} | dict.fromkeys(self.fallback, f"torch.func:{self.method}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Without scratch: what another process needs is what it was made of.
        return Engine, (self.model, self.tracing, self.method, self.setup, self.representations)

    def moved(self, device: torch.device) -> "Engine":
        """The same engine on another device; itself where it is there already."""
        return self if device == self.model.device else self.changed(model=self.model.moved(device))

    def copy(self) -> "Engine":
        """The same engine on its own copy of the module, for another thread."""
        return self.changed(model=self.model.copy())

    def changed(self, **changes: Any) -> "Engine":
        """The same engine but for the arguments that are given; terms that remain keep their representations."""
        names = ("model", "tracing", "method", "setup", "representations")
        return Engine(**{**{name: getattr(self, name) for name in names}, **changes})

    def reusing(self, recorded: Mapping[str, str]) -> "Engine":
        """The same engine with the recorded choices of an earlier run, as far as its tracing allows them."""
        methods = {n: each.partition(":")[2] for n, each in recorded.items() if each.startswith("torch.func:")}
        names = [name for name in self.tracing.covered if name in methods]
        tracing = self.tracing.without(dict.fromkeys(names, "it is there in the store that is resumed"))
        method = next(iter(methods.values()), self.method)
        return self.changed(tracing=tracing, method=method, representations=recorded)

    def with_covectors(self, covectors: Tensor, pairs: Pairs) -> "Engine":
        """The same engine for other covectors."""
        return self.changed(setup=replace(self.setup, covectors=covectors, pairs=pairs))

    def block(
        self, load: Callable[[int, int], Batch], start: int, stop: int, *, subtile: int, batch: int
    ) -> tuple[JacobianBlock, int]:
        """Jacobians of samples ``start:stop``, in pieces of ``subtile`` samples and forward passes of ``batch``."""
        # Memory: the block, and one batch's activations. Where that runs out, the batch is halved.
        done: list[tuple[Piece, Tensor]] = []
        for first in range(start, stop, subtile):
            last = min(first + subtile, stop)
            while True:
                try:
                    done.append(self._piece(load, first, last, batch))
                    break
                except Exception as error:
                    if not is_out_of_memory(error) or min(batch, last - first) <= 2:
                        raise
                # Not in the handler: the error keeps the frames of the failed attempt alive, and so their tensors.
                batch = max(2, min(batch, last - first) // 2)
                self.workspace.clear()
                release_memory()
        pieces, outputs = zip(*done, strict=True)
        return JacobianBlock(pieces, torch.cat(outputs)), batch

    def _piece(self, load: Callable[[int, int], Batch], start: int, stop: int, batch: int) -> tuple[Piece, Tensor]:
        if stop - start == 1:
            # Some backward passes are wrong for a batch of one (see fallback.by_loop): run it twice, keep the first.
            piece, outputs = self.piece(take(load(start, stop), (0, 0)))
            return piece.first(), outputs[:1]
        covectors, parameters = self.covectors.to(self.setup.accumulate_dtype), self.model.parameters()
        filling = PieceFilling(self.terms, self.fallback_terms, parameters, self.setup, covectors, stop - start)
        spans = Span(start, stop).batches(max(2, batch))
        found = [self._fill(filling, load(span.start, span.stop), span.start - start) for span in spans]
        return filling.piece(), torch.cat(found) if len(found) > 1 else found[0]

    def piece(self, batch: Batch) -> tuple[Piece, Tensor]:
        """Jacobians and outputs of one batch as one piece."""
        size = batch_size(batch)
        return self._piece(lambda start, stop: batch, 0, size, size)

    def _fill(self, filling: PieceFilling, batch: Batch, first: int) -> Tensor:
        samples, parameters = slice(first, first + batch_size(batch)), self.model.parameters()
        outputs, calls = self.forward(batch)
        for covectors, grads in self.pull_back(outputs, calls):
            filling.fill(Pulled(calls, grads, covectors, samples, parameters, self.workspace))
        if self.fallback:
            filling.fill_fallback(self.fallback_jacobian(batch).transpose(0, 1), samples)
        return outputs.detach()

    def fallback_jacobian(self, batch: Batch) -> Tensor:
        """Jacobians of the fallback's parameters, shape (S, B, P), in the compute dtype."""
        return METHODS[self.method](self.model, self.fallback, batch, self.covectors).detach()

    def forward(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Outputs of a batch, with their graph, and the recorded calls."""
        with torch.set_grad_enabled(bool(self.terms or self.tracing.unused)):
            outputs, calls = self.tracing.record(self.model, batch)
        if self.terms and not self.tracing.matches(calls, outputs, self.model.parameters(), batch_size(batch)):
            raise ModelError(f"the forward pass used its parameters in another way than on the probe batch: {_WHY}")
        if any(calls[use.call].input_was_changed() for use in self.tracing.uses):
            raise ModelError("an input of a layer was changed in place after its use; it was not on the probe batch")
        return outputs, calls

    def pull_back(
        self, outputs: Tensor, calls: list[Call], *, every_use: bool = False
    ) -> Iterator[tuple[slice, Grads]]:
        """Covectors pulled back to the output of each use, a few at a time: gradients by number of the call."""
        numbers = sorted({use.call for term in self.terms if every_use or not term.is_constant for use in term.uses})
        keeps_graph = every_use or any(term.held_as.needs_graph for term in self.terms)
        edges = {number: edge for number in numbers if (edge := calls[number].edge) is not None}
        parameters, count = self.model.parameters(), len(self.covectors)
        sources: list[Any] = [*edges.values(), *(parameters[name] for name in self.tracing.unused)]
        num_bytes = sum(calls[number].blank().numel() for number in edges) * outputs.itemsize
        step = max(1, min(count, sizes_of(self.model.device).gradient_bytes // max(1, num_bytes)))
        for start in range(0, count, step):
            covectors = slice(start, min(start + step, count))
            found: list[Sequence[Tensor | None]] = []
            for number in range(start, covectors.stop):
                grads: Sequence[Tensor | None] = [None] * len(sources)
                if outputs.requires_grad and sources:
                    grads = torch.autograd.grad(
                        outputs,
                        sources,
                        grad_outputs=self.covectors[number].to(outputs.dtype).expand_as(outputs),
                        # Some terms go on from here, through what was made of parameters.
                        retain_graph=number + 1 < count or keeps_graph,
                        allow_unused=True,
                    )
                found.append(grads)
                if any(grad is not None for grad in grads[len(edges) :]):
                    raise ModelError(f"a parameter that the probe batch did not use is used by another batch: {_WHY}")
            by_call = {}
            for number, grads_of_call in zip(edges, zip(*found, strict=True), strict=False):
                if any(grad is not None for grad in grads_of_call):
                    call = calls[number]
                    by_call[number] = [call.blank() if g is None else g.reshape(call.shape) for g in grads_of_call]
            yield covectors, by_call

    def cost(self, batch: Batch) -> Cost:
        """Measure what one sample costs by running ``batch`` and its first half; B must be at least four."""
        size = batch_size(batch)
        half = take(batch, range(size // 2))
        self.piece(half)  # lazy initialisation is not a cost of the batch
        with Meter() as whole:  # type: ignore[no-untyped-call]
            self.piece(batch)
        with Meter() as part:  # type: ignore[no-untyped-call]
            self.piece(half)
        slope = max(0, whole.num_bytes - part.num_bytes) // (size - size // 2)
        return Cost(
            block_bytes=self.block_bytes(),
            workspace_bytes=max(1, slope),
            fixed_workspace_bytes=max(0, whole.num_bytes - slope * size),
            largest_bytes=max(1, (whole.largest_bytes - part.largest_bytes) // (size - size // 2)),
            jacobian_flops=whole.num_flops / size,
            pair_flops=self.pair_flops(),
        )

    def pair_flops(self) -> float:
        """Operations of a contraction that fall on one pair of samples."""
        return sum((term.held_as.pair_flops(term, self.setup) for term in (*self.terms, *self.fallback_terms)), 0.0)

    def block_bytes(self) -> int:
        """Bytes that a block holds for a sample."""
        every, covectors = (*self.terms, *self.fallback_terms), self.setup.num_covectors
        numbers = sum(term.held_as.num_numbers(term, covectors) for term in every)
        outputs = self.model.dtype.itemsize * self.covectors.shape[1]
        return max(1, numbers * self.setup.accumulate_dtype.itemsize + outputs)
