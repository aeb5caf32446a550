"""Modules that give a tensor, for parts of one's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule


class StatelessBuffer(CoreModule):
    """A constant tensor that moves with the model; no state dict holds it.

    Args:
        value: the tensor, or a number.
        dtype: of the tensor, its own when None; half precision becomes float32.
        device: of the tensor, its own when None.
    """

    value: Tensor

    def __init__(
        self,
        value: Tensor | float,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if isinstance(value, Tensor):
            dtype, device = dtype or value.dtype, device or value.device
        self.register_constant("value", value, dtype, device)

    def forward(self) -> Tensor:
        """The tensor, without gradient."""
        return self.value.detach()


class SingleArgStatelessBuffer(StatelessBuffer):
    """The same in the place of a function of one argument, which isn't looked at.

    Args:
        value: the tensor, or a number.
        dtype: of the tensor, its own when None; half precision becomes float32.
        device: of the tensor, its own when None.
    """

    def forward(self, placeholder: object) -> Tensor:  # type: ignore[override]
        """The tensor, without gradient."""
        return self.value.detach()


class ParameterWrapper(CoreModule):
    """A parameter, under ``value``.

    Args:
        value: the parameter; a tensor becomes one.
    """

    def __init__(self, value: nn.Parameter | Tensor) -> None:
        super().__init__()
        self.value = value if isinstance(value, nn.Parameter) else nn.Parameter(value)

    def forward(self) -> Tensor:
        """The parameter."""
        return self.value
