"""Start quantizing after a number of training steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qframework.core.base import CoreModule
from qframework.core.collector import why_no_count
from qframework.functional import is_recomputing


class DelayWrapper(CoreModule):
    """Returns the float input for the first training calls; state-dict key ``steps_left``.

    Args:
        quant_delay_steps: how many calls in training mode. Evaluation always quantizes.

    Raises:
        ValueError: a negative number of steps.
    """

    steps_left: Tensor

    def __init__(self, quant_delay_steps: int) -> None:
        super().__init__()
        if quant_delay_steps < 0:
            raise ValueError(f"quant_delay_steps must be at least 0, got {quant_delay_steps}")
        self.register_buffer("steps_left", torch.tensor(quant_delay_steps, dtype=torch.int64))

    def why_refused(self, name: str, number: Tensor, entries: Mapping[str, Any]) -> str | None:
        """A counter that can't be."""
        return why_no_count(number, -1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` while steps are left, then ``y``."""
        if not self.training:
            return y
        if is_recomputing():
            return torch.where(self.steps_left >= 0, x, y)
        out = torch.where(self.steps_left > 0, x, y)
        with torch.no_grad():
            self.steps_left.sub_(1).clamp_(min=-1)  # 0 after the last delayed call
        return out
