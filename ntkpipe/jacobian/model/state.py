"""The tensors of a model, whatever their layout: found, checked and fingerprinted."""

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


def is_special(value: Tensor) -> bool:
    """Whether a tensor is more than a dense array of numbers."""
    return value.layout != torch.strided or value.is_nested or value.is_quantized or _is_wrapper(value)


def num_bytes(values: Iterable[Tensor]) -> int:
    """Bytes that tensors hold."""
    return sum(part.nbytes for value in values for part in parts(value))


def require_values(tensors: Mapping[str, Tensor]) -> None:
    """Check that the parameters and buffers of a model have values, and buffers no graph."""
    for name, value in tensors.items():
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


def require_parameters(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Check that the selected parameters are plain, real and finite, and that nothing else is NaN."""
    for name in names:
        value = tensors[name]
        if is_special(value):
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
    for name, value in tensors.items():
        # Masks and observers hold infinities on purpose: outputs and Jacobians are checked to be finite.
        bad = _count(value, finite=name in names)
        if bad:
            what = "NaN or infinite" if name in names else "NaN"
            raise NonFiniteError(f"{name!r} of the model has {bad} {what} entries of {value.numel()}")


def _count(value: Tensor, *, finite: bool) -> int:
    """Entries that are NaN, or not finite."""
    bad = 0
    for part in parts(value):
        if part.is_floating_point() or part.is_complex():
            part = part.float() if part.itemsize == 1 else part  # torch compares few of the small dtypes
            if bool(torch.isfinite(part.sum())):  # one pass, where nothing is wrong
                continue
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

    def __init__(self, named_values: Iterable[tuple[str, Any]]) -> None:
        self._held: dict[str, tuple[list[Any], list[int | None]]] = {}
        seen: set[int] = set()
        for name, value in named_values:
            values = list(values_inside([value], seen))  # kept alive, so that nothing new can take their place
            self._held[name] = values, [each._version if isinstance(each, Tensor) else None for each in values]

    def changed(self, before: "Snapshot") -> list[str]:
        """Names of what is not what it was, or not known to be."""
        now, then = self._held, before._held
        return sorted(name for name in then.keys() | now.keys() if not _is_same(then.get(name), now.get(name)))


def _is_same(before: Any, now: Any) -> bool:
    if before is None or now is None or before[1] != now[1]:
        return False
    return all(one is other for one, other in zip(before[0], now[0], strict=True))


@contextlib.contextmanager
def put_back(attributes: list[dict[str, Any]]) -> Iterator[None]:
    """Undo what passes leave behind in attributes and containers: tensors of ``torch.func`` are of no use after it."""
    held = values_inside(attributes, set())
    kept = [(each, copy.copy(each)) for each in held if isinstance(each, dict | list | set | deque)]
    try:
        yield
    finally:
        for each, before in kept:
            now, then = ((*each, *(each.values() if isinstance(each, dict) else ())) for each in (each, before))
            if len(now) != len(then) or any(one is not other for one, other in zip(now, then, strict=True)):
                each.clear()
                (each.update if isinstance(each, dict | set) else each.extend)(before)


def values_inside(holders: list[Any], seen: set[int]) -> Iterator[Any]:
    """Every value that a copy of these would copy, in containers and plain objects too, and those."""
    left = list(holders)
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
    # Non-persistent buffers, too: they decide outputs as well.
    every = dict([*model.named_parameters(), *model.named_buffers()])
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
