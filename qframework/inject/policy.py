"""The policy variables: what a user may set on any quantizer, with type, range and meaning.

One documented pydantic model is the single source of the checks, of error messages and of the documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qframework.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    LearnedRoundImplType,
    MSESearchMethod,
    PolicyEnum,
    QuantType,
    RestrictValueType,
    ScalingImplType,
    ScalingPerOutputType,
    StatsOp,
    TruncScalingImplType,
)
from qframework.inject.errors import PolicyTypeError, PolicyValueError, did_you_mean


def _member(enum: type[PolicyEnum], value: Any) -> Any:
    allowed = ", ".join(repr(m.value) for m in enum)
    if isinstance(value, enum):
        return value
    if isinstance(value, PolicyEnum):
        raise ValueError(f"is a {type(value).__name__}, needed is a {enum.__name__}: {allowed}")
    if isinstance(value, str):
        try:
            return enum(value)
        except ValueError:
            hint = did_you_mean(value.lower(), [m.value for m in enum])
            raise ValueError(f"allowed: {allowed}{hint}") from None
    raise ValueError(f"is a {type(value).__name__}, needed is a {enum.__name__}: {allowed}")


def _choice(enum: type[PolicyEnum]) -> Any:
    return BeforeValidator(partial(_member, enum))


def _plain(value: Any) -> Any:
    """Numbers and flags of NumPy, and tensors of one element, as those of Python."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value
    return value.item() if isinstance(value, np.generic) else value


def _number(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, (bool, str)):
        raise ValueError(f"is a {type(value).__name__}, needed is a number")
    return value


def _whole(value: Any) -> Any:
    value = _plain(value)
    if not isinstance(value, float):
        return value
    if not value.is_integer():
        raise ValueError("must be a whole number")
    return int(value)


def _axes(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, torch.Size)) else value


Flag = Annotated[bool, BeforeValidator(_plain), Field(strict=True)]
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Bits = Annotated[Whole, Field(ge=1, le=32)]
Count = Annotated[Whole, Field(ge=1)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Percent = Annotated[float, BeforeValidator(_number), Field(ge=0, le=100)]
Norm = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]
Codes = Annotated[tuple[Annotated[str, Field(pattern="^[01]*$")], ...], Field(min_length=1)]
Shape = Annotated[tuple[int, ...], BeforeValidator(_axes)]


class Policy(BaseModel):
    """All policy variables.

    A default is what is in effect where no quantizer class says otherwise; a variable without one has to be bound by
    the class, as the predefined quantizers do, or by a keyword.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, validate_assignment=True)

    quant_type: Annotated[QuantType, _choice(QuantType)] = Field(
        QuantType.INT, description="Number format; 'fp' switches quantization off."
    )
    bit_width: Bits = Field(
        description="Bits of an integer, a whole number from 1 to 32; the initial width where it is learned.",
    )
    bit_width_impl_type: Annotated[BitWidthImplType, _choice(BitWidthImplType)] = Field(
        BitWidthImplType.CONST,
        description="Whether the bit width is fixed, fixed but saved, or learned.",
    )
    min_bit_width: Bits = Field(2, description="Base of a learned bit width.")
    bit_width_offset_min_val: Positive | None = Field(
        None, description="Lower bound of a learned width, bits."
    )
    bit_width_offset_max_val: Positive | None = Field(
        None, description="Upper bound of a learned width, bits."
    )
    override_pretrained_bit_width: Flag = Field(
        False, description="Keep the declared width when a state dict with a learned one is loaded."
    )
    signed: Flag = Field(description="Two's complement integers, or integers from 0.")
    narrow_range: Flag = Field(description="Leave one code out: signed ranges become symmetric.")
    float_to_int_impl_type: Annotated[FloatToIntImplType, _choice(FloatToIntImplType)] = Field(
        FloatToIntImplType.ROUND,
        description="How a number between two integers becomes one of them.",
    )
    quant_delay_steps: Annotated[Whole, Field(ge=0)] = Field(
        0, description="Training calls before quantization starts."
    )
    scaling_impl_type: Annotated[ScalingImplType, _choice(ScalingImplType)] = Field(
        ScalingImplType.STATS,
        description="Where the scale comes from; 'parameter_from_stats' on activations.",
    )
    scaling_stats_op: Annotated[StatsOp, _choice(StatsOp)] = Field(
        StatsOp.MAX, description="Statistic that the scale is made of; 'percentile' on activations."
    )
    scaling_per_output_type: Annotated[ScalingPerOutputType, _choice(ScalingPerOutputType)] = Field(
        ScalingPerOutputType.TENSOR,
        description="Granularity: one scale a tensor, channel or group.",
    )
    scaling_per_output_channel: Flag = Field(
        False, description="Older form of scaling_per_output_type; wins over it when set."
    )
    scaling_per_row: Flag = Field(
        False, description="A scale for each row (last axis) of a dynamic activation."
    )
    per_channel_broadcastable_shape: Shape | None = Field(
        None, description="Shape of a per-channel activation scale, such as (1, C, 1, 1)."
    )
    scaling_stats_permute_dims: Shape | None = Field(
        None,
        description="Order of axes that brings the channels of an activation first: (1, 0, 2, 3).",
    )
    restrict_scaling_type: Annotated[RestrictValueType, _choice(RestrictValueType)] = Field(
        RestrictValueType.FP, description="Which values the scale may take."
    )
    scaling_min_val: NotNegative | None = Field(
        None,
        description="Lower bound of the statistic before it is divided by the integer threshold.",
    )
    scaling_const: Positive = Field(
        description="Initial or fixed largest value of a weight's scale."
    )
    min_val: Number = Field(description="Lower end of an activation's initial range.")
    max_val: Number = Field(description="Upper end of an activation's initial range.")
    collect_stats_steps: Count = Field(
        description="Training calls that activation statistics are collected over."
    )
    scaling_stats_momentum: Share | None = Field(
        0.1, description="Momentum of the running statistic; None for the plain mean."
    )
    zero_point_stats_momentum: Share | None = Field(
        0.1, description="Momentum of the zero point's running statistic; None for the plain mean."
    )
    high_percentile_q: Percent = Field(description="Upper percentile, in percent.")
    low_percentile_q: Percent = Field(description="Lower percentile, in percent.")
    sigma: Positive = Field(description="Standard deviations above the mean magnitude.")
    std_dev_epsilon: Positive = Field(1e-8, description="Added to the variance.")
    scaling_affine_rescaling_init: Number | None = Field(
        None, description="Initial weight of a learned map on the statistic."
    )
    scaling_affine_shifting_init: Number | None = Field(
        None, description="Initial bias of that map."
    )
    zero_point_affine_rescaling_init: Number | None = Field(
        None, description="The same for the zero point."
    )
    zero_point_affine_shifting_init: Number | None = Field(
        None, description="The same for the zero point."
    )
    mse_iters: Annotated[Whole, Field(ge=2)] = Field(
        20, description="Candidates of a search for the least squared error."
    )
    mse_search_method: Annotated[MSESearchMethod, _choice(MSESearchMethod)] = Field(
        MSESearchMethod.GRID,
        description="Try equally spaced candidates, or narrow the interval down beside them.",
    )
    mse_bipolar_search: Flag = Field(False, description="Half of the candidates of the other sign.")
    hqo_beta_scale: Positive = Field(
        1e5, description="First weight of a half-quadratic search's split of outliers."
    )
    hqo_kappa_scale: Positive = Field(1.01, description="Factor on it per step.")
    hqo_lp_norm_scale: Norm = Field(0.7, description="Norm that its outliers are measured by.")
    hqo_iters_scale: Count = Field(1000, description="At most so many steps.")
    hqo_beta_zp: Positive = Field(1.0, description="The same for the zero point.")
    hqo_kappa_zp: Positive = Field(1.01, description="The same for the zero point.")
    hqo_lp_norm_zp: Norm = Field(0.5, description="The same for the zero point.")
    hqo_iters_zp: Count = Field(1000, description="The same for the zero point.")
    trunc_scaling_impl_type: Annotated[TruncScalingImplType, _choice(TruncScalingImplType)] = Field(
        TruncScalingImplType.MSB,
        description="Divide an accumulator by what leaves its most significant bits, or by a scale of its integers.",
    )
    accumulator_bit_width: Bits = Field(
        32, description="Bits of the accumulator that no input may overflow, sign included."
    )
    pre_scaling_min_val: NotNegative | None = Field(
        None, description="Lower bound of a learned norm and of an accumulator-aware pre-scale."
    )
    force_parameter: Flag = Field(
        False, description="Take statistics of the stored parameter, whatever is given."
    )
    quantize_zero_point: Flag = Field(
        description="Round the zero point to an integer of the range."
    )
    requires_input_scale: Flag = Field(
        True, description="A bias takes input scale times weight scale as its own."
    )
    threshold: Share = Field(
        description="Half width of a ternary quantizer's dead zone, a fraction of the scale."
    )
    exponent_bit_width: Annotated[Whole, Field(ge=1, le=8)] = Field(
        description="Bits of a minifloat's exponent, 1 to 8; the initial width where it is learned."
    )
    mantissa_bit_width: Annotated[Whole, Field(ge=0, le=23)] = Field(
        description="Bits of a minifloat's mantissa, 0 to 23; the initial width where it is learned."
    )
    exponent_bias: Whole = Field(
        description="A minifloat's smallest normal number is 2^(1 - bias); that of IEEE 754 unless bound."
    )
    exponent_bit_width_impl_type: Annotated[BitWidthImplType, _choice(BitWidthImplType)] = Field(
        BitWidthImplType.CONST, description="Whether the exponent's width is fixed or learned."
    )
    mantissa_bit_width_impl_type: Annotated[BitWidthImplType, _choice(BitWidthImplType)] = Field(
        BitWidthImplType.CONST, description="Whether the mantissa's width is fixed or learned."
    )
    saturating: Flag = Field(
        True, description="Minifloats that are too large become the largest; else infinity or NaN."
    )
    inf_values: Codes | None = Field(
        None, description="Mantissas that mean infinity at the top exponent, as bits: ('00',)."
    )
    nan_values: Codes | None = Field(
        None, description="Mantissas that mean NaN at the top exponent, as bits: ('111',)."
    )
    max_available_float: Positive | None = Field(
        None, description="Largest minifloat; that below the reserved codes unless bound."
    )
    group_size: Count = Field(description="Elements that share a scale, with granularity 'group'.")
    group_dim: Whole = Field(
        description="Axis that is split into groups; the input features of a weight unless bound."
    )
    group_padding: Flag = Field(
        True,
        description="Fill up the last group with zeros where the axis is no multiple of a group.",
    )
    codebook: Annotated[tuple[float, ...], Field(min_length=2)] = Field(
        description="Entries of a codebook, two or more, in any order."
    )
    apot_base_bits: Count = Field(2, description="Bits of each term of an additive power of two.")
    learned_round_impl_type: Annotated[LearnedRoundImplType, _choice(LearnedRoundImplType)] = Field(
        LearnedRoundImplType.HARD_SIGMOID, description="Parametrization of learned rounding."
    )
    learned_round_zeta: Number = Field(1.1, description="Upper stretch of the hard sigmoid.")
    learned_round_gamma: Number = Field(-0.1, description="Lower stretch of the hard sigmoid.")
    learned_round_temperature: Positive = Field(1.0, description="Temperature of the sigmoid.")
    deterministic_inference: Flag = Field(
        True, description="Stochastic rounding rounds to nearest in evaluation."
    )
    seed: Whole | None = Field(None, description="Seed of stochastic rounding.")


#: Names that are bound to classes or modules rather than to values: one per slot of a quantizer.
SLOTS = {
    "tensor_quant": "the tensor quantizer; None switches quantization off",
    "proxy_class": "the proxy that a layer holds",
    "scaling_impl": "the scale",
    "scaling_stats_impl": "the scale's statistic",
    "scaling_stats_input_view_shape_impl": "the view that the statistic reduces over",
    "scaling_init": "initial value of the scale",
    "scaling_shape": "shape of the scale",
    "int_scaling_impl": "the integer threshold",
    "restrict_scaling_impl": "the domain of the scale",
    "restrict_threshold_impl": "the domain of the threshold",
    "restrict_scale_threshold_impl": "applied to the final scale",
    "restrict_value_float_to_int_impl": "rounding of integer and power-of-two domains",
    "decoupled_int_quant": "rounds by one scale, dequantizes by another",
    "pre_scaling_impl": "the scale of the integers of a decoupled quantizer",
    "pre_scaling_scale_impl": "the scale within it",
    "pre_scaling_shape": "its shape",
    "pre_zero_point_impl": "the zero point of those integers",
    "pre_zero_point_stats_input_view_shape_impl": "the view that its means are taken of",
    "pre_zero_point_shape": "its shape",
    "normalize_stats_impl": "the norm of a channel in weight normalization",
    "restrict_pre_scaling_impl": "the domain of the learned norm",
    "accumulator_bit_width_impl": "the accumulator's bit width",
    "zero_point_impl": "the zero point",
    "zero_point_stats_impl": "the zero point's statistic",
    "zero_point_stats_input_view_shape_impl": "the view for it",
    "zero_point_shape": "shape of the zero point",
    "zero_point_init": "initial value of the zero point",
    "scale_shift_zero_point_impl": "from offset and scale to the zero point",
    "bit_width_impl": "the bit width",
    "restrict_bit_width_impl": "rounding of a learned bit width",
    "int_quant": "rounds and clamps",
    "float_to_int_impl": "the rounding rule",
    "tensor_clamp_impl": "the clamp",
    "trunc_scaling_impl": "what the integers of an accumulator are divided by",
    "trunc_int_scaling_impl": "the integer threshold of that scale",
    "input_view_impl": "shapes the input",
    "stats_reduce_dim": "axis of the statistic",
    "act_impl": "activation function in front of the quantizer",
    "passthrough_act": "whether it keeps a quantized input on its grid",
    "exponent_bit_width_impl": "bits of a minifloat's exponent",
    "mantissa_bit_width_impl": "bits of a minifloat's mantissa",
    "exponent_bias_impl": "a minifloat's bias",
    "compute_max_mantissa": "the largest significand of a width",
    "float_scaling_impl": "the largest number of a format, threshold of its scale",
    "float_clamp_impl": "what becomes of numbers beyond it",
    "keepdim": "whether a statistic keeps its axis",
    "learned_round_impl": "parametrization of learned rounding",
    "learned_round_init": "its initial value",
}

#: How keywords of layers begin, of which a quantizer's own names have none.
KEYWORD_PREFIXES = ("weight_", "bias_", "act_", "input_", "output_", "io_", "trunc_")

#: Switches that other libraries have or had, which have no meaning here: of caches (what is kept is asked for by
#: ``qframework.frozen``), and of scales and widths of results, which quantized tensors always know.
IGNORED_KEYWORDS = frozenset(
    {
        "cache_inference_quant_act",
        "cache_inference_quant_bias",
        "cache_inference_quant_bias_metadata_only",
        "cache_inference_quant_io",
        "cache_inference_quant_io_metadata_only",
        "cache_inference_quant_weight",
        "cache_inference_quant_weight_metadata_only",
        "cache_quant_io_metadata_only",
        "compute_output_bit_width",
        "compute_output_scale",
    }
)

POLICY_NAMES: frozenset[str] = frozenset(Policy.model_fields) | frozenset(SLOTS)

_validate: Callable[..., Any] = Policy.__pydantic_validator__.validate_assignment
#: Values that a later call finds as they were; of others, such as tensors, nothing is kept.
_UNCHANGING = (int, float, str, PolicyEnum)
_checked: dict[tuple[str, type, Any] | None, Any] = {}


def setting_name(name: str) -> str | None:
    """The policy variable that an attribute is named after, with a prefix or without; None where it isn't.

    Args:
        name: of the attribute.
    """
    for prefix in ("", *KEYWORD_PREFIXES):
        bare = name.removeprefix(prefix)
        if name.startswith(prefix) and bare in Policy.model_fields:
            return bare
    return None


def check_policy(name: str, value: Any) -> Any:
    """The value of a policy variable, checked; a string becomes a member of its enum.

    Raises:
        PolicyValueError: out of range, or not one of the choices.
        PolicyTypeError: of a type that can't be.
    """
    if name not in Policy.model_fields:
        return value
    key = (name, type(value), value) if isinstance(value, _UNCHANGING) else None
    if key in _checked:
        return _checked[key]
    try:
        result = _check(name, value)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        range_or_choice = first["type"] not in ("int_type", "bool_type", "float_type", "tuple_type")
        raise (PolicyValueError if range_or_choice else PolicyTypeError)(
            f"{message}{'' if message.endswith('?') else '.'} {Policy.model_fields[name].description}"
        ) from None
    if key is not None:
        _checked[key] = result
    return result


def _check(name: str, value: Any) -> Any:
    probe = Policy.model_construct()
    _validate(probe, name, value)
    return getattr(probe, name)
