"""The choices of a quantizer's policies.

Members are strings: ``'stats'``, ``'STATS'`` and ``ScalingImplType.STATS`` say the same, and compare equal
whatever their case. Members of two different enums are never equal.
"""

from __future__ import annotations

from enum import StrEnum, auto


class PolicyEnum(StrEnum):
    """Base of the policy enums."""

    @classmethod
    def _missing_(cls, value: object) -> PolicyEnum | None:
        if isinstance(value, str) and not isinstance(value, PolicyEnum):
            return cls.__members__.get(value.upper())
        return None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PolicyEnum):
            return self is other
        return isinstance(other, str) and other.lower() == self.value

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class QuantType(PolicyEnum):
    """The number format."""

    BINARY = auto()
    TERNARY = auto()
    INT = auto()
    FP = auto()


class BitWidthImplType(PolicyEnum):
    """Where a bit width comes from."""

    CONST = auto()
    PARAMETER = auto()
    STATEFUL_CONST = auto()


class ScalingImplType(PolicyEnum):
    """Where a scale comes from."""

    HE = auto()
    CONST = auto()
    STATS = auto()
    AFFINE_STATS = auto()
    PARAMETER = auto()
    PARAMETER_FROM_STATS = auto()


class RestrictValueType(PolicyEnum):
    """Which values a scale may take."""

    FP = auto()
    SIGNED_FP = auto()
    LOG_FP = auto()
    INT = auto()
    POWER_OF_TWO = auto()


class FloatToIntImplType(PolicyEnum):
    """Rounding rules."""

    ROUND = auto()
    CEIL = auto()
    FLOOR = auto()
    ROUND_TO_ZERO = auto()
    DPU = auto()
    LEARNED_ROUND = auto()
    STOCHASTIC_ROUND = auto()


class LearnedRoundImplType(PolicyEnum):
    """How a learned rounding is parametrized."""

    HARD_SIGMOID = auto()
    SIGMOID = auto()
    IDENTITY = auto()


class ScalingPerOutputType(PolicyEnum):
    """How many elements share a scale."""

    TENSOR = auto()
    CHANNEL = auto()
    GROUP = auto()


class StatsOp(PolicyEnum):
    """Statistics of a scale."""

    MAX = auto()
    AVE = auto()
    MAX_AVE = auto()
    MEAN_SIGMA_STD = auto()
    MEAN_LEARN_SIGMA_STD = auto()
    PERCENTILE = auto()
    MIN_MAX = auto()
    PERCENTILE_INTERVAL = auto()
    SIGNED_MAX = auto()


class MSESearchMethod(PolicyEnum):
    """Which candidates a search for the least squared error tries."""

    GRID = auto()
    FIBONACCI = auto()


class TruncScalingImplType(PolicyEnum):
    """What the integers of an accumulator are divided by."""

    MSB = auto()
    WRAPPER = auto()
