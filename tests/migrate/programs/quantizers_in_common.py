"""Quantizers that a family of networks shares: which format, from the number of bits."""

from brevitas.core.bit_width import BitWidthImplType
from brevitas.core.quant import QuantType
from brevitas.core.restrict_val import (
    FloatToIntImplType,
    RestrictValueType,  # domains of a scale
)
from brevitas.core.scaling import ScalingImplType
from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.inject import ExtendedInjector
from brevitas.quant.solver import ActQuantSolver
from brevitas.quant.solver import WeightQuantSolver
from dependencies import value


class FromBits(ExtendedInjector):
    bit_width_impl_type = BitWidthImplType.CONST
    scaling_impl_type = ScalingImplType.CONST
    restrict_scaling_type = RestrictValueType.FP
    float_to_int_impl_type = FloatToIntImplType.ROUND
    scaling_per_output_channel = False
    zero_point_impl = ZeroZeroPoint
    narrow_range = True
    signed = True

    @value
    def quant_type(bit_width):
        if bit_width is None:
            return QuantType.FP
        return QuantType.BINARY if bit_width == 1 else QuantType.INT


class WeightFromBits(FromBits, WeightQuantSolver):
    scaling_const = 1.0


class ActFromBits(FromBits, ActQuantSolver):
    min_val = -1.0
    max_val = 1.0
