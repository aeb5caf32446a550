"""Bit widths: constant, constant but saved, learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qframework.core.base import Constant, CoreModule, Stated, number_of, parameter_of
from qframework.core.function_wrapper import RoundSte
from qframework.core.restrict_val import IntRestrictValue, RestrictValue
from qframework.functional import abs_binary_sign_grad, compute_dtype, scalar_clamp_ste


def _whole(bit_width: Any, least: int = 1) -> int:
    if isinstance(bit_width, bool) or not isinstance(bit_width, int):
        raise TypeError(
            f"bit_width must be an int, got {bit_width!r} of type {type(bit_width).__name__}"
        )
    if not bit_width >= least:
        raise ValueError(f"bit_width must be at least {least}, got {bit_width}")
    return bit_width


#: The widest integers that floating-point numbers are counted in.
WIDEST = 64


def why_no_width(width: Tensor) -> str | None:
    """Why a number of a state dict can't be a width in bits; None where it can."""
    allowed = bool((torch.isfinite(width) & (width >= 1) & (width <= WIDEST)).all())
    return None if allowed else f"a width of 1 to {WIDEST} bits"


class BitWidthConst(Constant):
    """A fixed width; nothing of it is in the state dict.

    Args:
        bit_width: width in bits, at least 1.
        dtype, device: of the 0-dim tensor that ``forward()`` returns.

    Attributes:
        bits: the width, an int; assign another one to change it.
    """

    least = 1

    def __init__(
        self, bit_width: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__(dtype, device)
        self.bits = _whole(bit_width, self.least)

    @property
    def bit_width(self) -> Tensor:
        """The width as a 0-dim tensor."""
        return self.number(float(self.bits))

    def rule(self, stated: Stated) -> int:
        """The width in bits."""
        return _whole(self.bits, self.least)

    def forward(self) -> Tensor:
        """The width as a 0-dim tensor."""
        return self.bit_width


class BitWidthStatefulConst(CoreModule):
    """A fixed width that a state dict carries, under ``bit_width``.

    Args:
        bit_width: width in bits, at least 1.
        dtype, device: of the buffer.
    """

    bit_width: Tensor

    def __init__(
        self, bit_width: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__()
        value = torch.full((), float(_whole(bit_width)), dtype=compute_dtype(dtype), device=device)
        self.register_buffer("bit_width", value)

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """A width that can't be."""
        return why_no_width(number)

    def forward(self) -> Tensor:
        """The width as a 0-dim tensor."""
        return self.bit_width


class BitWidthParameter(CoreModule):
    """A learned width ``b = round(|offset| + min_bit_width)``, ``offset`` a 0-dim parameter.

    The gradient of ``|.|`` at 0 is +1, that of rounding and of the bounds the identity, so a width that sits
    on a bound can leave it.

    Args:
        bit_width: initial width in bits.
        min_bit_width: the width that no offset goes below.
        restrict_bit_width_impl: rounding of the sum.
        bit_width_offset_min_val, bit_width_offset_max_val: bounds of the total width, in bits.
        override_pretrained_bit_width: keep the initial width when a state dict is loaded.
        dtype, device: of the parameter.

    Attributes:
        bit_width_base: ``min_bit_width``, a float.
        bit_width_offset: the parameter.
        override_pretrained: whether the initial width is kept when a state dict is loaded.

    Raises:
        ValueError: ``bit_width`` below ``min_bit_width``.
    """

    def __init__(
        self,
        bit_width: int,
        min_bit_width: int = 2,
        restrict_bit_width_impl: RestrictValue | None = None,
        bit_width_offset_min_val: float | None = None,
        bit_width_offset_max_val: float | None = None,
        override_pretrained_bit_width: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if _whole(bit_width) < min_bit_width:
            raise ValueError(f"bit_width={bit_width} is below min_bit_width={min_bit_width}")
        self.bit_width_base = float(min_bit_width)
        offset = torch.full(
            (), bit_width - self.bit_width_base, dtype=compute_dtype(dtype), device=device
        )
        self.bit_width_offset = parameter_of(offset)
        self.restrict_bit_width_impl = restrict_bit_width_impl or IntRestrictValue(RoundSte())
        self.minimum, self.maximum = bit_width_offset_min_val, bit_width_offset_max_val
        self.override_pretrained = override_pretrained_bit_width

    def forward(self) -> Tensor:
        """The width as a 0-dim tensor."""
        offset = abs_binary_sign_grad(number_of(self.bit_width_offset, ()))
        width: Tensor = self.restrict_bit_width_impl(offset + self.bit_width_base)
        if self.minimum is not None or self.maximum is not None:
            width = scalar_clamp_ste(width, self.minimum, self.maximum)
        return width

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """An offset of a width that can't be."""
        return why_no_width(number.abs() + self.bit_width_base)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A width saved by a constant (key ``bit_width``) becomes the offset that gives it."""
        key = prefix + "bit_width_offset"
        if prefix + "bit_width" in state_dict:
            state_dict[key] = state_dict.pop(prefix + "bit_width") - self.bit_width_base
        if self.override_pretrained:
            state_dict[key] = self.bit_width_offset.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)
