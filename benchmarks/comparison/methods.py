"""The methods that are compared. Each computes the kernel of the first n samples; rows are (sample, covector)."""

import math
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from comparison.hooks import hooked_kernel, with_visible_attention
from comparison.work import NUM_OUTPUTS, Work
from ntkpipe.base.config import KernelSpec, RunSpec
from ntkpipe.build.in_memory import build_matrix, kernel_matrix, settle_matrix
from ntkpipe.build.prepare import Request, Settled, exact_single_thread
from ntkpipe.jacobian import learnt
from ntkpipe.jacobian.model.samples import as_samples

# Jacobians of a part of the samples, for torch.func; two such parts are contracted.
_PART_BYTES = 3 * 2**30


class Method:
    """One way to a kernel.

    Parameters
    ----------
    work, model, inputs
        What is computed.
    workers
        Cores it may use.
    """

    name = ""
    package = ""

    def __init__(self, work: Work, model: nn.Module, inputs: Tensor, workers: int) -> None:
        self.work, self.model, self.inputs, self.workers = work, model, inputs, workers
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def kernel(self, size: int) -> Tensor:
        """K of the first ``size`` samples."""
        raise NotImplementedError

    def effort(self, size: int) -> tuple[int, int]:
        """Jacobians computed and pairs contracted for the first ``size`` samples: what its seconds are a sum of."""
        return size, size**2

    def peak_size(self) -> int:
        """Samples whose kernel takes as much memory, but for the kernel itself, as that of all."""
        return self.work.num_samples


class Ours(Method):
    """This engine: planned and checked once for each size, as ``ntkpipe.kernel_matrix`` does, then computed."""

    name = "ntkpipe"
    package = "ntkpipe"
    compute_dtype = "float32"

    def kernel(self, size: int) -> Tensor:
        with exact_single_thread():
            return torch.from_numpy(build_matrix(self.settled(size)))

    def settled(self, size: int) -> Settled:
        """Traced, measured, planned and self-checked; ``settle_seconds`` says how long it took."""
        held: tuple[int, Settled] | None = getattr(self, "_settled", None)
        if held is None or held[0] != size:
            spec = KernelSpec(kind=self.work.kind, compute_dtype=self.compute_dtype)
            start = perf_counter()
            with exact_single_thread():
                samples = as_samples(self.inputs[:size], with_targets=False)
                run = RunSpec(workers=self.workers, device="cpu")
                held = size, settle_matrix(Request(self.model, samples, None, spec, run))
            self._settled, self.settle_seconds = held, perf_counter() - start
        return held[1]


class WholeCall(Ours):
    """``ntkpipe.kernel_matrix`` of a copy of the model, without the self-check: what a user waits for."""

    name = "whole call"

    def kernel(self, size: int) -> Tensor:
        learnt.forget()  # of a model that was seen, less would be measured
        options = {"kind": self.work.kind, "workers": self.workers, "self_check": False, "device": "cpu"}
        return torch.from_numpy(kernel_matrix(deepcopy(self.model), self.inputs[:size], **options))


class Reference(Ours):
    """The same in float64."""

    name = "reference"
    compute_dtype = "float64"


class TorchFunc(Method):
    """Plain torch.func as in PyTorch's tutorial on neural tangent kernels; parts of samples where not all fit.

    Each part of rows is held while parts of columns pass, and the lower triangle is copied.
    """

    name = "torch.func"
    package = "torch"

    def part(self, size: int) -> int:
        """Samples whose Jacobians are held at a time."""
        most = max(1, _PART_BYTES // (4 * self.num_parameters * self.work.num_covectors))
        return size if most >= size else 1 << (min(most, max(1, size // 4)).bit_length() - 1)

    def effort(self, size: int) -> tuple[int, int]:
        part = self.part(size)
        count = -(-size // part)
        tiles = count * (count + 1) // 2
        return part * tiles, part**2 * tiles

    def peak_size(self) -> int:
        return min(self.work.num_samples, 4 * self.part(self.work.num_samples))

    def kernel(self, size: int) -> Tensor:
        part, width = self.part(size), self.work.num_covectors
        kernel = torch.empty(size, width, size, width)
        for row in range(0, size, part):
            left = self._jacobian(row, row + part)
            for column in range(row, size, part):
                right = left if column == row else self._jacobian(column, column + part)
                block = torch.stack([torch.einsum("Naf,Mbf->NMab", a, b) for a, b in zip(left, right, strict=True)])
                tile = block.sum(0).permute(0, 2, 1, 3)
                kernel[row : row + part, :, column : column + part] = tile
                kernel[column : column + part, :, row : row + part] = tile.permute(2, 3, 0, 1)
        return kernel.reshape(size * width, size * width)

    def _jacobian(self, start: int, stop: int) -> list[Tensor]:
        parameters = {name: value.detach() for name, value in self.model.named_parameters()}

        def outputs(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.model, weights, (x.unsqueeze(0),)).squeeze(0)

        def scalar(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return outputs(weights, x).sum() / math.sqrt(NUM_OUTPUTS)

        function = jacrev(outputs) if self.work.kind == "ntk" else grad(scalar)
        jacobian = vmap(function, (None, 0))(parameters, self.inputs[start:stop])
        return [value.reshape(len(value), self.work.num_covectors, -1) for value in jacobian.values()]


class Hooks(Method):
    """Hand-written hooks."""

    name = "hooks"
    package = "torch"

    def kernel(self, size: int) -> Tensor:
        return hooked_kernel(self.model, self.inputs[:size], self.work.covectors())


class NNGeometry(Method):
    """nngeometry's ``GramMatrix`` in its dense representation, all samples in one batch."""

    name = "nngeometry"
    package = "nngeometry"

    def kernel(self, size: int) -> Tensor:
        from nngeometry.gram import GramMatrix

        model = _with_covectors(self.model, self.work)
        gram = GramMatrix(model, (self.inputs[:size].clone(),), function=lambda *batch: model(batch[0])).to_torch()
        rows = size * self.work.num_covectors
        return gram.detach().permute(1, 0, 3, 2).reshape(rows, rows)


class Asdl(Method):
    """asdfghjkl (imported as asdl): its exact kernels.

    Full kernels by ``empirical_implicit_ntk``, since ``empirical_direct_ntk`` of 0.1a5 raises for every model: it looks
    for an attribute of modules that the package no longer sets. A pNTK is a kernel of one output, so by the class-wise
    one: Hadamard where all layers are linear, else direct, since Hadamard approximates convolutions.
    """

    name = "asdfghjkl"
    package = "asdfghjkl"

    def kernel(self, size: int) -> Tensor:
        import asdl

        model, inputs, rows = _with_covectors(self.model, self.work), self.inputs[:size], size * self.work.num_covectors
        if self.work.kind == "ntk":
            return asdl.empirical_implicit_ntk(model, inputs).detach().permute(0, 2, 1, 3).reshape(rows, rows)
        own = [module for module in model.modules() if list(module.parameters(recurse=False))]
        if all(isinstance(module, nn.Linear) for module in own):
            return asdl.empirical_class_wise_hadamard_ntk(model, inputs)[:, :, 0].detach()
        return asdl.empirical_class_wise_direct_ntk(model, inputs)[:, :, 0].detach()


class TorchJD(Method):
    """The autogram engine of TorchJD, all samples in one batch."""

    name = "torchjd"
    package = "torchjd"

    def kernel(self, size: int) -> Tensor:
        from torchjd.autogram import Engine

        model = _with_covectors(with_visible_attention(self.model), self.work)
        engine = Engine(model, batch_dim=0)
        return engine.compute_gramian(model(self.inputs[:size]))


class _PseudoOutput(nn.Module):
    """Sum of the logits over sqrt(O), as a model of one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).sum(dim=1, keepdim=True) / math.sqrt(NUM_OUTPUTS)


def _with_covectors(model: nn.Module, work: Work) -> nn.Module:
    return model if work.kind == "ntk" else _PseudoOutput(model).eval()


_METHODS = (Ours, WholeCall, Hooks, TorchFunc, NNGeometry, Asdl, TorchJD)
METHODS: dict[str, type[Method]] = {method.name: method for method in _METHODS}


def versions() -> Iterator[str]:
    """Name and version of each package, or that it is not installed."""
    for package in dict.fromkeys(method.package for method in METHODS.values()):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} not installed (pip install 'ntkpipe[bench]')"


def autograd_kernel(work: Work, model: nn.Module, inputs: Tensor) -> Tensor:
    """K of a few samples by plain autograd, one sample and one covector at a time, in float64."""
    parameters, rows = list(model.parameters()), []
    for x in inputs:
        outputs = model(x[None])[0]
        for covector in work.covectors(torch.float64):
            grads = torch.autograd.grad(outputs, parameters, covector, retain_graph=True)
            rows.append(torch.cat([value.flatten() for value in grads]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T
