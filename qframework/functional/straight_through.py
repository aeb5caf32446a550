"""Straight-through estimators: a step function forwards, the identity backwards.

The gradient rule is the one of Bengio et al., "Estimating or Propagating Gradients Through Stochastic
Neurons for Conditional Computation", https://arxiv.org/abs/1308.3432. Forward-mode derivatives follow it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from qframework.functional.registry import defined

_transforms_active = torch._C._are_functorch_transforms_active

#: Of a clamp: a number, a tensor that broadcasts, or None for none.
Bound = Tensor | float | None


def _dpu_round(x: Tensor) -> Tensor:
    """Half to even, but halves of negative numbers go up: -1.5 -> -1, 1.5 -> 2."""
    rounded = torch.round(x)
    return torch.where((x < 0) & (x - torch.floor(x) == 0.5), torch.ceil(x), rounded)


def _binary_sign(x: Tensor) -> Tensor:
    signs = (x >= 0).to(x.dtype) * 2 - 1
    return torch.where(x.isnan(), x, signs)


def _ternary_sign(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, torch.sign(x))


#: The rounding rules by name: plain functions without a gradient of their own.
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": torch.round,
    "ceil": torch.ceil,
    "floor": torch.floor,
    "round_to_zero": torch.trunc,
    "dpu": _dpu_round,
}

#: The step functions of :func:`apply_step` by name.
STEPS = {**ROUNDINGS, "binary_sign": _binary_sign, "ternary_sign": _ternary_sign}


class StraightThroughStep(Function):
    """A step function of :func:`apply_step`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, step: str) -> Tensor:
        """The step."""
        return STEPS[step](x)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Any, ...], output: object) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Any:  # type: ignore[override]
        """The gradient as it comes."""
        return grad, None

    @staticmethod
    def jvp(ctx: object, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        """The tangent as it comes."""
        return tangent.clone()


@defined
def apply_step(x: Tensor, step: str) -> Tensor:
    """A step function by name, with a straight-through gradient.

    Args:
        x: floating-point tensor of any shape.
        step: a name of :data:`ROUNDINGS`, ``'binary_sign'`` or ``'ternary_sign'``.

    Returns:
        Tensor with the shape and dtype of ``x``.
    """
    if not (x.requires_grad or _transforms_active() or forward_ad._current_level >= 0):
        return STEPS[step](x)  # there is no gradient to pass
    return StraightThroughStep.apply(x, step)  # type: ignore[no-any-return, no-untyped-call]


def round_ste(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves to even; the gradient passes unchanged.

    Args:
        x: floating-point tensor of any shape.

    Returns:
        Tensor of integers in the dtype and shape of ``x``.
    """
    return apply_step(x, "round")


def ceil_ste(x: Tensor) -> Tensor:
    """Round up; the gradient passes unchanged. Shapes and dtype as :func:`round_ste`."""
    return apply_step(x, "ceil")


def floor_ste(x: Tensor) -> Tensor:
    """Round down; the gradient passes unchanged. Shapes and dtype as :func:`round_ste`."""
    return apply_step(x, "floor")


def round_to_zero_ste(x: Tensor) -> Tensor:
    """Cut the fraction off; the gradient passes unchanged. Shapes and dtype as :func:`round_ste`."""
    return apply_step(x, "round_to_zero")


def dpu_round_ste(x: Tensor) -> Tensor:
    """Round as AMD's DPU does: halves to even, but negative halves go up; identity gradient.

    For example -0.5 -> -0, -1.5 -> -1, -2.5 -> -2, 0.5 -> 0, 1.5 -> 2, 2.5 -> 2. Shapes and dtype as :func:`round_ste`.
    """
    return apply_step(x, "dpu")


def binary_sign_ste(x: Tensor) -> Tensor:
    """1 where ``x >= 0``, else -1; NaN stays NaN; the gradient passes unchanged. Shapes and dtype as :func:`round_ste`."""
    return apply_step(x, "binary_sign")


def ternary_sign_ste(x: Tensor) -> Tensor:
    """-1, 0 or 1; NaN stays NaN; the gradient passes unchanged. Shapes and dtype as :func:`round_ste`."""
    return apply_step(x, "ternary_sign")


def abs_binary_sign_grad(x: Tensor) -> Tensor:
    """``abs(x)`` whose gradient at 0 is +1 rather than 0, so that a parameter can leave 0.

    Args:
        x: floating-point tensor of any shape.
    """
    return x * torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class StraightThroughClamp(Function):
    """The clamp of :func:`tensor_clamp_ste`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, minimum: Bound, maximum: Bound) -> Tensor:
        """The clamp."""
        return torch.clamp(x, minimum, maximum)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Any, ...], output: object) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Any:  # type: ignore[override]
        """The gradient as it comes."""
        return grad, None, None

    @staticmethod
    def jvp(ctx: object, tangent: Tensor, *_: object) -> Tensor:  # type: ignore[override]
        """The tangent as it comes."""
        return tangent.clone()


def scalar_clamp_ste(x: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
    """Clamp to ``[minimum, maximum]``; the gradient passes unchanged, also outside.

    Args:
        x: floating-point tensor of any shape.
        minimum: lower bound, None for none.
        maximum: upper bound, None for none.
    """
    return tensor_clamp_ste(x, minimum, maximum)


def scalar_clamp_min_ste(x: Tensor, minimum: float) -> Tensor:
    """Clamp from below; the gradient passes unchanged, also outside.

    Args:
        x: floating-point tensor of any shape.
        minimum: lower bound.
    """
    return scalar_clamp_ste(x, minimum, None)


@defined
def tensor_clamp_ste(
    x: Tensor, minimum: Tensor | float | None, maximum: Tensor | float | None
) -> Tensor:
    """Clamp; the gradient goes to ``x`` alone, unchanged, also outside.

    Args:
        x: floating-point tensor of any shape.
        minimum: lower bound, a number or a tensor that broadcasts to ``x``; None for none.
        maximum: upper bound, a number or a tensor that broadcasts to ``x``; None for none.
    """
    return StraightThroughClamp.apply(x, minimum, maximum)  # type: ignore[no-any-return, no-untyped-call]


def tensor_clamp(x: Tensor, minimum: Tensor | float, maximum: Tensor | float) -> Tensor:
    """Clamp with the true gradient: inside, bounds included, to ``x``, outside to the bound that was hit. NaN stays NaN.

    Args:
        x: floating-point tensor of any shape.
        minimum: lower bound, a number or a tensor that broadcasts to ``x``.
        maximum: upper bound, a number or a tensor that broadcasts to ``x``.
    """
    x = torch.where(x > maximum, maximum, x)
    return torch.where(x < minimum, minimum, x)
