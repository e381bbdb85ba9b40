"""The self-check: the engine against plain autograd, one sample at a time, parameter by parameter."""

import math
import sys
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ntkpipe.base.errors import NonFiniteError, SelfCheckError
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.fallback import by_loop, by_vjp, take
from ntkpipe.jacobian.mixing import FLOOR, SMALL, require_repeatable, require_single
from ntkpipe.jacobian.model.device import Alone, is_out_of_memory
from ntkpipe.jacobian.model.functional import Batch, FunctionalModel
from ntkpipe.jacobian.model.samples import show_samples
from ntkpipe.jacobian.probe import Load
from ntkpipe.jacobian.representations.pieces import contract
from ntkpipe.jacobian.representations.sums import Workspace

_NUM_SAMPLES = 3
_MAX_COVECTORS = 2
_MIN_BATCH, _MAX_BATCH = 8, 32  # where the run's is not smaller still
# Memory for the Jacobians of the chosen samples; even a single random covector covers every output.
_SHARE_OF_MEMORY, _JACOBIAN_BYTES = 0.5, 256 * 2**20
# |dK_p| <= tol * sqrt(K_p,ii K_p,jj) + eps * sqrt(K_ii K_jj). Models that compute parts in float32 whatever their
# dtype is (rotary embeddings, RMS norms) are right to about 1e-6 in float64; a wrong rule is off by far more.
_TOLERANCE, _EPSILON = 1e-5, 1e-10
_COMPUTE_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "tf32": 0.1, "bfloat16": 0.5}  # of the whole kernel
_TINY = torch.finfo(torch.float64).tiny

_PATIENCE = 1.0  # seconds after which the threads part: a lock of the model may keep one from the other
_DISTURBED = (
    "threads that run this model at once disturb each other ({}), as where it keeps something in a global variable or "
    "in .grad: they take turns, which is right but slower. workers=1 does without this message"
)

Jacobians = dict[str, Tensor]  # (covectors, samples, P) per parameter


@dataclass(frozen=True)
class CheckReport:
    """What the self-check found."""

    samples: tuple[int, ...]  # the samples that were compared
    num_covectors: int  # random covectors a sample
    dtype: str  # dtype of the comparison; float64 unless the model cannot run in it
    reference: str  # what computed it: plain autograd, or torch.func; in brackets what the other stumbled over
    worst_parameter: str  # parameter whose kernel has the largest error
    worst_error: float  # that error, on the scale sqrt(K_p,ii K_p,jj)
    compute_error: float  # error of the whole kernel in the compute dtype, on the scale sqrt(K_ii K_jj)
    moved: dict[str, str]  # parameters that failed and went to the fallback, with the size of their error
    reference_wrong: tuple[str, ...]  # parameters where finite differences agree with the engine, not the reference


def self_check(
    engine: Engine, load: Load, num_samples: int, *, batch: int, memory_bytes: int, threads: int = 1
) -> tuple[Engine, CheckReport]:
    """Compare the engine with a reference that shares none of its code; what fails is moved to the fallback.

    A run of several threads has two of them at once here, too; a model whose threads disturb each other takes turns.
    """
    with engine.model.turn:
        return _self_check(engine, load, num_samples, batch, memory_bytes, threads)


def _self_check(
    engine: Engine, load: Load, num_samples: int, batch: int, memory_bytes: int, threads: int
) -> tuple[Engine, CheckReport]:
    check = _Check(engine, load, num_samples, batch, memory_bytes)
    engine, moved, found = check.settle(engine)
    errors = {name: error for name, (_, error) in found.items() if name not in check.reference_wrong}
    worst = max(errors, key=lambda name: errors[name], default="")
    limit = _COMPUTE_TOLERANCE[engine.model.arithmetic]
    is_parallel, problem, compute_error = threads > 1 and not isinstance(engine.model.turn, Alone), "", float("inf")
    if is_parallel:
        compute_error, problem = check.error_at_once(engine)
    if not compute_error <= limit:
        compute_error = check.compute_error(engine, check.places)
        if is_parallel and compute_error <= limit:
            engine = engine.changed(model=replace(engine.model, turn=Alone()))
            warnings.warn(_DISTURBED.format(problem or "their Jacobians are wrong"), stacklevel=2)
    if not compute_error <= limit:
        is_double = engine.model.arithmetic == "float64"
        advice = "Part of the model may compute in another dtype" if is_double else "Use compute_dtype='float64'"
        if is_double and math.isnan(compute_error):
            advice = "Products of activations or gradients overflow: scale the inputs or the model"
        raise SelfCheckError(
            f"in {engine.model.arithmetic} the kernel of samples {check.chosen} is off by {compute_error:.1e} of "
            f"sqrt(K_ii K_jj); at most {limit:.0e} is accepted. {advice}"
        )
    return engine, CheckReport(
        samples=tuple(check.chosen),
        num_covectors=len(check.covectors),
        dtype=str(check.model.dtype).removeprefix("torch."),
        reference=check.reference_name,
        worst_parameter=worst,
        worst_error=errors.get(worst, 0.0),
        compute_error=compute_error,
        moved=moved,
        reference_wrong=tuple(sorted(check.reference_wrong)),
    )


class _InStep(TorchFunctionMode):
    """Lets two threads go through a model together, torch function by torch function, until one of them is through."""

    def __init__(self, together: threading.Barrier) -> None:
        super().__init__()
        self._together = together

    def attach(self, module: nn.Module) -> None:
        """Watch every forward pass of a module."""
        inside = ExitStack()

        def enter(*_: object) -> None:
            inside.enter_context(self)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda *_: inside.close(), always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with suppress(threading.BrokenBarrierError):
            self._together.wait(_PATIENCE)
        return func(*args, **(kwargs or {}))


class _Check:
    """Three samples and their reference Jacobians in float64, by which an engine is judged."""

    def __init__(self, engine: Engine, load: Load, num_samples: int, batch: int, memory_bytes: int) -> None:
        generator = np.random.default_rng(0)
        same_bytes = batch * engine.model.dtype.itemsize // 8  # samples in float64
        size = max(2, min(batch, max(_MIN_BATCH, same_bytes), _MAX_BATCH, num_samples))
        picked = generator.choice(num_samples, size=size, replace=num_samples < size)
        self.places = sorted(int(i) for i in generator.choice(size, size=min(_NUM_SAMPLES, size), replace=False))
        self.chosen = [int(picked[place]) for place in self.places]
        self._batch = load([int(i) for i in picked])
        num_outputs = engine.covectors.shape[1]
        row_bytes = 8 * sum(p.numel() for p in engine.model.parameters.values()) * len(self.chosen)
        affordable = int(min(_SHARE_OF_MEMORY * memory_bytes / 3, _JACOBIAN_BYTES) / max(1, row_bytes))
        count = max(1, min(_MAX_COVECTORS, num_outputs, affordable))
        self.covectors = torch.from_numpy(generator.standard_normal((count, num_outputs)))
        self.reference: Jacobians = {}
        self.grams: dict[str, Tensor] = {}
        self.reference_wrong: set[str] = set()
        try:
            self._refer(engine.model.converted(torch.float64), engine.method)
        except Exception as error:
            if isinstance(error, NonFiniteError) or is_out_of_memory(error):
                raise
            # Some operations exist in float32 alone; there the model has run before.
            self._refer(engine.model, engine.method)

    def _refer(self, model: FunctionalModel, method: str) -> None:
        """Find the Jacobians by which an engine with this method for its fallback is judged."""
        dtype, self.judged = model.dtype, method
        self.model, self._cast = model, tree_map(lambda v: v.to(dtype) if v.is_floating_point() else v, self._batch)
        found, self.reference_name, finite = _reference(model, take(self._cast, self.places), self.covectors, method)
        if not all(finite):
            bad = [number for number, is_finite in zip(self.chosen, finite, strict=True) if not is_finite]
            shown = show_samples(sorted({*bad}))
            raise NonFiniteError(f"Jacobians of {shown} are NaN or infinite; leave those out, or correct the model")
        self._refer_to({name: jacobian for name, jacobian in found.items() if name not in self.reference_wrong})

    def _refer_to(self, jacobians: Jacobians) -> None:
        """Take some parameters' Jacobians as the reference."""
        self.reference |= jacobians
        self.grams |= {name: _gram(jacobian) for name, jacobian in jacobians.items()}
        self.total = torch.stack([*self.grams.values()]).sum(dim=0)
        self.scale = _scale(self.total)

    def settle(self, engine: Engine) -> tuple[Engine, dict[str, str], dict[str, tuple[float, float]]]:
        """Move what fails to the fallback, then to the loop, unless finite differences show the reference wrong."""
        moved: dict[str, str] = {}
        while True:
            if engine.method != self.judged:
                self._refer(self.model, engine.method)
            found = self._jacobians(engine)
            grams = {name: _gram(jacobian) for name, jacobian in found.items()}
            if not moved:
                self._require_single(grams, engine)
            errors = self._errors(grams)
            failed = {
                name: f"self-check: off by {relative:.1e}"
                for name, (ratio, relative) in errors.items()
                if not ratio <= 1 and name not in self.reference_wrong
            }
            by_engine = {name for name in failed if self._engine_is_right(name, found[name])}
            if by_engine:  # the reference is wrong there, so the engine's own Jacobian takes its place
                self.reference_wrong |= by_engine
                self._refer_to({name: found[name] for name in by_engine})
            failed = {name: reason for name, reason in failed.items() if name not in by_engine}
            if not failed:
                return engine, moved, errors
            newly = {name: reason for name, reason in failed.items() if name not in engine.fallback}
            if newly:
                moved |= newly
                engine = engine.changed(tracing=engine.tracing.without(newly))
                engine = engine.with_working_method(take(self._batch, self.places))
            elif engine.method == "loop":
                raise SelfCheckError(
                    f"the reference ({self.reference_name}, one sample at a time) and the plain loop disagree on "
                    + ", ".join(f"{name} ({reason})" for name, reason in failed.items())
                    + ": gradients of this model depend on how it is run, so no kernel of it can be trusted"
                )
            else:
                engine = engine.changed(method="loop")

    def _require_single(self, grams: Mapping[str, Tensor], engine: Engine) -> None:
        """Look at samples in other company where kernels in a batch are not those of samples by themselves."""
        small, arithmetic = SMALL**2 * self.scale, engine.model.arithmetic
        gaps = [(grams[name] - exact).abs() / torch.maximum(_scale(exact), small) for name, exact in self.grams.items()]
        if engine.fallback:  # its Jacobians are of samples by themselves, outputs are not
            whole = self.model(self._cast)[self.places].detach()
            alone = torch.cat([self.model(take(self._cast, [n, n]))[:1].detach() for n in self.places])
            gaps.append((whole - alone).abs() / alone.abs().max().clamp_min(_TINY))
        if max(float(gap.nan_to_num().max()) for gap in gaps) > FLOOR[arithmetic]:
            require_repeatable(self.model, self._cast, self.model(self._cast).detach())
            require_single(self.model, self._cast, self.places, arithmetic)

    def compute_error(self, engine: Engine, places: list[int]) -> float:
        """The error of the whole kernel in the compute dtype; the places are those of the check in any order."""
        whole = engine.with_covectors(self.covectors, "all")
        piece, _ = whole.piece(take(self._batch, places))
        found = contract(piece, piece, Workspace())
        order, count = [places.index(place) for place in self.places], len(self.covectors)
        rows = [place * count + number for number in range(count) for place in order]
        found = found[rows][:, rows]
        gap = (found.double() - self.total).abs()
        return float((gap / self.scale.clamp_min(_TINY)).max())

    def error_at_once(self, engine: Engine) -> tuple[float, str]:
        """The largest error of two threads that compute that kernel at once, and what one of them raised."""
        ready, together, interval = threading.Barrier(2), threading.Barrier(2), sys.getswitchinterval()

        def compute(copy: Engine, places: list[int]) -> float:
            torch.set_num_threads(1)
            if copy.terms:  # a model that refuses to be watched has none
                _InStep(together).attach(copy.model.module)
            ready.wait()
            try:
                return self.compute_error(copy, places)
            finally:
                together.abort()

        try:
            sys.setswitchinterval(1e-5)  # else a small model is through before the other thread's turn
            with ThreadPoolExecutor(2, thread_name_prefix="ntkpipe-check") as pool:
                orders = self.places, self.places[::-1]
                running = [pool.submit(compute, engine.copy(), places) for places in orders]
        finally:
            sys.setswitchinterval(interval)
        raised = [error for each in running if (error := each.exception()) is not None]
        if any(map(is_out_of_memory, raised)):  # which the plan sees to
            return self.compute_error(engine, self.places), ""
        if raised:
            return float("inf"), f"{type(raised[0]).__name__}: {str(raised[0]).partition(chr(10))[0]:.120}"
        return max(each.result() for each in running), ""

    def _jacobians(self, engine: Engine) -> Jacobians:
        double = engine.with_covectors(self.covectors, "all", model=self.model)
        try:
            found = double.by_parameter(self._cast, self.places)
        except Exception:
            if not engine.fallback or engine.method == "loop":
                raise
            # vmap runs nn.LSTM in float32 (oneDNN has it as one function) and cannot in float64; what it gives there is
            # still judged, with everything else, by compute_error.
            found = double.changed(method="loop").by_parameter(self._cast, self.places)
        return {name: found[name].double() for name in self.reference}

    def _errors(self, grams: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Per parameter, the error relative to what is allowed, and on the scale sqrt(K_p,ii K_p,jj)."""
        loosened = 1.0 if self.model.dtype == torch.float64 else 1e3
        errors = {}
        for name, wanted in self.grams.items():
            gap, own = (grams[name] - wanted).abs(), _scale(wanted)
            ratio = gap / (loosened * (_TOLERANCE * own + _EPSILON * self.scale)).clamp_min(_TINY)
            # Beside entries that are zero but for rounding, only the second term of the bound has a meaning.
            counted = own > _EPSILON * self.scale
            relative = gap[counted] / own[counted].clamp_min(_TINY)
            errors[name] = (float(ratio.max()), float(relative.max()) if relative.numel() else 0.0)
        return errors

    def _engine_is_right(self, name: str, found: Tensor) -> bool:
        """Whether a central difference along a random direction agrees with the engine and not with the reference."""
        parameter = self.model.parameters[name]
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        direction /= direction.norm()
        step = 1e-5 * max(1.0, float(parameter.detach().norm()))
        pairs = [take(self._cast, [place, place]) for place in self.places]
        original, ends = parameter.detach().clone(), []
        for shift in (step, -step, 0.0):
            with torch.no_grad():
                parameter.copy_(original + shift * direction)
            if shift:
                ends.append(torch.stack([self.model(pair)[0].detach() for pair in pairs]))
        slope = (ends[0] - ends[1]) / (2 * step) @ self.covectors.to(ends[0]).T
        flat = direction.reshape(-1).double()
        gaps = [float(((jacobian @ flat).T - slope.double()).norm()) for jacobian in (found, self.reference[name])]
        return gaps[0] < 0.01 * gaps[1]


def _reference(
    model: FunctionalModel, batch: Batch, covectors: Tensor, method: str
) -> tuple[Jacobians, str, list[bool]]:
    """Jacobians, one sample at a time, what computed them, and whether those of each sample are finite."""
    # By the one of two ways that the engine does not use itself; by the other where that fails or gives NaN.
    ways = [("plain autograd", by_loop), ("torch.func", by_vjp)]
    widths = {name: parameter.numel() for name, parameter in model.parameters.items()}
    covectors, problem = covectors.to(model.device, model.dtype), ""
    for name, way in reversed(ways) if method == "loop" else ways:
        try:
            whole = way(model, tuple(widths), batch, covectors).double()
            finite = torch.isfinite(whole.sum(dim=2)).all(dim=0)
            if problem or finite.all():
                parts = whole.split(list(widths.values()), dim=2)
                return dict(zip(widths, parts, strict=True)), name + problem, finite.tolist()
            problem = " (NaN)"
        except Exception as error:
            if problem or is_out_of_memory(error):
                raise
            problem = f" ({type(error).__name__}: {str(error).partition(chr(10))[0]:.120})"
    raise AssertionError


def _gram(jacobian: Tensor) -> Tensor:
    """Gram matrix of rows in the order (covector, sample)."""
    rows = jacobian.flatten(0, 1)
    return rows @ rows.T


def _scale(gram: Tensor) -> Tensor:
    diagonal = gram.diagonal().clamp_min(0).sqrt()
    return diagonal[:, None] * diagonal
