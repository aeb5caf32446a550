"""Whether what a part states of itself is what it computes, and stays so.

A class that gives a rule vouches for its own code and that of its bases. The rule counts for no part whose class overrides some of
it without a rule of its own, of which a method was assigned, or whose calls hooks look at.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sized
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from qframework.core.base import CompactModule, CoreModule, Stateless
from qframework.core.following import FollowsParameters

_is_compiling = torch.compiler.is_compiling

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
        "why_refused",
        "saved",
        "get_extra_state",
        "set_extra_state",
    ]
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: The hooks on all modules of the process.
GLOBAL_HOOKS: tuple[Sized, ...] = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)
#: The classes of torch, of which only the way from a call to ``forward`` is looked at.
_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__")
TORCH_CALLS = tuple((vars(nn.Module), name, vars(nn.Module)[name]) for name in _CALLS)
#: The bases of parts that say nothing of what these compute, as long as they don't define what goes before it.
BASES: tuple[type, ...] = (nn.Module, object, CompactModule, CoreModule, Stateless)
_ABSENT = tuple(
    (base, name)
    for base in BASES
    for name in (*_CALLS, "__getattribute__")
    if name not in vars(base)
)
#: Attributes that every module has, and what they hold is looked at where it matters.
COMMON = frozenset([*vars(nn.Module()), "_constants"])


def is_code(what: Any) -> bool:
    """Whether what a class holds is a function, a property, or another descriptor."""
    return callable(what) or hasattr(type(what), "__get__")


_defined: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()


def definition_of(cls: type) -> dict[str, Any]:
    """What a class defined when it was first seen."""
    found = _defined.get(cls)
    if found is None:
        found = {n: what for n, what in vars(cls).items() if n not in _HARMLESS}
        _defined[cls] = found
    return found


def record_definitions(cls: type[nn.Module] = CompactModule) -> None:
    """See a class and those derived from it as they are now: what is written to them later replaces something."""
    definition_of(cls)
    derived: type
    for derived in cls.__subclasses__():
        record_definitions(derived)


def own_classes(kind: type) -> list[type]:
    """The classes of a part, but for those that say nothing of what it computes."""
    return [c for c in kind.__mro__ if c not in BASES]


def giver_of(kind: type, name: str) -> Any:
    """The class that defines what a class has under a name; None where there is none."""
    return next((c for c in kind.__mro__ if name in vars(c)), None)


def are_ours(kind: type, *methods: str) -> bool:
    """Whether methods of a class of parts are the package's, rather than of one that vouches for its own rule."""
    return all(giver_of(kind, name).__module__.startswith("qframework.") for name in methods)


def distrust(part: nn.Module, method: str = "rule") -> str | None:
    """Why what a part states isn't what it computes; None where it is.

    Args:
        part: of a quantizer.
        method: that states it.
    """
    if (
        _is_compiling()
    ):  # which takes only numbers and classes as constants, and watches whose id it was asked for
        return _distrust_at(id(part), method)
    return _distrust(part, method)


def _distrust_at(address: int, method: str) -> str | None:
    part: nn.Module = ctypes.cast(address, ctypes.py_object).value  # the tracing compiler holds it
    return _distrust(part, method)


def _distrust(part: nn.Module, method: str) -> str | None:
    kind = type(part)
    order = kind.__mro__
    giver = giver_of(kind, method)
    if giver is None:
        return f"no faster form is known of {kind.__name__}"
    trusted = giver.__mro__
    for i, cls in enumerate(order):
        if cls not in trusted:
            reason = _overrides(part, cls, order[i + 1 :])
            if reason is not None:
                return reason
    for cls in own_classes(kind):
        now, then = vars(cls), definition_of(cls)
        for name, what in then.items():
            if now.get(name) is not what:
                return f"{cls.__name__}.{name} was replaced"
        for name in now.keys() - then.keys() - _HARMLESS:  # such as a method that was inherited
            return f"{cls.__name__}.{name} was added"
    own = vars(part)
    for name in own:
        if name not in COMMON and is_code(getattr(kind, name, None)):
            return f"{name} of the {kind.__name__} was replaced"
    if own.get("_compiled_call_impl") is not None:
        return f"the {kind.__name__} was compiled by itself"
    if any(getattr(part, name) for name in HOOKS):
        return f"the {kind.__name__} has a hook"
    return None


def _overrides(part: nn.Module, cls: type, bases: tuple[type, ...]) -> str | None:
    """Which code of its bases a class overrides that doesn't vouch for what it computes."""
    parametrized: Any = part._modules.get("parametrizations") or ()
    for name, what in vars(cls).items():
        if name in _HARMLESS:
            continue
        below = [vars(base)[name] for base in bases if name in vars(base)]
        # Data may take the place of a property.
        if (below and is_code(what)) or any(map(is_code, below)):
            return f"{cls.__name__} overrides {name}"
        # A property goes before what a base's constructor assigned, and may give something else at each call. Tensors, as
        # parametrizations compute them, are no part of rules.
        if hasattr(type(what), "__set__") and name not in parametrized:
            return f"{cls.__name__} computes {name}"
    return None


def distrust_all() -> str | None:
    """Why no part computes what it states; None where they do."""
    if any(map(len, GLOBAL_HOOKS)):
        return "there are hooks on all modules"
    for namespace, name, what in TORCH_CALLS:
        if namespace[name] is not what:
            return f"torch.nn.Module.{name} was replaced"
    for base, name in _ABSENT:
        if name in vars(base):
            return f"{base.__name__}.{name} was added"
    return None


_PLAIN = (Tensor, nn.Parameter)
_function_modes, _dispatch_modes = (
    torch._C._len_torch_function_stack,
    torch._C._len_torch_dispatch_stack,
)


def is_plain(*tensors: Any) -> bool:
    """Whether torch's functions do with tensors what they are known for: a subclass may have its own."""
    for t in tensors:  # noqa: SIM110 a generator takes longer
        if type(t) not in _PLAIN:
            return False
    return True


def modes_active() -> bool:
    """Whether a mode sees, and may change, each of torch's functions or operators; outside of compilers."""
    return _dispatch_modes() > 0 or (_function_modes() > 0 and _changes_functions())


def _changes_functions() -> bool:
    # The mode of torch.set_default_device only fills in a device.
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def function_names(kind: type) -> tuple[str, ...]:
    """The methods of a part."""
    return tuple(
        {
            n: None
            for c in own_classes(kind)
            for n, what in vars(c).items()
            if isinstance(what, FunctionType) and not n.startswith("__")
        }
    )


# As torch.compiler.assume_constant_result does, which imports the compiler.
_distrust_at._dynamo_marked_constant = True  # type: ignore[attr-defined]
distrust_all._dynamo_marked_constant = True  # type: ignore[attr-defined]
function_names._dynamo_marked_constant = True  # type: ignore[attr-defined]
are_ours._dynamo_marked_constant = True  # type: ignore[attr-defined]


record_definitions()
record_definitions(FollowsParameters)  # a mixin of parts
