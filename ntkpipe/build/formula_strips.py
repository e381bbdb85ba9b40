"""A network of infinite width as an engine of strips: samples as its layers need them, and how two become entries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.errors import ConfigError, NtkpipeError
from ntkpipe.base.grid import Span
from ntkpipe.base.paths import said
from ntkpipe.build.strips import Contraction
from ntkpipe.build.tiles import BuildJob
from ntkpipe.infinite.networks import Network
from ntkpipe.infinite.state import Rows
from ntkpipe.jacobian.cost import Cost

_PIECE_FLOPS = 4e9  # of two pieces that meet, after which a worker looks whether the run is stopped


@dataclass(frozen=True)
class _Piece:
    """Samples as the layers of a network need them."""

    net: Network
    rows: Rows

    @property
    def num_samples(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> "_Piece":
        return replace(self, rows=self.rows[start:stop])


@dataclass(frozen=True)
class _Strip:
    """See :class:`ntkpipe.build.strips.Strip`."""

    pieces: tuple[_Piece, ...]
    outputs: Tensor  # zeros, their mean at initialisation
    sample_bytes: int

    def num_bytes(self) -> int:
        return len(self.outputs) * self.sample_bytes

    def require_finite(self, split: str, numbers: Sequence[int]) -> None:
        """Nothing: a network checks what it prepares."""


@dataclass(frozen=True)
class FormulaEngine:
    """A network of infinite width as :class:`ntkpipe.build.strips.StripEngine`; threads may share it."""

    net: Network
    num_outputs: int
    shape: tuple[int, ...]  # of a sample
    tf32: ClassVar[bool] = False

    @property
    def model(self) -> "FormulaEngine":
        """Itself: no module is run."""
        return self

    def moved(self, device: torch.device) -> "FormulaEngine":
        """Itself."""
        return self

    def copy(self) -> "FormulaEngine":
        """Itself."""
        return self

    def to_batch(self, arrays: Mapping[str, Tensor], is_mapping: bool) -> NDArray[Any]:
        """The samples."""
        (values,) = arrays.values()
        found: NDArray[Any] = values.numpy()
        return found

    def failure(self, error: Exception, where: str) -> NtkpipeError:
        """What is raised in place of an error of an activation that a caller gave."""
        return ConfigError(f"the network raised {type(error).__name__} {where}: {said(error)}")

    @cached_property
    def cost(self) -> Cost:
        """Counted costs, but for the time of preparing a sample."""
        held = self.net.row_bytes(self.shape)
        scratch = self.net.scratch_bytes(self.shape)
        return Cost(held, 3 * held, scratch, held, 0.0, self.net.operations(self.shape))

    def block(
        self, load: Callable[[int, int], NDArray[Any]], start: int, stop: int, *, subtile: int, batch: int
    ) -> tuple[_Strip, int]:
        """See :meth:`ntkpipe.build.strips.StripEngine.block`; a piece is prepared at once."""
        size = max(1, min(subtile, int((_PIECE_FLOPS / self.cost.pair_flops) ** 0.5)))
        spans = Span(start, stop).cut(size)
        pieces = tuple(_Piece(self.net, self.net.prepare(load(span.start, span.stop))) for span in spans)
        outputs = torch.zeros((stop - start, self.num_outputs), dtype=torch.float64)
        return _Strip(pieces, outputs, self.cost.block_bytes), batch


def _fill(left: _Piece, right: _Piece, workspace: object, pairs: str, outs: Sequence[Tensor]) -> None:
    nngp, ntk = left.net.tile(left.rows, right.rows)
    for out, values in zip(outs, (ntk, nngp), strict=True):
        out.copy_(torch.from_numpy(values))


def _diagonal(piece: _Piece, pairs: str, num_planes: int) -> list[Tensor]:
    nngp, ntk = piece.net.diagonal(piece.rows)
    return [torch.from_numpy(values)[:, None, None] for values in (ntk, nngp)]


@dataclass(frozen=True)
class FormulaJob(BuildJob):
    """Tiles of a formula, each by one thread."""

    @contextmanager
    def session(self) -> Iterator[None]:
        """See :meth:`BuildJob.session`."""
        with single_threaded_blas(), super().session():
            yield


CONTRACTION = Contraction(_fill, _diagonal)
