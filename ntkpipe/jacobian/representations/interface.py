"""What every representation of Jacobians offers, and those by factors; each of them is a file of this folder."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import sizes_of
from ntkpipe.jacobian.representations.sums import GramSums, Pairs, Workspace, copy_merged, cuts
from ntkpipe.jacobian.tracing.recorder import Call
from ntkpipe.jacobian.tracing.rules.form import Outer
from ntkpipe.jacobian.tracing.uses import Use, pull_back


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, for choosing between representations; only ratios matter."""

    product: float  # operations of a large matrix product
    elementwise: float  # entries that are multiplied and added to others


@dataclass(frozen=True)
class Setup:
    """What an engine is asked for, beside the model."""

    covectors: Tensor  # shape (S, O)
    pairs: Pairs  # which pairs of covectors are contracted
    accumulate_dtype: torch.dtype  # dtype of Jacobian blocks, and so of their contraction
    rates: Rates  # of the device
    num_samples: int  # samples along a tile's edge: how often a Jacobian is used once it is there
    memory_bytes: float  # what the Jacobians of that many samples may take
    piece_rows: int  # rows of the pieces that are contracted at a time
    groups: tuple[tuple[str, ...], ...] = ()  # parameters that also get a sum of their own

    @property
    def num_covectors(self) -> int:
        """S."""
        return len(self.covectors)

    @property
    def num_pairs(self) -> int:
        """How many pairs of covectors are contracted."""
        return self.num_covectors**2 if self.pairs == "all" else self.num_covectors

    @cached_property
    def _groups(self) -> dict[str, int]:
        return {name: number for number, names in enumerate(self.groups) for name in names}

    def group_of(self, name: str) -> int:
        """Number of the group that a parameter is in; one more number for those in none."""
        return self._groups.get(name, len(self.groups))


@dataclass(frozen=True)
class Term:
    """Parameters whose Jacobians are found together: a weight, the bias of the same calls, both, or all that joins."""

    name: str  # for manifests: the parameters; a part of one has its number
    parameters: tuple[str, ...]  # their names
    uses: tuple[Use, ...]  # uses whose positions are summed; of the weight where there is a bias, too
    width: int  # entries of a covector's Jacobian
    held_as: "type[Representation]"  # how its Jacobians are held
    has_bias: bool = False  # whether the bias of the same calls is part of it

    @property
    def num_positions(self) -> int:
        """Rows of a sample, over all uses."""
        return sum(use.num_positions for use in self.uses)

    @property
    def is_constant(self) -> bool:
        """Whether its cotangents are the covectors themselves, the same for all samples, and held as such."""
        return self.held_as.can_be_constant and len(self.uses) == 1 and self.uses[0].is_output

    @property
    def label(self) -> str:
        """Functions and representation, for manifests and reports."""
        functions = "+".join(dict.fromkeys(use.function for use in self.uses))
        return f"{functions}:{self.held_as.word}"


@dataclass(frozen=True)
class Pulled:
    """A few covectors, pulled back through one batch to the calls that use parameters."""

    calls: list[Call]
    grads: Mapping[int, Sequence[Tensor]]  # by number of the call; without those that nothing flows back to
    covectors: slice
    samples: slice  # of the piece that is filled
    parameters: Mapping[str, Tensor]
    workspace: Workspace

    @property
    def num_samples(self) -> int:
        """Samples of the batch."""
        return len(range(self.samples.start, self.samples.stop))

    def add_jacobians(
        self, uses: Iterable[Use], targets: Mapping[str, Tensor], places: Sequence[int] | None = None
    ) -> None:
        """Add the Jacobians of all samples, or those at some places, to a tensor (S, n, P) for each parameter."""
        for use in uses:
            call = self.calls[use.call]
            for number, grad in enumerate(self.grads.get(use.call, ()), self.covectors.start):
                rows = use.jacobian(call, grad, self.num_samples, places)
                for name, found in pull_back(call.arguments[use.role], self.parameters, rows):
                    targets[name][number] += found


@dataclass(frozen=True)
class Representation(ABC):
    """Jacobians of n samples by the parameters of a term: one way to hold them."""

    # A subclass is a frozen dataclass whose first fields are the tensors that are held. Its class methods say what it
    # would cost to hold a term like this, before anything is computed.
    word: ClassVar[str]  # in manifests and reports; stores record it
    meaning: ClassVar[str]  # explanation for the parameter report
    num_additions: ClassVar[float] = 0  # of a contraction to the covector-major sum; many are made in float64
    sample_axes: ClassVar[tuple[int, ...]]  # of each tensor; an axis of length one is the same for all samples
    takes_bias: ClassVar[bool] = False  # whether it can hold the bias of the same calls, too
    can_be_constant: ClassVar[bool] = False  # whether it can hold the same cotangents for all samples once
    needs_graph: ClassVar[bool] = False  # whether it is filled by another backward pass

    @classmethod
    def suits(cls, term: Term, setup: Setup) -> bool:
        """Whether it is the cheapest way for the Jacobians of a term, if none that is listed before it is."""
        return True

    @classmethod
    def pair_flops(cls, term: Term, setup: Setup) -> float:
        """Operations of a contraction that fall on one pair of samples."""
        return 2.0 * setup.num_pairs * term.width

    @classmethod
    def sample_flops(cls, term: Term, num_covectors: int) -> float:
        """Operations to multiply out the factors of one sample's Jacobians, beside its forward and backward pass."""
        outer = [use for use in term.uses if use.kind == Outer.kind]
        return sum((2.0 * num_covectors * use.num_positions * use.numel for use in outer), 0.0)

    @classmethod
    def num_numbers(cls, term: Term, num_covectors: int) -> int:
        """Numbers held for a sample."""
        covectors = torch.empty((num_covectors, 1), device="meta")
        one, two = (sum(t.numel() for t in cls.empty(term, n, covectors).tensors()) for n in (1, 2))
        return two - one

    @classmethod
    @abstractmethod
    def empty(cls, term: Term, num_samples: int, covectors: Tensor) -> Self:
        """Room for the Jacobians of a term, in the dtype of the covectors (S, O)."""

    @abstractmethod
    def fill(self, term: Term, pulled: Pulled) -> None:
        """Take the Jacobians of a batch for a few covectors; the inputs of uses with the first covector alone."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are held; the last is in the dtype of the Jacobians."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Tensor))

    def by_sample(self) -> tuple[Tensor, ...]:
        """What has to be finite, with the samples on the first axis; of length one where it is the same for all."""
        values = zip(self.tensors(), self.sample_axes, strict=True)
        return tuple(tensor.movedim(axis, 0) for tensor, axis in values if tensor.dtype != torch.int64)

    def part(self, samples: slice) -> Self:
        """Jacobians of some samples, as views."""
        return self._with(
            [
                tensor if tensor.shape[axis] == 1 else tensor.movedim(axis, 0)[samples].movedim(0, axis)
                for tensor, axis in zip(self.tensors(), self.sample_axes, strict=True)
            ]
        )

    def first(self) -> Self:
        """Jacobians of the first sample."""
        return self._with([tensor.contiguous() for tensor in self.part(slice(0, 1)).tensors()])

    def _with(self, tensors: Sequence[Tensor]) -> Self:
        return replace(self, **dict(zip((field.name for field in fields(self)), tensors, strict=False)))

    @abstractmethod
    def add_gram(self, other: Self, sums: GramSums) -> None:
        """Add the Gram entries of these Jacobians with others by the same parameters."""

    @abstractmethod
    def diagonal(self, *, is_all: bool) -> Tensor:
        """Entries of each sample with itself in float64: of all pairs of covectors (n, S, S), or equal ones (n, S)."""


class Factored(Representation):
    """Inputs, the first field of a subclass, by sample, and cotangents; covector-major unless it says otherwise."""

    # The Jacobian of a weight is a sum of outer products d (x) a over positions. Where it pays, the two factors are
    # kept instead of the product (Novak, Sohl-Dickstein, Schoenholz 2022, arXiv 2206.08720, "structured derivatives").
    cotangents: Tensor  # a field of each subclass; d, shape (S, n, T, n_out)
    sample_axes: ClassVar[tuple[int, ...]] = (0, 1)

    def fill(self, term: Term, pulled: Pulled) -> None:
        """Copy the factors of every use; cotangents are zero where nothing flows back."""
        samples, (inputs, cotangents) = pulled.samples, self._by_position()
        size = pulled.num_samples
        stop = 0
        for use in term.uses:
            start, stop = stop, stop + use.num_positions
            call, grads = pulled.calls[use.call], pulled.grads.get(use.call)
            if pulled.covectors.start == 0:
                copy_merged(inputs[samples, start:stop], use.inputs(call, size))
            if term.is_constant:
                continue
            for number in range(pulled.covectors.start, pulled.covectors.stop):
                target = cotangents[number, samples, start:stop]
                if grads is None:
                    target.zero_()
                else:
                    copy_merged(target, use.cotangents(call, grads[number - pulled.covectors.start], size))

    def _by_position(self) -> tuple[Tensor, Tensor]:
        """Views of inputs (n, T, …) and cotangents (S, n, T, …)."""
        return self.tensors()[0], self.cotangents

    def diagonal(self, *, is_all: bool) -> Tensor:
        """From Gram matrices of positions, for so few samples at a time that float64 copies stay small."""
        inputs = self.tensors()[0]
        per_sample = 2 * (sum(tensor.numel() for tensor in self.tensors()) // len(inputs))
        per_sample += self._input_gram(slice(0, 1)).numel()
        found = []
        for samples in cuts(0, len(inputs), max(1, sizes_of(inputs.device).late_bytes // (8 * per_sample))):
            d, gram = self._grouped_cotangents(samples), self._input_gram(samples)
            other = gram[:, None] @ d
            found.append(
                d.flatten(2) @ other.flatten(2).transpose(1, 2) if is_all else (d * other).flatten(2).sum(dim=2)
            )
        return torch.cat(found)

    def _grouped_cotangents(self, samples: slice) -> Tensor:
        """Cotangents in float64, shape (n, S, groups, T, n_out)."""
        cotangents = self.cotangents.expand(-1, len(self.tensors()[0]), -1, -1)
        return cotangents[:, samples].double().transpose(0, 1)[:, :, None]

    @abstractmethod
    def _input_gram(self, samples: slice) -> Tensor:
        """Products of each sample's inputs at all pairs of positions, in float64; shape (n, groups, T, T)."""
