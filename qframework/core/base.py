"""Base classes of the engine's modules.

A part of a quantizer is a module that computes one thing. What it computes stands in its methods. What that means it may also
state as data, by a method ``rule(stated)``, where ``stated(part)`` is the rule of a part of its own: a faster form may then take
its place, as long as the class that states the rule is the one that computes, see :mod:`qframework.kernels.prepare`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.snapshot import unchanged_on_error
from qframework.functional import compute_dtype, is_half


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

    Most of that are eleven dictionaries for hooks, which it gets when the first one is registered.
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
        return register(self, *args, **kwargs)

    return make_room_and_register


for _name in _HOOKS:
    setattr(CompactModule, _name, _NO_HOOKS)
for _name in dir(nn.Module):
    if "register" in _name and "hook" in _name:
        setattr(CompactModule, _name, _registering(_name))


#: Gives the rule of a part, called with the part and what its ``rule`` takes besides.
Stated = Callable[..., Any]


class NotStated(Exception):
    """What a part means can't be said by the data that its rule is made of; the message says why."""


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
    """A part without parameters, buffers or children: a named function with settings.

    A :class:`CoreModule` holds it as a plain attribute: it costs nothing in ``modules()``, ``to()`` or
    attribute look-up, and has no part in a state dict.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        assign(self, name, value)


class CoreModule(CompactModule):
    """A part of a quantizer; its own numbers never drop below float32.

    ``model.half()`` or ``model.to(torch.bfloat16)`` converts a layer's weights but leaves scales, zero points
    and bit widths alone: an 8-bit range needs 256 exact integers, and a scale's rounding error is
    multiplied by all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Stateless):
            object.__setattr__(self, name, value)
        else:
            assign(self, name, value)

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
            dtype: of the buffer; half precision becomes float32.
            device: of the buffer, torch's default when None.
        """
        master = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        master = master.detach().to(dtype=compute_dtype(dtype), device="cpu").clone()
        self._constants[name] = master
        place = torch.empty(0, device=device).device
        self.register_buffer(name, master.to(place), persistent=False)

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """Why a state dict's entry can't be; None where it can.

        Args:
            name: of the parameter or buffer.
            number: what is to be loaded, of its shape.
            entries: all entries of this part, by name.

        Returns:
            What is allowed, such as ``'a positive, finite number'``. By default floating-point numbers have to be finite.
        """
        if number.is_floating_point() and not bool(torch.isfinite(number).all()):
            return "finite numbers"
        return None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load what can be; nothing of this part where an entry can't."""
        own = {
            n: t for n, t in (*self._parameters.items(), *self._buffers.items()) if t is not None
        }
        entries = {n: state_dict[prefix + n] for n in own if prefix + n in state_dict}
        errors = []
        for name, given in entries.items():
            held = own[name]
            if isinstance(given, Tensor) and given.dim() + held.dim() == 1 and held.numel() == 1:
                given = state_dict[prefix + name] = given.reshape(held.shape)
            number = local_part(given)
            if number is None or given.shape != held.shape:
                continue  # torch says so itself
            allowed = self.why_refused(name, number.detach(), entries)
            if allowed is not None:
                errors.append(f"{prefix}{name}: got {_in_short(number)}, allowed: {allowed}.")
        error_msgs += errors
        if not errors:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )

    def saved(self, name: str, number: Tensor) -> Tensor:
        """For subclasses: what is saved for a parameter, where one number is written in several ways."""
        return number

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in () if keep_vars else self._parameters:
            if prefix + name in destination:
                destination[prefix + name] = self.saved(name, destination[prefix + name])

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; where a state dict is refused, everything is as it was."""
        with unchanged_on_error(self):
            return super().load_state_dict(*args, **kwargs)

    def leave_meta(self, device: torch.device | None) -> None:
        """Put constants that are on the ``meta`` device onto another one.

        Args:
            device: torch's default when None.
        """
        place = torch.empty(0, device=device).device
        for name in self._non_persistent_buffers_set:
            buffer = self._buffers[name]
            if buffer is not None and buffer.is_meta:
                master = self._constants.get(name)
                self._buffers[name] = (
                    torch.ones_like(buffer, device=place)
                    if master is None
                    else master.to(device=place, dtype=buffer.dtype)
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoreModule:
        def keep_precise(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return (
                tensor.to(out.device) if is_half(out.dtype) and not is_half(tensor.dtype) else out
            )

        super()._apply(keep_precise, recurse)
        for name, master in self._constants.items():
            buffer = self._buffers[name]
            assert buffer is not None
            self._buffers[name] = master.to(device=buffer.device, dtype=buffer.dtype)
        return self


class Constant(CoreModule):
    """A part whose result is a number that doesn't change: :meth:`number` makes a tensor of it at each call.

    Writing to that tensor changes nothing; whoever wants another number assigns it.

    Args:
        dtype: of the tensor; half precision becomes float32.
        device: of the tensor, torch's default when None.
    """

    place: Tensor

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        super().__init__()
        # Moves and is converted with the model; it has no elements, so that to_empty leaves it as it is.
        empty = torch.empty(0, dtype=compute_dtype(dtype), device=device)
        self.register_buffer("place", empty, persistent=False)

    def number(self, value: float) -> Tensor:
        """A number as a 0-dim tensor, in the dtype and on the device of this part."""
        return self.place.new_full((), value)


def parameter_of(number: Tensor) -> nn.Parameter:
    """A parameter that holds a number; one without dimensions as one element, since sharding needs a dimension.

    Args:
        number: the start, of any shape.
    """
    return nn.Parameter(number.reshape(1) if number.dim() == 0 else number)


def number_of(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The number that a parameter holds, float32 at least.

    Args:
        parameter: of :func:`parameter_of`, or of an engine that shards it; outside of a forward pass that puts it together,
            for which all processes have to call this.
        shape: of the number.

    Returns:
        The parameter itself where it has that shape.
    """
    if hasattr(parameter, "full_tensor"):
        parameter = parameter.full_tensor()
    if is_half(parameter.dtype):
        parameter = parameter.float()
    if parameter.dim() != len(shape) and parameter.numel() == 1:
        return parameter.reshape(shape)
    return parameter


def held_number(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As :func:`number_of`, but the parameter itself where it is one of :func:`parameter_of`, which may have a dimension more."""
    if type(parameter) is nn.Parameter and parameter.dim() == (len(shape) or 1):
        if parameter.dtype in (torch.float32, torch.float64):
            return parameter
    return number_of(parameter, shape)


def local_part(tensor: Any) -> Tensor | None:
    """The elements of a tensor that this process holds; None where there are none to look at."""
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return None
    if hasattr(tensor, "to_local"):  # of a model that is sharded over processes
        tensor = tensor.to_local()
    return tensor if tensor.numel() else None


def _in_short(number: Tensor) -> str:
    if number.numel() == 1:
        return f"{number.item():g}"
    return f"numbers from {number.min().item():g} to {number.max().item():g}"


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all below it, those that are held as plain attributes too."""
    yield module
    for held in (*module._modules.values(), *vars(module).values()):
        if isinstance(held, nn.Module):
            yield from parts(held)
