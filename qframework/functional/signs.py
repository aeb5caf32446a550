"""Quantization to two values: a scale with the sign of each element."""

from __future__ import annotations

from torch import Tensor

from qframework.functional.registry import defined
from qframework.functional.straight_through import binary_sign_ste, tensor_clamp


@defined
def quantize_to_signs(x: Tensor, scale: Tensor, clamp_gradient: bool = False) -> Tensor:
    """``scale`` where ``x >= 0``, else ``-scale``; NaN stays NaN.

    The gradient passes the sign straight through, https://arxiv.org/abs/1602.02830.

    Args:
        x: floating-point tensor of any shape.
        scale: positive tensor that broadcasts to ``x``.
        clamp_gradient: of a differentiated clamp to ``[-scale, scale]`` in front: beyond an end the gradient goes to it, and so to the
            scale. Otherwise it passes to ``x`` everywhere.

    Returns:
        Tensor with the shape and dtype of ``x``.
    """
    seen = tensor_clamp(x, -scale, scale) if clamp_gradient else x
    return (binary_sign_ste(seen) * scale).to(x.dtype)
