"""Building blocks of minifloat quantizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qframework.core.bit_width import BitWidthConst, BitWidthParameter, BitWidthStatefulConst
from qframework.core.float_quant import FloatQuant, FloatScaleTrial
from qframework.core.function_wrapper import Identity, TensorClamp
from qframework.core.minifloat import (
    ComputeMaxMantissa,
    FloatClamp,
    FloatScaling,
    MantissaBitWidthConst,
    StaticExponentBias,
)
from qframework.core.restrict_val import RestrictValue
from qframework.functional import largest_available
from qframework.inject import Injector, PolicyValueError, value
from qframework.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
    StatsOp,
)
from qframework.proxy import ActFloatQuantProxyFromInjector, WeightFloatQuantProxyFromInjector
from qframework.quantizers.searched import MSESymmetricScale

__all__ = [
    "FloatActBase",
    "FloatBase",
    "FloatMSESymmetricScale",
    "FloatWeightBase",
    "Fp4e2m1",
    "Fp6e2m3",
    "Fp6e3m2",
    "Fp8e4m3",
    "Fp8e5m2",
    "FpFNUZMixin",
    "FpOCPMixin",
    "ScaledFloatActBase",
    "ScaledFloatWeightBase",
]


def _width(
    kind: BitWidthImplType,
    width: int,
    const: type,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Any:
    if kind == BitWidthImplType.PARAMETER:
        return BitWidthParameter(width, min_bit_width=1, dtype=dtype, device=device)
    if kind == BitWidthImplType.STATEFUL_CONST:
        return BitWidthStatefulConst(width, dtype, device)
    return const(width, dtype, device)


class FloatBase(Injector):
    """Minifloats that saturate; exponent, mantissa and all bits have to be bound."""

    signed = True
    float_to_int_impl_type = FloatToIntImplType.ROUND
    tensor_clamp_impl = TensorClamp
    float_clamp_impl = FloatClamp
    float_scaling_impl = FloatScaling
    compute_max_mantissa = ComputeMaxMantissa
    exponent_bias_impl = StaticExponentBias
    exponent_bit_width_impl_type = BitWidthImplType.CONST
    mantissa_bit_width_impl_type = BitWidthImplType.CONST
    saturating = True
    inf_values: Any = None
    nan_values: Any = None
    scaling_min_val = 1e-10

    @value
    def tensor_quant(
        bit_width: int, exponent_bit_width: int, mantissa_bit_width: int, signed: bool
    ) -> Any:
        whole = exponent_bit_width + mantissa_bit_width
        if bit_width not in (whole, whole + 1) or (signed and bit_width == whole):
            raise PolicyValueError(
                f"bit_width={bit_width} isn't the sum of exponent_bit_width={exponent_bit_width}, "
                f"mantissa_bit_width={mantissa_bit_width} and the sign; needed: bit_width={whole + bool(signed)}"
            )
        return FloatQuant

    @value
    def exponent_bit_width_impl(
        exponent_bit_width: int,
        exponent_bit_width_impl_type: BitWidthImplType,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Any:
        return _width(
            exponent_bit_width_impl_type, exponent_bit_width, BitWidthConst, dtype, device
        )

    @value
    def mantissa_bit_width_impl(
        mantissa_bit_width: int,
        mantissa_bit_width_impl_type: BitWidthImplType,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Any:
        kind = mantissa_bit_width_impl_type
        return _width(kind, mantissa_bit_width, MantissaBitWidthConst, dtype, device)

    @value
    def exponent_bias(exponent_bit_width: int) -> Any:
        return 2 ** (exponent_bit_width - 1) - 1

    @value
    def max_available_float(
        exponent_bit_width: int,
        mantissa_bit_width: int,
        exponent_bias: int,
        inf_values: tuple[str, ...] | None,
        nan_values: tuple[str, ...] | None,
    ) -> Any:
        reserved = (*(inf_values or ()), *(nan_values or ()))
        wrong = [bits for bits in reserved if len(bits) != mantissa_bit_width]
        if wrong:
            raise PolicyValueError(
                f"inf_values and nan_values name mantissas of mantissa_bit_width={mantissa_bit_width} bits; got {wrong}"
            )
        if not reserved:
            return None
        return largest_available(exponent_bit_width, mantissa_bit_width, exponent_bias, reserved)


class FloatWeightBase(FloatBase):
    """Weights in minifloats, without a scale."""

    proxy_class = WeightFloatQuantProxyFromInjector
    scaling_impl: Any = None


class FloatActBase(FloatBase):
    """Activations in minifloats, without a scale."""

    proxy_class = ActFloatQuantProxyFromInjector
    scaling_impl: Any = None


class ScaledFloatWeightBase(FloatBase):
    """Weights in minifloats; the largest magnitude is scaled to the largest number."""

    proxy_class: Any = WeightFloatQuantProxyFromInjector
    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = StatsOp.MAX
    restrict_scaling_type = RestrictValueType.FP


class ScaledFloatActBase(FloatBase):
    """Activations in minifloats; the largest magnitude is collected for 300 steps, then the scale is learned."""

    proxy_class: Any = ActFloatQuantProxyFromInjector
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    scaling_stats_op = StatsOp.MAX
    collect_stats_steps = 300
    restrict_scaling_type = RestrictValueType.FP


class PerTensor(Injector):
    """One scale a tensor."""

    scaling_per_output_type = ScalingPerOutputType.TENSOR


class PerChannel(Injector):
    """One scale an output channel."""

    scaling_per_output_type = ScalingPerOutputType.CHANNEL


class PerChannel2d(PerChannel):
    """One scale a channel of images (N, C, H, W); their number, as a shape, has to be given."""

    scaling_stats_permute_dims = (1, 0, 2, 3)


class FloatMSESymmetricScale(MSESymmetricScale):
    """The scale of minifloats that has the least squared error; learned from there on."""

    @value
    def symmetric_scale_trial(
        signed: bool,
        exponent_bit_width_impl: nn.Module,
        mantissa_bit_width_impl: nn.Module,
        exponent_bias_impl: nn.Module,
        float_clamp_impl: FloatClamp,
        float_scaling_impl: nn.Module,
        restrict_scaling_impl: RestrictValue,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: RestrictValue | None = None,
        scaling_min_val: float | None = None,
    ) -> Any:
        rounds = FloatQuant(
            signed,
            exponent_bit_width_impl,
            mantissa_bit_width_impl,
            exponent_bias_impl,
            float_clamp_impl,
            Identity(),
            float_scaling_impl=float_scaling_impl,
        )
        return FloatScaleTrial(
            rounds,
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )


# ------------------------------------------------------------------ widths


class Fp8e4m3(Injector):
    """8 bits: 4 of exponent, 3 of mantissa."""

    bit_width, exponent_bit_width, mantissa_bit_width = 8, 4, 3


class Fp8e5m2(Injector):
    """8 bits: 5 of exponent, 2 of mantissa."""

    bit_width, exponent_bit_width, mantissa_bit_width = 8, 5, 2


class Fp6e3m2(Injector):
    """6 bits: 3 of exponent, 2 of mantissa."""

    bit_width, exponent_bit_width, mantissa_bit_width = 6, 3, 2


class Fp6e2m3(Injector):
    """6 bits: 2 of exponent, 3 of mantissa."""

    bit_width, exponent_bit_width, mantissa_bit_width = 6, 2, 3


class Fp4e2m1(Injector):
    """4 bits: 2 of exponent, 1 of mantissa."""

    bit_width, exponent_bit_width, mantissa_bit_width = 4, 2, 1


# ------------------------------------------------------------------ reserved codes


class FpOCPMixin(Injector):
    """Reserved codes of the OCP 8-bit formats (OFP8 1.0): E4M3 has NaN, E5M2 infinity and NaN, others nothing."""

    @value
    def inf_values(exponent_bit_width: int, mantissa_bit_width: int) -> Any:
        return ("00",) if (exponent_bit_width, mantissa_bit_width) == (5, 2) else None

    @value
    def nan_values(exponent_bit_width: int, mantissa_bit_width: int) -> Any:
        if (exponent_bit_width, mantissa_bit_width) == (5, 2):
            return ("01", "11", "10")
        return ("111",) if (exponent_bit_width, mantissa_bit_width) == (4, 3) else None


class FpFNUZMixin(Injector):
    """Finite numbers, NaN in the place of -0, and a bias greater by one (https://arxiv.org/abs/2206.02915)."""

    @value
    def exponent_bias(exponent_bit_width: int) -> Any:
        return 2 ** (exponent_bit_width - 1)
