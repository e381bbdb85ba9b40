"""A digest of all that decides the operations of a forward pass: two models with the same one run the same code.

It covers code, attributes, hooks, flags, shapes, strides, which tensors are the same, and the values of buffers. It
fails where it cannot see into something, such as a generator of random numbers.
"""

import functools
import hashlib
import marshal
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkpipe.jacobian.model.state import is_special

_MAX_BYTES, _MAX_VALUES = 2**20, 50_000  # of tensors whose values are read, and of all else
_ATOMS = {types.NoneType, types.EllipsisType, bool, int, float, complex, str, bytes, range}
_ATOMS |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
_NAMED = types.MethodDescriptorType | types.WrapperDescriptorType | types.MemberDescriptorType
_NAMED |= types.GetSetDescriptorType | types.ClassMethodDescriptorType | types.ModuleType
_NO_CODE = {"__dict__", "__weakref__", "__doc__", "__annotations__", "__dataclass_fields__", "__dataclass_params__"}
_NO_CODE |= {"__abstractmethods__", "_abc_impl"}


def digest(values: Iterable[Any], free: Iterable[Tensor]) -> str:
    """The digest of values; of free tensors their content does not count."""
    free_ids, found, left, num_bytes = {id(each) for each in free}, hashlib.sha256(), [*values], 0
    seen: dict[int, tuple[int, Any]] = {}  # numbers by id, with the values, so that no id is used again
    while left:
        value, inside = left.pop(), list[Any]()
        if type(value) in _ATOMS or isinstance(value, _NAMED):
            label = f"{type(value)} {value!r}".encode()
        elif isinstance(value, types.CodeType):
            label = marshal.dumps(value, 2)  # later versions write references, which depend on other holders
        elif id(value) in seen:
            label = b"again %d" % seen[id(value)][0]
        else:
            seen[id(value)] = len(seen), value
            label = f"{type(value)} {getattr(value, '__qualname__', '')}".encode()
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                inside = [*_facts(value), seen.setdefault(-storage._cdata, (len(seen), storage))[0]]
                if id(value) not in free_ids:
                    num_bytes += value.nbytes
                    inside.append(_content(value) if num_bytes <= _MAX_BYTES else _refuse("large buffers"))
            else:
                inside = _inside(value)
        found.update(b"%d %d %b" % (len(label), len(inside), label))
        left += inside
        if len(seen) + len(left) > _MAX_VALUES:
            _refuse("very many values")
    return found.hexdigest()


def _refuse(what: str) -> Any:
    raise TypeError(f"the model, or what its code names, holds {what}")


def _facts(value: Tensor) -> list[Any]:
    if type(value) not in {Tensor, nn.Parameter, nn.Buffer} or is_special(value) or value.grad_fn is not None:
        _refuse(f"a {type(value).__qualname__} that is not plain, or was computed")
    hooks = [*_unnumbered(value._backward_hooks), None, *_unnumbered(value._post_accumulate_grad_hooks)]
    place = value.dtype, value.device, value.shape, value.stride(), value.storage_offset()
    return [f"{place} {value.requires_grad} {value.is_conj()} {value.is_neg()}", vars(value) or None, *hooks]


def _content(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _unnumbered(hooks: Mapping[int, Any] | None) -> list[Any]:
    """Hooks without their numbers, of which no two are the same in a process."""
    return [*(hooks or {}).values()]


def _inside(value: Any) -> list[Any]:
    """What a value holds."""
    kind = type(value)
    if kind in _PARTS:
        return _PARTS[kind](value)
    if isinstance(value, type):
        return [each for base in value.__mro__ for each in _members(base)]
    if isinstance(value, nn.Module):
        hooks = {name: held for name, held in vars(value).items() if "_hooks" in name and isinstance(held, dict)}
        of_runs = {name: held for name, held in hooks.items() if held and "state_dict" not in name}
        called = [each for name, held in of_runs.items() for each in (name, *_unnumbered(held))]
        return [kind, *called, {name: held for name, held in vars(value).items() if name not in hooks}]
    if isinstance(value, dict | list | tuple | set | frozenset | deque):
        members = (value, value.values()) if isinstance(value, dict) else (value,)
        names = () if kind in {dict, list, tuple} else ("__dict__", "default_factory", "maxlen")
        more = [getattr(value, name, None) for name in names]
        return [kind, *more, *(each for part in members for each in part)]
    if any(getattr(kind, n) is not getattr(object, n) for n in ("__reduce_ex__", "__reduce__", "__getstate__")):
        _refuse(f"a {kind.__qualname__}")
    return [kind, *object.__reduce_ex__(value, 2)[1:3]]  # which raises where a value is more than its attributes


def _members(kind: type) -> list[Any]:
    own = {name: value for name, value in vars(kind).items() if name not in _NO_CODE}
    if _is_torch(kind.__module__):  # its code alone; globals only of what runs
        inner = {name: getattr(value, "__func__", value) for name, value in own.items()}
        functions = {name: value for name, value in inner.items() if isinstance(value, types.FunctionType)}
        own = {name: value if name == "forward" else value.__code__ for name, value in functions.items()}
    return [kind.__module__, kind.__qualname__, *own, *own.values()]


def _of_function(value: types.FunctionType) -> list[Any]:
    """Code, what is bound to it, and the globals that it names; of those of torch's own functions code alone."""
    named = _named(value.__globals__, _names(value.__code__))
    if _is_torch(value.__globals__.get("__name__")):
        named = [each.__code__ if isinstance(each, types.FunctionType) else None for each in named]
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    return [value.__code__, value.__defaults__, value.__kwdefaults__, vars(value), cells, named]


def _is_torch(module: object) -> bool:
    return str(module).partition(".")[0] in {"torch", "numpy", "builtins"}


def _names(code: types.CodeType) -> dict[str, None]:
    """Names of globals and attributes, also those of functions inside."""
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return dict.fromkeys(code.co_names) | {name: None for each in inner for name in _names(each)}


def _named(variables: dict[str, Any], names: Iterable[str]) -> list[Any]:
    """Variables of these names, and attributes of these names of modules among them."""
    found, left, seen = list[Any](), [variables], {id(variables)}
    while left:
        own = left.pop()
        found += (values := [own[name] for name in names if name in own])
        modules = [vars(each) for each in values if isinstance(each, types.ModuleType)]
        left += [each for each in modules if id(each) not in seen]
        seen |= {id(each) for each in modules}
    return found


_PARTS: dict[type, Callable[[Any], list[Any]]] = {
    types.FunctionType: _of_function,
    types.MethodType: lambda value: [value.__func__, value.__self__],
    types.BuiltinFunctionType: lambda value: [value.__module__, value.__self__],
    staticmethod: lambda value: [value.__func__],
    classmethod: lambda value: [value.__func__],
    property: lambda value: [value.fget, value.fset, value.fdel],
    functools.partial: lambda value: [value.func, value.args, value.keywords, vars(value)],
    types.SimpleNamespace: lambda value: [vars(value)],
    weakref.ref: lambda value: [value()],
}
