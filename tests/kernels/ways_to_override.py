"""The public methods of a quantizer's parts, and ways to override them, each of which is undone at the end of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: They state what a part means, serve construction, or are torch's own.
_NOT_COMPUTED = ("rule", "statistic_rule")
#: Their effect is a write, and their result None.
_WRITES = ("record", "restart_collection", "init_from_parameters")


def named_parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all below it, those that are held as plain attributes too, each once, by a path of attributes."""
    seen: set[int] = set()
    waiting = [(name, module)]
    while waiting:
        path, part = waiting.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield path, part
        held = {**part._modules, **vars(part)}
        waiting += [
            (f"{path}.{n}" if path else n, m) for n, m in held.items() if isinstance(m, nn.Module)
        ]


def part_at(module: nn.Module, path: str) -> Any:
    """The part at a path of :func:`named_parts`."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def public_methods(part: nn.Module) -> dict[str, type]:
    """Methods and properties that the engine's classes of a part define, and which of them does."""
    found: dict[str, type] = {}
    for cls in type(part).__mro__:
        if not cls.__module__.startswith("qframework.core"):
            continue
        for name, what in vars(cls).items():
            hidden = name.startswith(("_", "register_")) or name in _NOT_COMPUTED
            computed = isinstance(what, property) or (callable(what) and not isinstance(what, type))
            if computed and not hidden:
                found.setdefault(name, cls)
    return found


def changed(result: Any) -> Any:
    """A result, visibly changed."""
    if isinstance(result, Tensor):
        if result.dtype == torch.bool:
            return ~result
        return result * 1.25 + 0.25 if result.is_floating_point() else result + 1
    if isinstance(result, bool):
        return not result
    if isinstance(result, (int, float)):
        return result * 2 + 1
    if isinstance(result, (tuple, list)) and any(isinstance(r, Tensor) for r in result):
        first = next(i for i, r in enumerate(result) if isinstance(r, Tensor))
        return type(result)(changed(r) if i == first else r for i, r in enumerate(result))
    return result


def _replacement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    if name in _WRITES:
        return lambda *args, **kwargs: None
    return lambda *args, **kwargs: changed(original(*args, **kwargs))


def derived_class(cls: type, name: str) -> type:
    """A subclass whose method, or property, calls that of its base and changes the result."""
    is_property = isinstance(getattr(cls, name), property)

    def of_base(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_property:  # compilers can't read one off ``super()``
            return getattr(cls, name).fget(self)
        return getattr(super(derived, self), name)(*args, **kwargs)

    method = _replacement(name, of_base)
    derived = type(f"My{cls.__name__}", (cls,), {name: property(method) if is_property else method})
    return derived


@contextmanager
def subclass(part: Any, name: str) -> Iterator[None]:
    """Of a class of a user's own."""
    kind = type(part)
    part.__class__ = derived_class(kind, name)
    try:
        yield
    finally:
        part.__class__ = kind


@contextmanager
def instance(part: Any, name: str) -> Iterator[None]:
    """By a function that is assigned to the part."""
    object.__setattr__(part, name, _replacement(name, getattr(part, name)))
    try:
        yield
    finally:
        object.__delattr__(part, name)


@contextmanager
def _replaced(cls: type, name: str) -> Iterator[None]:
    original, own = getattr(cls, name), name in vars(cls)
    if isinstance(original, property):
        setattr(cls, name, property(_replacement(name, original.fget)))
    else:
        setattr(cls, name, _replacement(name, original))
    try:
        yield
    finally:
        if own:
            setattr(cls, name, original)
        else:
            delattr(cls, name)


def on_class(part: Any, name: str) -> Any:
    """By a function that is assigned to the class of the part."""
    return _replaced(type(part), name)


def on_base(part: Any, name: str) -> Any:
    """By a function that is assigned to the base of that class that defines the method."""
    return _replaced(public_methods(part)[name], name)


@contextmanager
def hook(part: Any, name: str) -> Iterator[None]:
    """By a hook behind the part's call."""
    handle = part.register_forward_hook(lambda module, args, out: changed(out))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def pre_hook(part: Any, name: str) -> Iterator[None]:
    """By a hook in front of the part's call."""
    handle = part.register_forward_pre_hook(lambda module, args: changed(args) if args else None)
    try:
        yield
    finally:
        handle.remove()


WAYS: dict[str, Callable[[Any, str], Any]] = {
    "subclass": subclass,
    "instance": instance,
    "class": on_class,
    "base": on_base,
    "hook": hook,
    "pre_hook": pre_hook,
}


def ways_for(part: nn.Module, name: str) -> list[str]:
    """The ways by which a method can be overridden."""
    giver = public_methods(part)[name]
    ways = ["subclass", "class"]
    if not isinstance(getattr(type(part), name), property):
        ways.append("instance")
    if giver is not type(part):
        ways.append("base")
    return [*ways, "hook", "pre_hook"] if name == "forward" else ways
