"""The model as a function of its parameters and a batch, in the dtype and on the device of a run."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ntkpipe.base.config import ComputeDtype
from ntkpipe.base.errors import ConfigError, ModelError, NonFiniteError, NtkpipeError
from ntkpipe.base.paths import said
from ntkpipe.jacobian.model.device import without_cudnn_rnns
from ntkpipe.jacobian.model.picking import Batch as Batch
from ntkpipe.jacobian.model.picking import PathPicker, described, hint_of, how_to_pick, reshaped
from ntkpipe.jacobian.model.state import (
    Snapshot,
    is_special,
    put_back,
    require_parameters,
    require_values,
    values_inside,
)

Forward = str | Callable[..., Any] | None

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes of a weight
# The dtype of parameters and activations by ``compute_dtype``; TF32 is a way to multiply float32.
DTYPES: dict[ComputeDtype, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
}
# Outputs of one sample in two batches may differ by rounding only, on the scale of the largest output.
MIXING_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}
_OF_MODULES = vars(nn.Module()).keys()  # attributes of any module
_MANY_CHANNELS = 16  # input channels of a 1 x 1 convolution from which it may be channels last
_HOOKS = "'.attribute', a function of the model's output, or a function of (model, inputs)"


class _Hooked(nn.Module):
    """A model and the hook that picks its output, as one module, so that ``functional_call`` reaches both."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self.pick = _as_picker(forward)
        self.training = model.training

    def forward(self, batch: Batch) -> Any:
        # A model may change its input in place; the batch is used again.
        return self.pick(self.model, tree_map(Tensor.clone, batch))


def _as_picker(forward: Forward) -> Callable[[nn.Module, Batch], Any]:
    if not (forward is None or callable(forward) or isinstance(forward, str)):
        raise ConfigError(f"forward is {type(forward).__name__}; needed {_HOOKS}")
    choose = PathPicker(forward) if isinstance(forward, str) else forward
    try:
        taken = inspect.signature(forward) if callable(forward) else None
    except (TypeError, ValueError):  # builtins such as operator.attrgetter('logits')
        taken = None
    if callable(forward) and taken is not None:
        needed = [one for one in taken.parameters.values() if one.default is one.empty]
        counted = [one for one in needed if one.kind in {one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD}]
        if len(counted) > 2 or not taken.parameters or any(one.kind is one.KEYWORD_ONLY for one in needed):
            raise ConfigError(f"forward takes {taken}; needed {_HOOKS}")
        if len(counted) == 2:
            return forward

    def pick(model: nn.Module, batch: Batch) -> Any:
        value = model(**batch) if isinstance(batch, dict) else model(batch)
        return value if choose is None else choose(value)

    return pick


@dataclass(frozen=True)
class FunctionalModel:
    """One thread's copy of a model, in one dtype on one device; the selected parameters alone require a gradient."""

    module: nn.Module  # maps a batch to outputs; its parameters are called `model.<name>`
    names: tuple[str, ...]  # the selected parameters, as the user's model names them
    dtype: torch.dtype  # of parameters and floating-point inputs
    device: torch.device
    tf32: bool = False  # whether float32 products of a GPU may be TF32, as ``exact_math`` then allows
    # What passes are run in: alone where threads that ran the model at once would disturb each other.
    turn: contextlib.AbstractContextManager[None] = field(default_factory=contextlib.nullcontext)
    parameters: dict[str, nn.Parameter] = field(init=False, repr=False, compare=False)  # the selected ones by name
    arithmetic: ComputeDtype = field(init=False)  # the ``compute_dtype``, on which tolerances depend

    def __post_init__(self) -> None:
        every = dict(self.module.named_parameters())
        arithmetic = "tf32" if self.tf32 else next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        object.__setattr__(self, "parameters", {name: every[f"model.{name}"] for name in self.names})
        object.__setattr__(self, "arithmetic", arithmetic)

    def constants(self) -> list[Tensor]:
        """All other parameters, and the buffers, which a forward pass may replace."""
        selected = {id(parameter) for parameter in self.parameters.values()}
        return [value for value in (*self.module.parameters(), *self.module.buffers()) if id(value) not in selected]

    def __call__(self, batch: Batch) -> Tensor:
        """Outputs (B, O) of a batch."""
        return self.check_outputs(self.module(batch), batch)

    def explained(self, batch: Batch) -> Tensor:
        """The same; what the model raises is an error that says so, with what it was given."""
        try:
            return self(batch)
        except NtkpipeError:
            raise
        except Exception as error:
            tensors = batch if isinstance(batch, dict) else {"input": batch}
            shown = ", ".join(f"{name}: {tuple(v.shape)} {v.dtype}" for name, v in tensors.items())
            size = len(next(iter(tensors.values())))
            raise self.failure(error, f"on a batch of {size} ({shown})", batch) from error

    def failure(self, error: Exception, where: str, batch: Batch | None = None) -> ModelError:
        """What the model raised, as an error that says where and what to do."""
        model = getattr(self.module, "model", self.module)
        hint = hint_of(error, model, batch, self.arithmetic)
        return ModelError(f"the model raised {type(error).__name__} {where}: {said(error)}{hint}")

    def call_with(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Outputs of a batch with some parameters replaced, through ``torch.func.functional_call``."""
        # Not by ``tie_weights``, which in torch 2.13 leaves the replaced tensors in a module that is in two places.
        given = {id(self.parameters[name]): value for name, value in parameters.items()}
        renamed = {
            f"{prefix}.{name}": given[id(parameter)]
            for prefix, child in self.module.named_modules()
            for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False)
            if id(parameter) in given
        }
        with put_back(_attributes(self.module)):
            outputs = torch.func.functional_call(self.module, renamed, (batch,), tie_weights=False)
        return self.check_outputs(outputs, batch)

    def require_replaced(self, outputs: Tensor) -> None:
        """Check that outputs of :meth:`call_with` do not depend on the parameters that were to be replaced."""
        # They do where a module also keeps a parameter in a plain list or a closure: there it uses the original, and
        # derivatives by ``torch.func`` would silently lack that use.
        if outputs.requires_grad:
            live = list(self.parameters.values())
            grads = torch.autograd.grad(outputs.sum(), live, retain_graph=True, allow_unused=True)
            if any(grad is not None for grad in grads):
                raise ModelError("parameters are used out of reach of torch.func.functional_call")

    def check_outputs(self, outputs: object, batch: Batch) -> Tensor:
        """Return ``outputs`` if they are one floating-point (batch, O) tensor."""
        size = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
        if not isinstance(outputs, Tensor):
            raise ModelError(
                f"the model returned {described(outputs)}; needed one (batch, outputs) tensor. "
                + how_to_pick(outputs, size)
            )
        if outputs.layout != torch.strided:
            raise ModelError(
                f"the model returned a tensor of layout {outputs.layout}; needed a dense one: give "
                "forward=lambda output: output.to_dense()"
            )
        if outputs.ndim != 2 or outputs.shape[0] != size or outputs.shape[1] == 0:
            raise ModelError(
                f"the model returned shape {tuple(outputs.shape)} for a batch of {size}; needed (batch, outputs) with "
                f"at least one output{reshaped(tuple(outputs.shape), size)}"
            )
        if not outputs.is_floating_point():
            real = "give forward=lambda output: torch.view_as_real(output).flatten(1)"
            advice = real if outputs.is_complex() else "return them as they are before argmax, rounding or a cast"
            raise ModelError(f"the model returned dtype {outputs.dtype}; needed real floating-point outputs: {advice}")
        return outputs

    def to_batch(self, arrays: Mapping[str, Tensor], is_mapping: bool) -> Batch:
        """Move samples to the device; floating-point ones take the model's dtype, integers and masks keep theirs."""
        moved, is_gpu = {}, self.device.type == "cuda"
        for name, value in arrays.items():
            dtype = self.dtype if value.is_floating_point() else value.dtype
            if is_gpu and not value.is_pinned():
                value = value.pin_memory()
            # From pinned memory the host does not wait for the copy; the dtype is converted on the device.
            moved[name] = value.to(self.device, dtype, non_blocking=is_gpu)
        return moved if is_mapping else moved["input"]

    def copy(self) -> "FunctionalModel":
        """A copy that another thread may run: its own module tree and buffers, the same parameters in memory."""
        return self._with_module(deepcopy(self.module, {id(value): value for value in self.module.parameters()}))

    def with_fast_layout(self, batch: Batch) -> "FunctionalModel":
        """The model with its convolutions channels last, where that is faster and the model runs that way."""
        convolves = any(isinstance(module, nn.modules.conv._ConvNd) for module in self.module.modules())
        if not convolves or self.device.type != "cpu" or self.dtype != torch.float32:
            return self
        weights = [parameter for parameter in self.module.parameters() if parameter.ndim in _CHANNELS_LAST]
        # In torch 2.13 the backward of a 1 x 1 convolution of two to seven channels, channels last and with stride 2,
        # writes beyond its memory; strides of functional calls are not known here, nor what other instruction sets do.
        if any(weight.shape[2:].numel() == 1 and 1 < weight.shape[1] < _MANY_CHANNELS for weight in weights):
            return self
        changed = self.channels_last()
        outputs = self.explained(batch).detach()
        try:
            again = changed(batch).detach()
        except RuntimeError:  # it takes views of what a convolution returns, which need the usual layout
            return self
        scale = float(outputs.abs().max()) or 1.0
        return changed if float((again - outputs).abs().max()) <= MIXING_TOLERANCE[self.arithmetic] * scale else self

    def channels_last(self) -> "FunctionalModel":
        """A copy with convolutions channels last in memory; oneDNN's are 10 to 40 % faster in this layout."""
        module = deepcopy(self.module)
        for parameter in module.parameters():
            if parameter.ndim in _CHANNELS_LAST:
                parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])
        return self._with_module(module)

    def converted(self, dtype: torch.dtype, device: torch.device | None = None) -> "FunctionalModel":
        """A copy in another dtype, or on another device, which shares nothing."""
        device, tf32 = device or self.device, self.tf32 and dtype == self.dtype
        return self._with_module(converted(self.module, dtype, device), dtype=dtype, device=device, tf32=tf32)

    def snapshot(self) -> Snapshot:
        """What the module holds now."""
        return Snapshot(list(_named_values(self.module)))

    def _with_module(self, module: nn.Module, **changes: Any) -> "FunctionalModel":
        selected = {f"model.{name}" for name in self.names}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in selected)
        return replace(self, module=module, **changes)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model underneath ``torch.compile``; where that wraps parts of it, a copy without, of the same tensors."""
    compiled = [each for each in model.modules() if "_orig_mod" in each._modules]
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    for each in reversed(compiled):  # the innermost first
        inner: Any = each._modules["_orig_mod"]
        shared[id(each)] = deepcopy(inner, shared)
    return deepcopy(model, shared) if compiled else model


def deepcopy(module: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of a module; ``shared`` are objects by id that stay the same, or what takes their place."""
    memo = dict(shared or {})
    try:
        for value in values_inside(_attributes(module), set()):
            if not isinstance(value, Tensor) or id(value) in memo:
                continue
            if not value.is_leaf:
                # Old-style weight_norm and friends keep computed tensors as attributes, which deepcopy refuses; they
                # are recomputed by the next forward pass. Where one is used as it is, the outputs depend on a leaf that
                # is no parameter, which the probe refuses.
                memo[id(value)] = value.detach().clone().requires_grad_()
            elif is_special(value) or type(value) not in {Tensor, nn.Parameter}:  # deepcopy refuses many of them
                clone = value.detach().clone()
                memo[id(value)] = nn.Parameter(clone, value.requires_grad) if isinstance(value, nn.Parameter) else clone
        with torch.no_grad():  # else the parameters of a scripted module's copy depend on those of the original
            return copy.deepcopy(module, dict(memo))
    except Exception as error:
        what = next(_not_copied(module, memo), "")
        raise ModelError(
            f"the model cannot be copied (copy.deepcopy raised {type(error).__name__}: {said(error)}){what}; keep what "
            "cannot be copied outside of the model, or give its class a __deepcopy__"
        ) from error


def _not_copied(module: nn.Module, memo: dict[int, Any]) -> Iterator[str]:
    """Attributes that cannot be copied."""
    for name, value in _named_values(module):
        try:
            copy.deepcopy(value, dict(memo))
        except Exception:  # noqa: BLE001 - this is what is looked for
            yield f" at {name!r}"


def _attributes(module: nn.Module) -> list[dict[str, Any]]:
    return [vars(child) for child in module.modules()]


def _named_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes and buffers by name."""
    for path, child in module.named_modules():
        for name, value in {**vars(child), **child._buffers}.items():
            if name not in _OF_MODULES:
                yield f"{path}.{name}".removeprefix("model").removeprefix("."), value


def converted(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy in a dtype; complex buffers, which ``Module.to`` would strip of their imaginary part, stay complex."""

    def convert(value: Tensor) -> Tensor:
        if value.is_complex():
            return value.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    copied = deepcopy(module)
    try:
        found: nn.Module = copied._apply(convert)
    except Exception as error:
        raise ModelError(
            f"the model cannot be converted to {dtype} on {device} ({type(error).__name__}: {said(error)}); keep what "
            "torch cannot convert as dense tensors of an ordinary dtype"
        ) from error
    if device.type == "cuda":
        without_cudnn_rnns(found)
    return found


def prepare_model(
    model: nn.Module,
    *,
    forward: Forward = None,
    parameters: str | tuple[str, ...] | None = None,
    dtype: torch.dtype,
    device: torch.device,
    tf32: bool = False,
) -> FunctionalModel:
    """Copy ``model`` into the dtype and device of a run and select its parameters; the user's model is not changed."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is {type(model).__name__}; needed a torch.nn.Module")
    _check_modes(model)  # these first, since parameters of a lazy module have no size
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    require_values(tensors)
    names = select_parameters(model, parameters)
    require_parameters(tensors, names)
    hooked = converted(_Hooked(model, forward), dtype, device)
    found = FunctionalModel(hooked, names, dtype, device, tf32)._with_module(hooked)
    changed = {name: value for name, value in found.parameters.items() if value.dtype != tensors[name].dtype}
    if lost := [name for name, value in changed.items() if not bool(torch.isfinite(value).all())]:
        raise NonFiniteError(
            f"parameter {lost[0]!r} overflows {dtype}; use compute_dtype='float64', or scale the model"
        )
    return found


def select_parameters(model: nn.Module, patterns: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the parameters that require a gradient and match one of ``patterns``."""
    every = dict(model.named_parameters())
    trainable = [name for name, parameter in every.items() if parameter.requires_grad and parameter.numel()]
    if not trainable:
        found = f"{len(every)} parameters, all frozen" if every else "no parameters"
        raise ModelError(f"the model has {found}; needed at least one with requires_grad=True")
    if patterns is None:
        return tuple(trainable)
    # A compiled model shows names with the wrapper's, which the model underneath lacks.
    patterns = tuple(
        each.replace("_orig_mod.", "") for each in ((patterns,) if isinstance(patterns, str) else patterns)
    )
    if not patterns:
        raise ModelError("parameters is empty; needed patterns of names, or None for all that require a gradient")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            frozen = any(fnmatchcase(name, pattern) for name in every)
            what = "matches only frozen parameters" if frozen else "matches no parameter"
            shown = ", ".join(trainable[:8]) + (", …" if len(trainable) > 8 else "")
            raise ModelError(f"parameters={pattern!r} {what}; those that require a gradient are {shown}")
    return tuple(name for name in trainable if any(fnmatchcase(name, pattern) for pattern in patterns))


def _check_modes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ModelError(
                f"{kind} {name!r} is active (train mode, p={module.p}), so outputs are random; call model.eval() first"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training:
                raise ModelError(
                    f"{kind} {name!r} is in train mode, so outputs of a sample depend on its batch; call model.eval() "
                    "first"
                )
            if module.running_mean is None:
                raise ModelError(
                    f"{kind} {name!r} has no running statistics (track_running_stats=False), so outputs of a sample "
                    "depend on its batch also in eval mode; a kernel of single samples is not defined"
                )
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ModelError(f"{kind} {name!r} is not initialised; run the model once on a batch first")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The given device, or by default the first GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not a torch device: {said(error)}") from error
    if found.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device={device!r}; needed 'cpu' or 'cuda'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={device!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use 'cpu'")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found
