"""The keywords of layers, for type checkers and editors: policies and parts of each quantizer, by prefix.

Made by ``python tests/layers/keywords_text.py`` from :class:`qframework.inject.policy.Policy`, where each is explained. At run
time further names are taken: whatever a quantizer class binds.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import nn

from qframework.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    LearnedRoundImplType,
    MSESearchMethod,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
    StatsOp,
    TruncScalingImplType,
)

BitWidthImplTypeName = BitWidthImplType | Literal["const", "parameter", "stateful_const"]
FloatToIntImplTypeName = (
    FloatToIntImplType
    | Literal[
        "round",
        "ceil",
        "floor",
        "round_to_zero",
        "dpu",
        "learned_round",
        "stochastic_round",
    ]
)
LearnedRoundImplTypeName = LearnedRoundImplType | Literal["hard_sigmoid", "sigmoid", "identity"]
MSESearchMethodName = MSESearchMethod | Literal["grid", "fibonacci"]
QuantTypeName = QuantType | Literal["binary", "ternary", "int", "fp"]
RestrictValueTypeName = (
    RestrictValueType
    | Literal[
        "fp",
        "signed_fp",
        "log_fp",
        "int",
        "power_of_two",
    ]
)
ScalingImplTypeName = (
    ScalingImplType
    | Literal[
        "he",
        "const",
        "stats",
        "affine_stats",
        "parameter",
        "parameter_from_stats",
    ]
)
ScalingPerOutputTypeName = ScalingPerOutputType | Literal["tensor", "channel", "group"]
StatsOpName = (
    StatsOp
    | Literal[
        "max",
        "ave",
        "max_ave",
        "mean_sigma_std",
        "mean_learn_sigma_std",
        "percentile",
        "min_max",
        "percentile_interval",
        "signed_max",
    ]
)
TruncScalingImplTypeName = TruncScalingImplType | Literal["msb", "wrapper"]
Part = nn.Module | type[nn.Module]


class WeightKeywords(TypedDict, total=False):
    """Keywords with the prefix ``weight_``."""

    weight_quant_type: QuantTypeName
    weight_bit_width: int
    weight_bit_width_impl_type: BitWidthImplTypeName
    weight_min_bit_width: int
    weight_bit_width_offset_min_val: float | None
    weight_bit_width_offset_max_val: float | None
    weight_override_pretrained_bit_width: bool
    weight_signed: bool
    weight_narrow_range: bool
    weight_float_to_int_impl_type: FloatToIntImplTypeName
    weight_quant_delay_steps: int
    weight_scaling_impl_type: ScalingImplTypeName
    weight_scaling_stats_op: StatsOpName
    weight_scaling_per_output_type: ScalingPerOutputTypeName
    weight_scaling_per_output_channel: bool
    weight_scaling_per_row: bool
    weight_per_channel_broadcastable_shape: tuple[int, ...] | None
    weight_scaling_stats_permute_dims: tuple[int, ...] | None
    weight_restrict_scaling_type: RestrictValueTypeName
    weight_scaling_min_val: float | None
    weight_scaling_const: float
    weight_min_val: float
    weight_max_val: float
    weight_collect_stats_steps: int
    weight_scaling_stats_momentum: float | None
    weight_zero_point_stats_momentum: float | None
    weight_high_percentile_q: float
    weight_low_percentile_q: float
    weight_sigma: float
    weight_std_dev_epsilon: float
    weight_scaling_affine_rescaling_init: float | None
    weight_scaling_affine_shifting_init: float | None
    weight_zero_point_affine_rescaling_init: float | None
    weight_zero_point_affine_shifting_init: float | None
    weight_mse_iters: int
    weight_mse_search_method: MSESearchMethodName
    weight_mse_bipolar_search: bool
    weight_hqo_beta_scale: float
    weight_hqo_kappa_scale: float
    weight_hqo_lp_norm_scale: float
    weight_hqo_iters_scale: int
    weight_hqo_beta_zp: float
    weight_hqo_kappa_zp: float
    weight_hqo_lp_norm_zp: float
    weight_hqo_iters_zp: int
    weight_trunc_scaling_impl_type: TruncScalingImplTypeName
    weight_accumulator_bit_width: int
    weight_pre_scaling_min_val: float | None
    weight_force_parameter: bool
    weight_quantize_zero_point: bool
    weight_requires_input_scale: bool
    weight_threshold: float
    weight_exponent_bit_width: int
    weight_mantissa_bit_width: int
    weight_exponent_bias: int
    weight_exponent_bit_width_impl_type: BitWidthImplTypeName
    weight_mantissa_bit_width_impl_type: BitWidthImplTypeName
    weight_saturating: bool
    weight_inf_values: tuple[str, ...] | None
    weight_nan_values: tuple[str, ...] | None
    weight_max_available_float: float | None
    weight_group_size: int
    weight_group_dim: int
    weight_group_padding: bool
    weight_codebook: tuple[float, ...]
    weight_apot_base_bits: int
    weight_learned_round_impl_type: LearnedRoundImplTypeName
    weight_learned_round_zeta: float
    weight_learned_round_gamma: float
    weight_learned_round_temperature: float
    weight_deterministic_inference: bool
    weight_seed: int | None
    weight_bit_width_impl: Part
    weight_float_to_int_impl: Part
    weight_input_view_impl: Part
    weight_int_scaling_impl: Part
    weight_learned_round_impl: Part
    weight_restrict_scaling_impl: Part
    weight_scaling_impl: Part
    weight_scaling_stats_impl: Part
    weight_scaling_stats_input_view_shape_impl: Part
    weight_tensor_clamp_impl: Part
    weight_zero_point_impl: Part
    weight_zero_point_stats_input_view_shape_impl: Part


class BiasKeywords(TypedDict, total=False):
    """Keywords with the prefix ``bias_``."""

    bias_quant_type: QuantTypeName
    bias_bit_width: int
    bias_bit_width_impl_type: BitWidthImplTypeName
    bias_min_bit_width: int
    bias_bit_width_offset_min_val: float | None
    bias_bit_width_offset_max_val: float | None
    bias_override_pretrained_bit_width: bool
    bias_signed: bool
    bias_narrow_range: bool
    bias_float_to_int_impl_type: FloatToIntImplTypeName
    bias_quant_delay_steps: int
    bias_scaling_impl_type: ScalingImplTypeName
    bias_scaling_stats_op: StatsOpName
    bias_scaling_per_output_type: ScalingPerOutputTypeName
    bias_scaling_per_output_channel: bool
    bias_scaling_per_row: bool
    bias_per_channel_broadcastable_shape: tuple[int, ...] | None
    bias_scaling_stats_permute_dims: tuple[int, ...] | None
    bias_restrict_scaling_type: RestrictValueTypeName
    bias_scaling_min_val: float | None
    bias_scaling_const: float
    bias_min_val: float
    bias_max_val: float
    bias_collect_stats_steps: int
    bias_scaling_stats_momentum: float | None
    bias_zero_point_stats_momentum: float | None
    bias_high_percentile_q: float
    bias_low_percentile_q: float
    bias_sigma: float
    bias_std_dev_epsilon: float
    bias_scaling_affine_rescaling_init: float | None
    bias_scaling_affine_shifting_init: float | None
    bias_zero_point_affine_rescaling_init: float | None
    bias_zero_point_affine_shifting_init: float | None
    bias_mse_iters: int
    bias_mse_search_method: MSESearchMethodName
    bias_mse_bipolar_search: bool
    bias_hqo_beta_scale: float
    bias_hqo_kappa_scale: float
    bias_hqo_lp_norm_scale: float
    bias_hqo_iters_scale: int
    bias_hqo_beta_zp: float
    bias_hqo_kappa_zp: float
    bias_hqo_lp_norm_zp: float
    bias_hqo_iters_zp: int
    bias_trunc_scaling_impl_type: TruncScalingImplTypeName
    bias_accumulator_bit_width: int
    bias_pre_scaling_min_val: float | None
    bias_force_parameter: bool
    bias_quantize_zero_point: bool
    bias_requires_input_scale: bool
    bias_threshold: float
    bias_exponent_bit_width: int
    bias_mantissa_bit_width: int
    bias_exponent_bias: int
    bias_exponent_bit_width_impl_type: BitWidthImplTypeName
    bias_mantissa_bit_width_impl_type: BitWidthImplTypeName
    bias_saturating: bool
    bias_inf_values: tuple[str, ...] | None
    bias_nan_values: tuple[str, ...] | None
    bias_max_available_float: float | None
    bias_group_size: int
    bias_group_dim: int
    bias_group_padding: bool
    bias_codebook: tuple[float, ...]
    bias_apot_base_bits: int
    bias_learned_round_impl_type: LearnedRoundImplTypeName
    bias_learned_round_zeta: float
    bias_learned_round_gamma: float
    bias_learned_round_temperature: float
    bias_deterministic_inference: bool
    bias_seed: int | None
    bias_bit_width_impl: Part
    bias_float_to_int_impl: Part
    bias_input_view_impl: Part
    bias_int_scaling_impl: Part
    bias_learned_round_impl: Part
    bias_restrict_scaling_impl: Part
    bias_scaling_impl: Part
    bias_scaling_stats_impl: Part
    bias_scaling_stats_input_view_shape_impl: Part
    bias_tensor_clamp_impl: Part
    bias_zero_point_impl: Part
    bias_zero_point_stats_input_view_shape_impl: Part


class InputKeywords(TypedDict, total=False):
    """Keywords with the prefix ``input_``."""

    input_quant_type: QuantTypeName
    input_bit_width: int
    input_bit_width_impl_type: BitWidthImplTypeName
    input_min_bit_width: int
    input_bit_width_offset_min_val: float | None
    input_bit_width_offset_max_val: float | None
    input_override_pretrained_bit_width: bool
    input_signed: bool
    input_narrow_range: bool
    input_float_to_int_impl_type: FloatToIntImplTypeName
    input_quant_delay_steps: int
    input_scaling_impl_type: ScalingImplTypeName
    input_scaling_stats_op: StatsOpName
    input_scaling_per_output_type: ScalingPerOutputTypeName
    input_scaling_per_output_channel: bool
    input_scaling_per_row: bool
    input_per_channel_broadcastable_shape: tuple[int, ...] | None
    input_scaling_stats_permute_dims: tuple[int, ...] | None
    input_restrict_scaling_type: RestrictValueTypeName
    input_scaling_min_val: float | None
    input_scaling_const: float
    input_min_val: float
    input_max_val: float
    input_collect_stats_steps: int
    input_scaling_stats_momentum: float | None
    input_zero_point_stats_momentum: float | None
    input_high_percentile_q: float
    input_low_percentile_q: float
    input_sigma: float
    input_std_dev_epsilon: float
    input_scaling_affine_rescaling_init: float | None
    input_scaling_affine_shifting_init: float | None
    input_zero_point_affine_rescaling_init: float | None
    input_zero_point_affine_shifting_init: float | None
    input_mse_iters: int
    input_mse_search_method: MSESearchMethodName
    input_mse_bipolar_search: bool
    input_hqo_beta_scale: float
    input_hqo_kappa_scale: float
    input_hqo_lp_norm_scale: float
    input_hqo_iters_scale: int
    input_hqo_beta_zp: float
    input_hqo_kappa_zp: float
    input_hqo_lp_norm_zp: float
    input_hqo_iters_zp: int
    input_trunc_scaling_impl_type: TruncScalingImplTypeName
    input_accumulator_bit_width: int
    input_pre_scaling_min_val: float | None
    input_force_parameter: bool
    input_quantize_zero_point: bool
    input_requires_input_scale: bool
    input_threshold: float
    input_exponent_bit_width: int
    input_mantissa_bit_width: int
    input_exponent_bias: int
    input_exponent_bit_width_impl_type: BitWidthImplTypeName
    input_mantissa_bit_width_impl_type: BitWidthImplTypeName
    input_saturating: bool
    input_inf_values: tuple[str, ...] | None
    input_nan_values: tuple[str, ...] | None
    input_max_available_float: float | None
    input_group_size: int
    input_group_dim: int
    input_group_padding: bool
    input_codebook: tuple[float, ...]
    input_apot_base_bits: int
    input_learned_round_impl_type: LearnedRoundImplTypeName
    input_learned_round_zeta: float
    input_learned_round_gamma: float
    input_learned_round_temperature: float
    input_deterministic_inference: bool
    input_seed: int | None
    input_bit_width_impl: Part
    input_float_to_int_impl: Part
    input_input_view_impl: Part
    input_int_scaling_impl: Part
    input_learned_round_impl: Part
    input_restrict_scaling_impl: Part
    input_scaling_impl: Part
    input_scaling_stats_impl: Part
    input_scaling_stats_input_view_shape_impl: Part
    input_tensor_clamp_impl: Part
    input_zero_point_impl: Part
    input_zero_point_stats_input_view_shape_impl: Part


class OutputKeywords(TypedDict, total=False):
    """Keywords with the prefix ``output_``."""

    output_quant_type: QuantTypeName
    output_bit_width: int
    output_bit_width_impl_type: BitWidthImplTypeName
    output_min_bit_width: int
    output_bit_width_offset_min_val: float | None
    output_bit_width_offset_max_val: float | None
    output_override_pretrained_bit_width: bool
    output_signed: bool
    output_narrow_range: bool
    output_float_to_int_impl_type: FloatToIntImplTypeName
    output_quant_delay_steps: int
    output_scaling_impl_type: ScalingImplTypeName
    output_scaling_stats_op: StatsOpName
    output_scaling_per_output_type: ScalingPerOutputTypeName
    output_scaling_per_output_channel: bool
    output_scaling_per_row: bool
    output_per_channel_broadcastable_shape: tuple[int, ...] | None
    output_scaling_stats_permute_dims: tuple[int, ...] | None
    output_restrict_scaling_type: RestrictValueTypeName
    output_scaling_min_val: float | None
    output_scaling_const: float
    output_min_val: float
    output_max_val: float
    output_collect_stats_steps: int
    output_scaling_stats_momentum: float | None
    output_zero_point_stats_momentum: float | None
    output_high_percentile_q: float
    output_low_percentile_q: float
    output_sigma: float
    output_std_dev_epsilon: float
    output_scaling_affine_rescaling_init: float | None
    output_scaling_affine_shifting_init: float | None
    output_zero_point_affine_rescaling_init: float | None
    output_zero_point_affine_shifting_init: float | None
    output_mse_iters: int
    output_mse_search_method: MSESearchMethodName
    output_mse_bipolar_search: bool
    output_hqo_beta_scale: float
    output_hqo_kappa_scale: float
    output_hqo_lp_norm_scale: float
    output_hqo_iters_scale: int
    output_hqo_beta_zp: float
    output_hqo_kappa_zp: float
    output_hqo_lp_norm_zp: float
    output_hqo_iters_zp: int
    output_trunc_scaling_impl_type: TruncScalingImplTypeName
    output_accumulator_bit_width: int
    output_pre_scaling_min_val: float | None
    output_force_parameter: bool
    output_quantize_zero_point: bool
    output_requires_input_scale: bool
    output_threshold: float
    output_exponent_bit_width: int
    output_mantissa_bit_width: int
    output_exponent_bias: int
    output_exponent_bit_width_impl_type: BitWidthImplTypeName
    output_mantissa_bit_width_impl_type: BitWidthImplTypeName
    output_saturating: bool
    output_inf_values: tuple[str, ...] | None
    output_nan_values: tuple[str, ...] | None
    output_max_available_float: float | None
    output_group_size: int
    output_group_dim: int
    output_group_padding: bool
    output_codebook: tuple[float, ...]
    output_apot_base_bits: int
    output_learned_round_impl_type: LearnedRoundImplTypeName
    output_learned_round_zeta: float
    output_learned_round_gamma: float
    output_learned_round_temperature: float
    output_deterministic_inference: bool
    output_seed: int | None
    output_bit_width_impl: Part
    output_float_to_int_impl: Part
    output_input_view_impl: Part
    output_int_scaling_impl: Part
    output_learned_round_impl: Part
    output_restrict_scaling_impl: Part
    output_scaling_impl: Part
    output_scaling_stats_impl: Part
    output_scaling_stats_input_view_shape_impl: Part
    output_tensor_clamp_impl: Part
    output_zero_point_impl: Part
    output_zero_point_stats_input_view_shape_impl: Part


class PrefixedActKeywords(TypedDict, total=False):
    """Keywords with the prefix ``act_``."""

    act_quant_type: QuantTypeName
    act_bit_width: int
    act_bit_width_impl_type: BitWidthImplTypeName
    act_min_bit_width: int
    act_bit_width_offset_min_val: float | None
    act_bit_width_offset_max_val: float | None
    act_override_pretrained_bit_width: bool
    act_signed: bool
    act_narrow_range: bool
    act_float_to_int_impl_type: FloatToIntImplTypeName
    act_quant_delay_steps: int
    act_scaling_impl_type: ScalingImplTypeName
    act_scaling_stats_op: StatsOpName
    act_scaling_per_output_type: ScalingPerOutputTypeName
    act_scaling_per_output_channel: bool
    act_scaling_per_row: bool
    act_per_channel_broadcastable_shape: tuple[int, ...] | None
    act_scaling_stats_permute_dims: tuple[int, ...] | None
    act_restrict_scaling_type: RestrictValueTypeName
    act_scaling_min_val: float | None
    act_scaling_const: float
    act_min_val: float
    act_max_val: float
    act_collect_stats_steps: int
    act_scaling_stats_momentum: float | None
    act_zero_point_stats_momentum: float | None
    act_high_percentile_q: float
    act_low_percentile_q: float
    act_sigma: float
    act_std_dev_epsilon: float
    act_scaling_affine_rescaling_init: float | None
    act_scaling_affine_shifting_init: float | None
    act_zero_point_affine_rescaling_init: float | None
    act_zero_point_affine_shifting_init: float | None
    act_mse_iters: int
    act_mse_search_method: MSESearchMethodName
    act_mse_bipolar_search: bool
    act_hqo_beta_scale: float
    act_hqo_kappa_scale: float
    act_hqo_lp_norm_scale: float
    act_hqo_iters_scale: int
    act_hqo_beta_zp: float
    act_hqo_kappa_zp: float
    act_hqo_lp_norm_zp: float
    act_hqo_iters_zp: int
    act_trunc_scaling_impl_type: TruncScalingImplTypeName
    act_accumulator_bit_width: int
    act_pre_scaling_min_val: float | None
    act_force_parameter: bool
    act_quantize_zero_point: bool
    act_requires_input_scale: bool
    act_threshold: float
    act_exponent_bit_width: int
    act_mantissa_bit_width: int
    act_exponent_bias: int
    act_exponent_bit_width_impl_type: BitWidthImplTypeName
    act_mantissa_bit_width_impl_type: BitWidthImplTypeName
    act_saturating: bool
    act_inf_values: tuple[str, ...] | None
    act_nan_values: tuple[str, ...] | None
    act_max_available_float: float | None
    act_group_size: int
    act_group_dim: int
    act_group_padding: bool
    act_codebook: tuple[float, ...]
    act_apot_base_bits: int
    act_learned_round_impl_type: LearnedRoundImplTypeName
    act_learned_round_zeta: float
    act_learned_round_gamma: float
    act_learned_round_temperature: float
    act_deterministic_inference: bool
    act_seed: int | None
    act_bit_width_impl: Part
    act_float_to_int_impl: Part
    act_input_view_impl: Part
    act_int_scaling_impl: Part
    act_learned_round_impl: Part
    act_restrict_scaling_impl: Part
    act_scaling_impl: Part
    act_scaling_stats_impl: Part
    act_scaling_stats_input_view_shape_impl: Part
    act_tensor_clamp_impl: Part
    act_zero_point_impl: Part
    act_zero_point_stats_input_view_shape_impl: Part


class ActKeywords(TypedDict, total=False):
    """Keywords without a prefix."""

    quant_type: QuantTypeName
    bit_width: int
    bit_width_impl_type: BitWidthImplTypeName
    min_bit_width: int
    bit_width_offset_min_val: float | None
    bit_width_offset_max_val: float | None
    override_pretrained_bit_width: bool
    signed: bool
    narrow_range: bool
    float_to_int_impl_type: FloatToIntImplTypeName
    quant_delay_steps: int
    scaling_impl_type: ScalingImplTypeName
    scaling_stats_op: StatsOpName
    scaling_per_output_type: ScalingPerOutputTypeName
    scaling_per_output_channel: bool
    scaling_per_row: bool
    per_channel_broadcastable_shape: tuple[int, ...] | None
    scaling_stats_permute_dims: tuple[int, ...] | None
    restrict_scaling_type: RestrictValueTypeName
    scaling_min_val: float | None
    scaling_const: float
    min_val: float
    max_val: float
    collect_stats_steps: int
    scaling_stats_momentum: float | None
    zero_point_stats_momentum: float | None
    high_percentile_q: float
    low_percentile_q: float
    sigma: float
    std_dev_epsilon: float
    scaling_affine_rescaling_init: float | None
    scaling_affine_shifting_init: float | None
    zero_point_affine_rescaling_init: float | None
    zero_point_affine_shifting_init: float | None
    mse_iters: int
    mse_search_method: MSESearchMethodName
    mse_bipolar_search: bool
    hqo_beta_scale: float
    hqo_kappa_scale: float
    hqo_lp_norm_scale: float
    hqo_iters_scale: int
    hqo_beta_zp: float
    hqo_kappa_zp: float
    hqo_lp_norm_zp: float
    hqo_iters_zp: int
    trunc_scaling_impl_type: TruncScalingImplTypeName
    accumulator_bit_width: int
    pre_scaling_min_val: float | None
    force_parameter: bool
    quantize_zero_point: bool
    requires_input_scale: bool
    threshold: float
    exponent_bit_width: int
    mantissa_bit_width: int
    exponent_bias: int
    exponent_bit_width_impl_type: BitWidthImplTypeName
    mantissa_bit_width_impl_type: BitWidthImplTypeName
    saturating: bool
    inf_values: tuple[str, ...] | None
    nan_values: tuple[str, ...] | None
    max_available_float: float | None
    group_size: int
    group_dim: int
    group_padding: bool
    codebook: tuple[float, ...]
    apot_base_bits: int
    learned_round_impl_type: LearnedRoundImplTypeName
    learned_round_zeta: float
    learned_round_gamma: float
    learned_round_temperature: float
    deterministic_inference: bool
    seed: int | None
    bit_width_impl: Part
    float_to_int_impl: Part
    input_view_impl: Part
    int_scaling_impl: Part
    learned_round_impl: Part
    restrict_scaling_impl: Part
    scaling_impl: Part
    scaling_stats_impl: Part
    scaling_stats_input_view_shape_impl: Part
    tensor_clamp_impl: Part
    zero_point_impl: Part
    zero_point_stats_input_view_shape_impl: Part


class WeightLayerKeywords(WeightKeywords, BiasKeywords, InputKeywords, OutputKeywords, total=False):
    """Of layers with a weight, a bias, an input and an output to quantize."""


class ActLayerKeywords(ActKeywords, PrefixedActKeywords, InputKeywords, total=False):
    """Of activation functions; those of the result go with the prefix ``act_`` or without."""
