"""Pure tensor functions: straight-through rounding and clamping, integer ranges, fused kernels."""

from qframework.functional.fake_quantize import fake_quantize, fake_quantize_reference
from qframework.functional.integer_range import check_range, max_int, min_int
from qframework.functional.straight_through import (
    ROUNDINGS,
    abs_binary_sign_grad,
    binary_sign_ste,
    ceil_ste,
    dpu_round_ste,
    floor_ste,
    round_ste,
    round_to_zero_ste,
    scalar_clamp_min_ste,
    scalar_clamp_ste,
    tensor_clamp,
    tensor_clamp_ste,
    ternary_sign_ste,
)

__all__ = [
    "ROUNDINGS",
    "abs_binary_sign_grad",
    "binary_sign_ste",
    "ceil_ste",
    "check_range",
    "dpu_round_ste",
    "fake_quantize",
    "fake_quantize_reference",
    "floor_ste",
    "max_int",
    "min_int",
    "round_ste",
    "round_to_zero_ste",
    "scalar_clamp_min_ste",
    "scalar_clamp_ste",
    "tensor_clamp",
    "tensor_clamp_ste",
    "ternary_sign_ste",
]
