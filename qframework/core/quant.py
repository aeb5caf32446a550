"""Integer tensor quantizers; all but :class:`IntQuant` return ``(value, scale, zero_point, bit_width)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qframework.changes import changes
from qframework.core.base import CoreModule
from qframework.core.bit_width import BitWidthConst
from qframework.core.delay import DelayWrapper
from qframework.core.function_wrapper import (
    Identity,
    Rounding,
    RoundSte,
    TensorClamp,
    TensorClampSte,
)
from qframework.core.one_step import OneStep, traced_weight
from qframework.core.zero_point import ZeroZeroPoint
from qframework.functional import FixedStep, check_range, fake_quantize, is_fused, max_int, min_int
from qframework.functional.autograd import transforms_active

#: Integers of more bits aren't all numbers of float32.
_EXACT_BITS = 24

QuantOutput = tuple[Tensor, Tensor, Tensor, Tensor]


def _largest_float_below(power: Tensor) -> Tensor:
    """The largest number of the dtype below a power of two: where a float can't hold ``2^b - 1``."""
    return power * (1 - torch.finfo(power.dtype).eps / 2)


class IntQuant(CoreModule):
    """``q = clamp(round(x / scale + zero_point), min_int, max_int)``, ``y = (q - zero_point) * scale``.

    With the rounding rules and clamps of the library this is one fused step; with others it is composed.
    Bounds that the float dtype can't hold (over 24 bits in float32) are the nearest inside the range.

    Args:
        narrow_range, signed: the integer range.
        input_view_impl: shapes the input before, the identity when None.
        float_to_int_impl: the rounding rule.
        tensor_clamp_impl: the clamp, which decides on its gradient.
        quant_delay_steps: how many training calls return the input as it is.
    """

    def __init__(
        self,
        narrow_range: bool,
        signed: bool,
        input_view_impl: nn.Module | None = None,
        float_to_int_impl: nn.Module | None = None,
        tensor_clamp_impl: nn.Module | None = None,
        quant_delay_steps: int = 0,
    ) -> None:
        super().__init__()
        self.narrow_range, self.signed = narrow_range, signed
        self.input_view_impl = input_view_impl or Identity()
        self.float_to_int_impl = float_to_int_impl or RoundSte()
        self.tensor_clamp_impl = tensor_clamp_impl or TensorClamp()
        self.delay_wrapper = DelayWrapper(quant_delay_steps) if quant_delay_steps else None

    def min_int(self, bit_width: Tensor) -> Tensor:
        """Smallest integer, 0-dim float tensor."""
        return min_int(self.signed, self.narrow_range, bit_width)

    def max_int(self, bit_width: Tensor) -> Tensor:
        """Largest integer that the dtype of ``bit_width`` holds, 0-dim float tensor."""
        bound = max_int(self.signed, self.narrow_range, bit_width)
        power = 2.0 ** (bit_width - 1) if self.signed else 2.0**bit_width
        return torch.minimum(bound, _largest_float_below(power))

    def to_int(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """The integers ``q``, in the float dtype of ``x``, with straight-through gradients."""
        q = self.float_to_int_impl(x / scale + zero_point)
        return self.tensor_clamp_impl(q, self.min_int(bit_width), self.max_int(bit_width))  # type: ignore[no-any-return]

    def bounds_of(self, bits: int) -> tuple[float, float] | None:
        """Smallest and largest integer of a width as numbers; None where float32 may not hold them."""
        if bits > _EXACT_BITS:
            return None
        if self.signed:
            return float(self.narrow_range - 2 ** (bits - 1)), float(2 ** (bits - 1) - 1)
        return 0.0, float(2**bits - 1 - self.narrow_range)

    def fixed_range(self, bits: int) -> tuple[float, float] | None:
        """The bounds, where one step rounds and clamps and nothing else is done."""
        if type(self) is not IntQuant or not self.is_fused or self.delay_wrapper is not None:
            return None
        return self.bounds_of(bits)

    @property
    def is_fused(self) -> bool:
        """Whether the rounding and the clamp are those of the library, which one step does."""
        rounding, clamp = type(self.float_to_int_impl), type(self.tensor_clamp_impl)
        return rounding.forward is Rounding.forward and clamp.forward in _CLAMPS

    def forward(
        self,
        scale: Tensor,
        zero_point: Tensor | None,
        bit_width: Tensor,
        x: Tensor,
        bits: int | None = None,
        rectify: bool = False,
    ) -> Tensor:
        """The dequantized values of ``x``.

        Args:
            scale: tensor that broadcasts to the viewed ``x``.
            zero_point: likewise, in integer steps; None for 0, which costs less.
            bit_width: 0-dim tensor.
            x: floating-point values.
            bits: the bit width, where it is a number, which costs less.
            rectify: quantize ``relu(x)``.
        """
        delayed = self.delay_wrapper is not None
        viewed = self.input_view_impl(torch.relu(x) if rectify and delayed else x)
        rectify = rectify and not delayed
        if self.is_fused:
            bounds: Any = None if bits is None else self.bounds_of(bits)
            if bounds is None:
                bounds = self.min_int(bit_width), self.max_int(bit_width)
                if rectify:
                    viewed, rectify = torch.relu(viewed), False
            how: Any = (
                *bounds,
                self.float_to_int_impl.rule,
                self.tensor_clamp_impl.masked,
                rectify,
            )
            y = fake_quantize(viewed, scale, zero_point, *how)
        else:
            viewed = torch.relu(viewed) if rectify else viewed
            zero = torch.zeros_like(scale) if zero_point is None else zero_point
            y = ((self.to_int(scale, zero, bit_width, viewed) - zero) * scale).to(x.dtype)
        return y if self.delay_wrapper is None else self.delay_wrapper(viewed, y)


_CLAMPS = (TensorClamp.forward, TensorClampSte.forward)


class DecoupledIntQuant(CoreModule):
    """Integers by one scale and zero point, values by another.

    ``q = clamp(round(x / pre_scale + pre_zero_point))``, ``y = (q - zero_point) * scale``. Arguments as for
    :class:`IntQuant`.
    """

    def __init__(
        self,
        narrow_range: bool,
        signed: bool,
        input_view_impl: nn.Module | None = None,
        float_to_int_impl: nn.Module | None = None,
        tensor_clamp_impl: nn.Module | None = None,
        quant_delay_steps: int = 0,
    ) -> None:
        super().__init__()
        self.int_quant = IntQuant(narrow_range, signed, None, float_to_int_impl, tensor_clamp_impl)
        self.input_view_impl = input_view_impl or Identity()
        self.delay_wrapper = DelayWrapper(quant_delay_steps) if quant_delay_steps else None

    def forward(
        self,
        pre_scale: Tensor,
        pre_zero_point: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bit_width: Tensor,
        x: Tensor,
    ) -> Tensor:
        viewed = self.input_view_impl(x)
        q = self.int_quant.to_int(pre_scale, pre_zero_point, bit_width, viewed)
        y = (q - zero_point) * scale
        return y if self.delay_wrapper is None else self.delay_wrapper(viewed, y)


class RescalingIntQuant(CoreModule):
    """An integer quantizer that computes its own scale, zero point and bit width.

    Args:
        int_quant: rounds and clamps.
        scaling_impl: called with ``(x, threshold)``.
        int_scaling_impl: from the bit width to the integer threshold of the scale.
        zero_point_impl: called with ``(x, scale, bit_width)``.
        bit_width_impl: called with nothing.

    Raises:
        ValueError: a constant width whose range holds no integer but 0.
    """

    def __init__(
        self,
        int_quant: nn.Module,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        zero_point_impl: nn.Module,
        bit_width_impl: nn.Module,
    ) -> None:
        super().__init__()
        self.int_quant = int_quant
        self.scaling_impl = scaling_impl
        self.int_scaling_impl = int_scaling_impl
        self.zero_point_impl = zero_point_impl
        self.msb_clamp_bit_width_impl = bit_width_impl
        self.observer_only = False
        self._one_step: OneStep | None = None
        self._known_threshold: tuple[Tensor, nn.Module, Tensor] | None = None
        if isinstance(bit_width_impl, BitWidthConst) and isinstance(int_quant, IntQuant):
            check_range(int_quant.signed, int_quant.narrow_range, bit_width_impl.initial)

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and bit width for ``x``."""
        bit_width = self.msb_clamp_bit_width_impl()
        scale = self.scaling_impl(x, self._threshold(bit_width))
        return scale, self.zero_point_impl(x, scale, bit_width), bit_width

    def _threshold(self, bit_width: Tensor) -> Tensor:
        """The integer threshold, computed once for a constant width."""
        rule, width = self.int_scaling_impl, self.msb_clamp_bit_width_impl
        if type(width) is not BitWidthConst:
            return rule(bit_width)  # type: ignore[no-any-return]
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # computed while it is compiled
            return rule(torch.full_like(bit_width, width.initial))  # type: ignore[no-any-return]
        if torch.compiler.is_compiling() or transforms_active():  # whose tensors must not be kept
            return rule(bit_width)  # type: ignore[no-any-return]
        known = self._known_threshold
        if known is None or known[0] is not bit_width or known[1] is not rule:
            known = (bit_width, rule, rule(bit_width))
            object.__setattr__(self, "_known_threshold", known)
        return known[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_one_step": None, "_known_threshold": None}

    def _in_one_step(self, x: Tensor, rectify: bool) -> QuantOutput | None:
        """All of it in one step, where there is one; None for others."""
        if self.observer_only or not is_fused():
            return None
        if torch.compiler.is_compiling():
            return None if rectify else traced_weight(self, x)
        step = self._one_step
        if step is None or step.count != changes.count or step.quantizer is not self:
            step = OneStep(self)
            object.__setattr__(self, "_one_step", step)
        return step.run(x, rectify)

    @property
    def looks_at_input(self) -> bool:
        """Whether scale or zero point depend on the input of the present call."""
        return any(
            getattr(part, "looks_at_input", True)
            for part in (self.scaling_impl, self.zero_point_impl)
        )

    def _looks_at_input_now(self) -> bool:
        parts: tuple[Any, ...] = (self.scaling_impl, self.zero_point_impl)
        for part in parts:
            if hasattr(part, "hand_over_if_due"):
                part.hand_over_if_due()
        return self.looks_at_input

    def forward(self, x: Tensor, rectify: bool = False) -> QuantOutput:
        """Quantize.

        Args:
            x: floating-point values.
            rectify: quantize ``relu(x)``.
        """
        done = self._in_one_step(x, rectify)
        if done is not None:
            return done
        if rectify and torch.compiler.is_compiling():
            # Where nothing looks at it, the compiler leaves it out.
            scale, zero_point, bit_width = self.parameters_for(torch.relu(x))
        else:
            if rectify and self._looks_at_input_now():
                x, rectify = torch.relu(x), False
            scale, zero_point, bit_width = self.parameters_for(x)
        return self.quantize(x, scale, zero_point, bit_width, rectify), scale, zero_point, bit_width

    def quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bit_width: Tensor,
        rectify: bool = False,
    ) -> Tensor:
        """Values of ``x`` by parameters that are known; arguments as :meth:`parameters_for` gives them."""
        return self.step(scale, zero_point, bit_width)(x, rectify)

    def step(
        self, scale: Tensor, zero_point: Tensor, bit_width: Tensor
    ) -> Callable[[Tensor, bool], Tensor]:
        """The function ``(x, rectify)`` that quantizes by parameters that are known."""
        if self.observer_only:
            return lambda x, rectify: torch.relu(x) if rectify else x
        int_quant, width = self.int_quant, self.msb_clamp_bit_width_impl
        if type(int_quant) is not IntQuant:
            return lambda x, rectify: int_quant(
                scale, zero_point, bit_width, torch.relu(x) if rectify else x
            )
        zero = None if isinstance(self.zero_point_impl, ZeroZeroPoint) else zero_point
        bits = width.initial if isinstance(width, BitWidthConst) else None
        fixed = None if bits is None else int_quant.fixed_range(bits)
        if fixed is None or type(int_quant.input_view_impl) is not Identity:
            return lambda x, rectify: int_quant(scale, zero, bit_width, x, bits, rectify)
        rule: Any = int_quant.float_to_int_impl.rule
        masked: Any = int_quant.tensor_clamp_impl.masked
        return FixedStep(scale, zero, *fixed, rule, masked)


class PrescaledRestrictIntQuant(CoreModule):
    """An integer quantizer of a bias: the scale is given, the zero point is 0.

    Args:
        int_quant: rounds and clamps.
        bit_width_impl: called with nothing.
    """

    def __init__(self, int_quant: nn.Module, bit_width_impl: nn.Module) -> None:
        super().__init__()
        self.int_quant, self.msb_clamp_bit_width_impl = int_quant, bit_width_impl

    def forward(self, x: Tensor, scale: Tensor) -> QuantOutput:
        """Quantize ``x`` by ``scale``, which broadcasts to it."""
        bit_width = self.msb_clamp_bit_width_impl()
        zero_point = torch.zeros((), dtype=scale.dtype, device=scale.device)
        return self.int_quant(scale, None, bit_width, x), scale, zero_point, bit_width


def is_integer_quantizer(module: Any) -> bool:
    """Whether a tensor quantizer gives affine integers."""
    return hasattr(module, "int_quant")
