"""All predefined quantizers, by what they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qframework import quantizers
from qframework.core.codebook import CodebookQuant
from qframework.core.zero_point import ZeroZeroPoint
from qframework.inject import UnknownNameError
from qframework.inject.errors import did_you_mean
from qframework.inject.expressions import This, Value, arguments_of
from qframework.inject.resolver import Resolver
from qframework.quantizers import QuantSolver

#: What a quantizer is for, by a part of its proxy's name.
ROLES = {"Weight": "weight", "Bias": "bias", "Act": "activation", "Trunc": "accumulator"}


@dataclass(frozen=True)
class Entry:
    """A predefined quantizer as it is without a keyword.

    Attributes:
        name: of the class.
        role: ``weight``, ``bias``, ``activation`` or ``accumulator``.
        format: in short, ``int8 narrow``, ``fp8 e4m3``, ``codebook of 16``, ``float``.
        bits: of an element; None where they have to be given, and for floats.
        granularity: what shares a scale: ``tensor``, ``channel``, ``row``, ``group of 32``; empty for floats.
        scale: where it comes from, and its domain if that isn't the floats.
        zero_point: the part that computes it; empty where it is 0.
        about: what the class says of itself.
    """

    name: str
    role: str
    format: str
    bits: int | None
    granularity: str
    scale: str
    zero_point: str
    about: str


def catalogue() -> list[Entry]:
    """All of them, in the order of the package."""
    found = []
    for name in vars(quantizers)["__all__"]:
        cls = getattr(quantizers, name)
        if isinstance(cls, type) and issubclass(cls, QuantSolver) and not name.endswith("Solver"):
            found.append(_entry(name, cls))
    return found


def choose(
    entries: Iterable[Entry],
    role: str | None = None,
    bits: int | None = None,
    per: str | None = None,
    scale: str | None = None,
    text: str | None = None,
) -> list[Entry]:
    """Those that fit everything that is given.

    Args:
        entries: of the catalogue.
        role: ``weight``, ``bias``, ``activation`` or ``accumulator``; the first letters will do.
        bits: of an element.
        per: ``tensor``, ``channel``, ``row`` or ``group``.
        scale: a word of where the scale comes from: ``stats``, ``parameter``, ``const``, ``MSE``, ``power_of_two``.
        text: anything in name, format or description.

    Raises:
        ValueError: a role or granularity that there isn't.
    """
    if role is not None:
        role = _one_of("role", role, tuple(ROLES.values()))
    if per is not None:
        per = _one_of("granularity", per, ("tensor", "channel", "row", "group"))
    return [
        e
        for e in entries
        if (role is None or e.role == role)
        and (bits is None or e.bits == bits)
        and (per is None or e.granularity.split(" ")[0] == per)
        and (scale is None or scale.lower() in e.scale.lower())
        and (text is None or text.lower() in f"{e.name} {e.format} {e.about}".lower())
    ]


def _one_of(what: str, given: str, allowed: tuple[str, ...]) -> str:
    for name in allowed:
        if name.startswith(given.lower()) and given:
            return name
    raise ValueError(f"no {what} {given!r}; allowed: {', '.join(allowed)}")


def find(name: str) -> Any:
    """A predefined quantizer by its name.

    Raises:
        UnknownNameError: there is none; the message has the nearest name.
    """
    names = [e.name for e in catalogue()]
    if name not in names:
        raise UnknownNameError(
            f"no predefined quantizer is called {name!r}{did_you_mean(name, names)}"
        )
    return getattr(quantizers, name)


def _entry(name: str, cls: Any) -> Entry:
    names = Resolver(cls)
    proxy = names.read("proxy_class").__name__
    role = next(r for part, r in ROLES.items() if part in proxy)
    kind = names.read("quant_type").value
    about = " ".join((cls.__doc__ or "").split())
    if kind == "fp":
        return Entry(name, role, "float", None, "", "", "", about)
    bits = names.read("bit_width", "?")
    if _is_codebook(names):
        levels = names.read("codebook", None)
        bits = max(1, (len(levels) - 1).bit_length()) if levels else "?"
    built, zero = _bound(names, "tensor_quant"), _bound(names, "zero_point_impl")
    by_itself = isinstance(built, type) and not {"zero_point_impl", "scaling_impl"} & _needs(built)
    zero_point = "" if zero is None or zero is ZeroZeroPoint else zero.__name__
    return Entry(
        name=name,
        role=role,
        format=_format(names, role, kind, bits),
        bits=1 if kind == "binary" else int(bits) if bits != "?" else None,
        granularity=_granularity(names),
        scale=_scale(names, role),
        zero_point=built.__name__ if by_itself else zero_point,
        about=about,
    )


def _bound(names: Resolver, name: str) -> Any:
    """What a name is bound to, not built; None where nothing binds it."""
    found = names.find(name)
    return None if found is None else found[0]


def _granularity(names: Resolver) -> str:
    if names.read("scaling_per_row", False):
        return "row"
    granularity = str(names.read("scaling_per_output_type").value)
    return f"group of {names.read('group_size', '?')}" if granularity == "group" else granularity


def _is_codebook(names: Resolver) -> bool:
    return _bound(names, "tensor_quant") is CodebookQuant


def _format(names: Resolver, role: str, kind: str, bits: object) -> str:
    signed = role == "accumulator" or names.read("signed", True)
    if names.find("float_clamp_impl") is not None:
        exponent = names.read("exponent_bit_width", None)
        widths = f" e{exponent}m{names.read('mantissa_bit_width', None)}" if exponent else ""
        return f"{'' if signed else 'u'}fp{bits}{widths}"
    if _is_codebook(names):
        levels = names.read("codebook", None)
        return f"codebook of {len(levels) if levels else '?'}"
    if kind != "int":
        return kind
    if role == "accumulator":
        return f"int{bits}, sign of the input"
    narrow = " narrow" if names.read("narrow_range", False) else ""
    return f"{'' if signed else 'u'}int{bits}{narrow}"


def _needs(cls: type) -> set[str]:
    return {argument.name for argument in arguments_of(cls) or ()}


def _scale(names: Resolver, role: str) -> str:
    if role == "bias" and names.read("requires_input_scale"):
        return "input times weight"
    if role == "accumulator" and names.read("trunc_scaling_impl_type") == "msb":
        return "2^bits removed"
    tensor_quant = _bound(names, "tensor_quant")
    if isinstance(tensor_quant, type) and "scaling_impl" not in _needs(tensor_quant):
        return tensor_quant.__name__
    parts = [names.read("scaling_impl_type").value]
    statistic = _bound(names, "scaling_stats_impl")
    if parts[0] not in ("const", "parameter", "he"):
        if isinstance(statistic, This):
            parts.append("MSE")
        elif isinstance(statistic, Value):
            parts.append(names.read("scaling_stats_op").value)
        else:
            parts.append(statistic.__name__)
    domain = names.read("restrict_scaling_type").value
    return " ".join(parts + ([] if domain == "fp" else [domain]))
