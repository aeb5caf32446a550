"""A scale and a zero point that were computed once and stay, whatever becomes of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.core.base import CoreModule


class FixedScaling(CoreModule):
    """A scale that is held as it is; state-dict key ``fixed_scale``.

    Takes the place of a scale that is a statistic of a weight, where the weight changes and the scale shouldn't.

    Args:
        scale: positive, of any shape that broadcasts to what is quantized.
    """

    depends_on_input = False
    fixed_scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed_scale", scale.detach().clone())

    def forward(self, x: Tensor, threshold: Tensor | None = None) -> Tensor:
        """The scale; neither ``x`` nor the threshold is looked at."""
        return self.fixed_scale


class FixedZeroPoint(CoreModule):
    """A zero point, in integer steps, that is held as it is; state-dict key ``fixed_zero_point``.

    Args:
        zero_point: of any shape that broadcasts to what is quantized.
    """

    symmetric = False
    quantize_zero_point = True
    depends_on_input = False
    fixed_zero_point: Tensor

    def __init__(self, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed_zero_point", zero_point.detach().clone())

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """The zero point; nothing is looked at."""
        return self.fixed_zero_point


#: The slots of a tensor quantizer that can be fixed, with what takes their place and the key that it holds.
FIXED_SLOTS = {
    "scaling_impl": (FixedScaling, "fixed_scale"),
    "zero_point_impl": (FixedZeroPoint, "fixed_zero_point"),
}


def fixed_keys(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """From the slots of a tensor quantizer to the fixed numbers that a state dict has for them."""
    found = {}
    for slot, (_, key) in FIXED_SLOTS.items():
        value = state_dict.get(f"{prefix}{slot}.{key}")
        if isinstance(value, torch.Tensor):
            found[slot] = value
    return found
