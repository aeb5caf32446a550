"""Quantizers of well-known papers that learn their step or range: LSQ, LSQ+, PACT, DoReFa."""

from __future__ import annotations

from typing import Any

from qframework.core.decoupled import UnitThreshold
from qframework.core.learned_step import (
    ClipGradientIntQuant,
    ClipThenRoundIntQuant,
    DoReFaWeightQuant,
    LearnedOffset,
    LearnedStepFromParameter,
    LearnedStepFromRuntime,
    LearnedStepStart,
    Minimum,
    RangeStepStart,
    ThreeSigmaStepStart,
)
from qframework.inject import Injector
from qframework.inject.enum import QuantType, ScalingImplType, ScalingPerOutputType, StatsOp
from qframework.quantizers.base import (
    IntQuant,
    PerChannelFloatScaling8bit,
    PerTensorFloatScaling8bit,
    UintQuant,
)
from qframework.quantizers.solver import ActQuantSolver, WeightQuantSolver

__all__ = [
    "BinaryWeightPerTensorDoReFa",
    "Int8ActPerTensorLSQ",
    "Int8WeightPerChannelLSQ",
    "Int8WeightPerChannelLSQPlus",
    "Int8WeightPerTensorLSQ",
    "Int8WeightPerTensorLSQPlus",
    "LearnedStepAct",
    "LearnedStepWeight",
    "ShiftedUint8ActPerTensorLSQPlus",
    "Uint8ActPerTensorDoReFa",
    "Uint8ActPerTensorLSQ",
    "Uint8ActPerTensorPACT",
    "Uint8WeightPerTensorDoReFa",
]

# ------------------------------------------------------------------ building blocks


class _LearnedStep(Injector):
    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
    int_quant: Any = ClipThenRoundIntQuant
    int_scaling_impl = UnitThreshold
    scaling_stats_impl: Any = LearnedStepStart
    scaling_min_val = 1e-10


class LearnedStepWeight(_LearnedStep):
    """A learned step of weights that starts from their mean magnitude."""

    scaling_impl = LearnedStepFromParameter


class LearnedStepAct(_LearnedStep):
    """A learned step of activations that starts from the mean magnitude of the first batch."""

    scaling_impl = LearnedStepFromRuntime
    collect_stats_steps = 1


# ------------------------------------------------------------------ LSQ


class Int8WeightPerTensorLSQ(
    LearnedStepWeight, IntQuant, PerTensorFloatScaling8bit, WeightQuantSolver
):
    """LSQ weights: the step is learned from ``2 mean|w| / sqrt(Q_P)`` on (https://arxiv.org/abs/1902.08153)."""


class Int8WeightPerChannelLSQ(
    LearnedStepWeight, IntQuant, PerChannelFloatScaling8bit, WeightQuantSolver
):
    """LSQ weights with a step per output channel (https://arxiv.org/abs/1902.08153)."""


class Int8ActPerTensorLSQ(LearnedStepAct, IntQuant, PerTensorFloatScaling8bit, ActQuantSolver):
    """LSQ signed activations; the step starts from the first batch (https://arxiv.org/abs/1902.08153)."""


class Uint8ActPerTensorLSQ(LearnedStepAct, UintQuant, PerTensorFloatScaling8bit, ActQuantSolver):
    """LSQ unsigned activations; the step starts from the first batch (https://arxiv.org/abs/1902.08153)."""


# ------------------------------------------------------------------ LSQ+


class Int8WeightPerTensorLSQPlus(Int8WeightPerTensorLSQ):
    """LSQ+ weights: the step starts from ``max|mu +- 3 sigma| / 2^(b-1)`` (https://arxiv.org/abs/2004.09576)."""

    scaling_stats_impl: Any = ThreeSigmaStepStart


class Int8WeightPerChannelLSQPlus(Int8WeightPerChannelLSQ):
    """LSQ+ weights with a step per output channel (https://arxiv.org/abs/2004.09576)."""

    scaling_stats_impl: Any = ThreeSigmaStepStart


class ShiftedUint8ActPerTensorLSQPlus(
    LearnedStepAct, UintQuant, PerTensorFloatScaling8bit, ActQuantSolver
):
    """LSQ+ activations: step and offset are learned, from the range of the first batch on.

    https://arxiv.org/abs/2004.09576
    """

    scaling_stats_impl: Any = RangeStepStart
    zero_point_impl: Any = LearnedOffset
    zero_point_stats_impl = Minimum


# ------------------------------------------------------------------ PACT


class Uint8ActPerTensorPACT(UintQuant, PerTensorFloatScaling8bit, ActQuantSolver):
    """PACT activations: clipped to a learned ``[0, alpha]``, which starts from ``max_val`` = 10.

    Only clipped values move alpha (https://arxiv.org/abs/1805.06085). Its authors add weight decay on alpha, and
    quantize weights as DoReFa does.
    """

    int_quant: Any = ClipGradientIntQuant
    scaling_impl_type = ScalingImplType.PARAMETER
    scaling_min_val = 1e-10
    min_val: Any = 0.0
    max_val = 10.0


# ------------------------------------------------------------------ DoReFa


class Uint8WeightPerTensorDoReFa(UintQuant, WeightQuantSolver):
    """DoReFa weights: ``tanh``, scaled into [-1, 1], then rounded (https://arxiv.org/abs/1606.06160)."""

    tensor_quant: Any = DoReFaWeightQuant
    bit_width = 8


class BinaryWeightPerTensorDoReFa(WeightQuantSolver):
    """DoReFa weights of 1 bit: the sign times the mean magnitude (https://arxiv.org/abs/1606.06160)."""

    quant_type = QuantType.BINARY
    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = StatsOp.AVE
    scaling_min_val = 1e-10
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    bit_width = 1
    signed = True
    narrow_range = True


class Uint8ActPerTensorDoReFa(UintQuant, PerTensorFloatScaling8bit, ActQuantSolver):
    """DoReFa activations: clipped to [0, 1], then rounded (https://arxiv.org/abs/1606.06160)."""

    int_quant: Any = ClipGradientIntQuant
    scaling_impl_type = ScalingImplType.CONST
    min_val: Any = 0.0
    max_val = 1.0
