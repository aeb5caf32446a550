"""From one call of a proxy in evaluation to the constants of that call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.core.binary import BinaryQuant, ClampedBinaryQuant, TernaryQuant
from qframework.core.float_quant import FloatQuant
from qframework.core.function_wrapper import Rounding
from qframework.core.trunc import TruncIntQuant
from qframework.export.constants import Constants
from qframework.functional import MinifloatFormat, floating, max_int, min_int, upcast
from qframework.proxy import QuantProxy, TruncQuantProxyFromInjector
from qframework.quant_tensor import (
    FloatQuantTensor,
    GroupwiseFloatQuantTensor,
    GroupwiseIntQuantTensor,
    IntQuantTensor,
    QuantTensor,
)


class Unreadable(Exception):
    """What a call computes can't be said by constants: the reason, and the remedy.

    Args:
        reason: what it is.
        remedy: what works.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


def role_of(proxy: QuantProxy) -> str:
    """``"weight"``, ``"bias"``, ``"activation"`` or ``"truncation"``."""
    if isinstance(proxy, TruncQuantProxyFromInjector):
        return "truncation"
    return getattr(proxy, "parameter_name", "activation")


def constants_of(slot: str, proxy: QuantProxy, args: tuple[Any, ...], out: Any) -> Constants:
    """The constants of a call.

    Args:
        slot: its name.
        proxy: that was called.
        args: that it was called with.
        out: what it returned.

    Raises:
        Unreadable: it computes what constants don't say.
    """
    role = role_of(proxy)
    if isinstance(out, (IntQuantTensor, GroupwiseIntQuantTensor)):
        found = _integers(slot, role, proxy, out)
    elif isinstance(out, (FloatQuantTensor, GroupwiseFloatQuantTensor)):
        found = _minifloats(slot, role, proxy, out)
    else:
        kind = type(out).__name__
        raise Unreadable(f"its values are a {kind}, no integers or minifloats", _INTEGERS)
    if role in ("weight", "bias"):
        _read_codes(found, out)
        return found
    found.activation = proxy._activation()
    if role == "truncation":
        _read_truncation(found, proxy, args[0], out)
    else:
        found.rounding = _rounding(proxy)
    _compare(found, args[0], out)
    return found


_INTEGERS = (
    "give an integer quantizer, such as Int8ActPerTensorFloat or Int4WeightPerTensorFloatDecoupled"
)


def _common(slot: str, role: str, out: Any) -> dict[str, Any]:
    value: Tensor = out.value
    grouped = hasattr(out, "group_size") and hasattr(out, "scale_")
    scale = (out.scale_ if grouped else out.scale).detach().cpu().clone()
    zero_point = (out.zero_point_ if grouped else out.zero_point).detach().cpu().clone()
    if scale.numel() == 1 and not grouped:
        scale = scale.reshape(())
    if zero_point.numel() == 1:
        zero_point = zero_point.reshape(())
    common = {
        "name": slot,
        "slot": slot,
        "role": role,
        "scale": scale,
        "zero_point": zero_point,
        "signed": bool(out.signed),
        "shape": tuple(value.shape),
        "dtype": value.dtype,
        "record": out.detach(),
    }
    if grouped:
        common |= {"group_size": out.group_size, "group_dim": out.group_dim % value.dim()}
    return common


def _integers(slot: str, role: str, proxy: QuantProxy, out: Any) -> Constants:
    quantizer: Any = proxy.tensor_quant
    bits = float(out.bit_width)
    narrow = bool(proxy.is_narrow_range)
    form, threshold = "integer", 0.0
    if isinstance(quantizer, (BinaryQuant, ClampedBinaryQuant)):
        form, low, high = "binary", -1.0, 1.0
    elif isinstance(quantizer, TernaryQuant):
        form, low, high, narrow, threshold = "ternary", -1.0, 1.0, True, quantizer.threshold
    else:
        rounds: Any = getattr(quantizer, "int_quant", None)
        if hasattr(rounds, "min_int") and role != "truncation":
            low, high = float(rounds.min_int(out.bit_width)), float(rounds.max_int(out.bit_width))
        else:
            low = float(min_int(bool(out.signed), narrow, out.bit_width.double()))
            high = float(max_int(bool(out.signed), narrow, out.bit_width.double()))
    if bits != int(bits) or low != int(low) or high != int(high):
        raise Unreadable(
            f"its width of {bits:g} bits is no whole number", "learn widths that are rounded"
        )
    return Constants(
        **_common(slot, role, out),
        format=form,
        low=int(low),
        high=int(high),
        bits=int(bits),
        narrow=narrow,
        threshold=threshold,
    )


def _minifloats(slot: str, role: str, proxy: QuantProxy, out: Any) -> Constants:
    quantizer = proxy.tensor_quant
    widths = (out.exponent_bit_width, out.mantissa_bit_width, out.exponent_bias)
    exponent, mantissa, bias = (float(w) for w in widths)
    if any(w != int(w) for w in (exponent, mantissa, bias)):
        raise Unreadable("the widths of its minifloats are no whole numbers", "round them")
    if not isinstance(quantizer, FloatQuant) and role != "weight":
        raise Unreadable(
            f"{type(quantizer).__name__} rounds minifloats in its own way",
            "give one of qframework.quantizers",
        )
    largest = float(quantizer.threshold()) if isinstance(quantizer, FloatQuant) else out.largest()
    overflow = 0.0
    if not out.saturating:
        overflow = float("inf") if out.inf_values else float("nan")
    return Constants(
        **_common(slot, role, out),
        format="minifloat",
        low=0,
        high=0,
        bits=int(exponent + mantissa) + int(out.signed),
        narrow=False,
        minifloat=MinifloatFormat(int(mantissa), int(bias), largest, bool(out.signed), overflow),
        exponent_bits=int(exponent),
        inf_codes=bool(out.inf_values),
        nan_codes=bool(out.nan_values),
    )


def _rounding(proxy: QuantProxy) -> str:
    quantizer: Any = proxy.tensor_quant
    rounds = getattr(getattr(quantizer, "int_quant", quantizer), "float_to_int_impl", None)
    return rounds.mode if isinstance(rounds, Rounding) else "round"


def _read_codes(found: Constants, out: Any) -> None:
    """The integers of a parameter, and that they are its value."""
    if found.format == "minifloat":
        codes = out.minifloat().cpu()
        value = (codes * found.spread(found.scale)).to(found.dtype)
        found.codes = codes.float()
    else:
        codes = out._integers().cpu()
        found.codes = codes.long()
        value = found.dequantized(codes.to(found.scale.dtype)).to(found.dtype)
    if not torch.equal(value, out.value.cpu()):
        raise Unreadable(
            "its values aren't integers (or minifloats) times its scale, to the bit",
            "give a quantizer whose value is (q - zero_point) * scale",
        )
    if found.format != "minifloat" and found.codes.numel():
        low, high = int(found.codes.min()), int(found.codes.max())
        if low < found.low or high > found.high:
            raise Unreadable(
                f"its integers reach from {low} to {high}, beyond {found.bits} bits",
                "give a quantizer that clamps them",
            )


def _read_truncation(found: Constants, proxy: QuantProxy, x: Any, out: Any) -> None:
    quantizer = proxy.tensor_quant
    if not isinstance(quantizer, TruncIntQuant):
        raise Unreadable(
            f"{type(quantizer).__name__} truncates in its own way",
            "give RoundTo8bit or TruncTo8bit",
        )
    rounds = quantizer.float_to_int_impl
    found.rounding = rounds.mode if isinstance(rounds, Rounding) else "round"
    q = (upcast(x.value) / x.scale + x.zero_point).round()
    divisor = quantizer.trunc_scaling_impl(
        q, x.bit_width, quantizer.msb_clamp_bit_width_impl(), x.signed
    )
    numbers = (t.detach().cpu().clone() for t in (divisor, x.scale, x.zero_point))
    found.truncates = (*numbers, int(x.bit_width))  # type: ignore[assignment]


def _compare(found: Constants, x: Any, out: Any) -> None:
    """Refuse a call whose result isn't that of its constants."""
    value = x.value if isinstance(x, QuantTensor) else floating(x)
    seen = value if found.activation is None else found.activation(value)
    if not _alike(found.compute(seen.cpu()), out.value.cpu()):
        raise Unreadable(
            "it computes something else than clamp(round(x / scale + zero_point)) by its constants",
            "give a quantizer of qframework.quantizers, or remove the hook on it",
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
