"""All steps of a quantized LSTM cell as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qframework.functional import LSTMRanges, add_kernel, in_order, lstm_sequence
from qframework.kernels.autograd import Context, is_compiling, may_fuse_in_graph
from qframework.kernels.sequence import (
    before,
    before_sigmoid,
    before_tanh,
    call,
    differentiated,
    plainly,
    refuse_other_gradients,
    scale_gradient,
    serves,
    takes_sequences,
    together,
    weight_gradient,
    writer,
    writer_of_columns,
)


class _LSTMSequence(Function):
    """See :func:`lstm_sequence`.

    Columns are those of the gates ``o, i, f, g`` and of the state ``c``, so that ``i, f`` and ``g, c`` are neighbours.
    """

    @staticmethod
    def forward(
        ctx: Context,
        products: Tensor,
        hidden: Tensor,
        h: Tensor,
        c: Tensor,
        reverse: bool,
        saves: bool,
        grids: Any,
        *scales: Any,
    ) -> Any:
        ranges = together(LSTMRanges, scales, grids)
        steps, batch, _ = products.shape
        size = h.shape[1]
        saved = steps if saves else 1
        gates = products.new_empty(saved, batch, 4 * size)
        held = products.new_empty(saved, batch, 5 * size)
        work, pair = products.new_empty(batch, 4 * size), products.new_empty(batch, 2 * size)
        sigmoids, tanhs = work[:, : 3 * size], work[:, 3 * size :]
        remembered, entered = pair[:, size:], pair[:, :size]
        total, last, first = (torch.empty_like(c) for _ in range(3))
        outputs = products.new_empty(steps, batch, size)
        accumulate, write_state = writer(ranges.accumulators), writer(ranges.state)
        squash, write = writer(ranges.hidden), writer(ranges.output)
        open_gates = writer_of_columns([(ranges.gates, 3 * size), (ranges.new, size)])
        views = (
            gates,
            held[..., : 4 * size],
            held[..., :size],
            held[..., size : 3 * size],
            held[..., 3 * size :],
            held[..., 4 * size :],
        )
        at = [v.unbind(0) for v in views]
        inputs, places = products.unbind(0), outputs.unbind(0)
        order = list(in_order(steps, reverse))
        following = [*order[1:], None]
        start, ctx.how = h, (reverse, grids)
        at[5][order[0] if saves else 0].copy_(c)
        for t, then in zip(order, following, strict=True):
            i = t if saves else 0
            raw, open_, leaving, left, right, _ = (v[i] for v in at)
            torch.addmm(inputs[t], h, hidden, out=raw)
            accumulate(raw, work, work)
            sigmoids.sigmoid_()
            tanhs.tanh_()
            open_gates(work, work, open_)
            write_state(torch.mul(left, right, out=pair), pair, pair)
            state = last if then is None else at[5][then if saves else 0]
            write_state(torch.add(entered, remembered, out=total), total, state)
            squash(torch.tanh(state, out=first), first, first)
            h = write(torch.mul(leaving, first, out=total), total, places[t])
        if saves:
            ctx.save_for_backward(hidden, start, gates, held, outputs, *scales)
        return outputs, last

    @staticmethod
    def backward(ctx: Context, grad_outputs: Tensor, grad_state: Tensor) -> Any:
        refuse_other_gradients(grad_outputs)
        hidden, start, gates, held, outputs, *scales = ctx.saved_tensors
        reverse, grids = ctx.how
        ranges = together(LSTMRanges, scales, grids)
        size = start.shape[1]
        need = ctx.needs_input_grad[7:]
        # Values of all steps again, element by element.
        summed, of_acc = differentiated(gates, ranges.accumulators, need[0])
        opened = torch.sigmoid(summed[..., : 3 * size])
        entering = torch.tanh(summed[..., 3 * size :])
        leaving, left, right = held.split([size, 2 * size, 2 * size], dim=-1)
        parts = left * right
        _, of_open = differentiated(opened, ranges.gates, need[1])
        _, of_new = differentiated(entering, ranges.new, need[2])
        quant_parts, of_parts = differentiated(parts, ranges.state, need[3])
        total = quant_parts[..., :size] + quant_parts[..., size:]
        state, of_total = differentiated(total, ranges.state, need[3])
        squashed = torch.tanh(state)
        quant_squashed, of_hidden = differentiated(squashed, ranges.hidden, need[4])
        _, of_output = differentiated(leaving * quant_squashed, ranges.output, need[5])
        # What the gradients of output (first) and state are multiplied by, back to the accumulators.
        to_squashed = of_output.through(leaving, last=False)
        to_state = before_tanh(of_hidden.through(to_squashed), squashed)
        to_open, to_acc = torch.empty_like(opened), torch.empty_like(gates)
        to_open[..., :size] = of_output.through(quant_squashed)
        to_parts = torch.cat([of_total.through(torch.ones_like(total))] * 2, dim=-1)
        before_parts = of_parts.through(to_parts)
        to_open[..., size:] = before_parts * right
        to_new, forgotten = before_parts.mul_(left).split(size, dim=-1)
        to_acc[..., : 3 * size] = before_sigmoid(of_open.through(to_open), opened)
        to_acc[..., 3 * size :] = before_tanh(of_new.through(to_new), entering)
        walk = _back_traced if is_compiling() else _back_through_time
        into = walk(
            grad_outputs,
            grad_state,
            hidden,
            to_state,
            of_acc.through(to_acc),
            forgotten,
            reverse,
        )
        by_output, by_state, grad_gates, grad_start, grad_state = into
        grad_hidden = weight_gradient(before(outputs, start, reverse), grad_gates)
        one, two, three = (1, by_output), (2, by_state), (3, by_state)
        of_sum = scale_gradient(of_total, ranges.state, by_state)
        of_summed = scale_gradient(of_parts, ranges.state, to_parts, two)
        of = (
            scale_gradient(of_acc, ranges.accumulators, to_acc, one, three),
            scale_gradient(of_open, ranges.gates, to_open, one, two),
            scale_gradient(of_new, ranges.new, to_new, by_state),
            None if of_sum is None or of_summed is None else of_sum + of_summed,
            scale_gradient(of_hidden, ranges.hidden, to_squashed, by_output),
            scale_gradient(of_output, ranges.output, by_output),
        )
        return grad_gates, grad_hidden, grad_start, grad_state, None, None, None, *of


class _TracedLSTMSequence(_LSTMSequence):
    """The same for compilers, which find places for results themselves, and have more to join when nothing is written over."""

    @staticmethod
    def forward(
        ctx: Context,
        products: Tensor,
        hidden: Tensor,
        h: Tensor,
        c: Tensor,
        reverse: bool,
        saves: bool,
        grids: Any,
        *scales: Any,
    ) -> Any:
        ranges = together(LSTMRanges, scales, grids)
        size = h.shape[1]
        steps = len(products)
        start, ctx.how = h, (reverse, grids)
        saved: list[Any] = [None] * steps
        for t in in_order(steps, reverse):
            raw = torch.addmm(products[t], h, hidden)
            summed = plainly(raw, ranges.accumulators)
            opened = plainly(torch.sigmoid(summed[:, : 3 * size]), ranges.gates)
            new = plainly(torch.tanh(summed[:, 3 * size :]), ranges.new)
            leaving, entering, remembered = opened.split(size, dim=1)
            held = torch.cat([opened, new, c], dim=1)
            entered = plainly(entering * new, ranges.state)
            c = plainly(entered + plainly(remembered * c, ranges.state), ranges.state)
            h = plainly(leaving * plainly(torch.tanh(c), ranges.hidden), ranges.output)
            saved[t] = raw, held, h
        outputs = torch.stack([k[2] for k in saved])
        if saves:
            gates, helds = (torch.stack([k[i] for k in saved]) for i in (0, 1))
            ctx.save_for_backward(hidden, start, gates, helds, outputs, *scales)
        return outputs, c


def _back_traced(
    grad_outputs: Tensor,
    grad_state: Tensor,
    hidden: Tensor,
    to_state: Tensor,
    to_gates: Tensor,
    forgotten: Tensor,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """:func:`_back_through_time` for compilers."""
    back, steps = hidden.t(), len(to_gates)
    found: list[Any] = [None] * steps
    grad = torch.zeros_like(to_gates[0])
    for t in reversed(list(in_order(steps, reverse))):
        h = torch.addmm(grad_outputs[t], grad, back)
        c = torch.addcmul(grad_state, h, to_state[t])
        grad = to_gates[t] * torch.cat([h, c, c, c], dim=1)
        grad_state = c * forgotten[t]
        found[t] = h, c, grad
    by_output, by_state, grads = (torch.stack([f[i] for f in found]) for i in range(3))
    return by_output, by_state, grads, grad @ back, grad_state


def _back_through_time(
    grad_outputs: Tensor,
    grad_state: Tensor,
    hidden: Tensor,
    to_state: Tensor,
    to_gates: Tensor,
    forgotten: Tensor,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Gradients of output, state and gates at each step, and of what was there before the first one.

    Args:
        grad_outputs: of all outputs, from behind the layer.
        grad_state: of the last state.
        hidden: the weights of the state.
        to_state: what the gradient of the output is multiplied by on its way to the state.
        to_gates: what those of the output (first gate) and the state (others) are multiplied by.
        forgotten: what that of the state is multiplied by on its way to the state before.
        reverse: whether the last step was taken first.
    """
    size, back = hidden.shape[0], hidden.t()
    by_output, by_state = torch.empty_like(to_state), torch.empty_like(to_state)
    grad_gates = torch.empty_like(to_gates)
    factors, products = (
        (t[..., :size], t[..., size:].unflatten(-1, (3, size))) for t in (to_gates, grad_gates)
    )
    views = (grad_outputs, to_state, forgotten, by_output, by_state, grad_gates)
    at = [v.unbind(0) for v in (*views, *factors, *products)]
    grad = None
    for t in reversed(list(in_order(len(to_gates), reverse))):
        behind, squash, forgot, h, c, all_, gate, others, grad_gate, grad_others = (
            v[t] for v in at
        )
        if grad is None:
            h.copy_(behind)
        else:
            torch.addmm(behind, grad, back, out=h)
        torch.addcmul(grad_state, h, squash, out=c)
        torch.mul(h, gate, out=grad_gate)
        torch.mul(c.unsqueeze(1), others, out=grad_others)
        grad_state, grad = c * forgot, all_
    assert grad is not None
    return by_output, by_state, grad_gates, grad @ back, grad_state


def _serves(products: Tensor, hidden: Tensor, first: tuple[Tensor, Tensor], *_: object) -> bool:
    if may_fuse_in_graph():
        return takes_sequences(products, hidden, *first)
    return serves(products, hidden, *first)


@add_kernel(lstm_sequence, "fused", _serves)
def _fused(
    products: Tensor,
    hidden: Tensor,
    first: tuple[Tensor, Tensor],
    ranges: LSTMRanges,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    function = _TracedLSTMSequence if is_compiling() else _LSTMSequence
    return call(function, ranges, products, hidden, *first, reverse)  # type: ignore[no-any-return]
