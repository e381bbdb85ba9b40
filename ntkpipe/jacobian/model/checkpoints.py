"""State dicts from files, from which a workflow's model is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ntkpipe.base.errors import ModelError
from ntkpipe.base.paths import said


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dict into ``model``: safetensors, or ``.pt`` / ``.pth`` weights-only. Nothing is unpickled."""
    if path.suffix not in {".safetensors", ".pt", ".pth"}:
        raise ModelError(f"checkpoint {path}: needed a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, safetensors its own
        raise ModelError(f"cannot read the checkpoint {path}: {said(error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, Mapping) else type(state).__name__
        raise ModelError(f"checkpoint {path} holds {keys}; needed a state dict, parameter name → tensor")
    wanted = model.state_dict()
    # Compiled and parallel models save other names than those that they wrap.
    names = {_plain(name): name for name in wanted}
    renamed = {names.get(_plain(name), name): value for name, value in state.items()}
    state = renamed if len(renamed) == len(state) else dict(state)
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model needs {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"checkpoint {path} does not fit the model: {shown}")
    model.load_state_dict(state)


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")
