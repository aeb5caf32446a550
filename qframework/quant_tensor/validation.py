"""Checks of what a user makes a quantized tensor of."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor

from qframework.quant_tensor.source import can_read


def check_names(changes: Iterable[str], names: tuple[str, ...]) -> None:
    """Refuse unknown field names.

    Raises:
        TypeError: names the nearest field.
    """
    for name in changes:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"no field {name!r}; the fields are {', '.join(names)}.{hint}")


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and can_read(value):
        value = value.item()
    if not isinstance(value, Tensor) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def as_tensor(name: str, x: object, like: Tensor) -> Tensor:
    """A field as a floating-point tensor on the device of the value ``like``; without axes when it is one number.

    Raises:
        TypeError: neither a number nor a tensor.
    """
    if isinstance(x, Tensor):
        t = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        return t.reshape(()) if t.numel() == 1 and t.dim() > like.dim() else t
    if isinstance(x, numbers.Real) and not isinstance(x, bool):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.tensor(float(x), dtype=dtype, device=like.device)
    raise TypeError(f"{name} must be a number or a tensor, got {x!r} of type {type(x).__name__}")


def check_fields(
    value: object,
    scale: object,
    zero_point: object,
    bit_width: object,
    signed: object,
    training: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, bool]:
    """The fields as tensors and bools.

    Raises:
        TypeError: of a type that can't be.
        ValueError: out of range, or of a shape that doesn't broadcast.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = (
            f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}"
        )
        raise TypeError(
            f"value must be a floating-point tensor, the dequantized (q - zero_point) * scale; got {got}"
        )
    scale, zero_point, bit_width = (
        as_tensor(n, x, value)
        for n, x in (("scale", scale), ("zero_point", zero_point), ("bit_width", bit_width))
    )
    for name, t in (("scale", scale), ("zero_point", zero_point), ("bit_width", bit_width)):
        try:
            broadcasts = (
                torch.broadcast_shapes(t.shape, value.shape) == value.shape or t.numel() == 1
            )
        except RuntimeError:
            broadcasts = False
        if not broadcasts:
            raise ValueError(
                f"{name} of shape {tuple(t.shape)} doesn't broadcast to value's {tuple(value.shape)}"
            )
    if can_read(scale, zero_point, bit_width):
        with torch.no_grad():
            if not bool(((scale > 0) & torch.isfinite(scale)).all()):
                raise ValueError(f"scale must be positive and finite, got {scale.detach()}")
            if not bool(torch.isfinite(zero_point).all()):
                raise ValueError(f"zero_point must be finite, got {zero_point.detach()}")
            if not bool(((bit_width >= 1) & torch.isfinite(bit_width)).all()):
                raise ValueError(f"bit_width must be at least 1 bit, got {bit_width.detach()}")
    return value, scale, zero_point, bit_width, _flag("signed", signed), _flag("training", training)
