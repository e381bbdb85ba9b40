"""A digest of all that decides the operations of a forward pass: two models with the same one run the same code.

It covers code, attributes, hooks, flags, shapes, strides, which tensors are the same, and the values of buffers. It
fails where it cannot see into something, such as a generator of random numbers.
"""

import builtins
import functools
import hashlib
import opcode
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkpipe.jacobian.model.state import is_special

_MAX_BYTES, _MAX_VALUES = 2**20, 50_000  # of tensors whose values are read, and of all else
_ATOMS = {types.NoneType, types.NotImplementedType, types.EllipsisType, bool, int, float, complex, str, bytes, range}
_ATOMS |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
_NAMED = {types.MethodDescriptorType, types.WrapperDescriptorType, types.MemberDescriptorType, TypeVar}
_NAMED |= {types.GetSetDescriptorType, types.ClassMethodDescriptorType}
_NO_CODE = {"__dict__", "__weakref__", "__doc__", "__annotations__", "__dataclass_fields__", "__dataclass_params__"}
_NO_CODE |= {"__abstractmethods__", "_abc_impl"}
_OPAQUE = {"eval", "exec", "globals", "__import__", "import_module"}  # which lead to what no name shows
_HOOKS = {name for name, held in vars(nn.Module()).items() if "_hooks" in name and isinstance(held, dict)}
# Torch's own functions are digested without the globals that they name. What is no longer as it was, is.
_CLASSES = {"Tensor": Tensor, "Module": nn.Module}  # to which others add methods
_FACES: list[Any] = [*_CLASSES.values(), torch, F, torch._C._nn, torch.linalg, torch.special, torch.fft]
_ORIGINALS = [dict(vars(face)) for face in _FACES]


def digest(values: Iterable[Any], free: Iterable[Tensor]) -> str:
    """The digest of values; of free tensors their content does not count."""
    free_ids, found, left, num_bytes = {id(each) for each in free}, hashlib.sha256(), [*values, *_patched()], 0
    seen: dict[int, tuple[int, Any]] = {}  # numbers by id, with the values, so that no id is used again
    names, modules = dict[str, None](), dict[str, Any](_CLASSES)  # any of these may be asked of any of those
    asked = set[tuple[str, str]]()
    while left or (left := _asked(names, modules, asked)):
        value, inside = left.pop(), list[Any]()
        kind = type(value)
        if kind is str:  # most of all
            text = value.encode()
            found.update(b"%d:%b" % (len(text), text))
            continue
        if kind in _ATOMS or kind in _NAMED or isinstance(value, types.ModuleType) or _is_static(value):
            label = f"{kind} {value!r}".encode()
            if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] != "numpy":
                modules[value.__name__] = value
        elif isinstance(value, types.CodeType):
            label = _bytes(value)
            names |= _names(value)
        elif id(value) in seen:
            label = b"again %d" % seen[id(value)][0]
        else:
            seen[id(value)] = len(seen), value
            label = f"{kind} {getattr(value, '__qualname__', '')}".encode()
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


def _is_static(value: object) -> bool:
    """Whether it is a type of Python's own, which nobody can change."""
    return isinstance(value, type) and not value.__flags__ & 1 << 9


def _refuse(what: str) -> Any:
    raise TypeError(f"the model, or what its code names, holds {what}")


def _facts(value: Tensor) -> list[Any]:
    if type(value) not in {Tensor, nn.Parameter, nn.Buffer} or is_special(value) or value.grad_fn is not None:
        _refuse(f"a {type(value).__qualname__} that is not plain, or was computed")
    hooks = [[*(each or {}).values()] for each in (value._backward_hooks, value._post_accumulate_grad_hooks)]
    place = value.dtype, value.device, value.shape, value.stride(), value.storage_offset()
    return [f"{place} {value.requires_grad} {value.is_conj()} {value.is_neg()}", vars(value) or None, *hooks]


def _content(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _inside(value: Any) -> list[Any]:
    """What a value holds."""
    kind = type(value)
    if kind in _PARTS:
        return _PARTS[kind](value)
    if isinstance(value, type):
        own = [
            (name, held)
            for base in value.__mro__
            if base not in _FACES
            for name, held in vars(base).items()
            if name not in _NO_CODE
        ]
        return [kind, value.__module__, *value.__mro__[1:], *own]
    if isinstance(value, nn.Module):
        hooks = {name: held for name, held in vars(value).items() if name in _HOOKS}
        of_runs = {name: held for name, held in hooks.items() if held and "state_dict" not in name}
        numbers = sorted({number for held in of_runs.values() for number in held})  # of which no process has two alike
        called = [(name, numbers.index(n), hook) for name, held in of_runs.items() for n, hook in held.items()]
        return [kind, *called, {name: held for name, held in vars(value).items() if name not in hooks}]
    if isinstance(value, dict | list | tuple | set | frozenset | deque):
        members = (value, value.values()) if isinstance(value, dict) else (value,)
        names = () if kind in {dict, list, tuple} else ("__dict__", "default_factory", "maxlen")
        more = [getattr(value, name, None) for name in names]
        return [kind, *more, *(each for part in members for each in part)]
    if any(getattr(kind, n) is not getattr(object, n) for n in ("__reduce_ex__", "__reduce__", "__getstate__")):
        _refuse(f"a {kind.__qualname__}")
    return [kind, *object.__reduce_ex__(value, 2)[1:3]]  # which raises where a value is more than its attributes


def _of_function(value: types.FunctionType) -> list[Any]:
    """Code, what is bound to it, and the globals that it names; of torch's own functions no globals."""
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    bound = [value.__defaults__, value.__kwdefaults__, vars(value), cells]
    variables = value.__globals__
    if str(variables.get("__name__")).partition(".")[0] in {"torch", "numpy"}:
        return [_bytes(value.__code__), *bound]
    named = [
        (name, every[name]) for name in _names(value.__code__) for every in (variables, vars(builtins)) if name in every
    ]
    return [value.__code__, *bound, *named]


@functools.lru_cache(4096)
def _bytes(code: types.CodeType) -> bytes:
    consts = [_bytes(each) if isinstance(each, types.CodeType) else each for each in code.co_consts]
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    return repr((code.co_code, code.co_exceptiontable, names, counts, consts)).encode()


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> dict[str, None]:
    """Names of globals and attributes, also as strings, and those of functions inside."""
    if _OPAQUE & {*code.co_names} or opcode.opmap["IMPORT_NAME"] in code.co_code[::2]:
        _refuse("a function that imports, or runs text")
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    texts = [each for each in code.co_consts if isinstance(each, str)]
    return dict.fromkeys((*code.co_names, *texts)) | {name: None for each in inner for name in _names(each)}


def _asked(names: Iterable[str], modules: Mapping[str, Any], known: set[tuple[str, str]]) -> list[Any]:
    """Variables of modules by all names of attributes, those of before apart."""
    new = [(m, n) for m, held in modules.items() for n in names if n in vars(held) and (m, n) not in known]
    known.update(new)
    return [(m, n, vars(modules[m])[n]) for m, n in new]


def _is_bound(value: types.BuiltinFunctionType) -> bool:
    return not isinstance(value.__self__, types.ModuleType) and type(value.__self__).__name__ != "PyCapsule"


def _patched() -> list[Any]:
    """What torch's modules offer in another way than when this module was loaded."""
    both = zip(_FACES, _ORIGINALS, strict=True)
    new = [(n, v) for face, before in both for n, v in vars(face).items() if before.get(n, v) is not v]
    return [each for each in new if each[0] != "manual_seed" and not isinstance(each[1], types.ModuleType)]


_PARTS: dict[type, Callable[[Any], list[Any]]] = {
    types.FunctionType: _of_function,
    types.MethodType: lambda value: [value.__func__, value.__self__],
    types.BuiltinFunctionType: lambda value: [value.__module__, *([value.__self__] if _is_bound(value) else ())],
    staticmethod: lambda value: [value.__func__],
    classmethod: lambda value: [value.__func__],
    property: lambda value: [value.fget, value.fset, value.fdel],
    functools.partial: lambda value: [value.func, value.args, value.keywords, vars(value)],
    types.SimpleNamespace: lambda value: [vars(value)],
    weakref.ref: lambda value: [value()],
}
