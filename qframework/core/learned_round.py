"""Learned rounding (AdaRound, https://arxiv.org/abs/2004.10568): a parameter per element decides up or down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qframework.core.base import CoreModule, Stateless
from qframework.core.function_wrapper import Identity
from qframework.functional import compute_dtype, floor_ste, round_ste, scalar_clamp_ste


class LearnedRoundHardSigmoid(Stateless):
    """``p = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)``, in evaluation ``p > 0.5``; ``floor(x) + p``.

    Args:
        learned_round_zeta, learned_round_gamma: stretch of the sigmoid, above 1 and below 0.
    """

    def __init__(self, learned_round_zeta: float = 1.1, learned_round_gamma: float = -0.1) -> None:
        super().__init__()
        self.zeta, self.gamma = learned_round_zeta, learned_round_gamma

    def forward(self, x: Tensor, v: Tensor, training: bool) -> Tensor:
        p = torch.clamp(torch.sigmoid(v) * (self.zeta - self.gamma) + self.gamma, 0.0, 1.0)
        return floor_ste(x) + (p if training else (p > 0.5).to(x.dtype))


class LearnedRoundSigmoid(Stateless):
    """``p = sigmoid(v / T)``, in evaluation ``v > 0``; ``floor(x) + p``.

    Args:
        learned_round_temperature: T.
    """

    def __init__(self, learned_round_temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = learned_round_temperature

    def forward(self, x: Tensor, v: Tensor, training: bool) -> Tensor:
        return floor_ste(x) + (
            torch.sigmoid(v / self.temperature) if training else (v > 0).to(x.dtype)
        )


class LearnedRoundIdentity(Stateless):
    """``round(x + clamp(v, -0.5, 0.5))``, with straight-through gradients: an additive correction."""

    def forward(self, x: Tensor, v: Tensor, training: bool) -> Tensor:
        return round_ste(x + scalar_clamp_ste(v, -0.5, 0.5))


class LearnedRoundSte(CoreModule):
    """Rounds by a learned parameter of the shape of the weight; state-dict key ``value``.

    In training the sigmoid forms give numbers between integers, as the method wants it; in evaluation integers.

    Args:
        learned_round_impl: from ``(x, v, training)`` to rounded values.
        learned_round_init: initial ``v``, in the shape of the weight.
        input_view_impl: the view that the quantizer takes of the weight.
        device, dtype: of the parameter.
    """

    def __init__(
        self,
        learned_round_impl: nn.Module,
        learned_round_init: Tensor,
        input_view_impl: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.learned_round_impl = learned_round_impl
        self.input_view_impl = input_view_impl or Identity()
        init = learned_round_init.detach().clone().to(dtype=compute_dtype(dtype), device=device)
        self.value = nn.Parameter(init)

    def forward(self, x: Tensor) -> Tensor:
        v = self.input_view_impl(self.value)
        return self.learned_round_impl(x, v, self.training)  # type: ignore[no-any-return]
