"""Base classes of the engine's modules."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qframework.changes import changes

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class _NoHooks(OrderedDict[int, Any]):
    """The hooks of all modules that have none."""

    def __setitem__(self, key: int, value: Any) -> None:
        raise RuntimeError("register hooks by a module's methods, such as register_forward_hook")


_NO_HOOKS: Any = _NoHooks()
_EMPTY = nn.Module().__dict__
_HOOKS = tuple(n for n, held in _EMPTY.items() if type(held) is OrderedDict and not held)
_OTHERS = {n: held for n, held in _EMPTY.items() if n not in _HOOKS}


class CompactModule(nn.Module):
    """A module that is made, copied and pickled without what every module starts with.

    Most of that are eleven dictionaries for hooks. It gets them when the first is registered, which counts as a change:
    a hook has to see each call.
    """

    def __init__(self) -> None:
        # In place of torch's own, which only fills the dictionary.
        for name, held in _OTHERS.items():
            self.__dict__[name] = type(held)() if isinstance(held, (dict, set)) else held

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: held
            for name, held in self.__dict__.items()
            if held or name not in _EMPTY or held != _EMPTY[name]
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        CompactModule.__init__(self)
        self.__dict__.update(state)


def _registering(name: str) -> Any:
    register = getattr(nn.Module, name)

    @functools.wraps(register)
    def make_room_and_register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for kind in _HOOKS:
            self.__dict__.setdefault(kind, OrderedDict(getattr(self, kind)))
        changes.note()
        return register(self, *args, **kwargs)

    return make_room_and_register


for _name in _HOOKS:
    setattr(CompactModule, _name, _NO_HOOKS)
for _name in dir(nn.Module):
    if "register" in _name and "hook" in _name:
        setattr(CompactModule, _name, _registering(_name))


_SETTINGS = (bool, int, float, str, tuple, list, dict, type(None))


def assign(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute; a plain setting without the checks that a module makes for parameters, which take long."""
    held = module.__dict__
    if (
        type(value) in _SETTINGS
        and "_modules" in held
        and name not in held["_parameters"]
        and name not in held["_buffers"]
        and name not in held["_modules"]
    ):
        object.__setattr__(module, name, value)
    else:
        nn.Module.__setattr__(module, name, value)


class Stateless(CompactModule):
    """A module without parameters, buffers or children: a named function with settings.

    A :class:`CoreModule` holds it as a plain attribute: it costs nothing in ``modules()``, ``to()`` or
    attribute look-up, and has no part in a state dict.
    """

    #: Equal calls give equal results, so that results may be kept.
    repeatable = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training":
            changes.note()
        assign(self, name, value)


class CoreModule(CompactModule):
    """A module of the engine; its own numbers never drop below float32.

    ``model.half()`` or ``model.to(torch.bfloat16)`` converts a layer's weights but leaves scales, zero points
    and bit widths alone: an 8-bit range needs 256 exact integers, and a scale's rounding error is
    multiplied by all of them.
    """

    #: Equal calls give equal results while parameters, buffers and settings stay, so that results may be kept. A
    #: property where that depends on the mode; False for what draws at random or counts its calls.
    repeatable: Any = True

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training":
            changes.note()
        if isinstance(value, Stateless):
            object.__setattr__(self, name, value)
        else:
            assign(self, name, value)

    @property
    def unread(self) -> Collection[str]:
        """Names of own tensors that results don't depend on, or only in ways that are counted."""
        return self._constants

    def register_constant(
        self,
        name: str,
        value: float | Tensor,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        """A buffer that no state dict holds; it survives ``to_empty`` and the ``meta`` device.

        Args:
            name: of the buffer.
            value: a number, or a tensor with values.
            dtype: of the buffer; half precision is widened.
            device: of the buffer, torch's default when None.
        """
        master = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        master = master.detach().to(dtype=wide_dtype(dtype), device="cpu").clone()
        self._constants[name] = master
        place = torch.empty(0, device=device).device
        self.register_buffer(name, master.to(place), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoreModule:
        def keep_wide(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.dtype in _LOW_PRECISION and tensor.dtype not in _LOW_PRECISION:
                return tensor.to(out.device)
            return out

        super()._apply(keep_wide, recurse)
        changes.note()
        for name, master in self._constants.items():
            buffer = self._buffers[name]
            assert buffer is not None
            self._buffers[name] = master.to(device=buffer.device, dtype=buffer.dtype)
        return self


def is_recomputing() -> bool:
    """Whether a forward pass runs again inside a backward pass, as ``torch.utils.checkpoint`` lets it.

    What is counted or collected at each training call has then been counted already.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def wide_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a quantizer's own numbers beside values of ``dtype``: float32, or float64."""
    if dtype is None:
        dtype = torch.get_default_dtype()
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def widen(x: Tensor) -> Tensor:
    """``x`` in float32 when it is of lower precision."""
    return x.float() if x.dtype in _LOW_PRECISION else x


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """A quantizer's module and all below it, those that are held as plain attributes too."""
    yield module
    for held in (*module._modules.values(), *vars(module).values()):
        if isinstance(held, nn.Module):
            yield from parts(held)
