"""All steps of a quantized Elman cell as one differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.sequence import (
    Range,
    before,
    before_relu,
    before_tanh,
    call,
    differentiated,
    in_order,
    refuse_batches,
    scale_gradient,
    together,
    weight_gradient,
    writer,
)


class RNNRanges(NamedTuple):
    """The quantizers of an Elman cell, None where there is none.

    Attributes:
        accumulator: of the sum of products.
        output: of the output.
    """

    accumulator: Range | None
    output: Range | None


class _RNNSequence(Function):
    """See :func:`rnn_sequence`."""

    @staticmethod
    def forward(
        ctx: Any,
        products: Tensor,
        hidden: Tensor,
        h: Tensor,
        rectify: bool,
        reverse: bool,
        keep: bool,
        hows: Any,
        *scales: Any,
    ) -> Any:
        ranges = together(RNNRanges, scales, hows)
        steps = len(products)
        raw = torch.empty_like(products) if keep else torch.empty_like(products[:1])
        outputs, work = torch.empty_like(products), torch.empty_like(products[0])
        accumulate, write = writer(ranges.accumulator), writer(ranges.output)
        apply_to = torch.Tensor.relu_ if rectify else torch.Tensor.tanh_
        inputs, sums, places = products.unbind(0), raw.unbind(0), outputs.unbind(0)
        start, ctx.rectify, ctx.reverse, ctx.hows = h, rectify, reverse, hows
        for t in in_order(steps, reverse):
            total = torch.addmm(inputs[t], h, hidden, out=sums[t if keep else 0])
            accumulate(total, work, work)
            h = write(apply_to(work), work, places[t])
        if keep:
            ctx.save_for_backward(hidden, start, raw, outputs, *scales)
        return outputs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_outputs: Tensor) -> Any:
        refuse_batches(grad_outputs)
        hidden, start, raw, outputs, *scales = ctx.saved_tensors
        ranges = together(RNNRanges, scales, ctx.hows)
        need = ctx.needs_input_grad[7:]
        summed, of_acc = differentiated(raw, ranges.accumulator, need[0])
        result = torch.relu(summed) if ctx.rectify else torch.tanh(summed)
        _, of_output = differentiated(result, ranges.output, need[1])
        behind = before_relu if ctx.rectify else before_tanh
        to_acc = behind(of_output.through(torch.ones_like(result)), result)
        to_raw = of_acc.through(to_acc)
        by_output, grad_raw = torch.empty_like(raw), torch.empty_like(raw)
        views = (grad_outputs, to_raw, by_output, grad_raw)
        at, back, grad = [v.unbind(0) for v in views], hidden.t(), torch.zeros_like(start)
        for t in reversed(list(in_order(len(raw), ctx.reverse))):
            given, factor, h, into = (v[t] for v in at)
            torch.addmm(given, grad, back, out=h)
            grad = torch.mul(h, factor, out=into)
        return (
            grad_raw,
            weight_gradient(before(outputs, start, ctx.reverse), grad_raw),
            grad @ back,
            *(None,) * 4,
            scale_gradient(of_acc, ranges.accumulator, to_acc, by_output),
            scale_gradient(of_output, ranges.output, by_output),
        )


def rnn_sequence(
    products: Tensor,
    hidden: Tensor,
    first: Tensor,
    ranges: RNNRanges,
    rectify: bool,
    reverse: bool,
) -> Tensor:
    """Outputs of all steps, ``h = q(f(q(x + W h)))``; ``q`` quantizes by a range, or is the identity where there is none.

    Args:
        products: what the inputs add to the accumulator, ``(T, N, H)``; float32 or float64.
        hidden: the weights of the state, ``(H, H)``.
        first: the output before, ``(N, H)``.
        ranges: the quantizers.
        rectify: ``f`` is a ReLU, not a hyperbolic tangent.
        reverse: take the last step first.

    Returns:
        Outputs ``(T, N, H)``.
    """
    return call(_RNNSequence, ranges, products, hidden, first, rectify, reverse)  # type: ignore[no-any-return]
