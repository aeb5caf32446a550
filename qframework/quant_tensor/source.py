"""Whether two tensors have the same scale, known from where their scales come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qframework.quant_tensor.int_quant_tensor import IntQuantTensor


def product_source(a: IntQuantTensor, b: IntQuantTensor) -> Any:
    """The source of the product of two scales, None where one of them is unknown."""
    if a.source is None or b.source is None:
        return None
    return ("product", a.source, b.source)


def same_source(a: IntQuantTensor, b: IntQuantTensor) -> bool:
    """True when both scales are known to come from one place, in evaluation mode, where it doesn't move."""
    if a.training or b.training:
        return a.scale is b.scale
    return a.scale is b.scale or (a.source is not None and a.source == b.source)


def can_read(*tensors: Tensor) -> bool:
    """Whether values may be looked at: not while tracing, not on the meta device."""
    if torch.compiler.is_compiling():
        return False
    return not any(t.is_meta or type(t) is torch._subclasses.FakeTensor for t in tensors)


def require_same_scale(operation: str, a: IntQuantTensor, b: IntQuantTensor) -> None:
    """Refuse two tensors whose scales differ, or can't be known to be the same.

    Raises:
        RuntimeError: with the remedy.
    """
    if same_source(a, b) or a.training or b.training:
        return
    remedy = (
        "Let both come from one quantizer: QuantIdentity(act_quant=other.act_quant), "
        "or add their values: a.value + b.value"
    )
    if not can_read(a.scale, b.scale):
        raise RuntimeError(
            f"{operation} of two quantized tensors: they come from different quantizers, so that their scales can't "
            f"be known to be the same while tracing. {remedy}"
        )
    if not torch.allclose(a.scale, b.scale):
        raise RuntimeError(
            f"{operation} of two quantized tensors with different scales: {_brief(a.scale)} and {_brief(b.scale)}. "
            f"Integers on different grids can't be combined exactly. {remedy}"
        )


def _brief(t: Tensor) -> str:
    if t.numel() == 1:
        return f"{float(t.detach()):.6g}"
    return (
        f"{float(t.detach().min()):.6g} to {float(t.detach().max()):.6g} (shape {tuple(t.shape)})"
    )
