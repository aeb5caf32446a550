"""What a name of a quantizer can be bound to, besides plain values and classes: ``@value`` and ``this.x``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from qframework.inject.errors import PolicyTypeError


class Argument(NamedTuple):
    """One argument of a constructor or ``@value`` function."""

    name: str
    required: bool
    default: Any


@lru_cache(maxsize=4096)
def arguments_of(call: Callable[..., Any]) -> tuple[Argument, ...] | None:
    """The arguments that ``call`` takes by name; None when it takes any (``*args``, ``**kwargs``).

    For a class these are those of its constructor, without ``self``.
    """
    if isinstance(call, type):
        init = call.__init__  # type: ignore[misc]
        if init is object.__init__:
            return ()
        parameters = list(inspect.signature(init).parameters.values())[1:]
    else:
        parameters = list(inspect.signature(call).parameters.values())
    out = []
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            return None
        required = p.default is p.empty
        out.append(Argument(p.name, required, None if required else p.default))
    return tuple(out)


class Value:
    """A name computed from other names: its function's arguments are resolved by name.

    The result may be a plain value, a class (wired like any class) or ``this.x`` (followed).
    """

    __slots__ = ("arguments", "function")

    def __init__(self, function: Callable[..., Any]) -> None:
        if isinstance(function, staticmethod):
            function = function.__func__
        if not callable(function):
            raise TypeError(
                f"@value takes a function, got {function!r} of type {type(function).__name__}"
            )
        arguments = arguments_of(function)
        if arguments is None:
            raise PolicyTypeError(
                f"@value {function.__name__}: arguments are resolved by name, *args and **kwargs can't be"
            )
        if arguments and arguments[0].name == "self":
            raise PolicyTypeError(
                f"@value {function.__name__}(self, ...): a quantizer has no instances; "
                f"write the names that it needs as arguments, without self"
            )
        self.function, self.arguments = function, arguments

    def __repr__(self) -> str:
        return f"@value {self.function.__qualname__}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Value, (self.function,))


def value(function: Callable[..., Any]) -> Any:
    """Decorate a function in the body of a quantizer: the name is what the function returns.

    Example::

        class MyWeight(Int8WeightPerTensorFloat):
            @value
            def scaling_init(module):
                return module.weight.abs().max()
    """
    return Value(function)


class This:
    """A path to another name: ``this.x``, ``this.nested.x``, ``(this << 1).x`` for one of the enclosing."""

    __slots__ = ("_levels", "_path")

    def __init__(self, levels: int = 0, path: tuple[str, ...] = ()) -> None:
        self._levels, self._path = levels, path

    def __getattr__(self, name: str) -> This:
        if name.startswith("__"):
            raise AttributeError(name)
        return This(self._levels, (*self._path, name))

    def __lshift__(self, levels: int) -> This:
        if not isinstance(levels, int) or levels < 1 or self._path:
            raise TypeError("write (this << n).name with a whole number n >= 1")
        return This(self._levels + levels, ())

    def __repr__(self) -> str:
        start = f"(this << {self._levels})" if self._levels else "this"
        return ".".join((start, *self._path))

    def __reduce__(self) -> tuple[Any, ...]:
        return (This, (self._levels, self._path))


this: Any = This()


def this_levels(expression: This) -> int:
    """How many enclosing injectors ``expression`` goes out."""
    return expression._levels


def this_path(expression: This) -> tuple[str, ...]:
    """The names that ``expression`` follows."""
    return expression._path
