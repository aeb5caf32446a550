"""What a declarative quantizer class is."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from qframework.inject.container import own_form
from qframework.inject.enum import ScalingPerOutputType
from qframework.inject.errors import ImmutableQuantizerError, PolicyTypeError
from qframework.inject.expressions import Value


class Binding(NamedTuple):
    """What a name is bound to, and where."""

    bound: Any
    origin: str


_ORDINARY = frozenset({"mro", "let", "explain"})


def _is_declaration(name: str) -> bool:
    return not (name.startswith("__") and name.endswith("__"))


#: Newer names, each with the older one that decides on it where a user binds that.
LEGACY_NAMES = {"scaling_per_output_type": "scaling_per_output_channel"}


def _granularity(scaling_per_output_channel: bool) -> ScalingPerOutputType:
    return (
        ScalingPerOutputType.CHANNEL if scaling_per_output_channel else ScalingPerOutputType.TENSOR
    )


def with_legacy_names(bindings: dict[str, Any]) -> dict[str, Any]:
    """``scaling_per_output_channel`` decides on ``scaling_per_output_type`` where it is bound by a user."""
    if "scaling_per_output_channel" in bindings:
        chosen = bindings["scaling_per_output_channel"]
        if isinstance(chosen, bool):
            return {**bindings, "scaling_per_output_type": _granularity(chosen)}
        if not isinstance(chosen, Value) or "scaling_per_output_type" not in bindings:
            return {**bindings, "scaling_per_output_type": Value(_granularity)}
    return bindings


class InjectorType(type):
    """The class of quantizer classes.

    It keeps the names of a class body aside, so that reading ``MyQuant.bit_width`` gives the resolved value
    rather than what stands in the body, and merges those of the bases by Python's method resolution order.
    Nothing is ever changed after a class is made.
    """

    __bindings__: dict[str, Binding]

    def __new__(
        mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> InjectorType:
        """Make a quantizer class: keep its names aside, merge those of its bases."""
        if "__module__" not in namespace:  # a call of ``type``
            caller = sys._getframe(1).f_globals.get("__name__", "__main__")
            namespace = {**namespace, "__module__": caller}
        declared = {k: own_form(v) for k, v in namespace.items() if _is_declaration(k)}
        ordinary = {k: v for k, v in namespace.items() if k not in declared}
        if not any(
            isinstance(b, InjectorType) for b in bases
        ):  # the root: its methods are ordinary
            ordinary, declared = dict(namespace), {}
        for wrong in _ORDINARY & declared.keys():
            raise PolicyTypeError(
                f"{name}.{wrong}: this name is a method of every quantizer; choose another one"
            )
        ordinary["__declared__"] = with_legacy_names(declared)
        cls = super().__new__(mcls, name, bases, ordinary, **kwargs)
        merged: dict[str, Binding] = {}
        for base in reversed(cls.__mro__):
            for k, v in base.__dict__.get("__declared__", {}).items():
                merged[k] = Binding(v, f"class {base.__name__}")
        type.__setattr__(cls, "__bindings__", merged)
        return cls

    def __getattr__(cls, name: str) -> Any:
        if not _is_declaration(name) or name.startswith("_"):
            raise AttributeError(name)
        from qframework.inject.resolver import Resolver

        return Resolver(cls).read(name)

    def __setattr__(cls, name: str, value: Any) -> None:
        raise ImmutableQuantizerError(
            f"{cls.__name__}.{name} = ...: quantizer classes don't change; "
            f"make a subclass, or {cls.__name__}.let({name}=...)"
        )

    def __delattr__(cls, name: str) -> None:
        raise ImmutableQuantizerError(f"del {cls.__name__}.{name}: quantizer classes don't change")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: quantizer classes have no instances."""
        raise PolicyTypeError(
            f"{cls.__name__}(...): a quantizer class has no instances; give the class itself to a layer, "
            f"or read what it builds: {cls.__name__}.tensor_quant"
        )

    def __contains__(cls, name: object) -> bool:
        return name in cls.__bindings__

    def __iter__(cls) -> Iterator[str]:
        return iter(cls.__bindings__)

    def __dir__(cls) -> list[str]:
        return sorted({*super().__dir__(), *cls.__bindings__})

    def __repr__(cls) -> str:
        return f"<quantizer {cls.__name__}>"


class Injector(metaclass=InjectorType):
    """Base of all quantizers: a class whose body binds names.

    A name is bound to a plain value, to a class (built with its constructor's arguments resolved by name), to a
    ``@value`` function of other names, to ``this.name``, or to a nested injector. Reading a name off the class
    resolves it. Names ending in ``_class`` stay classes.
    """

    @classmethod
    def let(cls, **overrides: Any) -> InjectorType:
        """A subclass with names bound anew; the class itself stays as it is.

        Args:
            **overrides: names and what to bind them to.
        """
        derived = InjectorType(cls.__name__, (cls,), {**overrides, "__module__": cls.__module__})
        type.__setattr__(derived, "__let__", (cls, overrides))
        return derived

    @classmethod
    def explain(cls) -> Any:
        """Every name, its resolved value and where it comes from, as a printable table."""
        from qframework.inject.explanation import explain_class

        return explain_class(cls)


ExtendedInjector = Injector
BaseInjector = Injector


def _rebuild(base: InjectorType, overrides: dict[str, Any]) -> InjectorType:
    return base.let(**overrides)  # type: ignore[attr-defined, no-any-return]


def _reduce(cls: InjectorType) -> Any:
    if "__let__" in cls.__dict__:
        return _rebuild, cls.__dict__["__let__"]
    return cls.__qualname__


copyreg.pickle(InjectorType, _reduce)  # type: ignore[arg-type]
