"""Exact per-sample Jacobians of any parameters by plain ``torch.func``, and by a plain loop where that fails.

So are products J'v and J u with the Jacobian of a whole data set, for which that Jacobian is not needed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from ntkpipe.base.errors import ModelError
from ntkpipe.base.grid import Span
from ntkpipe.base.paths import said
from ntkpipe.jacobian.model.device import Alone, is_out_of_memory
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.model.gradients import autograd_vjp
from ntkpipe.jacobian.model.samples import Source


def batch_size(batch: Batch) -> int:
    """Number of samples of a batch."""
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch
    return first.shape[0]


def take(batch: Batch, samples: Sequence[int]) -> Batch:
    """Some samples of a batch, in the order given; a sample may be repeated."""
    taken: Batch = tree_map(lambda values: values[list(samples)], batch)
    return taken


def by_vmap(model: FunctionalModel, names: tuple[str, ...], batch: Batch, covectors: Tensor) -> Tensor:
    """Jacobians (S, B, P) by ``vmap`` over samples of ``vjp``."""
    parameters = {name: value.detach() for name, value in model.parameters.items() if name in names}

    def one_sample(sample: Batch) -> Tensor:
        single = tree_map(lambda values: values.unsqueeze(0), sample)

        def outputs(values: dict[str, Tensor]) -> Tensor:
            return model.call_with(values, single)[0]

        pull_back = torch.func.vjp(outputs, parameters)[1]

        def one_covector(covector: Tensor) -> Tensor:
            (grads,) = pull_back(covector)
            return torch.cat([grads[name].reshape(-1) for name in names])

        return one_covector(covectors[0])[None] if len(covectors) == 1 else torch.func.vmap(one_covector)(covectors)

    # Not out_dims=1: vmap cannot expand there what does not depend on the sample, as the Jacobian of a last bias.
    return torch.func.vmap(one_sample)(batch).transpose(0, 1)


def by_loop(model: FunctionalModel, names: tuple[str, ...], batch: Batch, covectors: Tensor) -> Tensor:
    """The same, one sample at a time by plain autograd: slower, for models that vmap cannot run."""
    # Each sample is run beside a copy of itself: in torch 2.13 on the CPU the backward of batch_norm and instance_norm
    # is wrong for a batch of one where input and gradient differ in memory layout.
    parameters = [model.parameters[name] for name in names]
    found = _room(parameters, batch, covectors)
    for sample in range(batch_size(batch)):
        outputs = model(take(batch, (sample, sample)))[0]
        if not outputs.requires_grad:
            found[:, sample] = 0
        for number, covector in enumerate(covectors if outputs.requires_grad else ()):
            keep = number + 1 < len(covectors)
            grads = autograd_vjp(outputs, covector, parameters, retain_graph=keep, materialize_grads=True)
            _copy(grads, found[number, sample])
    return found


def by_vjp(model: FunctionalModel, names: tuple[str, ...], batch: Batch, covectors: Tensor) -> Tensor:
    """The same by ``torch.func.vjp``, one sample at a time, by which the loop is judged."""
    parameters = {name: model.parameters[name].detach() for name in names}
    found = _room(parameters.values(), batch, covectors)
    for sample in range(batch_size(batch)):
        single = take(batch, [sample])
        outputs, vjp = torch.func.vjp(lambda values, single=single: model.call_with(values, single), parameters)[:2]
        model.require_replaced(outputs)
        for number, covector in enumerate(covectors):
            (grads,) = vjp(covector[None].to(outputs.dtype, copy=True))  # a copy, which hooks may change in place
            _copy([grads[name].detach() for name in names], found[number, sample])
    return found


def _room(parameters: Iterable[Tensor], batch: Batch, covectors: Tensor) -> Tensor:
    return covectors.new_empty((len(covectors), batch_size(batch), sum(value.numel() for value in parameters)))


def _copy(grads: Sequence[Tensor], row: Tensor) -> None:
    for grad, part in zip(grads, row.split([grad.numel() for grad in grads]), strict=True):
        part.view(grad.shape).copy_(grad.to_dense())


METHODS = {"vmap": by_vmap, "loop": by_loop}
_COMPARED = 8  # rows by which the ways of finding J u are judged
_GOOD = 1e4  # times the rounding unit: certainly of the same J
_COMPARED_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "tf32": 0.1, "bfloat16": 0.5}


class NoProductError(ModelError):
    """J u cannot be computed but row by row."""


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
    forward_mode: bool = True  # whether J u may be found by forward mode, and not by reverse mode twice

    def agreeing(self, source: Source) -> "JacobianProducts":
        """The way of finding J u that is of the same J as gradients are, by a few rows of a few samples."""
        # Forward mode passes over hooks, estimators and solvers whose backward pass is not the derivative of forward.
        generator, count = np.random.default_rng(0), source.num_samples * len(self.covectors)
        labels, chosen = np.full(count, -1), generator.choice(count, size=min(_COMPARED, count), replace=False)
        labels[chosen] = np.arange(len(chosen))
        rows: list[dict[str, Tensor]] = [{} for _ in chosen]
        for label, gradients in self.row_gradients(source, labels, lambda: None):
            rows[label] = gradients
        flat = [{name: value.double().reshape(-1) for name, value in row.items()} for row in rows]
        gram = np.array([[sum(float(a[n] @ b[n]) for n in a.keys() & b.keys()) for b in flat] for a in flat])
        signs, vector = generator.choice([-1.0, 1.0], size=len(chosen)), np.zeros(count)
        vector[chosen] = signs
        scale = np.sqrt(np.clip(gram.diagonal() * (signs @ gram @ signs), np.finfo(float).tiny, None))
        errors = {}
        for way in (self, replace(self, forward_mode=False)):
            with contextlib.suppress(NoProductError):
                found = way.product(source, way.transposed(source, vector, lambda: None), lambda: None)[chosen]
                errors[way.forward_mode] = float((np.abs(found - gram @ signs) / scale).max())
                if errors[way.forward_mode] <= _GOOD * torch.finfo(self.model.dtype).eps:
                    return way
        best = min(errors, key=lambda way: errors[way], default=True)
        if not errors.get(best, 1.0) <= _COMPARED_TOLERANCE[self.model.arithmetic]:
            raise ModelError(
                "the kernel of this model is no product J (J' v): its backward pass is not the derivative of its "
                f"forward pass, or not linear (J (J' v) is off by {errors.get(best, 1.0):.1e}). kernel_matrix and "
                "compute_kernel take each gradient by itself; use one of them"
            )
        return replace(self, forward_mode=best)

    def transposed(self, source: Source, vector: NDArray[np.float64], step: Callable[[], None]) -> dict[str, Tensor]:
        """``J' v`` as one float64 tensor for each parameter; v has shape (n*S,)."""
        parameters = self.model.parameters
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
        by_sample = torch.from_numpy(vector).reshape(-1, len(self.covectors))
        for span, batch in self.batches(source):
            with self.model.turn:
                outputs = self.model(batch)
                seed = torch.zeros_like(outputs)
                seed[: len(span)] = by_sample[span.start : span.stop].to(self.covectors) @ self.covectors
                grads = autograd_vjp(outputs, seed, list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad
            step()
        return total

    def row_gradients(
        self, source: Source, labels: NDArray[np.int64], step: Callable[[], None]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Sums of the gradients of rows with equal labels, a few rows at a time; negative labels are left out."""
        # A backward pass has one covector, unscaled, as those of the tiles: hooks that clip gradients are not linear.
        by_sample, parameters = labels.reshape(-1, len(self.covectors)), self.model.parameters
        for span, batch in self.batches(source):
            own = by_sample[span.start : span.stop]
            wanted = [(n, int(label)) for n, column in enumerate(own.T) for label in np.unique(column[column >= 0])]
            with self.model.turn:
                outputs = self.model(batch) if wanted else self.covectors
                for left, (number, label) in zip(reversed(range(len(wanted))), wanted, strict=True):
                    seed = torch.zeros_like(outputs)
                    seed[np.flatnonzero(own[:, number] == label)] = self.covectors[number].to(outputs)
                    found = autograd_vjp(
                        outputs, seed, list(parameters.values()), retain_graph=left > 0, allow_unused=True
                    )
                    pairs = zip(parameters, found, strict=True)
                    yield label, {name: grad.to_dense() for name, grad in pairs if grad is not None}
            step()

    def product(self, source: Source, direction: Mapping[str, Tensor], step: Callable[[], None]) -> NDArray[np.float64]:
        """``J u`` for a direction u in parameter space, shape (n*S,)."""
        parameters = {name: value.detach() for name, value in self.model.parameters.items()}
        norm = float(torch.stack([(value**2).sum() for value in direction.values()]).sum().sqrt())
        tangents = {name: (direction[name] / (norm or 1.0)).to(value) for name, value in parameters.items()}
        parts = []
        for span, batch in self.batches(source):
            with Alone():  # of forward mode
                derivatives = self._derivatives(parameters, tangents, batch).double() * norm
            parts.append((derivatives @ self.covectors.double().T)[: len(span)].reshape(-1).cpu())
            step()
        return torch.cat(parts).numpy()

    def _derivatives(self, parameters: dict[str, Tensor], tangents: dict[str, Tensor], batch: Batch) -> Tensor:
        """Derivatives of a batch's outputs along the tangents, shape (B, O)."""
        found: Tensor
        with contextlib.suppress(Exception):  # operations without forward-mode derivatives, parameters out of reach
            if not self.forward_mode:
                raise NoProductError
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
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise NoProductError(f"neither forward-mode nor second derivatives: {said(error)}") from error
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
