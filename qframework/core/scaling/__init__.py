"""Scales: constant, learned, computed from a parameter, collected at run time."""

from qframework.core.scaling.from_parameter import (
    ParameterFromStatsFromParameterScaling,
    StatsFromParameterScaling,
)
from qframework.core.scaling.runtime import ParameterFromRuntimeStatsScaling, RuntimeStatsScaling
from qframework.core.scaling.standalone import ConstScaling, ParameterScaling
from qframework.core.scaling.threshold import IntScaling, PowerOfTwoIntScaling

__all__ = [
    "ConstScaling",
    "IntScaling",
    "ParameterFromRuntimeStatsScaling",
    "ParameterFromStatsFromParameterScaling",
    "ParameterScaling",
    "PowerOfTwoIntScaling",
    "RuntimeStatsScaling",
    "StatsFromParameterScaling",
]
