"""Minifloat tensor quantizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, Stateless, wide_dtype
from qframework.core.bit_width import BitWidthConst
from qframework.core.function_wrapper import (
    Identity,
    Rounding,
    RoundSte,
    TensorClamp,
    TensorClampSte,
)
from qframework.core.minifloat import (
    ComputeMaxMantissa,
    FloatClamp,
    FloatScaling,
    StaticExponentBias,
)
from qframework.core.restrict_val import FloatRestrictValue, RestrictValue, ScaleRestriction
from qframework.core.search import beside
from qframework.functional import (
    MinifloatFormat,
    minifloat_quantize,
    minifloat_reference,
)

#: Exponents that float32 can hold, subnormal numbers included.
_LOWEST, _HIGHEST = -149, 127

FloatOutput = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    bool,
    tuple[str, ...] | None,
    tuple[str, ...] | None,
]


class FloatQuant(CoreModule):
    """Rounds to minifloats: ``y = clamp(u * round(x / (s * u))) * s``, see :mod:`qframework.functional.minifloat`.

    Args:
        signed: whether there are negative numbers.
        exponent_bit_width_impl: bits of the exponent, called with nothing.
        mantissa_bit_width_impl: bits of the mantissa, likewise.
        exponent_bias_impl: the bias, likewise.
        float_clamp_impl: what becomes of numbers beyond the largest.
        input_view_impl: shapes the input before, the identity when None.
        compute_max_mantissa: the largest significand of a width.
        scaling_impl: called with ``(x, threshold)``; None for no scale.
        float_scaling_impl: the threshold, called with the widths and the bias.
        float_to_int_impl: the rounding rule of significands.
        dtype: of the scale where there is none.
        device: likewise.

    Raises:
        ValueError: a format whose numbers float32 doesn't hold.
    """

    def __init__(
        self,
        signed: bool,
        exponent_bit_width_impl: nn.Module,
        mantissa_bit_width_impl: nn.Module,
        exponent_bias_impl: nn.Module,
        float_clamp_impl: FloatClamp,
        input_view_impl: nn.Module | None = None,
        compute_max_mantissa: nn.Module | None = None,
        scaling_impl: nn.Module | None = None,
        float_scaling_impl: nn.Module | None = None,
        float_to_int_impl: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.signed = signed
        self.exponent_bit_width_impl = exponent_bit_width_impl
        self.mantissa_bit_width_impl = mantissa_bit_width_impl
        self.exponent_bias_impl, self.float_clamp_impl = exponent_bias_impl, float_clamp_impl
        self.input_view_impl = input_view_impl or Identity()
        self.float_scaling_impl = float_scaling_impl or FloatScaling(
            float_clamp_impl.max_available_float, compute_max_mantissa or ComputeMaxMantissa()
        )
        self.float_to_int_impl = float_to_int_impl or RoundSte()
        self.scaling_impl = scaling_impl
        self.register_constant("zero", 0.0, wide_dtype(dtype), device)
        if scaling_impl is None:
            self.register_constant("one", torch.ones(1, device="cpu"), wide_dtype(dtype), device)
        self._check()

    def _check(self) -> None:
        """Refuse constant widths that float32 can't carry."""
        widths = self._constant_widths()
        if widths is None:
            return
        exponent, mantissa, bias = widths
        top, bottom = 2**exponent - 1 - bias, 1 - bias - mantissa
        if top > _HIGHEST or bottom < _LOWEST:
            raise ValueError(
                f"exponent_bit_width={exponent}, mantissa_bit_width={mantissa}, exponent_bias={bias} reaches from "
                f"2^{bottom} to 2^{top}; float32, in which it is computed, from 2^{_LOWEST} to 2^{_HIGHEST}"
            )

    def _constant_widths(self) -> tuple[int, int, int] | None:
        parts = (
            self.exponent_bit_width_impl,
            self.mantissa_bit_width_impl,
            self.exponent_bias_impl,
        )
        kinds = (BitWidthConst, BitWidthConst, StaticExponentBias)
        if not all(isinstance(p, k) for p, k in zip(parts, kinds, strict=True)):
            return None
        exponent, mantissa, bias = (p.initial for p in parts)
        return exponent, mantissa, bias  # type: ignore[return-value]

    def format(self) -> MinifloatFormat | None:
        """The format, where widths, bias, clamp and rounding are constant and fused; None for others."""
        widths, clamp = self._constant_widths(), self.float_clamp_impl
        known = (TensorClamp, TensorClampSte)
        if (
            widths is None
            or type(clamp) is not FloatClamp
            or type(clamp.tensor_clamp_impl) not in known
        ):
            return None
        if type(self.float_to_int_impl).forward is not Rounding.forward:
            return None
        if type(self.float_scaling_impl) is not FloatScaling:
            return None
        exponent, mantissa, bias = widths
        largest = float((2 - 2.0**-mantissa) * 2.0 ** (2**exponent - 1 - bias))
        bound = clamp.max_available_float
        largest = largest if bound is None else min(largest, bound)
        return MinifloatFormat(mantissa, bias, largest, self.signed, clamp.overflow or 0.0)

    @property
    def looks_at_input(self) -> bool:
        """Whether the scale depends on the input of the present call."""
        if self.scaling_impl is None:
            return False
        return bool(getattr(self.scaling_impl, "looks_at_input", True))

    def widths(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bits of exponent and mantissa, bias."""
        return (
            self.exponent_bit_width_impl(),
            self.mantissa_bit_width_impl(),
            self.exponent_bias_impl(),
        )

    def threshold(self) -> Tensor:
        """The largest number of the format."""
        return self.float_scaling_impl(*self.widths())  # type: ignore[no-any-return]

    def scale_for(self, x: Tensor) -> Tensor:
        """The scale of ``x``; a 1 of shape ``(1,)`` without scaling."""
        if self.scaling_impl is None:
            return self.one  # type: ignore[return-value]
        return self.scaling_impl(x, self.threshold())  # type: ignore[no-any-return]

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and all bits for ``x``."""
        exponent, mantissa, _ = self.widths()
        return self.scale_for(x), self.zero, exponent + mantissa + float(self.signed)  # type: ignore[return-value]

    def quantize(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """The values of a viewed ``x`` by a scale that is known."""
        fmt, clamp = self.format(), self.float_clamp_impl
        if fmt is not None:
            rule: Any = self.float_to_int_impl.rule
            masked: Any = clamp.tensor_clamp_impl.masked
            return minifloat_quantize(x, scale, fmt, rule, masked)
        _, mantissa, bias = self.widths()
        return minifloat_reference(
            x,
            scale,
            mantissa,
            bias,
            self.threshold(),
            self.signed,
            clamp.overflow,
            self.float_to_int_impl,
            clamp,
        )

    def forward(self, x: Tensor) -> FloatOutput:
        """Values, scale, zero point, exponent and mantissa bits, bias, and how it overflows.

        Args:
            x: floating-point values.
        """
        scale = self.scale_for(x)
        given = None if self.scaling_impl is None else scale
        y = self.quantize(self.input_view_impl(x), given)
        clamp = self.float_clamp_impl
        how = (clamp.saturating, clamp.inf_values, clamp.nan_values)
        return y, scale, self.zero, *self.widths(), *how  # type: ignore[return-value]


class FloatScaleTrial(Stateless):
    """Trial of a scale's statistic, for a search: see :class:`~qframework.core.search.ScaleTrial`.

    Args:
        float_quant: rounds.
        restrict_scaling_impl: see :class:`~qframework.core.restrict_val.ScaleRestriction`.
        restrict_threshold_impl: likewise.
        restrict_scale_threshold_impl: likewise.
        scaling_min_val: likewise.
    """

    def __init__(
        self,
        float_quant: FloatQuant,
        restrict_scaling_impl: RestrictValue | None = None,
        restrict_threshold_impl: RestrictValue | None = None,
        restrict_scale_threshold_impl: nn.Module | None = None,
        scaling_min_val: float | None = None,
    ) -> None:
        super().__init__()
        self.float_quant = float_quant
        self.restriction = ScaleRestriction(
            restrict_scaling_impl or FloatRestrictValue(),
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )

    def of(self, x: Tensor, *context: Tensor) -> Any:
        """From a candidate to the dequantized values of ``x``."""

        def quantized(statistic: Tensor) -> Tensor:
            stored = self.restriction.to_domain(statistic)
            scale = beside(self.restriction(stored, self.float_quant.threshold()), x)
            return self.float_quant.quantize(x, scale)

        return quantized
