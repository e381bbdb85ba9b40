"""A job as bytes, with modules that torch refuses to pickle: those with parametrizations, as weight norm makes them."""

import io
from typing import Any

import torch
from cloudpickle import Pickler
from torch import nn
from torch.nn.utils import parametrize


def dumps(job: object, *, blank: bool = False) -> bytes:
    """Pickle anything that cloudpickle can, and parametrized modules, for a process with the same version of torch."""
    buffer = io.BytesIO()
    (_BlankPickler if blank else _JobPickler)(buffer).dump(job)
    return buffer.getvalue()


class _JobPickler(Pickler):  # type: ignore[misc]
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
            # Their class is made at run time, and refuses to be pickled: send the one that it was made of.
            kind = parametrize.type_before_parametrizations(value)
            return kind.__new__, (kind,), value.__dict__, None, None, _set_parametrized
        return super().reducer_override(value)


class _BlankPickler(_JobPickler):
    """Tensors without their numbers: a few kilobytes that need all that a job needs."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _blank, (tuple(value.shape), value.dtype)
        return super().reducer_override(value)


def _blank(shape: tuple[int, ...], dtype: Any) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def _set_parametrized(module: Any, state: dict[str, Any]) -> None:
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)
