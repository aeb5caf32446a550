"""Sums of products: linear layers, convolutions, embeddings; exact scale and width of the accumulator.

The widths are worst cases, see :func:`accumulator_bits`.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from qframework.functional import convolution, linear, transposed_convolution
from qframework.functional.products import Numbers
from qframework.quant_tensor.algebra import bits_of_codes, in_float64
from qframework.quant_tensor.base import QuantTensor, TensorLike
from qframework.quant_tensor.int_quant_tensor import IntQuantTensor
from qframework.quant_tensor.record import has_field
from qframework.quant_tensor.registry import rule
from qframework.quant_tensor.source import Source, can_read, product_source, scale_only


def _is_plain_int(x: TensorLike | None) -> TypeGuard[IntQuantTensor]:
    return has_field(x, "bit_width") and hasattr(x, "symmetric")


def _value(x: TensorLike | None) -> Tensor | None:
    return x.value if isinstance(x, QuantTensor) else x


def accumulator_bits(x: IntQuantTensor, w: IntQuantTensor, products: int) -> Tensor:
    """Bits of the sum of ``products`` products of integers of two types, in the worst case.

    The customary ``ceil(log2(U(b_x) U(b_w) K + 1))``, or more where the exact range needs it: for signed results
    ``ceil(log2(|q_x| |q_w| K + 1)) + 1``, ``|q|`` being ``2^(b-1)`` for signed integers (1 for -1 and 1 in one bit).
    """
    return _accumulator_bits(*_types_of(x, w), products)


def _types_of(x: IntQuantTensor, w: IntQuantTensor) -> tuple[Tensor, bool, Tensor, bool]:
    return x.bit_width, x.signed, w.bit_width, w.signed


def _accumulator_bits(
    bits_x: Tensor, signed_x: bool, bits_w: Tensor, signed_w: bool, products: int
) -> Tensor:
    codes_x, codes_w = 2.0 ** in_float64(bits_x), 2.0 ** in_float64(bits_w)
    codes = (codes_x - 1) * (codes_w - 1) * products + 1
    if signed_x or signed_w:
        largest_x = codes_x / 2 if signed_x else codes_x - 1
        largest_w = codes_w / 2 if signed_w else codes_w - 1
        codes = torch.maximum(codes, 2 * (largest_x * largest_w * products + 1))
    return bits_of_codes(codes).to(bits_x.dtype)


def _along(t: Tensor, axis: int, ndim: int, channels: int) -> Tensor | None:
    """``t`` as a 0-dim tensor or spread along ``axis`` alone; None when it varies along another."""
    if t.numel() == 1:
        return t.reshape(())
    if t.numel() != channels:
        return None
    shape = [1] * ndim
    shape[axis] = channels
    return t.reshape(shape)


def _only_along(q: IntQuantTensor, axis: int) -> bool:
    """Whether a scale varies along one axis of its tensor at most."""
    shape = (1,) * (q.value.dim() - q.scale.dim()) + tuple(q.scale.shape)
    return all(n == 1 for i, n in enumerate(shape) if i != axis % len(shape))


def _input_scale(x: IntQuantTensor, axis: int, depthwise: int | None) -> Tensor | None:
    scale: Tensor = x.scale
    if scale.numel() == 1:
        return scale.reshape(())
    if depthwise is None or scale.dim() != x.value.dim() or not _only_along(x, axis):
        return None
    return scale.repeat_interleave(depthwise, dim=axis) if depthwise != 1 else scale


def _products(
    value: Tensor,
    x: IntQuantTensor,
    w: IntQuantTensor,
    bias: TensorLike | None,
    products: int,
    axis: int,
    weight_axis: int,
    depthwise: int | None = None,
) -> Any:
    """Wrap a sum of ``products`` products, or return the float ``value`` where it has no exact metadata.

    Args:
        value: the result, with its output channels along ``axis``.
        x: input.
        w: weight, with its output channels along ``weight_axis``.
        bias: None, float tensor or quantized tensor.
        products: how many products one output is a sum of, at most.
        axis: of the output channels in the result.
        weight_axis: of the output channels in the weight.
        depthwise: output channels per input channel, where each output depends on one input channel.
    """
    if not (x.symmetric and w.symmetric):
        return value
    ndim, channels = value.dim(), value.shape[axis]
    weight_scale = _along(w.scale, axis, ndim, channels) if _only_along(w, weight_axis) else None
    input_scale = _input_scale(x, axis, depthwise)
    if weight_scale is None or input_scale is None:
        return value
    source = product_source(x, w)
    integer_bias = bias if _is_plain_int(bias) else None
    on_scale = bias is None or (
        integer_bias is not None
        and _on_scale(integer_bias, weight_scale, input_scale, source, axis, ndim, channels)
    )
    moved = None
    if not on_scale:
        moved = _along(bias.value if isinstance(bias, QuantTensor) else bias, axis, ndim, channels)  # type: ignore[arg-type]
        assert moved is not None
    types = _types_of(x, w)

    def later() -> dict[str, Tensor]:
        scale = weight_scale * input_scale
        bits = _accumulator_bits(*types, products)
        if integer_bias is not None:
            bits = torch.maximum(bits, integer_bias.bit_width) + 1
        if moved is not None:
            zero_point = -moved / scale
        else:
            zero_point = torch.zeros_like(scale.detach().reshape(-1)[0])
        return {"scale": scale, "bit_width": bits, "zero_point": zero_point}

    return x.replace_later(
        later,
        value=value,
        signed=x.signed or w.signed,
        training=x.training or w.training,
        source=scale_only(source),
        symmetric=on_scale,
        has_zero=on_scale,
    )


def _on_scale(
    bias: IntQuantTensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    source: Source,
    axis: int,
    ndim: int,
    channels: int,
) -> bool:
    """Whether a quantized bias lies on the scale of the accumulator."""
    if not bias.symmetric:
        return False
    if source is not None and scale_only(bias.source) == scale_only(source):
        return True
    own = _along(bias.scale, axis, ndim, channels)
    scale = weight_scale * input_scale
    if own is None or not can_read(own, scale):
        return False
    return bool(torch.isclose(own.detach(), scale.detach(), rtol=1e-5, atol=0.0).all())


@rule("linear", method=False)
def _linear(x: TensorLike, weight: TensorLike, bias: TensorLike | None = None) -> Any:
    if not (_is_plain_int(x) and _is_plain_int(weight)):
        return NotImplemented
    value = linear(x.value, weight.value, _value(bias))
    if weight.value.dim() != 2:
        return value
    return _products(value, x, weight, bias, weight.value.shape[1], -1, 0)


def _conv_rule(spatial: int) -> None:
    def apply(
        x: TensorLike,
        weight: TensorLike,
        bias: TensorLike | None = None,
        stride: Numbers = 1,
        padding: str | Numbers = 0,
        dilation: Numbers = 1,
        groups: int = 1,
    ) -> Any:
        if not (_is_plain_int(x) and _is_plain_int(weight)):
            return NotImplemented
        w = weight.value
        value = convolution(x.value, w, _value(bias), stride, padding, dilation, groups)
        depthwise = w.shape[0] // groups if w.shape[1] == 1 else None
        axis = value.dim() - spatial - 1
        return _products(value, x, weight, bias, math.prod(w.shape[1:]), axis, 0, depthwise)

    rule(f"conv{spatial}d", method=False)(apply)


def _conv_transpose_rule(spatial: int) -> None:
    def apply(
        x: TensorLike,
        weight: TensorLike,
        bias: TensorLike | None = None,
        stride: Numbers = 1,
        padding: Numbers = 0,
        output_padding: Numbers = 0,
        groups: int = 1,
        dilation: Numbers = 1,
    ) -> Any:
        if not (_is_plain_int(x) and _is_plain_int(weight)):
            return NotImplemented
        w = weight.value
        value = transposed_convolution(
            x.value, w, _value(bias), stride, padding, output_padding, groups, dilation
        )
        if groups != 1 and weight.scale.numel() > 1:
            if not _only_along(weight, 1) or weight.scale.dim() != w.dim():
                return value
            # A scale belongs to a position within its group.
            tiled = weight.scale.repeat(1, groups, *[1] * spatial)
            weight = weight.replace(scale=tiled, source=None)
        strides = (stride,) * spatial if isinstance(stride, int) else tuple(stride)
        dilations = (dilation,) * spatial if isinstance(dilation, int) else tuple(dilation)
        taps = math.prod(
            [
                -(-k // (s // math.gcd(s, d)))
                for k, s, d in zip(w.shape[2:], strides, dilations, strict=True)
            ]
        )
        axis = value.dim() - spatial - 1
        return _products(value, x, weight, bias, taps * (w.shape[0] // groups), axis, 1)

    rule(f"conv_transpose{spatial}d", method=False)(apply)


for _n in (1, 2, 3):
    _conv_rule(_n)
    _conv_transpose_rule(_n)


@rule("matmul", "__matmul__", "bmm", "mm")
def _matmul(
    a: TensorLike,
    other: TensorLike | None = None,
    *,
    mat2: TensorLike | None = None,
    out: Tensor | None = None,
) -> Any:
    """Per-tensor scales, no zero points; else a float tensor."""
    b = other if mat2 is None else mat2
    if out is not None or not (_is_plain_int(a) and _is_plain_int(b)):
        return NotImplemented
    value = torch.matmul(a.value, b.value)
    if not (a.symmetric and b.symmetric) or a.scale.numel() > 1 or b.scale.numel() > 1:
        return value
    scale = a.scale.reshape(()) * b.scale.reshape(())
    return a.replace(
        value=value,
        scale=scale,
        zero_point=torch.zeros_like(scale.detach()),
        bit_width=accumulator_bits(a, b, a.value.shape[-1]),
        signed=a.signed or b.signed,
        training=a.training or b.training,
        source=scale_only(product_source(a, b)),
        has_zero=True,
    )


@rule("embedding", method=False)
def _embedding(
    input: Tensor,
    weight: TensorLike,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rows of a quantized table; per-tensor metadata is needed.

    Raises:
        RuntimeError: a scale or zero point per row or column.
    """
    if not _is_plain_int(weight):
        return NotImplemented
    if max_norm is not None:  # torch rescales rows of the table, in place
        table = weight.value.clone()
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return F.embedding(input, table, *options)
    if weight.scale.numel() > 1 or weight.zero_point.numel() > 1:
        raise RuntimeError(
            f"an embedding of quantized weights needs one scale; got scales of shape {tuple(weight.scale.shape)}"
        )
    value = F.embedding(
        input, weight.value, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
    )
    return weight.replace(
        value=value, scale=weight.scale.reshape(()), zero_point=weight.zero_point.reshape(())
    )
