"""What a model returns: the part of its output that is meant, and words for what does not fit."""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from ntkpipe.base.errors import ConfigError, ModelError, nearest

Batch = Tensor | dict[str, Tensor]

_DEEPEST = 3
_MOST_SHOWN = 8
_KINDS = r"(Float|Double|Half|BFloat16|Long|Int|float|double|c10::\w+)"
_OF_DTYPES = re.compile(rf"dtype|scalar type|Input type \(|{_KINDS}(Tensor)? (and|but|to)\b|not implemented for '")
_OF_INDICES = re.compile(
    r"scalar types?: Long, Int|'indices'|used as indices|only be applied to an integer", re.IGNORECASE
)
_OF_LAYOUTS = re.compile(r"\b(Sparse|Mkldnn)\w+|sparse_\w+|Nested(Tensor)?\b")
_INTEGERS = re.compile(r"\b(Long|Int|Byte|Char|Short|Bool|long|int|bool|short|u?int\d+|(un)?signed char)\b")


class PathPicker:
    """Picks ``.hidden.0`` and the like: keys of mappings, numbers of sequences, attributes of anything."""

    def __init__(self, path: str) -> None:
        self._path, self._names = path, path.removeprefix(".").split(".")
        if not all(self._names):
            raise ConfigError(f"forward={path!r}; needed '.name', such as '.logits', or several, such as '.hidden.0'")

    def __call__(self, value: object) -> Any:
        """The part of what the model returns."""
        names = list(self._names)
        while names:
            parts, whole = dict(parts_of(value)), ".".join(names)
            if whole in parts:  # a name may have dots
                return parts[whole]
            name = names.pop(0)
            found = parts[name] if name in parts else getattr(value, name, None)
            if found is None or (callable(found) and not isinstance(found, Tensor)):
                hint = nearest(name, parts) or (f"; it has {', '.join(list(parts)[:_MOST_SHOWN])}" if parts else "")
                raise ModelError(
                    f"forward={self._path!r}: the model returned {type(value).__name__}, without {name!r}{hint}"
                )
            value = found
        return value


def parts_of(value: object) -> Iterator[tuple[str, Any]]:
    """Named parts of an output."""
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, tuple | list):
        yield from ((str(number), part) for number, part in enumerate(value))
    elif is_dataclass(value):
        yield from ((each.name, getattr(value, each.name)) for each in fields(value))
    elif not isinstance(value, Tensor):
        yield from ((name, part) for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_"))


def _tensors(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, part in parts_of(value):
        if isinstance(part, Tensor):
            yield f"{path}.{name}", part
        elif path.count(".") < _DEEPEST:
            yield from _tensors(part, f"{path}.{name}")


def described(outputs: object) -> str:
    """What was returned instead of a tensor: its type, and the tensors in it."""
    shown = [f"{path} {tuple(part.shape)}" for path, part in _tensors(outputs)]
    more = ", …" if len(shown) > _MOST_SHOWN else ""
    return type(outputs).__name__ + (f" with {', '.join(shown[:_MOST_SHOWN])}{more}" if shown else "")


def how_to_pick(outputs: object, size: int) -> str:
    """How to pick the part of an output that fits best."""
    found = list(_tensors(outputs))
    fitting = [path for path, part in found if part.ndim == 2 and len(part) == size and part.is_floating_point()]
    best = (fitting or [path for path, _ in found])[:1]
    path = "".join(f"forward={each!r}, " for each in best)
    return f"Pick it with {path}a function of the model's output, or a function of (model, inputs)"


def reshaped(shape: tuple[int, ...], size: int) -> str:
    """How outputs of another shape become (batch, outputs)."""
    if not shape:
        return ". A single number, such as a loss, has no kernel of samples: return the outputs of each sample"
    if shape[0] == size and len(shape) == 1:
        return ": give forward=lambda output: output[:, None]"
    if shape[0] == size and len(shape) > 2 and 0 not in shape:
        return ": give forward=lambda output: output.flatten(1)"
    if len(shape) == 2 and shape[1] == size:
        return ": give forward=lambda output: output.T"
    if len(shape) > 2 and shape[1] == size:
        return ": give forward=lambda output: output.transpose(0, 1).flatten(1)"
    return ". Outputs must keep the samples apart along the first axis"


def hint_of(error: Exception, model: nn.Module, batch: Batch | None, compute_dtype: str) -> str:
    """What to do about an error of a model, where its words tell; begins with a full stop."""
    words = str(error)
    if isinstance(error, TypeError) and "argument" in words and batch is not None:
        return _hint_of_arguments(model, batch)
    if _OF_INDICES.search(words):
        return ". Real inputs take the compute dtype: give what is looked up as integers, as inputs.astype(numpy.int64)"
    if _OF_DTYPES.search(words) and _INTEGERS.search(words):
        given = () if batch is None else batch.values() if isinstance(batch, dict) else (batch,)
        if all(value.is_floating_point() for value in given):
            return ". The model makes or keeps integers (one_hot, arange): cast them to the dtype of weights, or of x"
        return ". Integers and booleans are passed on as they are: give real inputs, as inputs.astype(numpy.float32)"
    if _OF_LAYOUTS.search(words):
        return ". torch lacks this for the layout of a tensor: keep it as .to_sparse_csr(), or dense as .to_dense()"
    if _OF_DTYPES.search(words):
        other = "" if compute_dtype == "float32" else "; or, if that cannot be changed, compute_dtype='float32'"
        return (
            f". Parameters and real inputs take the compute dtype, {compute_dtype}: where the model casts (x.float()) "
            f"or makes a constant (torch.zeros(n)), let it take the dtype of weights, or of x: x.new_zeros(n){other}"
        )
    if re.search("(same|expected) device|device type", words):
        return ". The model moves to the run's device: keep constants as buffers, or make them on x.device"
    return ""


def _hint_of_arguments(model: nn.Module, batch: Batch) -> str:
    try:
        taken = str(inspect.signature(model.forward))
    except (TypeError, ValueError):
        return ""
    if isinstance(batch, dict):
        return f". Arrays of a mapping are passed by their names, here {', '.join(batch)}; the model takes {taken}"
    return f". One array is passed as the only argument; the model takes {taken}: for several give a mapping by name"
