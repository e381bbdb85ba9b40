"""From samples to a Jacobian block: the engine that joins traced factors and the fallback, and what it costs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ntkpipe.errors import ModelError
from ntkpipe.jacobian.factors import Outer, Piece, is_factored_cheaper, materialize, pair_flops
from ntkpipe.jacobian.fallback import METHODS, batch_size, take
from ntkpipe.jacobian.trace import Call, Recorder, Tracing, count_edges, weights_and_biases
from ntkpipe.models import Batch, FunctionalModel


@dataclass(frozen=True)
class Term:
    """Parameters whose Jacobians are found together: a weight, the bias of exactly the same uses, or both.

    Attributes
    ----------
    weight, bias
        Names; at least one is there.
    uses
        Numbers of the uses whose positions are summed.
    n_in, n_out
        Width of the factors; ``n_in`` is zero without a weight.
    is_factored
        Whether factors are kept rather than the Jacobian itself.
    """

    weight: str | None
    bias: str | None
    uses: tuple[int, ...]
    n_in: int
    n_out: int
    is_factored: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass(frozen=True)
class Block:
    """Jacobians of a strip of samples.

    Attributes
    ----------
    pieces
        The strip cut into pieces of equal size; the last may be smaller.
    outputs
        f of each sample, shape (n, O), in the compute dtype.
    """

    pieces: tuple[Piece, ...]
    outputs: Tensor

    def num_bytes(self) -> int:
        """Bytes that the block holds."""
        return sum(piece.num_bytes() for piece in self.pieces) + self.outputs.nbytes


@dataclass(frozen=True)
class Cost:
    """What Jacobians and their contraction cost; the planner's only view of a model.

    Attributes
    ----------
    block_bytes
        Bytes held a sample.
    workspace_bytes, fixed_workspace_bytes
        Bytes that computing one more sample of a batch allocates, at most, and those that any batch does.
    jacobian_flops
        Operations a sample, forward and backward.
    pair_flops
        Operations to contract one pair of samples, all S*S entries.
    """

    block_bytes: int
    workspace_bytes: int
    fixed_workspace_bytes: int
    jacobian_flops: float
    pair_flops: float


class Engine:
    """Computes Jacobian blocks of one model for one set of covectors. One thread each; see :meth:`copy`.

    Parameters
    ----------
    model
        The model, its selected parameters requiring a gradient.
    tracing
        What :func:`ntkpipe.jacobian.trace.trace` found.
    method
        ``vmap`` or ``loop``: how parameters of the fallback are done.
    covectors
        Shape (S, O).
    accumulate_dtype
        dtype of the blocks, and so of their contraction.
    representations
        Recorded choices to reuse, by term; none chooses by the cost model.
    """

    def __init__(
        self,
        model: FunctionalModel,
        tracing: Tracing,
        method: str,
        covectors: Tensor,
        accumulate_dtype: torch.dtype,
        representations: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.tracing = tracing
        self.method = method
        self.covectors = covectors.to(device=model.device, dtype=model.dtype)
        self.accumulate_dtype = accumulate_dtype
        self.fallback = tuple(name for name in model.names if name in tracing.fallback)
        shapes = {name: tuple(p.shape) for name, p in model.parameters().items()}
        self.terms = tuple(_terms(tracing, shapes, len(covectors), representations))

    @property
    def representations(self) -> dict[str, str]:
        """How each term's Jacobian is found and kept, for the manifest."""
        found = {}
        for term in self.terms:
            rule = self.tracing.uses[term.uses[0]].rule.name
            found[" + ".join(term.names)] = f"{rule}:{'factors' if term.is_factored else 'dense'}"
        return {**found, **dict.fromkeys(self.fallback, f"torch.func:{self.method}")}

    def copy(self) -> "Engine":
        """The same engine on its own copy of the module, for another thread."""
        return Engine(
            self.model.copy(), self.tracing, self.method, self.covectors, self.accumulate_dtype, self.representations
        )

    def reusing(self, recorded: Mapping[str, str]) -> "Engine":
        """The same engine with the recorded choices of an earlier run, as far as its tracing allows them."""
        methods = {label.partition(":")[2] for label in recorded.values() if label.startswith("torch.func:")}
        moved = {
            name: "as recorded" for name in self.tracing.covered if recorded.get(name, "").startswith("torch.func:")
        }
        method = methods.pop() if methods else self.method
        tracing = self.tracing.without(moved) if moved else self.tracing
        return Engine(self.model, tracing, method, self.covectors, self.accumulate_dtype, recorded)

    def with_covectors(self, covectors: Tensor) -> "Engine":
        """The same engine for other covectors."""
        return Engine(self.model, self.tracing, self.method, covectors, self.accumulate_dtype, self.representations)

    def block(
        self, load: Callable[[int, int], Batch], start: int, stop: int, *, subtile: int, batch: int
    ) -> tuple[Block, int]:
        """Jacobians of samples ``start:stop``, in pieces of ``subtile`` samples and forward passes of ``batch``.

        Memory: the block, and one batch's activations. On a GPU that runs out of memory the batch is halved.

        Returns
        -------
        The block, and the batch size that was used in the end.

        Raises
        ------
        torch.OutOfMemoryError
            If a GPU cannot even run two samples at a time.
        """
        pieces, outputs = [], []
        for first in range(start, stop, subtile):
            last = min(first + subtile, stop)
            while True:
                try:
                    piece, values = self._piece(load, first, last, batch)
                    break
                except torch.OutOfMemoryError:
                    if batch <= 2:
                        raise
                    batch //= 2
                    torch.cuda.empty_cache()
            pieces.append(piece)
            outputs.append(values)
        return Block(tuple(pieces), torch.cat(outputs)), batch

    def _piece(self, load: Callable[[int, int], Batch], start: int, stop: int, batch: int) -> tuple[Piece, Tensor]:
        parts, outputs = [], []
        for first in range(start, stop, batch):
            last = min(first + batch, stop)
            part, values = self.piece(load(first, last))
            parts.append(part)
            outputs.append(values)
        return _join(parts), torch.cat(outputs)

    def piece(self, batch: Batch) -> tuple[Piece, Tensor]:
        """Jacobians and outputs of one batch as one piece."""
        size = batch_size(batch)
        if size == 1:
            # Some backward passes are wrong for a batch of one (see fallback.by_loop): run it twice, keep the first.
            piece, outputs = self.piece(take(batch, (0, 0)))
            return _first_sample(piece), outputs[:1]
        outputs, layers = self.layers(batch)
        factored, dense = [], []
        for term, layer in zip(self.terms, layers, strict=True):
            if term.is_factored:
                factored.append(layer)
            elif term.weight is not None:
                dense.append(materialize(layer.inputs, layer.cotangents, layer.has_bias))
            else:
                dense.append(layer.cotangents.sum(dim=0))
        if self.fallback:
            dense.append(self.fallback_jacobian(batch).to(self.accumulate_dtype))
        empty = outputs.new_empty((len(self.covectors), size, 0), dtype=self.accumulate_dtype)
        joined = dense[0] if len(dense) == 1 else torch.cat(dense, dim=2) if dense else empty
        return Piece(size, tuple(factored), joined.contiguous()), outputs

    def fallback_jacobian(self, batch: Batch) -> Tensor:
        """Jacobians of the fallback's parameters, shape (S, B, P), in the compute dtype."""
        return METHODS[self.method](self.model, self.fallback, batch, self.covectors).detach()

    def layers(self, batch: Batch) -> tuple[Tensor, list[Outer]]:
        """Outputs of a batch and the factors of each term, in the accumulate dtype.

        Raises
        ------
        ModelError
            If the forward pass is not the one that was traced.
        """
        size, uses = batch_size(batch), self.tracing.uses
        parameters = self.model.parameters()
        needs_graph = bool(self.terms or self.tracing.unused)
        with torch.set_grad_enabled(needs_graph), Recorder(parameters) as recorder:
            outputs = self.model(batch)
        calls = recorder.calls
        if self.terms and not self.tracing.matches(calls, count_edges(outputs, parameters), size):
            raise ModelError(
                "the forward pass used its parameters in another way than on the probe batch: its operations depend on "
                "the data. Pass jacobian='fallback' to compute this model without structure"
            )
        cotangents = self._pull_back(outputs, calls)
        if any(call.input_was_changed() for call, use in zip(calls, uses, strict=False) if use.names):
            raise ModelError("an input of a layer was changed in place after its use; it was not on the probe batch")
        layers = []
        for term in self.terms:
            inputs, pulled = [], []
            for number in term.uses:
                use, call = uses[number], calls[number]
                shape = (use.num_positions, size, 0)
                inputs.append(
                    use.by_position(call.rule.input_rows(call.input), size) if term.weight else outputs.new_zeros(shape)
                )
                rows = [
                    outputs.new_zeros((call.num_rows, term.n_out)) if grad is None else call.rule.output_rows(grad)
                    for grad in cotangents[number]
                ]
                pulled.append(torch.stack([use.by_position(grad, size) for grad in rows], dim=1))
            layers.append(
                Outer(
                    torch.cat(inputs).to(self.accumulate_dtype).contiguous(),
                    torch.cat(pulled).to(self.accumulate_dtype).contiguous(),
                    has_bias=term.bias is not None,
                )
            )
        return outputs.detach(), layers

    def _pull_back(self, outputs: Tensor, calls: list[Call]) -> dict[int, list[Tensor | None]]:
        """Each covector pulled back to the output of each use, by number; none where nothing flows back.

        Raises
        ------
        ModelError
            If a parameter that the probe batch did not use gets a gradient.
        """
        uses = self.tracing.uses
        named = [number for number, use in enumerate(uses) if use.names]
        edges = {number: edge for number in named if (edge := calls[number].edge) is not None}
        parameters = self.model.parameters()
        sources: list[Any] = [*edges.values(), *(parameters[name] for name in self.tracing.unused)]
        found: dict[int, list[Tensor | None]] = {number: [] for number in named}
        for position, covector in enumerate(self.covectors):
            grads: Sequence[Tensor | None] = [None] * len(sources)
            if outputs.requires_grad and sources:
                grads = torch.autograd.grad(
                    outputs,
                    sources,
                    grad_outputs=covector.to(outputs.dtype).expand_as(outputs),
                    retain_graph=position + 1 < len(self.covectors),
                    allow_unused=True,
                )
            if any(grad is not None for grad in grads[len(edges) :]):
                raise ModelError(
                    "a parameter that the probe batch did not use is used by another batch: the operations of the "
                    "forward pass depend on the data. Pass jacobian='fallback' to compute this model without structure"
                )
            by_number = dict(zip(edges, grads, strict=False))
            for number in named:
                found[number].append(by_number.get(number))
        return found

    def cost(self, batch: Batch) -> Cost:
        """Measure what one sample costs by running ``batch`` and its first half; B must be at least four."""
        size = batch_size(batch)
        half = take(batch, range(size // 2))
        self.piece(half)  # lazy initialisation is not a cost of the batch
        flops, bytes_whole, piece, outputs = self._measure(batch)
        _, bytes_half, _, _ = self._measure(half)
        slope = max(0, bytes_whole - bytes_half) // (size - size // 2)
        covectors, _, dense = piece.dense.shape
        return Cost(
            block_bytes=max(1, (piece.num_bytes() + outputs.nbytes) // size),
            workspace_bytes=max(1, slope),
            fixed_workspace_bytes=max(0, bytes_whole - slope * size),
            jacobian_flops=flops / size,
            pair_flops=2.0 * covectors**2 * dense + sum(map(pair_flops, piece.outers)),
        )

    def _measure(self, batch: Batch) -> tuple[float, int, Piece, Tensor]:
        with _Meter() as meter:  # type: ignore[no-untyped-call]
            piece, outputs = self.piece(batch)
        return meter.num_flops, meter.num_bytes, piece, outputs


class _Meter(TorchDispatchMode):
    """Adds up operations, and the bytes of every new tensor: an upper bound on the peak, as nothing is taken off.

    Not torch's FlopCounterMode: its hooks on modules cannot be differentiated through with parametrizations.
    """

    num_flops = 0.0
    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(func, "_overloadpacket", func))
        if count is not None:
            self.num_flops += float(count(*args, **(kwargs or {}), out_val=result))
        known = {_address(value) for value in _tensors((args, kwargs))}
        for value in _tensors(result):
            if _address(value) not in known:
                self.num_bytes += value.untyped_storage().nbytes()
        return result


def _address(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)  # of the storage itself: functorch's have no data


def _tensors(value: Any) -> Iterator[Tensor]:
    leaves = (leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    return (leaf for leaf in leaves if leaf.layout == torch.strided)  # sparse ones have no storage of their own


def _terms(
    tracing: Tracing,
    shapes: Mapping[str, tuple[int, ...]],
    num_covectors: int,
    representations: Mapping[str, str] | None,
) -> Iterator[Term]:
    weights, biases = weights_and_biases(tracing.uses)
    paired: dict[str, str] = {}
    for weight, uses in weights.items():
        partner = next((bias for bias, other in biases.items() if other == uses and bias not in paired.values()), None)
        if partner is not None:
            paired[weight] = partner
    for weight, uses in weights.items():
        n_out, n_in = shapes[weight]
        yield _term(weight, paired.get(weight), uses, n_in, n_out, tracing, num_covectors, representations)
    for bias, uses in biases.items():
        if bias not in paired.values():
            yield _term(None, bias, uses, 0, shapes[bias][0], tracing, num_covectors, representations)


def _term(
    weight: str | None,
    bias: str | None,
    uses: tuple[int, ...],
    n_in: int,
    n_out: int,
    tracing: Tracing,
    num_covectors: int,
    representations: Mapping[str, str] | None,
) -> Term:
    positions = sum(tracing.uses[number].num_positions for number in uses)
    key = " + ".join(name for name in (weight, bias) if name is not None)
    if representations is not None:
        factored = representations.get(key, "").endswith(":factors")
    else:
        factored = weight is not None and is_factored_cheaper(
            positions, n_in + (bias is not None), n_out, num_covectors
        )
    return Term(weight, bias, uses, n_in, n_out, factored)


def _join(parts: list[Piece]) -> Piece:
    """One piece of the samples of several."""
    if len(parts) == 1:
        return parts[0]
    outers = tuple(
        Outer(
            torch.cat([outer.inputs for outer in layer], dim=1),
            torch.cat([outer.cotangents for outer in layer], dim=2),
            layer[0].has_bias,
        )
        for layer in zip(*(part.outers for part in parts), strict=True)
    )
    dense = torch.cat([part.dense for part in parts], dim=1)
    return Piece(sum(part.num_samples for part in parts), outers, dense)


def _first_sample(piece: Piece) -> Piece:
    outers = tuple(
        Outer(o.inputs[:, :1].contiguous(), o.cotangents[:, :, :1].contiguous(), o.has_bias) for o in piece.outers
    )
    return Piece(1, outers, piece.dense[:, :1].contiguous())
