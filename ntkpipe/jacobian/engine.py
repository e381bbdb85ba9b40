"""From samples to a Jacobian block: the engine that joins traced terms and the fallback."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ntkpipe.base.grid import Span
from ntkpipe.jacobian.cost import Cost, make_meter
from ntkpipe.jacobian.fallback import METHODS, batch_size, take
from ntkpipe.jacobian.model.device import is_out_of_memory, release_memory
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.pullback import Pullback
from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Setup, Term
from ntkpipe.jacobian.representations.pieces import Piece, PieceFilling
from ntkpipe.jacobian.representations.sums import Pairs
from ntkpipe.jacobian.representations.terms import make_terms
from ntkpipe.jacobian.representations.workspace import Workspace
from ntkpipe.jacobian.tracing.layouts import Pass
from ntkpipe.jacobian.tracing.recorder import Recorder
from ntkpipe.jacobian.tracing.trace import Tracing

_VMAP_TOLERANCE = 0.1  # Jacobians by vmap and by the loop agree to rounding, or vmap is wrong


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
        self.fallback = tuple(name for name in model.names if name in tracing.fallback)
        parameters = model.parameters
        self.terms = tuple(make_terms(tracing, parameters, setup, representations))
        fallback = tuple(Term(name, (name,), (), parameters[name].numel(), Dense) for name in self.fallback)
        self.covectors = setup.covectors.to(device=model.device, dtype=model.dtype)
        self.pullback = Pullback(tracing, setup, parameters, self.covectors, self.terms, fallback)
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
        return (
            self if device == self.model.device else self.changed(model=self.model.converted(self.model.dtype, device))
        )

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

    def with_covectors(self, covectors: Tensor, pairs: Pairs, **changes: Any) -> "Engine":
        """The same engine for other covectors, and perhaps with other changes."""
        return self.changed(setup=replace(self.setup, covectors=covectors, pairs=pairs), **changes)

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
        filling = self.pullback.filling(stop - start)
        spans = Span(start, stop).batches(max(2, batch))
        found = [self._fill(filling, load(span.start, span.stop), span.start - start) for span in spans]
        return filling.piece(), torch.cat(found) if len(found) > 1 else found[0]

    def piece(self, batch: Batch) -> tuple[Piece, Tensor]:
        """Jacobians and outputs of one batch as one piece."""
        size = batch_size(batch)
        return self._piece(lambda start, stop: batch, 0, size, size)

    def _fill(self, filling: PieceFilling, batch: Batch, first: int) -> Tensor:
        samples = slice(first, first + batch_size(batch))
        recorded = self.forward(batch)
        self.pullback.fill(filling, recorded, samples, self.workspace)
        if self.fallback:
            filling.fill_fallback(self.fallback_jacobian(batch).transpose(0, 1), samples)
        return recorded.outputs.detach()

    def fallback_jacobian(self, batch: Batch) -> Tensor:
        """Jacobians of the fallback's parameters, shape (S, B, P), in the compute dtype."""
        return METHODS[self.method](self.model, self.fallback, batch, self.covectors).detach()

    def by_parameter(self, batch: Batch, places: list[int]) -> dict[str, Tensor]:
        """Jacobians (S, n, P) of every parameter for the samples at ``places`` of a batch."""
        found = self.pullback.by_parameter(self.forward(batch), places)
        if self.fallback:
            widths = [self.pullback.parameters[name].numel() for name in self.fallback]
            jacobians = self.fallback_jacobian(take(batch, places))
            found |= zip(self.fallback, jacobians.split(widths, dim=2), strict=True)
        return found

    def with_working_method(self, batch: Batch) -> "Engine":
        """The engine with a method that works for the fallback's parameters: vmap, or else the loop."""
        problem = self._problem_of_vmap(batch) if self.fallback and self.method == "vmap" else None
        if problem is None:
            return self
        engine = self.changed(method="loop")
        engine.fallback_jacobian(take(batch, (0, 1)))
        warnings.warn(
            f"torch.func.vmap cannot run this model ({problem}); the {len(self.fallback)} parameters without a rule "
            "are differentiated sample by sample, which is exact but slow",
            stacklevel=2,
        )
        return engine

    def _problem_of_vmap(self, batch: Batch) -> str | None:
        # Some batching rules of torch 2.13 work, or are right, only where there are as many samples as covectors.
        few = take(batch, [i % batch_size(batch) for i in range(3 if len(self.covectors) != 3 else 4)])
        try:
            with torch.enable_grad():
                replaced = {name: value.detach() for name, value in self.model.parameters.items()}
                self.model.require_replaced(self.model.call_with(replaced, batch))
            self.fallback_jacobian(batch)
            found = self.fallback_jacobian(few)
        except Exception as error:  # noqa: BLE001 - whatever vmap stumbles over; the loop is exact, its errors are raised
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.120}"
        exact = self.changed(method="loop").fallback_jacobian(few)
        gap = float((found - exact).norm(dim=-1).max() / exact.norm(dim=-1).max().clamp_min(1e-30))
        return None if gap <= _VMAP_TOLERANCE else f"its Jacobians are off by {gap:.1e}"

    def forward(self, batch: Batch) -> Pass:
        """A recorded pass of a batch."""
        recorder = Recorder(self.pullback.parameters, self.model.constants(), expansions=self.tracing.expansions)
        with torch.set_grad_enabled(self.pullback.needs_graph), recorder:
            recorded = Pass(self.model(batch), recorder.calls)
        self.pullback.check(recorded)
        return recorded

    def cost(self, batch: Batch) -> Cost:
        """Measure what one sample costs by running ``batch`` and its first half; B must be at least four."""
        size = batch_size(batch)
        half = take(batch, range(size // 2))
        self.piece(half)  # lazy initialisation is not a cost of the batch
        with make_meter() as whole:
            self.piece(batch)
        with make_meter() as part:
            self.piece(half)
        slope = max(0, whole.num_bytes - part.num_bytes) // (size - size // 2)
        return Cost(
            block_bytes=self.pullback.block_bytes(),
            workspace_bytes=max(1, slope),
            fixed_workspace_bytes=max(0, whole.num_bytes - slope * size),
            largest_bytes=max(1, (whole.largest_bytes - part.largest_bytes) // (size - size // 2)),
            jacobian_flops=whole.num_flops / size,
            pair_flops=self.pullback.pair_flops(),
        )
