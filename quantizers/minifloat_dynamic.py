"""Minifloat activations whose scale is computed from each input, for a tensor or for each row (last axis)."""

from __future__ import annotations

from typing import Any

from qframework.core.function_wrapper import FloorSte
from qframework.inject import Injector
from qframework.inject.enum import RestrictValueType
from qframework.proxy import DynamicActFloatQuantProxyFromInjector
from qframework.quantizers.base import MaxStatsScaling
from qframework.quantizers.dynamic import PerRow
from qframework.quantizers.minifloat_fnuz import Fp8e4m3FNUZActPerTensorFloat
from qframework.quantizers.minifloat_ocp import (
    Fp8e4m3OCPActPerTensorFloat,
    Fp8e5m2OCPActPerTensorFloat,
)

__all__ = [
    "DynamicFloatAct",
    "Fp8e4m3FNUZDynamicActPerRowFloat",
    "Fp8e4m3FNUZDynamicActPerTensorFloat",
    "Fp8e4m3OCPDynamicActPerRowFixedPoint",
    "Fp8e4m3OCPDynamicActPerRowFloat",
    "Fp8e4m3OCPDynamicActPerTensorFloat",
    "Fp8e5m2OCPDynamicActPerTensorFloat",
]


class DynamicFloatAct(MaxStatsScaling):
    """The largest magnitude of each input is scaled to the largest number."""

    proxy_class = DynamicActFloatQuantProxyFromInjector


class _FloorPowerOfTwo(Injector):
    restrict_scaling_type = RestrictValueType.POWER_OF_TWO
    restrict_value_float_to_int_impl: Any = FloorSte


class Fp8e4m3OCPDynamicActPerTensorFloat(DynamicFloatAct, Fp8e4m3OCPActPerTensorFloat):
    """OCP E4M3 (up to 448): activations, one scale for each input."""


class Fp8e4m3OCPDynamicActPerRowFloat(PerRow, Fp8e4m3OCPDynamicActPerTensorFloat):
    """OCP E4M3 (up to 448): activations, a scale for each row of each input."""


class Fp8e4m3OCPDynamicActPerRowFixedPoint(_FloorPowerOfTwo, Fp8e4m3OCPDynamicActPerRowFloat):
    """OCP E4M3 (up to 448): activations, a power of two for each row of each input."""


class Fp8e5m2OCPDynamicActPerTensorFloat(DynamicFloatAct, Fp8e5m2OCPActPerTensorFloat):
    """OCP E5M2 (up to 57344): activations, one scale for each input."""


class Fp8e4m3FNUZDynamicActPerTensorFloat(DynamicFloatAct, Fp8e4m3FNUZActPerTensorFloat):
    """FNUZ E4M3 (up to 240): activations, one scale for each input."""


class Fp8e4m3FNUZDynamicActPerRowFloat(PerRow, Fp8e4m3FNUZDynamicActPerTensorFloat):
    """FNUZ E4M3 (up to 240): activations, a scale for each row of each input."""
