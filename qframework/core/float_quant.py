"""Minifloat tensor quantizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, NotStated, Stated, Stateless
from qframework.core.bit_width import BitWidthConst
from qframework.core.function_wrapper import Identity, RoundSte
from qframework.core.minifloat import (
    ComputeMaxMantissa,
    FloatClamp,
    FloatScaling,
    StaticExponentBias,
)
from qframework.core.protocols import BitWidth, Scaling
from qframework.core.restrict_val import RestrictValue, ScaleRestriction
from qframework.core.search import Values, all_beside
from qframework.functional import (
    EXPONENTS,
    MinifloatFormat,
    compute_dtype,
    floating,
    round_to_minifloat,
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
        mantissa_bit_width_impl: bits of the mantissa, called with nothing.
        exponent_bias_impl: the bias, called with nothing.
        float_clamp_impl: what becomes of numbers beyond the largest.
        input_view_impl: shapes the input before, the identity when None.
        compute_max_mantissa: the largest significand of a width.
        scaling_impl: called with ``(x, threshold)``; None for no scale.
        float_scaling_impl: the threshold, called with the widths and the bias.
        float_to_int_impl: the rounding rule of significands.
        dtype: of the scale where there is none.
        device: of the scale where there is none.

    Raises:
        ValueError: a format whose numbers float32 doesn't hold.
    """

    def __init__(
        self,
        signed: bool,
        exponent_bit_width_impl: BitWidth,
        mantissa_bit_width_impl: BitWidth,
        exponent_bias_impl: BitWidth,
        float_clamp_impl: FloatClamp,
        input_view_impl: nn.Module | None = None,
        compute_max_mantissa: nn.Module | None = None,
        scaling_impl: Scaling | None = None,
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
            float_clamp_impl.max_available_float,
            compute_max_mantissa=compute_max_mantissa or ComputeMaxMantissa(),
        )
        self.float_to_int_impl = float_to_int_impl or RoundSte()
        self.scaling_impl = scaling_impl
        if scaling_impl is None:
            ones = torch.ones(1, device="cpu")
            self.register_constant("one", ones, compute_dtype(dtype), device)
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
        exponent, mantissa, bias = (
            self.exponent_bit_width_impl,
            self.mantissa_bit_width_impl,
            self.exponent_bias_impl,
        )
        if (
            isinstance(exponent, BitWidthConst)
            and isinstance(mantissa, BitWidthConst)
            and isinstance(bias, StaticExponentBias)
        ):
            return exponent.bits, mantissa.bits, bias.bias
        return None

    def rule(self, stated: Stated) -> tuple[MinifloatFormat, str, bool]:
        """Format, rounding of significands, and whether the clamp is differentiated."""
        widths = (
            stated(self.exponent_bit_width_impl),
            stated(self.mantissa_bit_width_impl),
            stated(self.exponent_bias_impl),
        )
        if widths[0] + widths[1] > 16:
            raise NotStated("more bits than a minifloat has")
        clamp, largest = self.float_clamp_impl, stated(self.float_scaling_impl, *widths)
        overflow = clamp.overflow or 0.0
        format = MinifloatFormat(widths[1], widths[2], largest, self.signed, overflow)
        return format, stated(self.float_to_int_impl), stated(clamp)

    @property
    def depends_on_input(self) -> bool:
        """Whether the scale depends on the input of the present call."""
        if self.scaling_impl is None:
            return False
        return bool(getattr(self.scaling_impl, "depends_on_input", True))

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
        bits = exponent + mantissa + float(self.signed)
        return self.scale_for(x), torch.zeros_like(bits.detach()), bits

    def quantize(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """The values of a viewed ``x`` by a scale that is known; None for 1."""
        _, mantissa, bias = self.widths()
        clamp = self.float_clamp_impl
        bounds = (self.threshold(), self.signed, clamp.overflow)
        return round_to_minifloat(x, scale, mantissa, bias, *bounds, self.float_to_int_impl, clamp)

    def forward(self, x: Tensor) -> FloatOutput:
        """Values, scale, zero point, exponent and mantissa bits, bias, and how it overflows.

        Args:
            x: floating-point values.
        """
        x = floating(x)
        scale = self.scale_for(x)
        y = self.quantize(self.input_view_impl(x), None if self.scaling_impl is None else scale)
        return self.described(y, scale)

    def described(self, y: Tensor, scale: Tensor) -> FloatOutput:
        """Values and scale, and what else the result of :meth:`forward` holds."""
        clamp, (exponent, mantissa, bias) = self.float_clamp_impl, self.widths()
        how = (clamp.saturating, clamp.inf_values, clamp.nan_values)
        return y, scale, torch.zeros_like(mantissa.detach()), exponent, mantissa, bias, *how


class FloatScaleTrial(Stateless):
    """Trial of a scale's statistic, for a search: see :class:`~qframework.core.search.ScaleTrial`.

    Args:
        float_quant: rounds.
        restrict_scaling_impl, restrict_threshold_impl, restrict_scale_threshold_impl, scaling_min_val: see
            :class:`~qframework.core.restrict_val.ScaleRestriction`.
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
            restrict_scaling_impl,
            restrict_threshold_impl,
            restrict_scale_threshold_impl,
            scaling_min_val,
        )

    def grid(self, candidates: Tensor, x: Tensor, *context: Tensor) -> tuple[Tensor, None]:
        """Scales of candidates along the first axis, beside the rows of ``x``; there are no zero points."""
        stored = self.restriction.to_domain(candidates)
        return all_beside(self.restriction(stored, self.float_quant.threshold()), x), None

    def values(self) -> Values:
        """What makes values of ``x`` and a scale, as the quantizer is now."""
        quantizer = self.float_quant
        clamp = quantizer.float_clamp_impl
        plain = type(clamp) is FloatClamp and clamp.overflow is None
        if not plain or type(quantizer.float_to_int_impl) is not RoundSte:
            return lambda x, scale, _: quantizer.quantize(x, scale)
        _, mantissa, bias = quantizer.widths()
        smallest, digits = 2.0 ** (1 - bias), 2.0**-mantissa
        top = quantizer.threshold()
        bottom = -top if quantizer.signed else torch.zeros_like(top)

        def values(x: Tensor, scale: Tensor, _: Tensor | None) -> Tensor:
            v = x / scale
            if v.dtype not in EXPONENTS:
                return quantizer.quantize(x, scale)
            integers, mask = EXPONENTS[v.dtype]
            unit = (v.view(integers) & mask).view(v.dtype)
            torch.maximum(unit, smallest, out=unit).mul_(digits)
            v.div_(unit).round_().mul_(unit)
            torch.minimum(torch.maximum(v, bottom, out=v), top, out=v)
            return v.mul_(scale)

        return values
