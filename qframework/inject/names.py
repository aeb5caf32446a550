"""Which keywords and names of a quantizer count: what nothing reads is refused, or warned of."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qframework.configuration import settings
from qframework.inject.errors import (
    ImmutableQuantizerError,
    QuantizerError,
    UnknownNameError,
    UnusedKeywordWarning,
    nearest,
)
from qframework.inject.injector import InjectorType
from qframework.inject.policy import (
    KEYWORD_PREFIXES,
    POLICY_NAMES,
    Policy,
    check_policy,
    setting_name,
)

if TYPE_CHECKING:
    from qframework.inject.resolver import Resolver

_INSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def is_ours(module: str | None) -> bool:
    """Whether a module of that name is part of the library."""
    return (module or "").partition(".")[0] == "qframework"


def report_unused(message: str) -> None:
    """Tell of a keyword that is known and has no effect, as ``settings.unused_keywords`` says.

    Raises:
        UnknownNameError: that setting is ``'error'``.
    """
    if settings.unused_keywords == "error":
        raise UnknownNameError(message)
    if settings.unused_keywords == "warn":
        warnings.warn(message, UnusedKeywordWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """How many calls up the first line is that isn't part of the library or of torch."""
    level, frame = 2, sys._getframe(2)
    real = str(Path(__file__).resolve().parents[2])
    inside = (*_INSIDE, f"{real}/layers", f"{real}/quantizers")
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def refuse_setting(owner: object, name: str, value: object, prefixes: Iterable[str]) -> None:
    """Refuse to assign what a quantizer was built with.

    Args:
        owner: the layer or proxy.
        name: of the attribute.
        value: to be assigned.
        prefixes: of the keywords of its quantizers.

    Raises:
        ImmutableQuantizerError: says which keyword does it.
    """
    bare = setting_name(name) or name
    asked = name.removesuffix(bare)
    keyword = next((p for p in (asked, *prefixes) if p), "") + bare
    raise ImmutableQuantizerError(
        f"{type(owner).__name__}.{name} = {value!r}: a quantizer is what it was built with, and this would change nothing; "
        f"build the layer with {keyword}={value!r}, or a subclass of its quantizer"
    )


#: Arguments of every layer whose keywords may go without a prefix.
_OF_ACTIVATION_LAYERS = {"act_quant", "input_quant", "return_quant_tensor"}


def check_overrides(resolver: Resolver, names: Iterable[str], is_on: bool) -> None:
    """Refuse keywords that no quantizer knows; tell of those that this one has no use for.

    Args:
        resolver: that has built everything.
        names: of keywords that nothing has read, as the user gave them.
        is_on: whether the tensor is quantized; where it was switched off, a keyword that is known is left alone.

    Raises:
        UnknownNameError: names the keyword and the nearest real one.
    """
    for name in names:
        shown, given = resolver.prefix + name, resolver.overrides_given[name]
        if name not in POLICY_NAMES and name not in resolver.injector.__bindings__:
            own = {"quant"} if resolver.prefix else _OF_ACTIVATION_LAYERS
            close = nearest(name, own | POLICY_NAMES | resolver.used)
            hint = f" Did you mean {resolver.prefix + close!r}?" if close else ""
            raise UnknownNameError(resolver.located(f"unknown keyword {shown}={given!r}.{hint}"))
        if not is_on:
            continue
        try:
            checked = check_policy(name, given)
        except QuantizerError as error:
            raise type(error)(resolver.located(f"{shown}={given!r}: {error}")) from None
        if not _is_in_effect(resolver, name, checked):
            resolver.cacheable = False  # so that the next layer is told of, too
            report_unused(resolver.located(f"{shown}={given!r} has no effect: {_why(resolver)}"))


def _is_in_effect(resolver: Resolver, name: str, given: Any) -> bool:
    """Whether a keyword asks for what is done anyway."""
    if name == "bit_width":
        built = resolver.read("tensor_quant")
        return given is None or getattr(built, "bits", None) == given
    field = Policy.model_fields.get(name)
    return field is not None and not field.is_required() and bool(field.default == given)


def _why(resolver: Resolver) -> str:
    known = resolver.values()
    kinds = ("quant_type", "scaling_impl_type", "scaling_per_output_type", "bit_width_impl_type")
    chosen = [f"{k} {str(known[k])!r}" for k in kinds if k in known]
    of = f", of {', '.join(chosen)}," if chosen else ""
    return f"{resolver.injector.__name__}{of} reads nothing of that name"


def check_declared(injector: InjectorType, known: set[str] | frozenset[str]) -> None:
    """Refuse names of a user's class that nothing reads and that look like a slip.

    Args:
        injector: the quantizer class.
        known: names that are read.

    Raises:
        UnknownNameError: names the class, the name and the right one.
    """
    for cls in injector.__mro__:
        if is_ours(cls.__module__) and "__let__" not in cls.__dict__:
            continue  # the library's own names are not typing errors
        for name, bound in cls.__dict__.get("__declared__", {}).items():
            if name in known or isinstance(bound, InjectorType):
                continue
            bare = _without_prefix(name)
            if bare is not None:
                raise UnknownNameError(
                    f"class {cls.__name__} binds {name!r}, which nothing reads: the prefix belongs to a layer's keywords; "
                    f"in a quantizer write {bare!r}"
                )
            close = nearest(name, known, cutoff=0.85)
            if close:
                raise UnknownNameError(
                    f"class {cls.__name__} binds {name!r}, which nothing reads. Did you mean {close!r}?"
                )


def _without_prefix(name: str) -> str | None:
    for prefix in KEYWORD_PREFIXES:
        bare = name.removeprefix(prefix)
        if bare != name and bare in POLICY_NAMES:
            return bare
    return None
