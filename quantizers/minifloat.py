"""Minifloats without reserved codes: every code is a number."""

from __future__ import annotations

from qframework.quantizers.minifloat_base import (
    FloatActBase,
    FloatMSESymmetricScale,
    FloatWeightBase,
    Fp8e4m3,
    Fp8e5m2,
    PerChannel,
    PerChannel2d,
    PerTensor,
    ScaledFloatActBase,
    ScaledFloatWeightBase,
)
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "Fp8e4m3Act",
    "Fp8e4m3ActPerChannelFloat2d",
    "Fp8e4m3ActPerChannelFloat2dMSE",
    "Fp8e4m3ActPerTensorFloat",
    "Fp8e4m3ActPerTensorFloatMSE",
    "Fp8e4m3Weight",
    "Fp8e4m3WeightPerChannelFloat",
    "Fp8e4m3WeightPerChannelFloatMSE",
    "Fp8e4m3WeightPerTensorFloat",
    "Fp8e4m3WeightPerTensorFloatMSE",
    "Fp8e5m2Act",
    "Fp8e5m2ActPerChannelFloat2d",
    "Fp8e5m2ActPerChannelFloat2dMSE",
    "Fp8e5m2ActPerTensorFloat",
    "Fp8e5m2ActPerTensorFloatMSE",
    "Fp8e5m2Weight",
    "Fp8e5m2WeightPerChannelFloat",
    "Fp8e5m2WeightPerChannelFloatMSE",
    "Fp8e5m2WeightPerTensorFloat",
    "Fp8e5m2WeightPerTensorFloatMSE",
]


class Fp8e4m3Weight(Fp8e4m3, FloatWeightBase, WeightQuantSolver):
    """E4M3 without reserved codes (up to 480): weights, unscaled."""


class Fp8e4m3Act(Fp8e4m3, FloatActBase, ActQuantSolver):
    """E4M3 without reserved codes (up to 480): activations, unscaled."""


class Fp8e4m3WeightPerTensorFloat(Fp8e4m3, PerTensor, ScaledFloatWeightBase, WeightQuantSolver):
    """E4M3 without reserved codes (up to 480): weights, one scale."""


class Fp8e4m3WeightPerChannelFloat(Fp8e4m3, PerChannel, ScaledFloatWeightBase, WeightQuantSolver):
    """E4M3 without reserved codes (up to 480): weights, a scale per output channel."""


class Fp8e4m3ActPerTensorFloat(Fp8e4m3, PerTensor, ScaledFloatActBase, ActQuantSolver):
    """E4M3 without reserved codes (up to 480): activations, one scale."""


class Fp8e4m3ActPerChannelFloat2d(Fp8e4m3, PerChannel2d, ScaledFloatActBase, ActQuantSolver):
    """E4M3 without reserved codes (up to 480): activations (N, C, H, W), a scale per channel."""


class Fp8e4m3WeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e4m3WeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3WeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp8e4m3WeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3ActPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e4m3ActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e4m3ActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp8e4m3ActPerChannelFloat2d):
    """The same; the scale has the least squared error."""


class Fp8e5m2Weight(Fp8e5m2, FloatWeightBase, WeightQuantSolver):
    """E5M2 without reserved codes (up to 114688): weights, unscaled."""


class Fp8e5m2Act(Fp8e5m2, FloatActBase, ActQuantSolver):
    """E5M2 without reserved codes (up to 114688): activations, unscaled."""


class Fp8e5m2WeightPerTensorFloat(Fp8e5m2, PerTensor, ScaledFloatWeightBase, WeightQuantSolver):
    """E5M2 without reserved codes (up to 114688): weights, one scale."""


class Fp8e5m2WeightPerChannelFloat(Fp8e5m2, PerChannel, ScaledFloatWeightBase, WeightQuantSolver):
    """E5M2 without reserved codes (up to 114688): weights, a scale per output channel."""


class Fp8e5m2ActPerTensorFloat(Fp8e5m2, PerTensor, ScaledFloatActBase, ActQuantSolver):
    """E5M2 without reserved codes (up to 114688): activations, one scale."""


class Fp8e5m2ActPerChannelFloat2d(Fp8e5m2, PerChannel2d, ScaledFloatActBase, ActQuantSolver):
    """E5M2 without reserved codes (up to 114688): activations (N, C, H, W), a scale per channel."""


class Fp8e5m2WeightPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e5m2WeightPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2WeightPerChannelFloatMSE(FloatMSESymmetricScale, Fp8e5m2WeightPerChannelFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2ActPerTensorFloatMSE(FloatMSESymmetricScale, Fp8e5m2ActPerTensorFloat):
    """The same; the scale has the least squared error."""


class Fp8e5m2ActPerChannelFloat2dMSE(FloatMSESymmetricScale, Fp8e5m2ActPerChannelFloat2d):
    """The same; the scale has the least squared error."""
