"""Quantizer classes as data: what is ours by its name, what a user has derived from it by the names that he bound."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from enum import Enum
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from qframework.export.errors import CheckpointError
from qframework.inject import enum as enums
from qframework.inject.expressions import This, this_levels, this_path
from qframework.inject.injector import InjectorType
from qframework.inject.names import is_ours

#: From the name of a quantizer to the class; None where there is none.
Find = Callable[[str], InjectorType | None]

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
}
#: Modules whose classes may stand in a recipe.
_CLASSES = ("qframework.core.", "qframework.proxy.", "torch.nn.modules.activation")
#: Whole numbers beyond it, but for a seed, are no setting of a quantizer.
_LARGEST = 1 << 20
_DEEPEST = 32


class NotData(Exception):
    """Something that can't be written as data, such as a function."""


def encode_quantizer(cls: InjectorType) -> dict[str, Any]:
    """A quantizer class as data.

    Returns:
        ``{"of": name}`` for one of ours; ``{"name", "bases", "binds"}`` for one that was derived; ``{"own": name}`` for one
        that binds what isn't data, which whoever loads it has to give.
    """
    if is_ours(cls.__module__) and "__let__" not in cls.__dict__:
        if getattr(sys.modules.get("qframework.quantizers"), cls.__name__, None) is cls:
            return {"of": cls.__name__}
        return {"own": cls.__name__}
    try:
        binds = {n: encode(v) for n, v in cls.__dict__["__declared__"].items()}
    except NotData:
        return {"own": cls.__name__}
    bases = [encode_quantizer(b) for b in cls.__bases__ if isinstance(b, InjectorType)]
    bases = [b for b in bases if b != {"own": "Injector"}]
    if any("own" in b for b in bases):
        return {"own": cls.__name__}
    return {"name": cls.__name__, "bases": bases, "binds": binds}


def decode_quantizer(data: Any, find: Find, depth: int = 0) -> InjectorType:
    """The class that :func:`encode_quantizer` has written.

    Args:
        data: from a file.
        find: gives classes by their names.
        depth: of classes that this one is part of.

    Raises:
        CheckpointError: it is none.
    """
    if depth > _DEEPEST or not isinstance(data, dict):
        raise CheckpointError(f"no quantizer: {_short(data)}")
    if data.keys() in ({"of"}, {"own"}):
        ((kind, name),) = data.items()
        found = find(name) if isinstance(name, str) else None
        if found is None:
            hint = (
                f". It is a class of a program: load_quantized(..., own=[{name}])"
                if kind == "own" and isinstance(name, str)
                else ""
            )
            raise CheckpointError(f"there is no quantizer {_short(name)}{hint}")
        return found
    if data.keys() != {"name", "bases", "binds"}:
        raise CheckpointError(f"no quantizer: {_short(data)}")
    name, bases, binds = data["name"], data["bases"], data["binds"]
    if not (isinstance(name, str) and name.isidentifier() and isinstance(bases, list)):
        raise CheckpointError(f"no quantizer: {_short(data)}")
    parents = tuple(decode_quantizer(b, find, depth + 1) for b in bases)
    if not parents:
        raise CheckpointError(f"the quantizer {name} is derived from nothing")
    names = decode_names(binds, find, depth + 1)
    try:
        return InjectorType(name, parents, {**names, "__module__": "qframework_checkpoint"})
    except TypeError as error:
        raise CheckpointError(f"no quantizer {name}: {error}") from None


def encode(value: Any) -> Any:
    """What a name is bound to, as data.

    Raises:
        NotData: a function, or a class that isn't ours.
    """
    if isinstance(value, enums.PolicyEnum):
        return {"enum": type(value).__name__, "value": value.value}
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if isfinite(value) else {"number": repr(value)}
    if type(value) in (tuple, list):
        return {type(value).__name__: [encode(v) for v in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES or value.numel() > _LARGEST:
            raise NotData(f"a tensor of {dtype}")
        flat = [encode(v) for v in value.detach().reshape(-1).tolist()]
        return {"tensor": flat, "shape": list(value.shape), "dtype": dtype}
    if isinstance(value, This):
        return {"this": [this_levels(value), *this_path(value)]}
    if isinstance(value, InjectorType):
        found = encode_quantizer(value)
        if "own" in found:
            raise NotData(value.__name__)
        return {"quantizer": found}
    if isinstance(value, type):
        module, name = value.__module__, value.__qualname__
        if _class_of(module, name) is value:
            return {"class": f"{module}:{name}"}
    raise NotData(f"{value!r} of type {type(value).__name__}")


def decode(data: Any, find: Find, depth: int = 0) -> Any:
    """What :func:`encode` has written.

    Raises:
        CheckpointError: it is none.
    """
    if depth > _DEEPEST:
        raise CheckpointError("values within values without end")
    if type(data) is int and not -_LARGEST <= data <= _LARGEST:
        raise CheckpointError(f"{data} is out of range for a setting, up to {_LARGEST}")
    if data is None or type(data) in (bool, str, int, float):
        return data
    if not isinstance(data, dict):
        raise CheckpointError(f"no value: {_short(data)}")
    try:
        return _decoded(data, find, depth)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"no value: {_short(data)} ({error})") from None


def _decoded(data: dict[str, Any], find: Find, depth: int) -> Any:
    kinds = set(data)
    if kinds == {"enum", "value"}:
        kind = getattr(enums, data["enum"])
        if not (isinstance(kind, type) and issubclass(kind, enums.PolicyEnum)):
            raise CheckpointError(f"no enum: {_short(data)}")
        member: Enum = kind(data["value"])
        return member
    if kinds == {"number"} and data["number"] in ("inf", "-inf", "nan"):
        return float(data["number"])
    if kinds in ({"tuple"}, {"list"}):
        ((kind_name, items),) = data.items()
        values = [decode(v, find, depth + 1) for v in _items(items)]
        return tuple(values) if kind_name == "tuple" else values
    if kinds == {"dtype"}:
        return _DTYPES[data["dtype"]]
    if kinds == {"tensor", "shape", "dtype"}:
        numbers = [decode(v, find, depth + 1) for v in _items(data["tensor"])]
        made = torch.tensor(numbers, dtype=_DTYPES[data["dtype"]], device="cpu")
        return made.reshape([int(n) for n in _items(data["shape"])])
    if kinds == {"this"}:
        levels, *path = _items(data["this"])
        if (
            type(levels) is not int
            or not 0 <= levels <= _DEEPEST
            or not all(isinstance(p, str) for p in path)
        ):
            raise CheckpointError(f"no path: {_short(data)}")
        return This(levels, tuple(path))
    if kinds == {"quantizer"}:
        return decode_quantizer(data["quantizer"], find, depth + 1)
    if kinds == {"class"}:
        module, _, name = data["class"].partition(":")
        found = _class_of(module, name)
        if found is not None:
            return found
    raise CheckpointError(f"no value: {_short(data)}")


def _items(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise CheckpointError(f"no list: {_short(data)}")
    return data


def _class_of(module: str, name: str) -> type[nn.Module] | None:
    """A module class of one of the places that recipes may name, as far as it was imported."""
    if not module.startswith(_CLASSES) or "." in name or name.startswith("_"):
        return None
    found = vars(sys.modules.get(module, object)).get(name)
    right = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == module
    return found if right else None


def encode_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """Names and what they are bound to, as data; raises as :func:`encode`."""
    return {name: encode(value) for name, value in names.items()}


def decode_names(data: Any, find: Find, depth: int = 0) -> dict[str, Any]:
    """What :func:`encode_names` has written; raises as :func:`decode`."""
    if not isinstance(data, dict):
        raise CheckpointError(f"no names: {_short(data)}")
    for name in data:
        if not name.isidentifier() or name.startswith("__"):
            raise CheckpointError(f"no name of a quantizer: {_short(name)}")
    return {name: decode(value, find, depth) for name, value in data.items()}


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) < 100 else text[:97] + "..."
