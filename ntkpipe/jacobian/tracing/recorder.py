"""Watching a forward pass: which calls use a parameter, and where their outputs are in the autograd graph.

A :class:`Recorder` sees every torch function. A tensor that is computed from parameters alone (a transposed weight, a
position embedding, a weight that is normalised) is *made*, and so is what is computed from it; a call that brings a
parameter, or a made tensor, together with samples is a *use*. Calls whose function has a rule are recorded.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ntkpipe.jacobian.model.device import is_out_of_memory
from ntkpipe.jacobian.tracing.rules.form import Form
from ntkpipe.jacobian.tracing.rules.table import RULES

Geometry = tuple[int, tuple[int, ...], tuple[int, ...]]  # (offset, size, stride) of a view within its parameter


@dataclass(frozen=True)
class Operand:
    """A parameter, or what was made of parameters, as the argument of one call."""

    sources: tuple[str, ...]  # names of the parameters that it is made of
    is_parameter: bool  # whether it is the parameter itself, or a view of it
    geometry: Geometry | None  # which view; None for the whole parameter, and for other tensors
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Argument(Operand):
    """The same in one forward pass, with live tensors."""

    edge: GradientEdge  # its place in the autograd graph, by which gradients reach the parameters
    form: Form  # how it enters the output


@dataclass(frozen=True)
class Call:
    """One use that has a rule: the live tensors of one forward pass."""

    name: str  # name of the torch function
    arguments: dict[str, Argument]  # by role
    saved: tuple[tuple[Tensor, int], ...]  # tensors that the forms read later, with their version counters at the call
    edge: GradientEdge | None  # of the output, right even if that changes in place later; None if nothing flows back
    zero: Tensor  # a zero of the output's dtype and device
    shape: tuple[int, ...]  # of the output

    def blank(self) -> Tensor:
        """Zeros in the shape of the output, without its memory."""
        return self.zero.expand(self.shape)

    def input_was_changed(self) -> bool:
        """Whether something that a form reads was changed in place after the call."""
        return any(tensor._version != version for tensor, version in self.saved)


class Recorder(TorchFunctionMode):
    """Records the calls that have a rule and use one of some parameters; constants are the model's other tensors."""

    # `expansions` are numbers of calls that are uses although they see parameters alone; `detach` tells whether
    # parameters are detached in the calls that are recorded.
    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        constants: Iterable[Tensor],
        *,
        expansions: frozenset[int] = frozenset(),
        detach: bool = False,
    ) -> None:
        super().__init__()
        self._parameters = {id(parameter): name for name, parameter in parameters.items()}
        # By id, with the tensors themselves, which stay alive so that no id is used again.
        self._made: dict[int, tuple[Tensor, tuple[str, ...]]] = {id(p): (p, (name,)) for name, p in parameters.items()}
        self._constants: dict[int, Tensor] = {id(value): value for value in constants}
        self._expansions, self._detach = expansions, detach
        self._number = 0
        self.calls: list[Call] = []
        self.made: dict[int, tuple[torch.Size, ...]] = {}  # shapes of what each call made, by its number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if peek_interpreter_stack() is not None:  # edges inside torch.func transforms end there: these are no uses
            return func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        known = all(id(tensor) in self._made or id(tensor) in self._constants for tensor in tensors)
        # Where no gradient is recorded, parameters are constants.
        mine = [tensor for tensor in tensors if id(tensor) in self._made] if torch.is_grad_enabled() else []
        if not mine:
            constants = [(tensor, tensor._version) for tensor in tensors if id(tensor) in self._constants]
            output = func(*args, **kwargs)
            if known:
                self._constants |= {id(value): value for value in tensors_in(output)}
            else:  # a constant into which samples were written no longer is one
                for tensor, version in constants:
                    if tensor._version != version:
                        self._constants.pop(id(tensor), None)
            return output
        number, self._number = self._number, self._number + 1
        if known and number not in self._expansions:
            return self._make(number, mine, func(*args, **kwargs))
        return self._use(func, args, kwargs, mine)

    def _make(self, number: int, mine: list[Tensor], output: Any) -> Any:
        found = tensors_in(output)
        names = {name for tensor in mine for name in self._made[id(tensor)][1]}
        sources = tuple(name for name in self._parameters.values() if name in names)
        new = {id(value): value for value in found if id(value) not in self._made}
        self._made |= {key: (value, sources) for key, value in new.items() if value.requires_grad}
        self._constants |= {key: value for key, value in new.items() if not value.requires_grad}
        self.made[number] = tuple(value.shape for value in found)
        return output

    def _use(self, func: Any, args: Any, kwargs: Any, mine: list[Tensor]) -> Any:
        own, saved = self._bound(func, args, kwargs)
        if not own:
            body = _body(func)
            if body is None:
                return self._without(mine, func(*args, **kwargs))
            with self:
                return body(*args, **kwargs)
        arguments = {role: argument for role, (_, argument) in own.items()}
        if self._detach:
            cut = {id(tensor) for tensor, _ in own.values()}
            args, kwargs = tree_map(lambda value: value.detach() if id(value) in cut else value, (args, kwargs))
        output = func(*args, **kwargs)
        edge = get_gradient_edge(_whole(output)) if output.requires_grad else None
        self.calls.append(Call(func.__name__, arguments, saved, edge, output.new_zeros(()), tuple(output.shape)))
        return self._without(mine, output)

    def _bound(
        self, func: Any, args: Any, kwargs: Any
    ) -> tuple[dict[str, tuple[Tensor, Argument]], tuple[tuple[Tensor, int], ...]]:
        """By role what parameters enter a call that has a rule, and what its forms read later."""
        rule = RULES.get(func)
        if rule is None or any(
            value.is_nested or value.layout != torch.strided or value.is_complex() for value in tensors_in(args)
        ):
            return {}, ()
        try:
            bound = rule(*args, **{name: value for name, value in kwargs.items() if name != "out"})
            operands = {} if bound is None else bound.operands
            made = {role: each for role, each in operands.items() if id(each[0]) in self._made}
            own = {role: (tensor, self._argument(tensor, form)) for role, (tensor, form) in made.items()}
            return own, tuple((tensor.detach(), tensor._version) for tensor in (bound.saved if bound and own else ()))
        except Exception as error:  # it has no rule then; if the call is wrong, torch says so
            if is_out_of_memory(error):
                raise
            return {}, ()

    def _without(self, mine: list[Tensor], output: Any) -> Any:
        """The output; what was made of parameters alone no longer is if the call wrote samples into it."""
        for tensor in mine:
            if output is tensor and id(tensor) not in self._parameters:
                del self._made[id(tensor)]
        return output

    def _argument(self, tensor: Tensor, form: Form) -> Argument:
        sources = self._made[id(tensor)][1]
        base, shape = tensor._base, tuple(tensor.shape)
        geometry, is_parameter = None, id(tensor) in self._parameters
        if base is not None and id(base) in self._parameters and tensor.dtype == base.dtype:
            geometry = (int(tensor.storage_offset()) - int(base.storage_offset()), shape, tensor.stride())
            is_parameter = is_parameter or not (tensor.is_conj() or tensor.is_neg())
        return Argument(sources, is_parameter, geometry, shape, get_gradient_edge(tensor), form)


def _whole(output: Tensor) -> Tensor:
    """What the output is a view of, if it has the same elements in the same order."""
    # A linear layer over tokens returns such a view; where that is changed in place, gradients arrive at what it views.
    base = output._base
    same = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return base if base is not None and same and base.requires_grad else output


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among the arguments or results of a call."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


_PLAIN = frozenset({type(None), bool, int, float, str, slice, torch.dtype, torch.device, torch.Size})


def _collect(value: Any, found: list[Tensor]) -> None:
    # As tree_leaves does, which takes half of the time of watching; what else holds tensors is left to it.
    kind = type(value)
    if isinstance(value, Tensor):
        found.append(value)
    elif kind is tuple or kind is list:
        for each in value:
            _collect(each, found)
    elif kind is dict:
        _collect([*value.values()], found)
    elif kind not in _PLAIN:
        found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _body(func: Any) -> Callable[..., Any] | None:
    """A copy of a torch function written in Python, whose own calls can be watched; None for other functions."""
    # Such functions call ``has_torch_function`` first and hand themselves to the mode; in the copy it returns False.
    if not isinstance(func, types.FunctionType) or not func.__module__.startswith("torch."):
        return None
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    if not any(name in func.__code__.co_names for name in names):
        return None
    variables = {**func.__globals__, **dict.fromkeys(names, lambda *_: False)}
    body = types.FunctionType(func.__code__, variables, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
