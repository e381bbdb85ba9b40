"""The tensors of a model, whatever their layout: checked, copied, converted and fingerprinted."""

import contextlib
import copy
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, ModuleType, NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ntkpipe.base.errors import ModelError, NonFiniteError
from ntkpipe.base.paths import said
from ntkpipe.store.manifest import ModelRecord

# What returns the plain tensors of each layout.
_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
    torch._mkldnn: ("to_dense",),  # type: ignore[attr-defined]
}


_OF_MODULES = vars(nn.Module()).keys()  # attributes of any module
_PLAIN: Any = object.__reduce_ex__  # of objects that deepcopy copies attribute by attribute


def parts(value: Tensor) -> list[Tensor]:
    """Plain tensors that hold the numbers of a tensor."""
    value = value.detach()
    if _is_wrapper(value):
        names = cast("Any", value).__tensor_flatten__()[0]
        return [part for name in names for part in parts(getattr(value, name))]
    if value.is_nested:
        return [part for each in value.unbind() for part in parts(each)]
    if value.is_quantized:
        return [value.int_repr(), value.dequantize()]
    if value.layout in _PARTS:
        return [getattr(value, name)() for name in _PARTS[value.layout]]
    return [value.resolve_conj().resolve_neg()]


def _is_wrapper(value: Any) -> bool:
    return is_traceable_wrapper_subclass(value)  # distributed and jagged tensors, quantised ones of torchao


def _is_special(value: Tensor) -> bool:
    return value.layout != torch.strided or value.is_nested or value.is_quantized or _is_wrapper(value)


def num_bytes(values: Iterable[Tensor]) -> int:
    """Bytes that tensors hold."""
    return sum(part.nbytes for value in values for part in parts(value))


def require_values(model: nn.Module) -> None:
    """Check that the parameters and buffers of a model have values, and buffers no graph."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value):
            raise ModelError(f"{name!r} of the model is not initialised; run the model once on a batch first")
        if value.is_meta:
            raise ModelError(
                f"{name!r} of the model is on the meta device, where tensors have no values; call "
                "model.to_empty(device='cpu') and load a state dict, or make the model without torch.device('meta')"
            )
        if value.grad_fn is not None:
            raise ModelError(
                f"buffer {name!r} was computed from parameters outside the forward pass, so that its derivative would "
                "be lost; compute it in forward, or detach it if it is meant to be constant"
            )


def require_parameters(model: nn.Module, names: tuple[str, ...]) -> None:
    """Check that the selected parameters are plain, real and finite, and that nothing else is NaN."""
    selected: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if name in names}
    for name, value in selected.items():
        if _is_special(value):
            what = type(value).__name__ if value.layout == torch.strided else str(value.layout)
            raise ModelError(
                f"parameter {name!r} is {what}; needed plain dense parameters: keep its values as one and build the "
                "tensor in forward, or freeze it"
            )
        if not value.is_floating_point():
            raise ModelError(
                f"parameter {name!r} has dtype {value.dtype}; needed real parameters: keep its real and imaginary "
                "part as one real parameter and use torch.view_as_complex, or freeze it"
            )
        if _changes_gradients(value):
            raise ModelError(
                f"parameter {name!r} has a hook that changes its gradient (register_hook), which the kernel would "
                "lack; remove the hook by its handle, or do in forward what it is for"
            )
    for name, value in _tensors(model).items():
        # Masks and observers hold infinities on purpose: outputs and Jacobians are checked to be finite.
        bad = _count(value, finite=name in selected)
        if bad:
            what = "NaN or infinite" if name in selected else "NaN"
            raise NonFiniteError(f"{name!r} of the model has {bad} {what} entries of {value.numel()}")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, non-persistent buffers too: they decide outputs as well."""
    return {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def _count(value: Tensor, *, finite: bool) -> int:
    """Entries that are NaN, or not finite."""
    bad = 0
    for part in parts(value):
        if part.is_floating_point() or part.is_complex():
            part = part.float() if part.itemsize == 1 else part  # torch compares few of the small dtypes
            bad += int((~torch.isfinite(part) if finite else torch.isnan(part)).sum())
    return bad


def _changes_gradients(parameter: Tensor) -> bool:
    """Whether a hook of a parameter changes its gradient; one that only looks does not."""
    hooks = list((parameter._backward_hooks or {}).values())
    given = torch.logspace(8, -8, parameter.numel()).reshape(parameter.shape).to(parameter) if hooks else parameter
    found = given.clone() if hooks else given
    try:
        for hook in hooks:
            returned = hook(found)
            found = found if returned is None else returned
    except Exception:  # noqa: BLE001 - whatever it needs, it gets no gradient here
        return True
    return bool(hooks) and not torch.equal(found, given)


class Snapshot:
    """What the attributes and buffers of a module hold, by which forward passes show which of it they change."""

    def __init__(self, module: nn.Module) -> None:
        self._held: dict[str, tuple[list[Any], list[int | None]]] = {}
        seen: set[int] = set()
        for name, value in _named_values(module):
            values = list(_values_inside([value], seen))  # kept alive, so that nothing new can take their place
            self._held[name] = values, [each._version if isinstance(each, Tensor) else None for each in values]

    def changed(self, module: nn.Module) -> list[str]:
        """Names of what is not what it was, or not known to be."""
        now = Snapshot(module)._held
        return sorted(
            name for name in self._held.keys() | now.keys() if not _is_same(self._held.get(name), now.get(name))
        )


def _is_same(before: Any, now: Any) -> bool:
    if before is None or now is None or before[1] != now[1]:
        return False
    return all(one is other for one, other in zip(before[0], now[0], strict=True))


def _named_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes and buffers by name."""
    for path, child in module.named_modules():
        for name, value in {**vars(child), **child._buffers}.items():
            if name not in _OF_MODULES:
                yield f"{path}.{name}".removeprefix("model").removeprefix("."), value


@contextlib.contextmanager
def put_back(module: nn.Module) -> Iterator[None]:
    """Undo what passes leave behind in attributes and containers: tensors of ``torch.func`` are of no use after it."""
    kept = [(each, copy.copy(each)) for each in _values_of(module) if isinstance(each, dict | list | set | deque)]
    try:
        yield
    finally:
        for each, before in kept:
            now, then = ((*each, *(each.values() if isinstance(each, dict) else ())) for each in (each, before))
            if len(now) != len(then) or any(one is not other for one, other in zip(now, then, strict=True)):
                each.clear()
                (each.update if isinstance(each, dict | set) else each.extend)(before)


def _values_of(module: nn.Module) -> Iterator[Any]:
    """Every value that a copy of a module would copy, in attributes, containers and plain objects too, and those."""
    return _values_inside([vars(child) for child in module.modules()], set())


def _values_inside(left: list[Any], seen: set[int]) -> Iterator[Any]:
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        yield value
        if isinstance(value, Tensor | FunctionType | ModuleType | NoneType):
            continue
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set | deque):
            left += value
        elif getattr(type(value), "__reduce_ex__", 0) is _PLAIN and hasattr(value, "__dict__"):
            left.append(value.__dict__)
        else:
            continue
        seen.add(id(value))


def deepcopy(module: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of a module; ``shared`` are objects by id that stay the same, or what takes their place."""
    memo = dict(shared or {})
    try:
        for value in _values_of(module):
            if not isinstance(value, Tensor) or id(value) in memo:
                continue
            if not value.is_leaf:
                # Old-style weight_norm and friends keep computed tensors as attributes, which deepcopy refuses; they
                # are recomputed by the next forward pass. Where one is used as it is, the outputs depend on a leaf that
                # is no parameter, which the probe refuses.
                memo[id(value)] = value.detach().clone().requires_grad_()
            elif _is_special(value) or type(value) not in {Tensor, nn.Parameter}:  # deepcopy refuses many of them
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


def converted(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module in a dtype; complex buffers, which ``Module.to`` would strip of their imaginary part, stay complex."""

    def convert(value: Tensor) -> Tensor:
        if value.is_complex():
            return value.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    try:
        found: nn.Module = module._apply(convert)
    except Exception as error:
        raise ModelError(
            f"the model cannot be converted to {dtype} on {device} ({type(error).__name__}: {said(error)}); keep what "
            "torch cannot convert as dense tensors of an ordinary dtype"
        ) from error
    return found


def _bytes_of(name: str, value: Tensor) -> Any:
    try:
        return value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    except Exception as error:
        raise ModelError(
            f"{name!r} of the model, {type(value).__name__}, has no plain bytes ({said(error)}); keep its parts as "
            "plain tensors, and build it in forward"
        ) from error


def fingerprint(model: nn.Module, names: tuple[str, ...]) -> ModelRecord:
    """Digests of a model's state and printed structure, with the selected parameters."""
    digest = hashlib.sha256()
    every = _tensors(model)
    for name, value in sorted(every.items()):
        shape = () if value.is_nested else tuple(value.shape)
        digest.update(f"{name}|{value.dtype}|{shape}|".encode())
        found = parts(value)
        for part in found:
            if len(found) > 1:
                digest.update(f"{part.dtype}|{tuple(part.shape)}|".encode())
            if part.numel():
                digest.update(_bytes_of(name, part))
    return ModelRecord(
        name=type(model).__name__,
        state_digest=digest.hexdigest(),
        structure_digest=hashlib.sha256(repr(model).encode()).hexdigest(),
        parameters=names,
        num_parameters=sum(every[name].numel() for name in names),
    )
