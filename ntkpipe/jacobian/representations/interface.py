"""What every representation of Jacobians offers; each of them is a file of this folder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.sums import GramSums, Pairs, Workspace
from ntkpipe.jacobian.tracing.recorder import Call
from ntkpipe.jacobian.tracing.rules.form import Outer
from ntkpipe.jacobian.tracing.uses import Use

Grads = Mapping[int, Sequence[Tensor]]  # by number of the call: gradients at its output for a run of covectors


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
    grads: Grads  # without calls that nothing flows back to
    covectors: slice
    samples: slice  # of the piece that is filled
    parameters: Mapping[str, Tensor]
    workspace: Workspace


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
    def suits(cls, uses: Sequence[Use], setup: Setup) -> bool:
        """Whether it is the cheapest way for the Jacobians of some uses, if none that is listed before it is."""
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
