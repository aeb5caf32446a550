"""All steps of a quantized Elman cell as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qframework.functional import RNNRanges, add_kernel, in_order, rnn_sequence
from qframework.kernels.autograd import Context
from qframework.kernels.sequence import (
    before,
    before_relu,
    before_tanh,
    call,
    differentiated,
    refuse_other_gradients,
    scale_gradient,
    serves,
    together,
    weight_gradient,
    writer,
)


class _RNNSequence(Function):
    """See :func:`rnn_sequence`."""

    @staticmethod
    def forward(
        ctx: Context,
        products: Tensor,
        hidden: Tensor,
        h: Tensor,
        relu: bool,
        reverse: bool,
        saves: bool,
        grids: Any,
        *scales: Any,
    ) -> Any:
        ranges = together(RNNRanges, scales, grids)
        steps = len(products)
        raw = torch.empty_like(products) if saves else torch.empty_like(products[:1])
        outputs, work = torch.empty_like(products), torch.empty_like(products[0])
        accumulate, write = writer(ranges.accumulator), writer(ranges.output)
        apply_to = torch.Tensor.relu_ if relu else torch.Tensor.tanh_
        inputs, sums, places = products.unbind(0), raw.unbind(0), outputs.unbind(0)
        start, ctx.how = h, (relu, reverse, grids)
        for t in in_order(steps, reverse):
            total = torch.addmm(inputs[t], h, hidden, out=sums[t if saves else 0])
            accumulate(total, work, work)
            h = write(apply_to(work), work, places[t])
        if saves:
            ctx.save_for_backward(hidden, start, raw, outputs, *scales)
        return outputs

    @staticmethod
    def backward(ctx: Context, grad_outputs: Tensor) -> Any:
        refuse_other_gradients(grad_outputs)
        hidden, start, raw, outputs, *scales = ctx.saved_tensors
        relu, reverse, grids = ctx.how
        ranges = together(RNNRanges, scales, grids)
        need = ctx.needs_input_grad[7:]
        summed, of_acc = differentiated(raw, ranges.accumulator, need[0])
        result = torch.relu(summed) if relu else torch.tanh(summed)
        _, of_output = differentiated(result, ranges.output, need[1])
        behind = before_relu if relu else before_tanh
        to_acc = behind(of_output.through(torch.ones_like(result)), result)
        to_raw = of_acc.through(to_acc)
        by_output, grad_raw = torch.empty_like(raw), torch.empty_like(raw)
        views = (grad_outputs, to_raw, by_output, grad_raw)
        at, back, grad = [v.unbind(0) for v in views], hidden.t(), torch.zeros_like(start)
        for t in reversed(list(in_order(len(raw), reverse))):
            given, factor, h, into = (v[t] for v in at)
            torch.addmm(given, grad, back, out=h)
            grad = torch.mul(h, factor, out=into)
        return (
            grad_raw,
            weight_gradient(before(outputs, start, reverse), grad_raw),
            grad @ back,
            *(None,) * 4,
            scale_gradient(of_acc, ranges.accumulator, to_acc, by_output),
            scale_gradient(of_output, ranges.output, by_output),
        )


@add_kernel(rnn_sequence, "fused", lambda x, w, h, *_: serves(x, w, h))
def _fused(
    products: Tensor, hidden: Tensor, first: Tensor, ranges: RNNRanges, relu: bool, reverse: bool
) -> Tensor:
    return call(_RNNSequence, ranges, products, hidden, first, relu, reverse)  # type: ignore[no-any-return]
