"""Integers whose groups of neighbours, along one axis, share a scale."""

from __future__ import annotations

from typing import Any

from qframework.core.groups import RuntimeDynamicGroupZeroPoint
from qframework.core.stats import NegativeMinOrZero
from qframework.inject import Injector
from qframework.inject.enum import RestrictValueType, ScalingPerOutputType
from qframework.proxy import (
    GroupwiseActFloatQuantProxyFromInjector,
    GroupwiseActQuantProxyFromInjector,
    GroupwiseWeightFloatQuantProxyFromInjector,
    GroupwiseWeightQuantProxyFromInjector,
)
from qframework.quantizers.base import (
    IntQuant,
    MaxStatsScaling,
    MinMaxStatsScaling,
    NarrowIntQuant,
    ShiftedMinUintQuant,
    UintQuant,
)
from qframework.quantizers.minifloat_base import Fp8e4m3
from qframework.quantizers.minifloat_ocp import FpOCPActPerTensorFloat, FpOCPWeightPerTensorFloat
from qframework.quantizers.searched import HQOWeightZeroPoint, MSESymmetricScale
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "Fp8e4m3OCPDynamicActPerGroupFloat",
    "Fp8e4m3OCPWeightPerGroupFloat",
    "GroupwiseActFloatProxyMixin",
    "GroupwiseActProxyMixin",
    "GroupwiseWeightFloatProxyMixin",
    "GroupwiseWeightProxyMixin",
    "Int8DynamicActPerGroupFloat",
    "Int8WeightPerGroupFloat",
    "Int8WeightPerGroupFloatMSE",
    "ShiftedMinGroupUintQuant",
    "ShiftedUint8DynamicActPerGroupFloat",
    "ShiftedUint8WeightGroupQuantFloat",
    "ShiftedUint8WeightPerGroupFloatHQO",
]


class Groups(Injector):
    """A scale for each group; ``group_size`` has to be bound."""

    scaling_per_output_type = ScalingPerOutputType.GROUP


class GroupwiseWeightProxyMixin(Groups):
    """Groups of integer weights, along the input features."""

    proxy_class = GroupwiseWeightQuantProxyFromInjector


class GroupwiseWeightFloatProxyMixin(Groups):
    """Groups of minifloat weights, along the input features."""

    proxy_class = GroupwiseWeightFloatQuantProxyFromInjector


class GroupwiseActProxyMixin(Groups):
    """Groups of integer activations, scaled by each input's own statistic."""

    proxy_class = GroupwiseActQuantProxyFromInjector


class GroupwiseActFloatProxyMixin(Groups):
    """Groups of minifloat activations, scaled by each input's own statistic."""

    proxy_class = GroupwiseActFloatQuantProxyFromInjector


class _FloatScale8bit(Injector):
    restrict_scaling_type = RestrictValueType.FP
    bit_width = 8


class ShiftedMinGroupUintQuant(UintQuant):
    """Unsigned integers; the zero point maps the minimum of each group of an input, or 0, to 0."""

    zero_point_impl: Any = RuntimeDynamicGroupZeroPoint
    zero_point_stats_impl = NegativeMinOrZero
    quantize_zero_point = True


class Int8WeightPerGroupFloat(
    GroupwiseWeightProxyMixin, NarrowIntQuant, MaxStatsScaling, _FloatScale8bit, WeightQuantSolver
):
    """8-bit symmetric weights, ``scale = max|w| / 127`` of each group."""

    group_size = 32


class Int8WeightPerGroupFloatMSE(MSESymmetricScale, Int8WeightPerGroupFloat):
    """The same; the scale has the least squared error."""


class ShiftedUint8WeightGroupQuantFloat(
    GroupwiseWeightProxyMixin,
    ShiftedMinUintQuant,
    MinMaxStatsScaling,
    _FloatScale8bit,
    WeightQuantSolver,
):
    """8-bit unsigned weights with an integer zero point for each group; group_size has to be given."""


class ShiftedUint8WeightPerGroupFloatHQO(HQOWeightZeroPoint, ShiftedUint8WeightGroupQuantFloat):
    """The same; zero points by half-quadratic optimization, not rounded."""

    group_size = 32


class Int8DynamicActPerGroupFloat(
    GroupwiseActProxyMixin, IntQuant, MaxStatsScaling, _FloatScale8bit, ActQuantSolver
):
    """8-bit signed activations, ``scale = max|x| / 128`` of each group."""

    group_size = 32


class ShiftedUint8DynamicActPerGroupFloat(
    GroupwiseActProxyMixin,
    ShiftedMinGroupUintQuant,
    MinMaxStatsScaling,
    _FloatScale8bit,
    ActQuantSolver,
):
    """8-bit unsigned activations with an integer zero point for each group."""

    group_size = 32


class Fp8e4m3OCPWeightPerGroupFloat(
    Fp8e4m3, GroupwiseWeightFloatProxyMixin, FpOCPWeightPerTensorFloat
):
    """OCP E4M3 (up to 448): weights, a float scale for each group."""

    group_size = 32


class Fp8e4m3OCPDynamicActPerGroupFloat(
    Fp8e4m3, GroupwiseActFloatProxyMixin, MaxStatsScaling, FpOCPActPerTensorFloat
):
    """OCP E4M3 (up to 448): activations, a float scale for each group."""

    group_size = 32
