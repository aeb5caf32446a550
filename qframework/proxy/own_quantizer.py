"""What a tensor quantizer of a user's own returns: numbers become tensors, and its first result is looked at."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qframework.proxy.naming import qualified_name
from qframework.quant_tensor import IntQuantTensor
from qframework.quant_tensor.validation import as_tensor

if TYPE_CHECKING:
    from qframework.proxy.base import QuantProxy

_NAMES = ("value", "scale", "zero_point", "bit_width")


def own_output(proxy: QuantProxy, output: object, x: Tensor, check: bool) -> tuple[Tensor, ...]:
    """Values, scale, zero point and bit width as tensors.

    Args:
        proxy: whose quantizer was called.
        output: what it returned.
        x: what was quantized.
        check: whether to look at the numbers, too; reads them.

    Raises:
        TypeError: it isn't a tuple of these four, or one of them is neither a number nor a tensor.
        ValueError: one of them is out of range, or its shape doesn't broadcast.
    """
    if not isinstance(output, (tuple, list)) or len(output) != len(_NAMES):
        got = (
            f"{len(output)} values" if isinstance(output, (tuple, list)) else type(output).__name__
        )
        raise TypeError(f"{_whose(proxy)} must return ({', '.join(_NAMES)}), got {got}")
    value, *others = output
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{_whose(proxy)} must return values of shape {tuple(x.shape)} first, got {got}"
        )
    try:
        pairs = zip(_NAMES[1:], others, strict=True)
        scale, zero_point, bit_width = (as_tensor(name, given, value) for name, given in pairs)
        if check:
            with torch.no_grad():
                made = IntQuantTensor(
                    value, scale, zero_point, bit_width, bool(proxy.is_signed), proxy.training
                )
                if not made.is_valid:
                    _tell_of_values(_whose(proxy), made)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_whose(proxy)} returned what can't be: {error}") from error
    return value, scale, zero_point, bit_width


def _whose(proxy: QuantProxy) -> str:
    where = f"{qualified_name(proxy.tracked_module_list[0])}.{proxy.attribute}"
    return f"{where}: {type(proxy.tensor_quant).__name__}"


def _tell_of_values(kind: str, made: IntQuantTensor) -> None:
    sign = "signed" if made.signed else "unsigned"
    warnings.warn(
        f"{kind} returned values that are no {sign} integers of {float(made.bit_width):g} bits times its scale, "
        "(q - zero_point) * scale; results that count on integers are wrong",
        UserWarning,
        stacklevel=2,
    )
