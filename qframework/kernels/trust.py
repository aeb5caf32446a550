"""Whether what a part states of itself is what it computes, and stays so.

A class that gives a rule vouches for its own code and that of its bases. The rule counts for no part whose class overrides some of
it without a rule of its own, of which a method was assigned, or whose calls hooks look at.
"""

from __future__ import annotations

from collections.abc import Sized
from operator import getitem
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from qframework.core.base import CompactModule, CoreModule, Stateless
from qframework.core.tracked import TrackedParameters

#: What may be overridden without a change of what is computed.
_HARMLESS = frozenset(
    [
        "__init__",
        "__init_subclass__",
        "__repr__",
        "extra_repr",
        "_get_name",
        "__doc__",
        "__module__",
        "__qualname__",
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__dict__",
        "__weakref__",
        "__getstate__",
        "__setstate__",
        "__reduce__",
        "__reduce_ex__",
        "__deepcopy__",
        "__copy__",
        "__hash__",
        "__eq__",
        "__static_attributes__",
        "__firstlineno__",
        "__parameters__",
        "__orig_bases__",
        "__abstractmethods__",
        "_abc_impl",
        "__slotnames__",
        "_version",
        "_save_to_state_dict",
        "_load_from_state_dict",
        "state_dict",
        "load_state_dict",
        "get_extra_state",
        "set_extra_state",
    ]
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: The hooks on all modules of the process.
_GLOBAL_HOOKS: tuple[Sized, ...] = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)
#: The classes of torch, of which only the way from a call to ``forward`` is looked at.
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")
_TORCH = tuple((vars(nn.Module), name, vars(nn.Module)[name]) for name in _CALLS)
#: Attributes that every module has, and what they hold is looked at where it matters.
_COMMON = frozenset([*vars(nn.Module()), "_constants"])


def _is_code(what: Any) -> bool:
    return callable(what) or hasattr(type(what), "__get__")


_defined: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


def _definition(cls: type) -> dict[str, Any]:
    """What a class defined when it was first seen."""
    found = _defined.get(cls)
    if found is None:
        found = {n: what for n, what in vars(cls).items() if n not in _HARMLESS}
        _defined[cls] = found
    return found


def record_definitions(cls: type = CompactModule) -> None:
    """See a class and those derived from it as they are now: what is written to them later replaces something."""
    _definition(cls)
    derived: type
    for derived in cls.__subclasses__():
        record_definitions(derived)


def _own_classes(kind: type) -> list[type]:
    """The classes of a part, but for those that say nothing of what it computes."""
    return [c for c in kind.__mro__ if c not in _BASES]


_BASES = (nn.Module, object, CompactModule, CoreModule, Stateless)


def distrust(part: nn.Module, method: str = "rule") -> str | None:
    """Why what a part states isn't what it computes; None where it is.

    Args:
        part: of a quantizer.
        method: that states it.
    """
    kind = type(part)
    order = kind.__mro__
    giver = next((c for c in order if method in vars(c)), None)
    if giver is None:
        return f"no faster form is known of {kind.__name__}"
    trusted = giver.__mro__
    for i, cls in enumerate(order):
        if cls in trusted:
            continue
        for name, what in vars(cls).items():
            if name not in _HARMLESS and _is_code(what):
                if any(name in vars(base) for base in order[i + 1 :]):
                    return f"{cls.__name__} overrides {name}"
    for cls in _own_classes(kind):
        now = vars(cls)
        for name, what in _definition(cls).items():
            if now.get(name) is not what:
                return f"{cls.__name__}.{name} was replaced"
    for name in vars(part):
        if name not in _COMMON and _is_code(getattr(kind, name, None)):
            return f"{name} of the {kind.__name__} was replaced"
    if any(getattr(part, name) for name in _HOOKS):
        return f"the {kind.__name__} has a hook"
    return None


def distrust_all() -> str | None:
    """Why no part computes what it states; None where they do."""
    if any(map(len, _GLOBAL_HOOKS)):
        return "there are hooks on all modules"
    for namespace, name, what in _TORCH:
        if namespace[name] is not what:
            return f"torch.nn.Module.{name} was replaced"
    return None


# As torch.compiler.assume_constant_result does, which imports the compiler.
distrust._dynamo_marked_constant = True  # type: ignore[attr-defined]
distrust_all._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Guards:
    """What parts were like when their rules were read.

    Attributes, classes and their functions, and lengths of containers, are compared in few calls, since each call of Python
    costs more than what it asks for.
    """

    def __init__(self) -> None:
        self.parts: list[nn.Module] = []
        self.types: list[type] = []
        self.containers: list[Sized] = list(_GLOBAL_HOOKS)
        self.namespaces: list[Any] = []
        self.names: list[str] = []
        self.values: tuple[Any, ...] = ()
        self.lengths: tuple[int, ...] = ()
        self._seen: set[Any] = set()
        self._expected: list[Any] = []
        for entry in _TORCH:
            self._expect(*entry)

    def _expect(self, namespace: Any, name: str, value: Any) -> None:
        self.namespaces.append(namespace)
        self.names.append(name)
        self._expected.append(value)

    def watch(self, part: nn.Module) -> None:
        """Remember what a part is like."""
        if id(part) in self._seen:
            return
        self._seen.add(id(part))
        self.parts.append(part)
        self.types.append(type(part))
        own = vars(part)
        self.containers += [own, part._modules]
        for name, value in part._modules.items():
            self._expect(part._modules, name, value)
        for name, value in own.items():
            if name in _HOOKS:
                self.containers.append(value)
            elif name not in _COMMON and not isinstance(value, Tensor):
                self._expect(own, name, value)
                if isinstance(value, TrackedParameters):
                    self.containers.append(value.modules)
        for cls in _own_classes(type(part)):
            if cls not in self._seen:
                self._seen.add(cls)
                now = vars(cls)
                self.containers.append(now)  # type: ignore[arg-type]
                for name, value in _definition(cls).items():
                    self._expect(now, name, now.get(name, value))

    def close(self) -> None:
        """All parts are seen."""
        self.lengths = tuple(map(len, self.containers))
        self.values = tuple(self._expected)

    def hold(self) -> bool:
        """Whether nothing has changed."""
        try:
            return (
                tuple(map(len, self.containers)) == self.lengths
                and tuple(map(getitem, self.namespaces, self.names)) == self.values
                and list(map(type, self.parts)) == self.types
            )
        except KeyError:  # something was removed
            return False


record_definitions()
