"""The views that statistics are taken of, by the names that quantizers choose them by."""

from __future__ import annotations

from qframework.core.function_wrapper import (
    OverBatchOverOutputChannelView,
    OverBatchOverTensorView,
    OverOutputChannelView,
    OverOutputFeaturesView,
    OverTensorView,
)
from qframework.core.groups import DynamicOverSubChannelBlockView, OverSubChannelBlockView


class StatsInputViewShapeImpl:
    """Values for ``scaling_stats_input_view_shape_impl`` and its like: the classes of views."""

    OVER_TENSOR = OverTensorView
    OVER_OUTPUT_CHANNELS = OverOutputChannelView
    OVER_BATCH_OVER_TENSOR = OverBatchOverTensorView
    OVER_BATCH_OVER_OUTPUT_CHANNELS = OverBatchOverOutputChannelView
    OVER_OUTPUT_FEATURES = OverOutputFeaturesView
    OVER_SUBCHANNEL_BLOCK = OverSubChannelBlockView
    DYNAMIC_OVER_SUBCHANNEL_BLOCK = DynamicOverSubChannelBlockView
