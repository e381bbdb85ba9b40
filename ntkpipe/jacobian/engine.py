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
from ntkpipe.jacobian.representations.contract import Pairs
from ntkpipe.jacobian.representations.factors import Dense, Factor, Piece
from ntkpipe.jacobian.representations.fill import Filler, Grads, dense_filler, make_filler
from ntkpipe.jacobian.representations.terms import (
    Rates,
    Representation,
    Term,
    choose_representation,
    contraction_flops,
    covector_pairs,
    kept_numbers,
    make_terms,
)
from ntkpipe.jacobian.representations.workspace import Workspace
from ntkpipe.jacobian.tracing.recorder import Call
from ntkpipe.jacobian.tracing.trace import Tracing
from ntkpipe.jacobian.tracing.uses import Use

# Dense Jacobians of fewer entries share one matrix.
_SMALL_WIDTH = 4096

_RECORDED = "it is there in the store that is resumed"
_DEPENDS = (
    "the operations of the forward pass depend on the data. Pass jacobian='fallback' to compute this model without "
    "structure"
)


@dataclass(frozen=True)
class Block:
    """Jacobians of a strip of samples."""

    pieces: tuple[Piece, ...]  # the strip cut into pieces of equal size; the last may be smaller
    outputs: Tensor  # f of each sample, shape (n, O), in the compute dtype

    def num_bytes(self) -> int:
        """Bytes that the block holds."""
        return sum(piece.num_bytes() for piece in self.pieces) + self.outputs.nbytes


@dataclass(frozen=True)
class Setup:
    """What is asked of an engine beside the model."""

    covectors: Tensor  # shape (S, O)
    pairs: Pairs  # which pairs of covectors are contracted
    accumulate_dtype: torch.dtype  # dtype of the blocks, and so of their contraction
    rates: Rates  # of the device, for choosing how Jacobians are held
    num_samples: int  # samples along a tile's edge: how often a Jacobian is used once it is there
    memory_bytes: float  # what the Jacobians of that many samples may take
    piece_rows: int  # rows of the pieces that are contracted at a time
    groups: tuple[tuple[str, ...], ...] = ()  # parameters that are summed over by themselves, too


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
        self.model = model
        self.tracing = tracing
        self.method = method
        self.setup = setup
        self.covectors = setup.covectors.to(device=model.device, dtype=model.dtype)
        self.fallback = tuple(name for name in model.names if name in tracing.fallback)
        self.group_of = {name: number for number, names in enumerate(setup.groups) for name in names}
        self.terms = tuple(make_terms(tracing, model.parameters(), self._chooser(representations), self.group_of))
        self.workspace = Workspace()

    def _chooser(self, recorded: Mapping[str, str] | None) -> Callable[[str, tuple[Use, ...]], Representation]:
        setup = self.setup
        # A weight that is held with its bias keeps its way where the bias goes to the fallback.
        labels = {name.partition(" + ")[0]: label.rpartition(":")[2] for name, label in (recorded or {}).items()}

        def choose(name: str, uses: tuple[Use, ...]) -> Representation:
            if recorded is None:
                return choose_representation(
                    uses,
                    len(setup.covectors),
                    setup.pairs,
                    setup.rates,
                    setup.num_samples,
                    setup.memory_bytes,
                    setup.piece_rows,
                )
            label = labels.get(name, "")
            return label if label in {"pairwise", "late", "table"} else "dense"  # type: ignore[return-value]

        return choose

    @property
    def representations(self) -> dict[str, str]:
        """How each term's Jacobian is found and kept, for the manifest."""
        found = {term.name: term.label for term in self.terms}
        return {**found, **dict.fromkeys(self.fallback, f"torch.func:{self.method}")}

    def __reduce__(self) -> tuple[Any, ...]:
        # Without scratch: what another process needs is what it was made of.
        return Engine, (self.model, self.tracing, self.method, self.setup, self.representations)

    def moved(self, device: torch.device) -> "Engine":
        """The same engine on another device; itself where it is there already."""
        return self if device == self.model.device else self.changed(model=self.model.moved(device))

    def copy(self) -> "Engine":
        """The same engine on its own copy of the module, for another thread."""
        return Engine(self.model.copy(), self.tracing, self.method, self.setup, self.representations)

    def changed(
        self, *, model: FunctionalModel | None = None, tracing: Tracing | None = None, method: str | None = None
    ) -> "Engine":
        """The same engine with another model, tracing or method; terms that remain keep their representations."""
        return Engine(
            model or self.model, tracing or self.tracing, method or self.method, self.setup, self.representations
        )

    def reusing(self, recorded: Mapping[str, str]) -> "Engine":
        """The same engine with the recorded choices of an earlier run, as far as its tracing allows them."""
        methods = {label.partition(":")[2] for label in recorded.values() if label.startswith("torch.func:")}
        moved = {name: _RECORDED for name in self.tracing.covered if recorded.get(name, "").startswith("torch.func:")}
        method = methods.pop() if methods else self.method
        tracing = self.tracing.without(moved) if moved else self.tracing
        return Engine(self.model, tracing, method, self.setup, recorded)

    def with_covectors(self, covectors: Tensor, pairs: Pairs) -> "Engine":
        """The same engine for other covectors."""
        setup = replace(self.setup, covectors=covectors, pairs=pairs)
        return Engine(self.model, self.tracing, self.method, setup, self.representations)

    def with_groups(self, groups: tuple[tuple[str, ...], ...]) -> "Engine":
        """The same engine with other groups of parameters."""
        setup = replace(self.setup, groups=groups)
        return Engine(self.model, self.tracing, self.method, setup, self.representations)

    def block(
        self, load: Callable[[int, int], Batch], start: int, stop: int, *, subtile: int, batch: int
    ) -> tuple[Block, int]:
        """Jacobians of samples ``start:stop``, in pieces of ``subtile`` samples and forward passes of ``batch``.

        Memory: the block, and one batch's activations. Where that runs out, the batch is halved.
        """
        pieces, outputs = [], []
        for first in range(start, stop, subtile):
            last = min(first + subtile, stop)
            found = None
            while found is None:
                found = self._piece_if_it_fits(load, first, last, batch)
                if found is None:
                    batch = max(2, min(batch, last - first) // 2)
                    self.workspace.clear()
                    release_memory()
            pieces.append(found[0])
            outputs.append(found[1])
        return Block(tuple(pieces), torch.cat(outputs)), batch

    def _piece_if_it_fits(
        self, load: Callable[[int, int], Batch], start: int, stop: int, batch: int
    ) -> tuple[Piece, Tensor] | None:
        """A piece; none if memory ran out for a batch that can be halved.

        A function of its own: once it has returned, nothing keeps the frames of the failed attempt and their tensors.
        """
        try:
            return self._piece(load, start, stop, batch)
        except Exception as error:
            if not is_out_of_memory(error) or min(batch, stop - start) <= 2:
                raise
            return None

    def _piece(self, load: Callable[[int, int], Batch], start: int, stop: int, batch: int) -> tuple[Piece, Tensor]:
        if stop - start == 1:
            return self.piece(load(start, stop))
        filling = _Filling(self, stop - start)
        outputs = [
            filling.add(load(s.start, s.stop), s.start - start) for s in Span(start, stop).batches(max(2, batch))
        ]
        return filling.piece(), torch.cat(outputs)

    def piece(self, batch: Batch) -> tuple[Piece, Tensor]:
        """Jacobians and outputs of one batch as one piece."""
        size = batch_size(batch)
        if size == 1:
            # Some backward passes are wrong for a batch of one (see fallback.by_loop): run it twice, keep the first.
            piece, outputs = self.piece(take(batch, (0, 0)))
            return piece.first(), outputs[:1]
        filling = _Filling(self, size)
        outputs = filling.add(batch, 0)
        return filling.piece(), outputs

    def fallback_jacobian(self, batch: Batch) -> Tensor:
        """Jacobians of the fallback's parameters, shape (S, B, P), in the compute dtype."""
        return METHODS[self.method](self.model, self.fallback, batch, self.covectors).detach()

    def forward(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Outputs of a batch, with their graph, and the recorded calls."""
        needs_graph = bool(self.terms or self.tracing.unused)
        with torch.set_grad_enabled(needs_graph):
            outputs, calls = self.tracing.record(self.model, batch)
        size = batch_size(batch)
        if self.terms and not self.tracing.matches(calls, outputs, self.model.parameters(), size):
            raise ModelError(f"the forward pass used its parameters in another way than on the probe batch: {_DEPENDS}")
        if any(calls[use.call].input_was_changed() for use in self.tracing.uses):
            raise ModelError("an input of a layer was changed in place after its use; it was not on the probe batch")
        return outputs, calls

    def pull_back(
        self, outputs: Tensor, calls: list[Call], *, every_use: bool = False
    ) -> Iterator[tuple[slice, Grads]]:
        """Covectors pulled back to the output of each use, a few at a time: gradients by number of the call."""
        numbers = sorted({use.call for term in self.terms if every_use or not term.is_constant for use in term.uses})
        keeps_graph = every_use or any(term.representation == "joined" for term in self.terms)
        edges = {number: edge for number in numbers if (edge := calls[number].edge) is not None}
        parameters = self.model.parameters()
        sources: list[Any] = [*edges.values(), *(parameters[name] for name in self.tracing.unused)]
        count = len(self.covectors)
        num_bytes = sum(calls[number].blank().numel() for number in edges) * outputs.itemsize
        most = sizes_of(self.model.device).gradient_bytes
        step = max(1, min(count, most // max(1, num_bytes)))
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
                        # Joined terms go on from here, through what was made of parameters.
                        retain_graph=number + 1 < count or keeps_graph,
                        allow_unused=True,
                    )
                if any(grad is not None for grad in grads[len(edges) :]):
                    raise ModelError(
                        f"a parameter that the probe batch did not use is used by another batch: {_DEPENDS}"
                    )
                found.append(grads)
            by_call = {number: [grads[place] for grads in found] for place, number in enumerate(edges)}
            yield (
                covectors,
                {
                    number: [
                        calls[number].blank() if grad is None else grad.reshape(calls[number].shape) for grad in each
                    ]
                    for number, each in by_call.items()
                    if any(grad is not None for grad in each)
                },
            )

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
        count, setup = len(self.covectors), self.setup
        width = sum(self.model.parameters()[name].numel() for name in self.fallback)
        return 2.0 * covector_pairs(count, setup.pairs) * width + sum(
            contraction_flops(term, count, setup.pairs, setup.num_samples, setup.piece_rows) for term in self.terms
        )

    def block_bytes(self) -> int:
        """Bytes that a block holds for a sample."""
        count = len(self.covectors)
        width = self.model.dtype.itemsize * self.covectors.shape[1]
        numbers = sum(kept_numbers(term, count) for term in self.terms)
        own = self.model.parameters()
        numbers += count * sum(own[name].numel() for name in self.fallback)
        return max(1, numbers * self.setup.accumulate_dtype.itemsize + width)


class _Filling:
    """A piece that is being filled, batch by batch."""

    def __init__(self, engine: Engine, num_samples: int) -> None:
        self._engine = engine
        self._num_samples = num_samples
        self._covectors = engine.covectors.to(engine.setup.accumulate_dtype)
        self._fillers: list[Filler] = []
        self._fallback: dict[str, Tensor] = {}
        # The last number is that of parameters in no group: of all, where there are no groups.
        groups = range(len(engine.setup.groups) + 1)
        self._factors: list[tuple[int, Factor]] = []
        for number in groups:
            self._factors += [(number, Dense(matrix)) for matrix in self._shared(number)]
        self._factors += [found for term in engine.terms for found in self._own(term)]

    def _owners(self, names: tuple[str, ...]) -> list[int]:
        """Numbers of the groups that parameters are in."""
        setup = self._engine.setup
        return [self._engine.group_of.get(name, len(setup.groups)) for name in names]

    def _is_shared(self, term: Term) -> bool:
        return _is_small(term) and len(set(self._owners(term.parameters))) == 1

    def _empty(self, width: int) -> Tensor:
        return self._covectors.new_empty((self._num_samples, len(self._covectors), width))

    def _shared(self, group: int) -> Iterator[Tensor]:
        """Jacobians of several terms of a group side by side, and those of the fallback."""
        engine = self._engine
        parameters = engine.model.parameters()
        small = [t for t in engine.terms if self._is_shared(t) and self._owners(t.parameters)[0] == group]
        widths = [term.width for term in small]
        if small:
            joined = self._empty(sum(widths))
            for term, part in zip(small, joined.split(widths, dim=2), strict=True):
                self._fillers.append(dense_filler(term, part, parameters, engine.workspace))
            yield joined
        names = [name for name in engine.fallback if self._owners((name,)) == [group]]
        if names:
            sizes = [parameters[name].numel() for name in names]
            matrix = self._empty(sum(sizes))
            self._fallback |= zip(names, matrix.split(sizes, dim=2), strict=True)
            yield matrix

    def _own(self, term: Term) -> Iterator[tuple[int, Factor]]:
        """What a term holds by itself; Jacobians that span groups parameter by parameter."""
        engine = self._engine
        parameters, owners = engine.model.parameters(), self._owners(term.parameters)
        if self._is_shared(term):
            return
        filler = make_filler(term, self._num_samples, self._covectors, parameters, engine.workspace)
        self._fillers.append(filler)
        factor = filler.factor()
        if len(set(owners)) == 1:
            yield owners[0], factor
            return
        assert isinstance(factor, Dense), "only what is joined spans groups"
        parts = factor.matrix.split([parameters[name].numel() for name in term.parameters], dim=2)
        for number, part in zip(owners, parts, strict=True):
            yield number, Dense(part)

    def add(self, batch: Batch, first: int) -> Tensor:
        """Fill in a batch that begins at sample ``first`` of the piece; its outputs, without their graph."""
        engine, samples = self._engine, slice(first, first + batch_size(batch))
        outputs, calls = engine.forward(batch)
        for filler in self._fillers:
            filler.add_inputs(calls, samples)
        for covectors, grads in engine.pull_back(outputs, calls):
            with torch.no_grad():
                for filler in self._fillers:
                    filler.add_cotangents(calls, grads, covectors, samples)
        if engine.fallback:
            targets = [self._fallback[name] for name in engine.fallback]
            found = engine.fallback_jacobian(batch).transpose(0, 1)
            for target, part in zip(targets, found.split([each.shape[2] for each in targets], dim=2), strict=True):
                target[samples] = part
        return outputs.detach()

    def piece(self) -> Piece:
        """The piece, once every batch is in."""
        numbers, factors = zip(*self._factors, strict=True)
        groups = numbers if self._engine.setup.groups else ()
        return Piece(self._num_samples, len(self._covectors), factors, groups)


def _is_small(term: Term) -> bool:
    return term.is_dense and term.width < _SMALL_WIDTH
