"""Weights between the two values that they can be rounded to, as differentiable functions of what is learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.optim import SignSGD

#: Stretch of AdaRound's sigmoid.
_ZETA, _GAMMA = 1.1, -0.1


class AdaRound(nn.Module):
    """``below + h (above - below)``, ``h = clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)``.

    Args:
        weights: where it starts.
        below: largest values not above them.
        above: smallest values not below.
    """

    def __init__(self, weights: Tensor, below: Tensor, above: Tensor) -> None:
        super().__init__()
        self.below, self.gap = below, above - below
        share = torch.where(self.gap > 0, (weights - below) / self.gap.clamp_min(1e-30), 0.5)
        inside = ((share.clamp(0.0, 1.0) - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-4, 1 - 1e-4)
        self.v = nn.Parameter(torch.logit(inside))

    def optimizer(self, lr: float | None, steps: int) -> Any:
        """What it is learned by."""
        return torch.optim.Adam([self.v], lr=1e-2 if lr is None else lr)

    def _share(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.v) * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)

    def soft(self) -> Tensor:
        """The weights as they are learned."""
        return self.below + self._share() * self.gap

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weights rounded to one of the two values."""
        return self.below + (self._share() >= 0.5) * self.gap

    def penalty(self, progress: float) -> Tensor | float:
        """What drives shares to 0 and 1: none in the first fifth, then ``1 - |2h - 1|^b`` with ``b`` from 20 to 2."""
        if progress < 0.2:
            return 0.0
        power = 2 + 18 * (1 - (progress - 0.2) / 0.8)
        return (1 - (2 * self._share() - 1).abs().clamp_min(1e-12) ** power).sum() * 0.1

    def bound(self) -> None:
        """Nothing is bounded."""


class AutoRound(nn.Module):
    """The nearest of the two values to ``w + v``, ``v`` within half a step; gradients go straight through.

    Args:
        weights: ``w``.
        below: largest values not above them.
        above: smallest values not below.
    """

    def __init__(self, weights: Tensor, below: Tensor, above: Tensor) -> None:
        super().__init__()
        self.below, self.gap = below, above - below
        self.share = torch.where(self.gap > 0, (weights - below) / self.gap.clamp_min(1e-30), 0.5)
        self.v = nn.Parameter(torch.zeros_like(weights))

    def optimizer(self, lr: float | None, steps: int) -> Any:
        """What it is learned by."""
        return _FallingSignSGD([self.v], lr=1 / steps if lr is None else lr, steps=steps)

    def soft(self) -> Tensor:
        """The rounded weights."""
        moved = self.share + self.v
        up = (moved.detach() >= 0.5).to(moved.dtype)
        return self.below + (up + (moved - moved.detach())) * self.gap

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The rounded weights."""
        return self.below + (self.share + self.v >= 0.5) * self.gap

    def penalty(self, progress: float) -> Tensor | float:
        """None."""
        return 0.0

    @torch.no_grad()
    def bound(self) -> None:
        """Offsets stay within half a step."""
        self.v.clamp_(-0.5, 0.5)


class _FallingSignSGD(SignSGD):
    """Steps that fall linearly to 0.

    Args:
        params: what is learned.
        lr: the first step.
        steps: how many there will be.
    """

    def __init__(self, params: Any, lr: float, steps: int) -> None:
        super().__init__(params, lr=lr)
        self.first, self.steps, self.count = lr, steps, 0

    def _step_group(self, group: dict[str, Any]) -> None:
        group["lr"] = self.first * max(1 - self.count / self.steps, 0.0)
        self.count += 1
        super()._step_group(group)


#: By their names.
METHODS: dict[str, Any] = {"adaround": AdaRound, "autoround": AutoRound}
