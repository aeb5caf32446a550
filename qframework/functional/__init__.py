"""Pure tensor functions: straight-through rounding and clamping, integer ranges, fused kernels."""

from qframework.functional.autograd import is_fused
from qframework.functional.codebook import codebook_quantize, codebook_reference
from qframework.functional.fake_quantize import (
    FixedStep,
    fake_quantize,
    fake_quantize_reference,
)
from qframework.functional.fixed_range import can_rectify
from qframework.functional.groups import grouped_shape, join_groups, split_groups
from qframework.functional.gru_sequence import GRURanges, gru_sequence
from qframework.functional.integer_range import check_range, max_int, min_int
from qframework.functional.learned import LearnedScaled, quantize_by_stored
from qframework.functional.lstm_sequence import LSTMRanges, lstm_sequence
from qframework.functional.minifloat import (
    MinifloatFormat,
    largest_available,
    largest_minifloat,
    minifloat_codes,
    minifloat_quantize,
    minifloat_reference,
    power_below,
)
from qframework.functional.products import convolution, linear, transposed_convolution
from qframework.functional.rnn_sequence import RNNRanges, rnn_sequence
from qframework.functional.scale import statistic_scale, stored_scale
from qframework.functional.sequence import Range, takes_sequences
from qframework.functional.spanned_weight import quantize_by_span
from qframework.functional.statistics import (
    abs_max,
    abs_max_of_channels,
    can_order,
    high_rank,
    low_rank,
    order_statistic,
)
from qframework.functional.straight_through import (
    ROUNDINGS,
    abs_binary_sign_grad,
    binary_sign_ste,
    ceil_ste,
    dpu_round_ste,
    floor_ste,
    round_ste,
    round_to_zero_ste,
    scalar_clamp_min_ste,
    scalar_clamp_ste,
    tensor_clamp,
    tensor_clamp_ste,
    ternary_sign_ste,
)
from qframework.functional.traced_statistics import percentile_if
from qframework.functional.traced_weight import forget, traced_largest
from qframework.functional.weight import LargestScaled, quantize_by_largest

__all__ = [
    "FixedStep",
    "GRURanges",
    "RNNRanges",
    "gru_sequence",
    "rnn_sequence",
    "LSTMRanges",
    "LargestScaled",
    "LearnedScaled",
    "MinifloatFormat",
    "ROUNDINGS",
    "Range",
    "abs_binary_sign_grad",
    "abs_max",
    "abs_max_of_channels",
    "binary_sign_ste",
    "can_order",
    "can_rectify",
    "ceil_ste",
    "check_range",
    "codebook_quantize",
    "codebook_reference",
    "convolution",
    "dpu_round_ste",
    "fake_quantize",
    "fake_quantize_reference",
    "forget",
    "floor_ste",
    "grouped_shape",
    "high_rank",
    "linear",
    "low_rank",
    "is_fused",
    "join_groups",
    "largest_available",
    "largest_minifloat",
    "lstm_sequence",
    "max_int",
    "min_int",
    "minifloat_codes",
    "minifloat_quantize",
    "minifloat_reference",
    "order_statistic",
    "percentile_if",
    "power_below",
    "quantize_by_largest",
    "quantize_by_span",
    "quantize_by_stored",
    "round_ste",
    "round_to_zero_ste",
    "scalar_clamp_min_ste",
    "scalar_clamp_ste",
    "split_groups",
    "statistic_scale",
    "stored_scale",
    "takes_sequences",
    "tensor_clamp",
    "tensor_clamp_ste",
    "ternary_sign_ste",
    "traced_largest",
    "transposed_convolution",
]
