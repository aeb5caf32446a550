"""Quantize and dequantize by a range that is known as numbers, in as few passes over memory as it takes.

q = clamp(round(x / scale + zero_point), minimum, maximum);   y = (q - zero_point) * scale
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional import compiled, native
from qframework.functional.autograd import keep, kept, transforms_active
from qframework.functional.origin import forget_origin
from qframework.functional.straight_through import ROUNDINGS

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision can't hold the integers of 8 bits and a fraction: round in float32."""
    return torch.float32 if x.dtype in _LOW_PRECISION else x.dtype


def sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over broadcast axes, in float64: a scale's gradient is a small sum of many numbers of both signs."""
    if grad.shape == like.shape:
        return grad.to(like.dtype)
    lead = grad.dim() - like.dim()
    axes = list(range(lead))
    axes += [i + lead for i, n in enumerate(like.shape) if n == 1 and grad.shape[i + lead] != 1]
    wide = grad.dtype if grad.device.type == "mps" else torch.float64
    if len(axes) == grad.dim() > 2 and torch.compiler.is_compiling():
        # By channel first: so a compiler sums in the pass over memory that sums for norms and biases, too.
        channels = 1 if grad.dim() > 3 else grad.dim() - 1
        axes = [i for i in axes if i != channels]
        grad, axes = grad.sum(dim=axes, dtype=wide), [0]
    return grad.sum(dim=axes, dtype=wide).reshape(like.shape).to(like.dtype)


def _first_outside(maximum: float, dtype: torch.dtype) -> float:
    """The smallest number that rounds, half to even, to an integer above ``maximum``."""
    half = maximum + 0.5
    step = 2.0 ** (math.frexp(half)[1] - (53 if dtype == torch.float64 else 24))
    if step > 0.5:
        return maximum + 1
    return half if maximum % 2 == 1 else half + step


class _FixedRange(Function):
    """Bounds that are numbers: the common case, in as few passes over memory as it takes.

    ``hardtanh_backward`` on the rounded value, with bounds half a step wider, masks in one pass and without a boolean
    tensor. With ``rectify`` it is :func:`fake_quantize` of ``relu(x)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minimum: float,
        maximum: float,
        rounding: str,
        masked: bool,
        rectify: bool,
    ) -> Tensor:
        layout = _native_layout(x, scale, zero_point, rounding)
        if layout is not None:
            return native.quantize(
                layout, x, scale, zero_point, minimum, maximum, rounding, rectify
            )
        if zero_point is None and compiled.wants_compiled(x, scale):
            return kernels_of(x, scale, minimum, maximum, rounding).quantize(x, scale)
        q = x.to(compute_dtype(x)) / scale
        if zero_point is not None:
            q += zero_point
        q = q.round_() if rounding == "round" else ROUNDINGS[rounding](q)
        q = q.clamp_(minimum, maximum)
        if zero_point is not None:
            q -= zero_point
        return q.mul_(scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, scale, zero_point, *ctx.settings = inputs
        keep(ctx, x, scale, zero_point)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        _, need_scale, need_zero, *rest = ctx.needs_input_grad
        forget_origin(ctx)
        x, scale, zero_point = kept(ctx)
        settings: Any = ctx.settings
        grads = range_gradients(
            grad, x, scale, zero_point, *settings, need_scale=need_scale, need_zero=need_zero
        )
        return *grads, *((None,) * len(rest))


def _native_layout(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, rounding: str, g: Tensor | None = None
) -> native.Layout | None:
    if zero_point is not None and zero_point.shape != scale.shape:
        return None
    return native.serves(x, scale.shape, rounding, scale, zero_point, g=g)


def range_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: float,
    maximum: float,
    rounding: str,
    masked: bool,
    rectify: bool,
    *,
    need_scale: bool,
    need_zero: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of ``x``, scale and zero point for that of the result; see :func:`fake_quantize`."""
    if not (masked or need_scale):
        return grad, None, None
    settings: Any = (minimum, maximum, rounding, masked, rectify)
    layout = _native_layout(x, scale, zero_point, rounding, grad)
    if layout is not None:
        return native.gradients(layout, grad, x, scale, zero_point, *settings)
    if zero_point is None and compiled.wants_compiled(x, scale, grad):
        kernels = kernels_of(x, scale, minimum, maximum, rounding, rectify)
        if masked:
            return *kernels.masked_gradient(grad, x, scale), None
        return grad, kernels.scale_gradient(grad, x, scale), None
    compute = compute_dtype(x)
    operands = (grad.to(compute), x.to(compute), scale, zero_point)
    needed: Any = (*settings, need_scale, need_zero and masked)
    slices = _slices(*operands) if masked else None
    if slices is None:
        grad_x, error, outside = _fixed_range_backward(*operands, *needed)
        grad_scale = sum_to(error, scale) if error is not None else None
        grad_zero = None
        if outside is not None and zero_point is not None:
            grad_zero = sum_to(outside * scale, zero_point)
    else:
        grad_x, grad_scale, grad_zero = _by_slices(slices, *operands, *needed)
    return grad_x.to(grad.dtype) if masked else grad, grad_scale, grad_zero


def kernels_of(
    x: Tensor, scale: Tensor, minimum: float, maximum: float, rounding: str, rectify: bool = False
) -> compiled.RangeKernels:
    """The functions that inductor compiles for a range."""
    low, high = minimum - 0.5, maximum + 0.5
    if rectify:
        low, high = 0.0, _first_outside(maximum, compute_dtype(x))
    rows = scale.numel() > 1
    return compiled.range_kernels(
        minimum, maximum, low, high, rounding, rectify, rows, x.dtype, x.device
    )


def _fixed_range_backward(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minimum: float,
    maximum: float,
    rounding: str,
    masked: bool,
    rectify: bool,
    need_scale: bool,
    need_zero: bool,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of ``x``; summands of the scale's; summands of the zero point's, over the scale.

    The scale's summand is, inside, ``q - x / scale`` (the difference itself, since the sum of each part is large), outside
    the clipped integer.
    """
    exact = x / scale
    shifted = exact if zero_point is None else exact + zero_point
    if rectify:
        place, low, high = shifted, 0.0, _first_outside(maximum, exact.dtype)
    else:
        place, low, high = ROUNDINGS[rounding](shifted), minimum - 0.5, maximum + 0.5
    grad_x, inside = g, torch.ops.aten.hardtanh_backward
    if masked and out is None:
        grad_x = inside(g, place, low, high)
    elif masked:
        grad_x = inside.grad_input(g, place, low, high, grad_input=out)
    outside = grad_x - g if need_zero else None
    if not need_scale:
        return grad_x, None, outside
    moved = inside(exact, place, low, high) if masked else exact
    q = place.round_() if rectify else place
    q = q.clamp_(minimum, maximum)
    error = (q if zero_point is None else q.sub_(zero_point)).sub_(moved)
    return grad_x, error * g if transforms_active(g) else error.mul_(g), outside


#: Elements of a slice: its intermediate results stay in the cache of a CPU core, and its memory is used again.
SLICE = 1 << 17


def _slices(g: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Any:
    """The slices that a large tensor is taken in on a CPU; None for the whole at once."""
    if x.device.type != "cpu" or x.numel() < 2 * SLICE or scale.numel() != 1:
        return None
    if zero_point is not None and zero_point.numel() != 1:
        return None
    if torch.compiler.is_compiling() or transforms_active(g):
        return None
    order: Any = torch.contiguous_format
    if not x.is_contiguous():
        order = torch.channels_last
        if x.dim() != 4 or not x.is_contiguous(memory_format=order):
            return None
    # An upstream gradient may be expanded, or laid out otherwise.
    grad_x = torch.empty_like(x)
    flat = [_flat(t) for t in (g.contiguous(memory_format=order), x, grad_x)]
    return grad_x, list(zip(*(t.split(SLICE) for t in flat), strict=True))


def _flat(t: Tensor) -> Tensor:
    return t.view(-1) if t.is_contiguous() else t.permute(0, 2, 3, 1).view(-1)


def total(sums: list[Tensor]) -> Tensor:
    """The sum of the slices' sums, each of which was taken pairwise."""
    return torch.stack(sums).double().sum().to(sums[0].dtype)


def _by_slices(
    slices: Any,
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *needed: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_x, pieces = slices
    errors, outsides = [], []
    for g_piece, x_piece, out in pieces:
        _, error, outside = _fixed_range_backward(
            g_piece, x_piece, scale.reshape(()), zero_point, *needed, out=out
        )
        if error is not None:
            errors.append(error.sum())
        if outside is not None:
            outsides.append(outside.sum())
    grad_scale = total(errors).reshape(scale.shape) if errors else None
    grad_zero = None
    if outsides and zero_point is not None:
        grad_zero = (total(outsides) * scale).reshape(zero_point.shape)
    return grad_x, grad_scale, grad_zero


def can_rectify(zero_point: Tensor | None, minimum: Any, rounding: str, masked: bool) -> bool:
    """Whether clamping to the range does what a ReLU in front would do, gradient included."""
    return zero_point is None and minimum == 0 and rounding == "round" and masked
