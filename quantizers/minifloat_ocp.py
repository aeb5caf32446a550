"""Minifloats of the Open Compute Project: 8 bits (OFP8 1.0), 6 and 4 bits (MX 1.0)."""

from __future__ import annotations

from qframework.quantizers.minifloat_base import (
    FloatActBase,
    FloatMSESymmetricScale,
    FloatWeightBase,
    Fp4e2m1,
    Fp6e2m3,
    Fp6e3m2,
    Fp8e4m3,
    Fp8e5m2,
    FpOCPMixin,
    PerChannel,
    PerChannel2d,
    PerTensor,
    ScaledFloatActBase,
    ScaledFloatWeightBase,
)
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "Fp4e2m1OCPAct",
    "Fp4e2m1OCPActPerChannelFloat2d",
    "Fp4e2m1OCPActPerChannelFloat2dMSE",
    "Fp4e2m1OCPActPerTensorFloat",
    "Fp4e2m1OCPActPerTensorFloatMSE",
    "Fp4e2m1OCPWeight",
    "Fp4e2m1OCPWeightPerChannelFloat",
    "Fp4e2m1OCPWeightPerChannelFloatMSE",
    "Fp4e2m1OCPWeightPerTensorFloat",
    "Fp4e2m1OCPWeightPerTensorFloatMSE",
    "Fp6e2m3OCPAct",
    "Fp6e2m3OCPActPerChannelFloat2d",
    "Fp6e2m3OCPActPerChannelFloat2dMSE",
    "Fp6e2m3OCPActPerTensorFloat",
    "Fp6e2m3OCPActPerTensorFloatMSE",
    "Fp6e2m3OCPWeight",
    "Fp6e2m3OCPWeightPerChannelFloat",
    "Fp6e2m3OCPWeightPerChannelFloatMSE",
    "Fp6e2m3OCPWeightPerTensorFloat",
    "Fp6e2m3OCPWeightPerTensorFloatMSE",
    "Fp6e3m2OCPAct",
    "Fp6e3m2OCPActPerChannelFloat2d",
    "Fp6e3m2OCPActPerChannelFloat2dMSE",
    "Fp6e3m2OCPActPerTensorFloat",
    "Fp6e3m2OCPActPerTensorFloatMSE",
    "Fp6e3m2OCPWeight",
    "Fp6e3m2OCPWeightPerChannelFloat",
    "Fp6e3m2OCPWeightPerChannelFloatMSE",
    "Fp6e3m2OCPWeightPerTensorFloat",
    "Fp6e3m2OCPWeightPerTensorFloatMSE",
    "Fp8e4m3OCPAct",
    "Fp8e4m3OCPActPerChannelFloat2d",
    "Fp8e4m3OCPActPerChannelFloat2dMSE",
    "Fp8e4m3OCPActPerTensorFloat",
    "Fp8e4m3OCPActPerTensorFloatMSE",
    "Fp8e4m3OCPWeight",
    "Fp8e4m3OCPWeightPerChannelFloat",
    "Fp8e4m3OCPWeightPerChannelFloatMSE",
    "Fp8e4m3OCPWeightPerTensorFloat",
    "Fp8e4m3OCPWeightPerTensorFloatMSE",
    "Fp8e5m2OCPAct",
    "Fp8e5m2OCPActPerChannelFloat2d",
    "Fp8e5m2OCPActPerChannelFloat2dMSE",
    "Fp8e5m2OCPActPerTensorFloat",
    "Fp8e5m2OCPActPerTensorFloatMSE",
    "Fp8e5m2OCPWeight",
    "Fp8e5m2OCPWeightPerChannelFloat",
    "Fp8e5m2OCPWeightPerChannelFloatMSE",
    "Fp8e5m2OCPWeightPerTensorFloat",
    "Fp8e5m2OCPWeightPerTensorFloatMSE",
    "FpOCPAct",
    "FpOCPActPerChannelFloat2d",
    "FpOCPActPerChannelFloat2dMSE",
    "FpOCPActPerTensorFloat",
    "FpOCPActPerTensorFloatMSE",
    "FpOCPWeight",
    "FpOCPWeightPerChannelFloat",
    "FpOCPWeightPerChannelFloatMSE",
    "FpOCPWeightPerTensorFloat",
    "FpOCPWeightPerTensorFloatMSE",
]


class FpOCPWeight(FpOCPMixin, FloatWeightBase, WeightQuantSolver):
    """Minifloat weights, unscaled; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpOCPAct(FpOCPMixin, FloatActBase, ActQuantSolver):
    """Minifloat activations, unscaled; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpOCPWeightPerTensorFloat(FpOCPMixin, PerTensor, ScaledFloatWeightBase, WeightQuantSolver):
    """Minifloat weights, one scale; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpOCPWeightPerChannelFloat(FpOCPMixin, PerChannel, ScaledFloatWeightBase, WeightQuantSolver):
    """Minifloat weights, a scale per output channel; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpOCPActPerTensorFloat(FpOCPMixin, PerTensor, ScaledFloatActBase, ActQuantSolver):
    """Minifloat activations, one scale; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpOCPActPerChannelFloat2d(FpOCPMixin, PerChannel2d, ScaledFloatActBase, ActQuantSolver):
    """Minifloat activations (N, C, H, W), a scale per channel; bit_width, exponent_bit_width and mantissa_bit_width have to be given."""


class FpOCPWeightPerTensorFloatMSE(FloatMSESymmetricScale, FpOCPWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class FpOCPWeightPerChannelFloatMSE(FloatMSESymmetricScale, FpOCPWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class FpOCPActPerTensorFloatMSE(FloatMSESymmetricScale, FpOCPActPerTensorFloat):
    """The same; the scale has the least squared error."""


class FpOCPActPerChannelFloat2dMSE(FloatMSESymmetricScale, FpOCPActPerChannelFloat2d):
    """The same; the scale has the least squared error."""


class Fp8e4m3OCPWeight(Fp8e4m3, FpOCPWeight):
    """OCP E4M3 (up to 448): weights, unscaled."""


class Fp8e4m3OCPAct(Fp8e4m3, FpOCPAct):
    """OCP E4M3 (up to 448): activations, unscaled."""


class Fp8e4m3OCPWeightPerTensorFloat(Fp8e4m3, FpOCPWeightPerTensorFloat):
    """OCP E4M3 (up to 448): weights, one scale."""


class Fp8e4m3OCPWeightPerChannelFloat(Fp8e4m3, FpOCPWeightPerChannelFloat):
    """OCP E4M3 (up to 448): weights, a scale per output channel."""


class Fp8e4m3OCPActPerTensorFloat(Fp8e4m3, FpOCPActPerTensorFloat):
    """OCP E4M3 (up to 448): activations, one scale."""


class Fp8e4m3OCPActPerChannelFloat2d(Fp8e4m3, FpOCPActPerChannelFloat2d):
    """OCP E4M3 (up to 448): activations (N, C, H, W), a scale per channel."""


class Fp8e4m3OCPWeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e4m3OCPWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3OCPWeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp8e4m3OCPWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3OCPActPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e4m3OCPActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3OCPActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp8e4m3OCPActPerChannelFloat2d):
    """The same; the scale has the least squared error."""


class Fp8e5m2OCPWeight(Fp8e5m2, FpOCPWeight):
    """OCP E5M2 (up to 57344): weights, unscaled."""


class Fp8e5m2OCPAct(Fp8e5m2, FpOCPAct):
    """OCP E5M2 (up to 57344): activations, unscaled."""


class Fp8e5m2OCPWeightPerTensorFloat(Fp8e5m2, FpOCPWeightPerTensorFloat):
    """OCP E5M2 (up to 57344): weights, one scale."""


class Fp8e5m2OCPWeightPerChannelFloat(Fp8e5m2, FpOCPWeightPerChannelFloat):
    """OCP E5M2 (up to 57344): weights, a scale per output channel."""


class Fp8e5m2OCPActPerTensorFloat(Fp8e5m2, FpOCPActPerTensorFloat):
    """OCP E5M2 (up to 57344): activations, one scale."""


class Fp8e5m2OCPActPerChannelFloat2d(Fp8e5m2, FpOCPActPerChannelFloat2d):
    """OCP E5M2 (up to 57344): activations (N, C, H, W), a scale per channel."""


class Fp8e5m2OCPWeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e5m2OCPWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2OCPWeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp8e5m2OCPWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2OCPActPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e5m2OCPActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2OCPActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp8e5m2OCPActPerChannelFloat2d):
    """The same; the scale has the least squared error."""


class Fp6e3m2OCPWeight(Fp6e3m2, FpOCPWeight):
    """OCP E3M2 (up to 28): weights, unscaled."""


class Fp6e3m2OCPAct(Fp6e3m2, FpOCPAct):
    """OCP E3M2 (up to 28): activations, unscaled."""


class Fp6e3m2OCPWeightPerTensorFloat(Fp6e3m2, FpOCPWeightPerTensorFloat):
    """OCP E3M2 (up to 28): weights, one scale."""


class Fp6e3m2OCPWeightPerChannelFloat(Fp6e3m2, FpOCPWeightPerChannelFloat):
    """OCP E3M2 (up to 28): weights, a scale per output channel."""


class Fp6e3m2OCPActPerTensorFloat(Fp6e3m2, FpOCPActPerTensorFloat):
    """OCP E3M2 (up to 28): activations, one scale."""


class Fp6e3m2OCPActPerChannelFloat2d(Fp6e3m2, FpOCPActPerChannelFloat2d):
    """OCP E3M2 (up to 28): activations (N, C, H, W), a scale per channel."""


class Fp6e3m2OCPWeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp6e3m2OCPWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp6e3m2OCPWeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp6e3m2OCPWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp6e3m2OCPActPerTensorFloatMSE(FloatMSESymmetricScale, Fp6e3m2OCPActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp6e3m2OCPActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp6e3m2OCPActPerChannelFloat2d):
    """The same; the scale has the least squared error."""


class Fp6e2m3OCPWeight(Fp6e2m3, FpOCPWeight):
    """OCP E2M3 (up to 7.5): weights, unscaled."""


class Fp6e2m3OCPAct(Fp6e2m3, FpOCPAct):
    """OCP E2M3 (up to 7.5): activations, unscaled."""


class Fp6e2m3OCPWeightPerTensorFloat(Fp6e2m3, FpOCPWeightPerTensorFloat):
    """OCP E2M3 (up to 7.5): weights, one scale."""


class Fp6e2m3OCPWeightPerChannelFloat(Fp6e2m3, FpOCPWeightPerChannelFloat):
    """OCP E2M3 (up to 7.5): weights, a scale per output channel."""


class Fp6e2m3OCPActPerTensorFloat(Fp6e2m3, FpOCPActPerTensorFloat):
    """OCP E2M3 (up to 7.5): activations, one scale."""


class Fp6e2m3OCPActPerChannelFloat2d(Fp6e2m3, FpOCPActPerChannelFloat2d):
    """OCP E2M3 (up to 7.5): activations (N, C, H, W), a scale per channel."""


class Fp6e2m3OCPWeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp6e2m3OCPWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp6e2m3OCPWeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp6e2m3OCPWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp6e2m3OCPActPerTensorFloatMSE(FloatMSESymmetricScale, Fp6e2m3OCPActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp6e2m3OCPActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp6e2m3OCPActPerChannelFloat2d):
    """The same; the scale has the least squared error."""


class Fp4e2m1OCPWeight(Fp4e2m1, FpOCPWeight):
    """OCP E2M1 (up to 6): weights, unscaled."""


class Fp4e2m1OCPAct(Fp4e2m1, FpOCPAct):
    """OCP E2M1 (up to 6): activations, unscaled."""


class Fp4e2m1OCPWeightPerTensorFloat(Fp4e2m1, FpOCPWeightPerTensorFloat):
    """OCP E2M1 (up to 6): weights, one scale."""


class Fp4e2m1OCPWeightPerChannelFloat(Fp4e2m1, FpOCPWeightPerChannelFloat):
    """OCP E2M1 (up to 6): weights, a scale per output channel."""


class Fp4e2m1OCPActPerTensorFloat(Fp4e2m1, FpOCPActPerTensorFloat):
    """OCP E2M1 (up to 6): activations, one scale."""


class Fp4e2m1OCPActPerChannelFloat2d(Fp4e2m1, FpOCPActPerChannelFloat2d):
    """OCP E2M1 (up to 6): activations (N, C, H, W), a scale per channel."""


class Fp4e2m1OCPWeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp4e2m1OCPWeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp4e2m1OCPWeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp4e2m1OCPWeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp4e2m1OCPActPerTensorFloatMSE(FloatMSESymmetricScale, Fp4e2m1OCPActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp4e2m1OCPActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp4e2m1OCPActPerChannelFloat2d):
    """The same; the scale has the least squared error."""
