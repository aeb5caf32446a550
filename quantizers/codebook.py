"""Codebooks: any levels that a user names, 4-bit NormalFloat, additive powers of two."""

from __future__ import annotations

from typing import Any

from qframework.core.codebook import NORMAL_FLOAT_4, CodebookQuant, additive_powers_of_two
from qframework.inject import Injector, value
from qframework.inject.enum import RestrictValueType, ScalingPerOutputType
from qframework.proxy import (
    ActCodebookQuantProxyFromInjector,
    WeightCodebookQuantProxyFromInjector,
)
from qframework.quantizers.base import MaxStatsScaling, ParamFromRuntimePercentileScaling
from qframework.quantizers.minifloat_base import PerChannel, PerTensor
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "APoT4ActPerTensorFloat",
    "APoT4WeightPerChannelFloat",
    "APoT4WeightPerTensorFloat",
    "AdditivePowersOfTwo",
    "CodebookActPerTensorFloat",
    "CodebookBase",
    "CodebookWeightPerChannelFloat",
    "CodebookWeightPerGroupFloat",
    "CodebookWeightPerTensorFloat",
    "NF4WeightPerChannelFloat",
    "NF4WeightPerGroupFloat",
    "NF4WeightPerTensorFloat",
    "NormalFloat4",
    "UnsignedAPoT4ActPerTensorFloat",
]


class CodebookBase(Injector):
    """The entries of ``codebook``, times a scale."""

    tensor_quant = CodebookQuant
    restrict_scaling_type = RestrictValueType.FP


class NormalFloat4(Injector):
    """The 16 entries of NF4 (QLoRA, https://arxiv.org/abs/2305.14314)."""

    codebook = NORMAL_FLOAT_4


class AdditivePowersOfTwo(Injector):
    """Sums of powers of two (APoT, https://arxiv.org/abs/1909.13144)."""

    bit_width = 4
    apot_base_bits = 2

    @value
    def codebook(bit_width: int, apot_base_bits: int, signed: bool) -> Any:
        return additive_powers_of_two(bit_width, apot_base_bits, signed)


class CodebookWeightPerTensorFloat(CodebookBase, PerTensor, MaxStatsScaling, WeightQuantSolver):
    """Weights of a codebook, one scale; codebook has to be given."""

    proxy_class = WeightCodebookQuantProxyFromInjector
    signed = True


class CodebookWeightPerChannelFloat(PerChannel, CodebookWeightPerTensorFloat):
    """Weights of a codebook, a scale per output channel; codebook has to be given."""


class CodebookWeightPerGroupFloat(CodebookWeightPerTensorFloat):
    """Weights of a codebook, a scale for each group; codebook has to be given."""

    scaling_per_output_type = ScalingPerOutputType.GROUP
    group_size = 64


class CodebookActPerTensorFloat(
    CodebookBase, PerTensor, ParamFromRuntimePercentileScaling, ActQuantSolver
):
    """Activations of a codebook; the scale is collected, then learned; codebook has to be given."""

    proxy_class = ActCodebookQuantProxyFromInjector
    signed = True


class NF4WeightPerTensorFloat(NormalFloat4, CodebookWeightPerTensorFloat):
    """4-bit NormalFloat weights, one scale."""


class NF4WeightPerChannelFloat(NormalFloat4, CodebookWeightPerChannelFloat):
    """4-bit NormalFloat weights, a scale per output channel."""


class NF4WeightPerGroupFloat(NormalFloat4, CodebookWeightPerGroupFloat):
    """4-bit NormalFloat weights, a scale for each 64."""


class APoT4WeightPerTensorFloat(AdditivePowersOfTwo, CodebookWeightPerTensorFloat):
    """4-bit weights, sums of powers of two, one scale."""


class APoT4WeightPerChannelFloat(AdditivePowersOfTwo, CodebookWeightPerChannelFloat):
    """4-bit weights, sums of powers of two, a scale per output channel."""


class APoT4ActPerTensorFloat(AdditivePowersOfTwo, CodebookActPerTensorFloat):
    """4-bit signed activations, sums of powers of two; the scale is collected, then learned."""


class UnsignedAPoT4ActPerTensorFloat(APoT4ActPerTensorFloat):
    """4-bit unsigned activations, sums of powers of two; the scale is collected, then learned."""

    signed = False
