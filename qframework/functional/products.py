"""Sums of products: those of torch, for floats and for quantized tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from torch.nn import functional as F

from qframework.functional.registry import defined

#: One number, or one for each spatial axis.
Numbers = int | Sequence[int]


class SupportsTorchFunction(Protocol):
    """What torch's functions take: a tensor, or an object that says by ``__torch_function__`` what they do to it."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The result of a torch function for arguments of these types."""

    def dim(self) -> int:
        """Number of axes."""


@defined
def linear(
    x: SupportsTorchFunction,
    weight: SupportsTorchFunction,
    bias: SupportsTorchFunction | None = None,
) -> Any:
    """``torch.nn.functional.linear``.

    Args:
        x: floating-point values, shape ``(..., in)``, or a quantized tensor, whose own rules then hold.
        weight: shape ``(out, in)``.
        bias: shape ``(out,)``, or None.

    Returns:
        Values of shape ``(..., out)``; quantized ones where the rules of ``x`` say so.

    Raises:
        RuntimeError: shapes or dtypes don't fit.
    """
    function: Callable[..., Any] = F.linear
    return function(x, weight, bias)


@defined
def convolution(
    x: SupportsTorchFunction,
    weight: SupportsTorchFunction,
    bias: SupportsTorchFunction | None = None,
    stride: Numbers = 1,
    padding: str | Numbers = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Any:
    """``torch.nn.functional.conv1d``, ``conv2d`` or ``conv3d``, by the axes of the weight.

    Args:
        x: floating-point values, shape ``(N, in, *spatial)`` or ``(in, *spatial)``, or a quantized tensor.
        weight: shape ``(out, in / groups, *kernel)``.
        bias: shape ``(out,)``, or None.
        stride: steps between windows, in elements.
        padding: zeros on both sides; or ``"valid"`` or ``"same"``.
        dilation: steps between the elements of a window.
        groups: number of groups of channels that see each other alone.

    Returns:
        Values of shape ``(N, out, *spatial)`` or ``(out, *spatial)``; quantized ones where the rules of ``x`` say so.

    Raises:
        RuntimeError: shapes or dtypes don't fit.
    """
    function: Callable[..., Any] = getattr(F, f"conv{weight.dim() - 2}d")
    return function(x, weight, bias, stride, padding, dilation, groups)


@defined
def transposed_convolution(
    x: SupportsTorchFunction,
    weight: SupportsTorchFunction,
    bias: SupportsTorchFunction | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Any:
    """``torch.nn.functional.conv_transpose1d``, ``2d`` or ``3d``, by the axes of the weight.

    Args:
        x: floating-point values, shape ``(N, in, *spatial)`` or ``(in, *spatial)``, or a quantized tensor.
        weight: shape ``(in, out / groups, *kernel)``.
        bias: shape ``(out,)``, or None.
        stride: steps between windows of the result, in elements.
        padding: elements that are left out on both sides of the result.
        output_padding: elements that are added on one side of the result.
        groups: number of groups of channels that see each other alone.
        dilation: steps between the elements of a window.

    Returns:
        Values of shape ``(N, out, *spatial)`` or ``(out, *spatial)``; quantized ones where the rules of ``x`` say so.

    Raises:
        RuntimeError: shapes or dtypes don't fit.
    """
    function: Callable[..., Any] = getattr(F, f"conv_transpose{weight.dim() - 2}d")
    return function(x, weight, bias, stride, padding, output_padding, groups, dilation)
