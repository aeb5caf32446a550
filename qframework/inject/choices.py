"""One table per slot: from an enum policy to the class that carries it out.

A quantizer that binds the slot itself bypasses the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qframework.core.binary import BinaryQuant, ClampedBinaryQuant, TernaryQuant
from qframework.core.bit_width import BitWidthConst, BitWidthParameter, BitWidthStatefulConst
from qframework.core.dynamic import RuntimeDynamicStatsScaling
from qframework.core.function_wrapper import (
    CeilSte,
    DPURoundSte,
    FloorSte,
    RoundSte,
    RoundToZeroSte,
)
from qframework.core.learned_round import (
    LearnedRoundHardSigmoid,
    LearnedRoundIdentity,
    LearnedRoundSigmoid,
    LearnedRoundSte,
)
from qframework.core.quant import PrescaledRestrictIntQuant, RescalingIntQuant
from qframework.core.restrict_val import (
    FloatRestrictValue,
    IntRestrictValue,
    LogFloatRestrictValue,
    PowerOfTwoRestrictValue,
    SignedFloatRestrictValue,
)
from qframework.core.scaling import (
    ConstScaling,
    IntScaling,
    ParameterFromRuntimeStatsScaling,
    ParameterFromStatsFromParameterScaling,
    ParameterScaling,
    PowerOfTwoIntScaling,
    RuntimeStatsScaling,
    StatsFromParameterScaling,
)
from qframework.core.stats import (
    AbsAve,
    AbsMax,
    AbsMaxAve,
    AbsMinMax,
    AbsPercentile,
    MeanLearnedSigmaStd,
    MeanSigmaStd,
    PercentileInterval,
    SignedAbsMax,
)
from qframework.core.stochastic_round import StochasticRoundSte
from qframework.core.trunc import (
    TruncIntQuant,
    TruncIntScaling,
    TruncMsbScaling,
    TruncPowerOfTwoIntScaling,
    TruncScalingWrapper,
)
from qframework.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    LearnedRoundImplType,
    PolicyEnum,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    StatsOp,
    TruncScalingImplType,
)
from qframework.inject.errors import PolicyValueError

WEIGHT_TENSOR_QUANT = {
    QuantType.INT: RescalingIntQuant,
    QuantType.BINARY: BinaryQuant,
    QuantType.TERNARY: TernaryQuant,
    QuantType.FP: None,
}
ACT_TENSOR_QUANT = {**WEIGHT_TENSOR_QUANT, QuantType.BINARY: ClampedBinaryQuant}
BIAS_TENSOR_QUANT = {QuantType.INT: RescalingIntQuant, QuantType.FP: None}
PRESCALED_BIAS_TENSOR_QUANT = {QuantType.INT: PrescaledRestrictIntQuant, QuantType.FP: None}

BIT_WIDTH = {
    BitWidthImplType.CONST: BitWidthConst,
    BitWidthImplType.PARAMETER: BitWidthParameter,
    BitWidthImplType.STATEFUL_CONST: BitWidthStatefulConst,
}

PARAMETER_SCALING = {
    ScalingImplType.CONST: ConstScaling,
    ScalingImplType.HE: ConstScaling,
    ScalingImplType.PARAMETER: ParameterScaling,
    ScalingImplType.STATS: StatsFromParameterScaling,
    ScalingImplType.AFFINE_STATS: StatsFromParameterScaling,
    ScalingImplType.PARAMETER_FROM_STATS: ParameterFromStatsFromParameterScaling,
}
ACT_SCALING = {
    ScalingImplType.CONST: ConstScaling,
    ScalingImplType.PARAMETER: ParameterScaling,
    ScalingImplType.STATS: RuntimeStatsScaling,
    ScalingImplType.AFFINE_STATS: RuntimeStatsScaling,
    ScalingImplType.PARAMETER_FROM_STATS: ParameterFromRuntimeStatsScaling,
}
DYNAMIC_ACT_SCALING = {ScalingImplType.STATS: RuntimeDynamicStatsScaling}

RESTRICT = {
    RestrictValueType.FP: FloatRestrictValue,
    RestrictValueType.SIGNED_FP: SignedFloatRestrictValue,
    RestrictValueType.LOG_FP: LogFloatRestrictValue,
    RestrictValueType.INT: IntRestrictValue,
    RestrictValueType.POWER_OF_TWO: PowerOfTwoRestrictValue,
}
INT_THRESHOLD = {
    RestrictValueType.FP: IntScaling,
    RestrictValueType.SIGNED_FP: IntScaling,
    RestrictValueType.LOG_FP: IntScaling,
    RestrictValueType.INT: IntScaling,
    RestrictValueType.POWER_OF_TWO: PowerOfTwoIntScaling,
}

STATISTIC = {
    StatsOp.MAX: AbsMax,
    StatsOp.AVE: AbsAve,
    StatsOp.MAX_AVE: AbsMaxAve,
    StatsOp.MEAN_SIGMA_STD: MeanSigmaStd,
    StatsOp.MEAN_LEARN_SIGMA_STD: MeanLearnedSigmaStd,
    StatsOp.PERCENTILE: AbsPercentile,
    StatsOp.MIN_MAX: AbsMinMax,
    StatsOp.PERCENTILE_INTERVAL: PercentileInterval,
    StatsOp.SIGNED_MAX: SignedAbsMax,
}
#: Statistics that can be negative, which have no place in the domain of powers of two.
SIGNED_STATISTICS = frozenset({StatsOp.SIGNED_MAX})

ROUNDING = {
    FloatToIntImplType.ROUND: RoundSte,
    FloatToIntImplType.CEIL: CeilSte,
    FloatToIntImplType.FLOOR: FloorSte,
    FloatToIntImplType.ROUND_TO_ZERO: RoundToZeroSte,
    FloatToIntImplType.DPU: DPURoundSte,
    FloatToIntImplType.LEARNED_ROUND: LearnedRoundSte,
    FloatToIntImplType.STOCHASTIC_ROUND: StochasticRoundSte,
}
LEARNED_ROUND = {
    LearnedRoundImplType.HARD_SIGMOID: LearnedRoundHardSigmoid,
    LearnedRoundImplType.SIGMOID: LearnedRoundSigmoid,
    LearnedRoundImplType.IDENTITY: LearnedRoundIdentity,
}

TRUNC_TENSOR_QUANT = {QuantType.INT: TruncIntQuant, QuantType.FP: None}
TRUNC_SCALING = {
    TruncScalingImplType.MSB: TruncMsbScaling,
    TruncScalingImplType.WRAPPER: TruncScalingWrapper,
}
TRUNC_INT_THRESHOLD = {
    k: TruncPowerOfTwoIntScaling if v is PowerOfTwoIntScaling else TruncIntScaling
    for k, v in INT_THRESHOLD.items()
}


def choose(table: Mapping[Any, Any], policy: str, member: PolicyEnum, role: str) -> Any:
    """The class for a member of a policy's enum.

    Args:
        table: one of this module's.
        policy: name of the policy, for the message.
        member: the choice.
        role: what is quantized, for the message.

    Raises:
        PolicyValueError: the role doesn't have this choice.
    """
    try:
        return table[member]
    except KeyError:
        allowed = ", ".join(repr(m.value) for m in table)
        raise PolicyValueError(
            f"{policy}={str(member)!r} is not for {role}; allowed: {allowed}"
        ) from None
