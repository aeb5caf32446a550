"""Microscaling: groups that share a power of two (OCP MX 1.0), and NVFP4.

A shared scale is ``2^floor(log2 max|group|)`` over the largest power of two of the element format, so that values
above the largest number saturate. A group whose largest magnitude is below 2^-110 has the scale of 2^-110.
"""

from __future__ import annotations

from typing import Any

from qframework.core.function_wrapper import FloorSte
from qframework.core.groups import TwoLevelGroupScaling
from qframework.core.scaling.threshold import MicroscalingIntScaling
from qframework.inject import Injector
from qframework.inject.enum import RestrictValueType
from qframework.quantizers.base import (
    IntQuant,
    MaxStatsScaling,
    MinMaxStatsScaling,
    ShiftedMinUintQuant,
)
from qframework.quantizers.groupwise import (
    GroupwiseActFloatProxyMixin,
    GroupwiseActProxyMixin,
    GroupwiseWeightFloatProxyMixin,
    GroupwiseWeightProxyMixin,
)
from qframework.quantizers.minifloat_base import (
    FloatMSESymmetricScale,
    Fp4e2m1,
    Fp6e2m3,
    Fp6e3m2,
    Fp8e4m3,
    Fp8e5m2,
    FpOCPMixin,
    ScaledFloatActBase,
    ScaledFloatWeightBase,
)
from qframework.quantizers.searched import (
    MSEAsymmetricScale,
    MSESymmetricScale,
    MSEWeightZeroPoint,
)
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "MXActMixin",
    "MXFloat4e2m1Act",
    "MXFloat4e2m1Weight",
    "MXFloat4e2m1WeightMSE",
    "MXFloat6e2m3Act",
    "MXFloat6e2m3Weight",
    "MXFloat6e3m2Act",
    "MXFloat6e3m2Weight",
    "MXFloat8e4m3Act",
    "MXFloat8e4m3Weight",
    "MXFloat8e4m3WeightMSE",
    "MXFloat8e5m2Act",
    "MXFloat8e5m2Weight",
    "MXInt8Act",
    "MXInt8OCPAct",
    "MXInt8OCPWeight",
    "MXInt8Weight",
    "MXInt8WeightMSE",
    "MXMixin",
    "MXWeightMixin",
    "NVFloat4Act",
    "NVFloat4Mixin",
    "NVFloat4Weight",
    "ShiftedMXUInt8Weight",
    "ShiftedMXUInt8WeightMSE",
]


class MXMixin(Injector):
    """Groups of 32 that share a power of two, an exponent of 8 bits (E8M0)."""

    group_size = 32
    restrict_scaling_type = RestrictValueType.POWER_OF_TWO
    restrict_value_float_to_int_impl: Any = FloorSte
    scaling_min_val = 2.0**-110


class MXWeightMixin(MXMixin, MaxStatsScaling):
    """The same for weights: the largest magnitude of a group, at every call."""

    scaling_min_val = 2.0**-110


class MXActMixin(MXWeightMixin):
    """The same for activations, of each input."""


class _MXFloatWeight(
    MXWeightMixin,
    GroupwiseWeightFloatProxyMixin,
    FpOCPMixin,
    ScaledFloatWeightBase,
    WeightQuantSolver,
):
    """Minifloat weights in microscaling groups."""


class _MXFloatAct(
    MXActMixin, GroupwiseActFloatProxyMixin, FpOCPMixin, ScaledFloatActBase, ActQuantSolver
):
    """Minifloat activations in microscaling groups."""


class MXFloat8e4m3Weight(Fp8e4m3, _MXFloatWeight):
    """MXFP8 E4M3: weights, a power of two for each 32."""


class MXFloat8e4m3WeightMSE(FloatMSESymmetricScale, MXFloat8e4m3Weight):
    """The same; the scale has the least squared error."""


class MXFloat8e4m3Act(Fp8e4m3, _MXFloatAct):
    """MXFP8 E4M3: activations, a power of two for each 32."""


class MXFloat8e5m2Weight(Fp8e5m2, _MXFloatWeight):
    """MXFP8 E5M2: weights, a power of two for each 32."""


class MXFloat8e5m2Act(Fp8e5m2, _MXFloatAct):
    """MXFP8 E5M2: activations, a power of two for each 32."""


class MXFloat6e3m2Weight(Fp6e3m2, _MXFloatWeight):
    """MXFP6 E3M2: weights, a power of two for each 32."""


class MXFloat6e3m2Act(Fp6e3m2, _MXFloatAct):
    """MXFP6 E3M2: activations, a power of two for each 32."""


class MXFloat6e2m3Weight(Fp6e2m3, _MXFloatWeight):
    """MXFP6 E2M3: weights, a power of two for each 32."""


class MXFloat6e2m3Act(Fp6e2m3, _MXFloatAct):
    """MXFP6 E2M3: activations, a power of two for each 32."""


class MXFloat4e2m1Weight(Fp4e2m1, _MXFloatWeight):
    """MXFP4 E2M1: weights, a power of two for each 32."""


class MXFloat4e2m1WeightMSE(FloatMSESymmetricScale, MXFloat4e2m1Weight):
    """The same; the scale has the least squared error."""


class MXFloat4e2m1Act(Fp4e2m1, _MXFloatAct):
    """MXFP4 E2M1: activations, a power of two for each 32."""


# ------------------------------------------------------------------ integers


class MXInt8Weight(MXWeightMixin, GroupwiseWeightProxyMixin, IntQuant, WeightQuantSolver):
    """8-bit weights, ``scale = 2^floor(log2 max|w|) / 128`` for each 32: the upper half of the range saturates."""

    bit_width = 8


class MXInt8WeightMSE(MSESymmetricScale, MXInt8Weight):
    """The same; the scale has the least squared error."""


class MXInt8Act(MXActMixin, GroupwiseActProxyMixin, IntQuant, ActQuantSolver):
    """8-bit activations, ``scale = 2^floor(log2 max|x|) / 128`` for each 32: the upper half of the range saturates."""

    bit_width = 8


class MXInt8OCPWeight(MXInt8Weight):
    """MXINT8 to the letter of OCP MX 1.0: weights, ``scale = 2^floor(log2 max|w|) / 64`` for each 32."""

    int_scaling_impl = MicroscalingIntScaling


class MXInt8OCPAct(MXInt8Act):
    """MXINT8 to the letter of OCP MX 1.0: activations, ``scale = 2^floor(log2 max|x|) / 64`` for each 32."""

    int_scaling_impl = MicroscalingIntScaling


class ShiftedMXUInt8Weight(
    MXMixin, GroupwiseWeightProxyMixin, ShiftedMinUintQuant, MinMaxStatsScaling, WeightQuantSolver
):
    """8-bit unsigned weights with a zero point and a power of two for each 32."""

    bit_width = 8


class ShiftedMXUInt8WeightMSE(MSEAsymmetricScale, MSEWeightZeroPoint, ShiftedMXUInt8Weight):
    """The same; scale and zero point have the least squared error."""


# ------------------------------------------------------------------ NVFP4


class NVFloat4Mixin(Injector):
    """Groups of 16 with a scale in E4M3, times one float32 scale for the tensor."""

    group_size = 16
    scaling_impl: Any = TwoLevelGroupScaling


class NVFloat4Weight(
    NVFloat4Mixin,
    Fp4e2m1,
    GroupwiseWeightFloatProxyMixin,
    MaxStatsScaling,
    FpOCPMixin,
    ScaledFloatWeightBase,
    WeightQuantSolver,
):
    """NVFP4: E2M1 weights, an E4M3 scale for each 16, a float32 scale for all."""


class NVFloat4Act(
    NVFloat4Mixin,
    Fp4e2m1,
    GroupwiseActFloatProxyMixin,
    MaxStatsScaling,
    FpOCPMixin,
    ScaledFloatActBase,
    ActQuantSolver,
):
    """NVFP4: E2M1 activations, an E4M3 scale for each 16, a float32 scale for all, of each input."""
