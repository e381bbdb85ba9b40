"""From samples to a Jacobian block: the engine that joins traced terms and the fallback."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from ntkpipe.base.errors import ModelError, NonFiniteError
from ntkpipe.base.grid import Span
from ntkpipe.jacobian.cost import Cost, make_meter
from ntkpipe.jacobian.fallback import METHODS, batch_size, take
from ntkpipe.jacobian.model.device import is_out_of_memory, release_memory, sizes_of
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.model.samples import show_samples
from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Factored, Pulled, Representation, Setup, Term
from ntkpipe.jacobian.representations.pieces import Piece
from ntkpipe.jacobian.representations.sums import Pairs, Workspace
from ntkpipe.jacobian.representations.terms import make_terms
from ntkpipe.jacobian.tracing.recorder import Recorder
from ntkpipe.jacobian.tracing.trace import DEPENDS_ON_DATA, Pass, Tracing

_WHY = (
    "the operations of the forward pass depend on the data. Pass jacobian='fallback' to compute this model without "
    "structure, from the start where a store was begun (another path, or mode='w')"
)
_SMALL_WIDTH = 4096  # dense Jacobians of fewer entries share one matrix
_METERED = 256  # covectors whose costs are measured; of more of them they are extrapolated
_VMAP_TOLERANCE = 0.1  # Jacobians by vmap and by the loop agree to rounding, or vmap is wrong


class DataDependentError(ModelError):
    """A batch was computed by other operations than those that were traced."""


@dataclass(frozen=True)
class JacobianBlock:
    """Jacobians of a strip of samples."""

    pieces: tuple[Piece, ...]  # the strip cut into pieces of equal size; the last may be smaller
    outputs: Tensor  # f of each sample, shape (n, O), in the compute dtype

    def num_bytes(self) -> int:
        """Bytes that the block holds."""
        return sum(piece.num_bytes() for piece in self.pieces) + self.outputs.nbytes

    def require_finite(self, split: str, numbers: Sequence[int]) -> None:
        """Check all entries of samples with these numbers; if nothing is wrong, this waits for a GPU just once."""
        outputs = torch.isfinite(self.outputs).all(dim=1)
        if bool((torch.cat([piece.has_finite_sums() for piece in self.pieces]) & outputs).all()):
            return
        finite = torch.cat([piece.is_finite() for piece in self.pieces]) & outputs
        bad = sorted({numbers[int(i)] for i in torch.nonzero(~finite.cpu()).flatten()})
        if bad:
            raise NonFiniteError(
                f"Jacobians or outputs of {split} {show_samples(bad)} are NaN or infinite; they were not written. "
                "Leave those samples out, or correct them or the model"
            )


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
        self.parameters = parameters = model.parameters
        self.fallback = tuple(name for name in model.names if name in tracing.fallback)
        self.terms = tuple(make_terms(tracing, parameters, setup, representations))
        self.fallback_terms = tuple(Term(n, (n,), (), parameters[n].numel(), Dense) for n in self.fallback)
        self.every_term = (*self.terms, *self.fallback_terms)
        self.covectors = setup.covectors.to(device=model.device, dtype=model.dtype)
        self.workspace = Workspace()

    @property
    def _waits(self) -> bool:
        """Whether gradients of several covectors are held at once: to be multiplied with inputs, not to be kept."""
        return not all(issubclass(term.held_as, Factored) for term in self.terms)

    @property
    def representations(self) -> dict[str, str]:
        """How each term's Jacobian is found and kept, for the manifest."""
        return {t.name: t.label for t in self.terms} | dict.fromkeys(self.fallback, f"torch.func:{self.method}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Without scratch: what another process needs is what it was made of.
        return Engine, (self.model, self.tracing, self.method, self.setup, self.representations)

    def moved(self, device: torch.device) -> "Engine":
        """The same engine on another device; itself where it is there already."""
        model = self.model
        return self if device == model.device else self.changed(model=model.converted(model.dtype, device))

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
        names = [name for name in (*self.tracing.covered, *self.tracing.unused) if name in methods]
        tracing = self.tracing.without(dict.fromkeys(names, "it is there in the store that is resumed"))
        stored = {name for term in recorded for name in term.split(" + ")}
        tracing = tracing.without_use(name for name in tracing.fallback if name not in stored)
        method = next(iter(methods.values()), self.method)
        return self.changed(tracing=tracing, method=method, representations=recorded)

    def without_structure(self, batch: Batch) -> "Engine":
        """The same engine where operations depend on the data: every parameter is left to the fallback."""
        names = (*self.tracing.covered, *self.tracing.unused)
        tracing = self.tracing.without(dict.fromkeys(names, DEPENDS_ON_DATA))
        return self.changed(tracing=tracing).with_working_method(batch)

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
                    with self.model.turn:
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
        piece, held = self._empty_piece(stop - start)
        spans = Span(start, stop).batches(max(2, batch))
        found = [self._fill(held, load(span.start, span.stop), span.start - start) for span in spans]
        return piece, torch.cat(found) if len(found) > 1 else found[0]

    def piece(self, batch: Batch) -> tuple[Piece, Tensor]:
        """Jacobians and outputs of one batch as one piece."""
        size = batch_size(batch)
        with self.model.turn:
            return self._piece(lambda start, stop: batch, 0, size, size)

    def _empty_piece(self, num_samples: int) -> tuple[Piece, dict[str, Representation]]:
        """Room for the Jacobians of some samples, and what each term fills of it."""
        covectors = self.covectors.to(self.setup.accumulate_dtype)  # they say in which dtype and on which device
        held: dict[str, Representation] = {}
        factors: list[tuple[int, Representation]] = []
        groups = {term.name: [self.setup.group_of(name) for name in term.parameters] for term in self.every_term}
        dense = [term for term in self.terms if issubclass(term.held_as, Dense) and term.width < _SMALL_WIDTH]
        small = [term for term in dense if len(set(groups[term.name])) == 1]
        # The last number is that of parameters in no group: of all, where there are no groups.
        for group, sharing in product(range(len(self.setup.groups) + 1), (small, self.fallback_terms)):
            if own := [term for term in sharing if groups[term.name][0] == group]:
                widths = [term.width for term in own]
                matrix = covectors.new_empty((num_samples, len(covectors), sum(widths)))
                factors.append((group, Dense(matrix)))
                for term, part in zip(own, matrix.split(widths, dim=2), strict=True):
                    held[term.name] = cast("type[Dense]", term.held_as)(part)
        for term in (term for term in self.terms if term.name not in held):
            held[term.name] = factor = term.held_as.empty(term, num_samples, covectors)
            numbers = groups[term.name]
            if len(set(numbers)) == 1:
                factors.append((numbers[0], factor))
                continue
            assert isinstance(factor, Dense), "only what is joined spans groups"
            parts = factor.matrix.split([self.parameters[name].numel() for name in term.parameters], dim=2)
            factors += [(group, Dense(part)) for group, part in zip(numbers, parts, strict=True)]
        own_groups, every = zip(*factors, strict=True)
        return Piece(num_samples, len(covectors), every, own_groups if self.setup.groups else ()), held

    def _fill(self, held: Mapping[str, Representation], batch: Batch, first: int) -> Tensor:
        samples = slice(first, first + batch_size(batch))
        recorded = self.forward(batch)
        for pulled in self.pulled(recorded, samples):
            for term in self.terms:
                held[term.name].fill(term, pulled)
        if self.fallback:
            jacobians = self.fallback_jacobian(batch).transpose(0, 1)
            parts = jacobians.split([term.width for term in self.fallback_terms], dim=2)
            for term, part in zip(self.fallback_terms, parts, strict=True):
                held[term.name].tensors()[0][samples] = part
        return recorded.outputs.detach()

    def forward(self, batch: Batch) -> Pass:
        """A recorded pass of a batch, which used its parameters as those on probe batches did."""
        if not self.terms:  # nothing to watch for; gradients are recorded, which models that differentiate inside need
            outputs = self.model(batch)
            return Pass(outputs if self.tracing.unused else outputs.detach(), [])
        recorder = Recorder(self.parameters, self.model.constants(), expansions=self.tracing.expansions)
        with recorder:
            recorded = Pass(self.model(batch), recorder.calls)
        if not self.tracing.matches(recorded, self.parameters):
            raise DataDependentError(f"the forward pass used its parameters in another way than on others: {_WHY}")
        if any(recorded.calls[use.call].input_was_changed() for use in self.tracing.uses):
            raise ModelError("an input of a layer was changed in place after its use; it was not on the probe batch")
        return recorded

    def pulled(self, recorded: Pass, samples: slice, *, every_use: bool = False) -> Iterator[Pulled]:
        """Covectors pulled back to the output of each use, a few at a time; the samples are these of a piece."""
        numbers = sorted({use.call for term in self.terms if every_use or not term.is_constant for use in term.uses})
        # Some terms go on from here, through what was made of parameters.
        keeps_graph = every_use or any(term.held_as.needs_graph for term in self.terms)
        outputs, calls, count = recorded.outputs, recorded.calls, len(self.covectors)
        unused = [self.parameters[name] for name in self.tracing.unused]
        num_bytes = sum(calls[n].blank().numel() for n in numbers if calls[n].edge is not None) * outputs.itemsize
        most = sizes_of(self.covectors.device).gradient_bytes if every_use or self._waits else 0
        step = max(1, min(count, most // max(1, num_bytes)))
        for start in range(0, count, step):
            found = []
            for number in range(start, min(start + step, count)):
                covectors = self.covectors[number].to(outputs.dtype).expand(len(outputs), -1)
                keeps = number + 1 < count
                grads, others = recorded.pulled(covectors, unused, numbers, keeps_graph=keeps or keeps_graph)
                if any(grad is not None for grad in others):
                    raise DataDependentError(f"a parameter that some samples do not use is used by others: {_WHY}")
                found.append(grads)
            reached = [number for number in numbers if any(number in grads for grads in found)]
            by_call = {number: [grads.get(number, calls[number].blank()) for grads in found] for number in reached}
            run = slice(start, start + len(found))
            yield Pulled(calls, by_call, run, samples, self.parameters, self.workspace)

    def fallback_jacobian(self, batch: Batch) -> Tensor:
        """Jacobians of the fallback's parameters, shape (S, B, P), in the compute dtype."""
        return METHODS[self.method](self.model, self.fallback, batch, self.covectors).detach()

    def by_parameter(self, batch: Batch, places: list[int]) -> dict[str, Tensor]:
        """Jacobians (S, n, P) of every parameter for the samples at ``places`` of a batch."""
        recorded, widths = self.forward(batch), {name: value.numel() for name, value in self.parameters.items()}
        shape = (len(self.covectors), len(places))
        found = {name: value.new_zeros((*shape, widths[name])) for name, value in self.parameters.items()}
        for pulled in self.pulled(recorded, slice(0, recorded.num_samples), every_use=True):
            pulled.add_jacobians(self.tracing.uses, found, places)
        if self.fallback:
            jacobians = self.fallback_jacobian(take(batch, places))
            found |= zip(self.fallback, jacobians.split([widths[name] for name in self.fallback], dim=2), strict=True)
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

    def pair_flops(self) -> float:
        """Operations of a contraction that fall on one pair of samples."""
        return sum((term.held_as.pair_flops(term, self.setup) for term in self.every_term), 0.0)

    def block_bytes(self) -> int:
        """Bytes that a block holds for a sample."""
        numbers = sum(term.held_as.num_numbers(term, self.setup.num_covectors) for term in self.every_term)
        return max(1, numbers * self.setup.accumulate_dtype.itemsize + self.covectors[0].nbytes)

    def cost(self, batch: Batch, samples: Sequence[int] | None = None) -> Cost:
        """Measure what one sample costs by running ``batch``, of these samples, and its first half; B is at least 4."""
        size, count, numbers = batch_size(batch), len(self.covectors), samples or range(batch_size(batch))
        most = _METERED if self._waits or self.fallback else 2
        found = self._of_few(min(count, most))._metered(batch, numbers)
        if count > most:  # each further covector costs the same
            less = self._of_few(most // 2)._metered(batch, numbers)
            found += (found - less) * (count - most) / (most - most // 2)
        (flops, whole_bytes, _), (_, num_bytes, largest) = found[0].tolist(), (found[0] - found[1]).tolist()
        slope = max(0, int(num_bytes)) // (size - size // 2)
        return Cost(
            block_bytes=self.block_bytes(),
            workspace_bytes=max(1, slope),
            fixed_workspace_bytes=max(0, int(whole_bytes) - slope * size),
            largest_bytes=max(1, int(largest) // (size - size // 2)),
            jacobian_flops=flops / size,
            pair_flops=self.pair_flops(),
        )

    def _of_few(self, count: int) -> "Engine":
        """The same engine for a few covectors, which cover every output."""
        if count == len(self.covectors):
            return self
        covectors = self.setup.covectors[:count].clone()
        covectors[0] = self.setup.covectors.sum(dim=0)
        return self.with_covectors(covectors, self.setup.pairs)

    def _metered(self, batch: Batch, samples: Sequence[int]) -> Tensor:
        """Operations, bytes and the largest tensor's bytes of a batch, and of its first half."""
        half = take(batch, range(batch_size(batch) // 2))
        with make_meter() as part:
            self.piece(half)
        with make_meter() as whole:
            piece, outputs = self.piece(batch)
        JacobianBlock((piece,), outputs).require_finite("train", samples)
        found = [[each.num_flops, each.num_bytes, each.largest_bytes] for each in (whole, part)]
        return torch.tensor(found, dtype=torch.float64)
