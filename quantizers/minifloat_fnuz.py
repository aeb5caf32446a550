"""Minifloats of the FNUZ kind: finite, one zero, NaN in the place of -0."""

from __future__ import annotations

from qframework.quantizers.minifloat_base import (
    FloatActBase,
    FloatMSESymmetricScale,
    FloatWeightBase,
    Fp8e4m3,
    Fp8e5m2,
    FpFNUZMixin,
    PerChannel,
    PerChannel2d,
    PerTensor,
    ScaledFloatActBase,
    ScaledFloatWeightBase,
)
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "Fp8e4m3FNUZAct",
    "Fp8e4m3FNUZActPerChannelFloat2d",
    "Fp8e4m3FNUZActPerChannelFloat2dMSE",
    "Fp8e4m3FNUZActPerTensorFloat",
    "Fp8e4m3FNUZActPerTensorFloatMSE",
    "Fp8e4m3FNUZWeight",
    "Fp8e4m3FNUZWeightPerChannelFloat",
    "Fp8e4m3FNUZWeightPerChannelFloatMSE",
    "Fp8e4m3FNUZWeightPerTensorFloat",
    "Fp8e4m3FNUZWeightPerTensorFloatMSE",
    "Fp8e5m2FNUZAct",
    "Fp8e5m2FNUZActPerChannelFloat2d",
    "Fp8e5m2FNUZActPerChannelFloat2dMSE",
    "Fp8e5m2FNUZActPerTensorFloat",
    "Fp8e5m2FNUZActPerTensorFloatMSE",
    "Fp8e5m2FNUZWeight",
    "Fp8e5m2FNUZWeightPerChannelFloat",
    "Fp8e5m2FNUZWeightPerChannelFloatMSE",
    "Fp8e5m2FNUZWeightPerTensorFloat",
    "Fp8e5m2FNUZWeightPerTensorFloatMSE",
    "FpFNUZAct",
    "FpFNUZActPerChannelFloat2d",
    "FpFNUZActPerChannelFloat2dMSE",
    "FpFNUZActPerTensorFloat",
    "FpFNUZActPerTensorFloatMSE",
    "FpFNUZWeight",
    "FpFNUZWeightPerChannelFloat",
    "FpFNUZWeightPerChannelFloatMSE",
    "FpFNUZWeightPerTensorFloat",
    "FpFNUZWeightPerTensorFloatMSE",
]


class FpFNUZWeight(FpFNUZMixin, FloatWeightBase, WeightQuantSolver):
    """Minifloat weights, unscaled; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpFNUZAct(FpFNUZMixin, FloatActBase, ActQuantSolver):
    """Minifloat activations, unscaled; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpFNUZWeightPerTensorFloat(FpFNUZMixin, PerTensor, ScaledFloatWeightBase, WeightQuantSolver):
    """Minifloat weights, one scale; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpFNUZWeightPerChannelFloat(
    FpFNUZMixin, PerChannel, ScaledFloatWeightBase, WeightQuantSolver
):
    """Minifloat weights, a scale per output channel; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpFNUZActPerTensorFloat(FpFNUZMixin, PerTensor, ScaledFloatActBase, ActQuantSolver):
    """Minifloat activations, one scale; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpFNUZActPerChannelFloat2d(FpFNUZMixin, PerChannel2d, ScaledFloatActBase, ActQuantSolver):
    """Minifloat activations (N, C, H, W), a scale per channel; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpFNUZWeightPerTensorFloatMSE(FloatMSESymmetricScale, FpFNUZWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class FpFNUZWeightPerChannelFloatMSE(FloatMSESymmetricScale, FpFNUZWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class FpFNUZActPerTensorFloatMSE(FloatMSESymmetricScale, FpFNUZActPerTensorFloat):
    """The same; the scale has the least squared error."""


class FpFNUZActPerChannelFloat2dMSE(FloatMSESymmetricScale, FpFNUZActPerChannelFloat2d):
    """The same; the scale has the least squared error."""


class Fp8e4m3FNUZWeight(Fp8e4m3, FpFNUZWeight):
    """FNUZ E4M3 (up to 240): weights, unscaled."""


class Fp8e4m3FNUZAct(Fp8e4m3, FpFNUZAct):
    """FNUZ E4M3 (up to 240): activations, unscaled."""


class Fp8e4m3FNUZWeightPerTensorFloat(Fp8e4m3, FpFNUZWeightPerTensorFloat):
    """FNUZ E4M3 (up to 240): weights, one scale."""


class Fp8e4m3FNUZWeightPerChannelFloat(Fp8e4m3, FpFNUZWeightPerChannelFloat):
    """FNUZ E4M3 (up to 240): weights, a scale per output channel."""


class Fp8e4m3FNUZActPerTensorFloat(Fp8e4m3, FpFNUZActPerTensorFloat):
    """FNUZ E4M3 (up to 240): activations, one scale."""


class Fp8e4m3FNUZActPerChannelFloat2d(Fp8e4m3, FpFNUZActPerChannelFloat2d):
    """FNUZ E4M3 (up to 240): activations (N, C, H, W), a scale per channel."""


class Fp8e4m3FNUZWeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e4m3FNUZWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3FNUZWeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp8e4m3FNUZWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3FNUZActPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e4m3FNUZActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3FNUZActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp8e4m3FNUZActPerChannelFloat2d):
    """The same; the scale has the least squared error."""


class Fp8e5m2FNUZWeight(Fp8e5m2, FpFNUZWeight):
    """FNUZ E5M2 (up to 57344): weights, unscaled."""


class Fp8e5m2FNUZAct(Fp8e5m2, FpFNUZAct):
    """FNUZ E5M2 (up to 57344): activations, unscaled."""


class Fp8e5m2FNUZWeightPerTensorFloat(Fp8e5m2, FpFNUZWeightPerTensorFloat):
    """FNUZ E5M2 (up to 57344): weights, one scale."""


class Fp8e5m2FNUZWeightPerChannelFloat(Fp8e5m2, FpFNUZWeightPerChannelFloat):
    """FNUZ E5M2 (up to 57344): weights, a scale per output channel."""


class Fp8e5m2FNUZActPerTensorFloat(Fp8e5m2, FpFNUZActPerTensorFloat):
    """FNUZ E5M2 (up to 57344): activations, one scale."""


class Fp8e5m2FNUZActPerChannelFloat2d(Fp8e5m2, FpFNUZActPerChannelFloat2d):
    """FNUZ E5M2 (up to 57344): activations (N, C, H, W), a scale per channel."""


class Fp8e5m2FNUZWeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e5m2FNUZWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2FNUZWeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp8e5m2FNUZWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2FNUZActPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e5m2FNUZActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2FNUZActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp8e5m2FNUZActPerChannelFloat2d):
    """The same; the scale has the least squared error."""
