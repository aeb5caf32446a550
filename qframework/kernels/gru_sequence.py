"""All steps of a quantized GRU cell as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qframework.functional import GRURanges, add_kernel, gru_sequence, in_order
from qframework.kernels.autograd import Context
from qframework.kernels.sequence import (
    before,
    before_sigmoid,
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


class _GRUSequence(Function):
    """See :func:`gru_sequence`; columns are those of the gates ``r, z``, of the state's part and of the new value."""

    @staticmethod
    def forward(
        ctx: Context,
        products: Tensor,
        hidden: Tensor,
        bias: Tensor | None,
        h: Tensor,
        reverse: bool,
        saves: bool,
        grids: Any,
        *scales: Any,
    ) -> Any:
        ranges = together(GRURanges, scales, grids)
        steps, batch, _ = products.shape
        size = h.shape[1]
        raw = products.new_empty(steps if saves else 1, batch, 4 * size)
        outputs = products.new_empty(steps, batch, size)
        moved, gates = products.new_empty(batch, 3 * size), products.new_empty(batch, 2 * size)
        from_state, new = torch.empty_like(h), torch.empty_like(h)
        reset, update = gates.split(size, dim=1)
        to_gates, to_new = moved[:, : 2 * size], moved[:, 2 * size :]
        accumulate, open_gates = writer(ranges.accumulators), writer(ranges.gates)
        move, enter = writer(ranges.from_state), writer(ranges.entering)
        squash, write = writer(ranges.new), writer(ranges.output)
        parts = raw[..., : 2 * size], raw[..., 2 * size : 3 * size], raw[..., 3 * size :]
        at = [v.unbind(0) for v in parts]
        given = [v.unbind(0) for v in (products[..., : 2 * size], products[..., 2 * size :])]
        places = outputs.unbind(0)
        start, ctx.how = h, (reverse, grids)
        for t in in_order(steps, reverse):
            sums, state_sum, new_sum = (v[t if saves else 0] for v in at)
            torch.mm(h, hidden, out=moved)
            accumulate(torch.add(given[0][t], to_gates, out=sums), gates, gates)
            open_gates(gates.sigmoid_(), gates, gates)
            if bias is None:
                state_sum.copy_(to_new)
            else:
                torch.add(to_new, bias, out=state_sum)
            move(state_sum, from_state, from_state)
            torch.add(given[1][t], torch.mul(reset, from_state, out=new), out=new_sum)
            squash(enter(new_sum, new, new).tanh_(), new, new)
            torch.sub(h, new, out=from_state).mul_(update).add_(new)
            h = write(from_state, from_state, places[t])
        if saves:
            ctx.save_for_backward(hidden, start, raw, outputs, *scales)
        return outputs

    @staticmethod
    def backward(ctx: Context, grad_outputs: Tensor) -> Any:
        refuse_other_gradients(grad_outputs)
        hidden, start, raw, outputs, *scales = ctx.saved_tensors
        reverse, grids = ctx.how
        ranges = together(GRURanges, scales, grids)
        size = start.shape[1]
        need = ctx.needs_input_grad[7:]
        # Values of all steps again, element by element.
        summed, of_acc = differentiated(raw[..., : 2 * size], ranges.accumulators, need[0])
        opened = torch.sigmoid(summed)
        gates, of_gates = differentiated(opened, ranges.gates, need[3])
        reset, update = gates.split(size, dim=-1)
        from_state, of_state = differentiated(
            raw[..., 2 * size : 3 * size], ranges.from_state, need[1]
        )
        entering, of_entering = differentiated(raw[..., 3 * size :], ranges.entering, need[2])
        squashed = torch.tanh(entering)
        new, of_new = differentiated(squashed, ranges.new, need[4])
        states = before(outputs, start, reverse)
        change = states - new
        _, of_output = differentiated(torch.addcmul(new, update, change), ranges.output, need[5])
        # What the gradient of the output is multiplied by, back to the accumulators.
        to_total = of_output.through(torch.ones_like(new))
        to_state = to_total * update
        to_new = to_total - to_state
        to_entering = before_tanh(of_new.through(to_new), squashed)
        to_sum = of_entering.through(to_entering)
        to_gates = torch.cat([to_sum * from_state, to_total * change], dim=-1)
        to_moved = to_sum * reset
        to_acc = before_sigmoid(of_gates.through(to_gates), opened)
        factors = torch.cat([of_acc.through(to_acc), of_state.through(to_moved)], dim=-1)
        # Back through time.
        by_output, grad_moved = torch.empty_like(new), torch.empty_like(factors)
        parts = (grad_outputs, to_state, factors, by_output, grad_moved)
        spread = (t.unflatten(-1, (3, size)) for t in (factors, grad_moved))
        at = [v.unbind(0) for v in (*parts, *spread)]
        back, into_state, grad = hidden.t(), None, None
        for t in reversed(list(in_order(len(raw), reverse))):
            given, staying, _, h, grad_all, factor, grad_parts = (v[t] for v in at)
            if grad is None or into_state is None:
                h.copy_(given)
            else:
                torch.addmm(into_state.add_(given), grad, back, out=h)
            torch.mul(h.unsqueeze(1), factor, out=grad_parts)
            into_state, grad = h * staying, grad_all
        assert grad is not None and into_state is not None
        grad_sum = to_sum.mul_(by_output)
        two = (2, by_output)
        return (
            torch.cat([grad_moved[..., : 2 * size], grad_sum], dim=-1),
            weight_gradient(states, grad_moved),
            grad_moved[..., 2 * size :].sum(dim=(0, 1)) if ctx.needs_input_grad[2] else None,
            torch.addmm(into_state, grad, back),
            *(None,) * 3,
            scale_gradient(of_acc, ranges.accumulators, to_acc, two),
            scale_gradient(of_state, ranges.from_state, to_moved, by_output),
            scale_gradient(of_entering, ranges.entering, to_entering, by_output),
            scale_gradient(of_gates, ranges.gates, to_gates, two),
            scale_gradient(of_new, ranges.new, to_new, by_output),
            scale_gradient(of_output, ranges.output, by_output),
        )


@add_kernel(gru_sequence, "fused", lambda x, w, b, h, *_: serves(x, w, h))
def _fused(
    products: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    first: Tensor,
    ranges: GRURanges,
    reverse: bool,
) -> Tensor:
    return call(_GRUSequence, ranges, products, hidden, bias, first, reverse)  # type: ignore[no-any-return]
