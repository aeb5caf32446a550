"""One step of a quantized LSTM cell, behind its matrix products, as one differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.functional.autograd import apply
from qframework.functional.fake_quantize import fake_quantize, range_gradients


class Range(NamedTuple):
    """A quantizer whose scale is known.

    Attributes:
        scale: a number, or one for each column.
        how: smallest and largest integer, rounding and clamp gradient, as :func:`fake_quantize` has them.
    """

    scale: Tensor
    how: tuple[Any, ...]


class CellRanges(NamedTuple):
    """The quantizers of an LSTM cell, None where there is none.

    Attributes:
        accumulators: of all gates.
        gates: of the results of the sigmoids.
        new: of what enters the state.
        state: of the state and what it is the sum of.
        hidden: of the hyperbolic tangent of the state.
        output: of the output.
    """

    accumulators: Range | None
    gates: Range | None
    new: Range | None
    state: Range | None
    hidden: Range | None
    output: Range | None


def _quantize(x: Tensor, scale: Tensor | None, how: Any) -> Tensor:
    if scale is None:
        return x
    low, high, rule, _ = how
    if rule == "round" and x.dtype in (torch.float32, torch.float64):
        return x.div(scale).round_().clamp_(low, high).mul_(scale)
    return fake_quantize(x, scale, None, *how)


def _back(grad: Tensor, x: Tensor, scale: Tensor | None, how: Any) -> tuple[Tensor, Tensor | None]:
    if scale is None:
        return grad, None
    options: Any = {"rectify": False, "need_scale": scale.requires_grad, "need_zero": False}
    grad_x, grad_scale, _ = range_gradients(grad, x, scale, None, *how, **options)
    return grad_x, grad_scale


class _LSTMStep(Function):
    """See :func:`lstm_step`."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor, hows: Any, *scales: Any) -> Any:
        size = cell.shape[1]
        acc, sigmoid, new, state, hidden, output = zip(scales, hows, strict=True)
        summed = _quantize(gates, *acc)
        open_, entering = torch.sigmoid(summed[:, : 3 * size]), torch.tanh(summed[:, 3 * size :])
        quant_open, quant_new = _quantize(open_, *sigmoid), _quantize(entering, *new)
        pair = torch.cat([quant_new, cell], dim=1)
        parts = quant_open[:, : 2 * size] * pair
        quant_parts = _quantize(parts, *state)
        total = quant_parts[:, :size] + quant_parts[:, size:]
        following = _quantize(total, *state)
        squashed = torch.tanh(following)
        quant_squashed = _quantize(squashed, *hidden)
        raw = quant_open[:, 2 * size :] * quant_squashed
        ctx.hows, ctx.size, ctx.scales = hows, size, len(scales)
        kept = (
            gates,
            open_,
            entering,
            quant_open,
            pair,
            parts,
            total,
            squashed,
            quant_squashed,
            raw,
        )
        ctx.save_for_backward(*kept, *scales)
        return _quantize(raw, *output), following

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: Tensor, grad_cell: Tensor) -> Any:
        """Each part in turn, from the output to the accumulators."""
        saved, size = ctx.saved_tensors, ctx.size
        gates, open_, entering, quant_open, pair, parts, total, squashed, quant_squashed, raw = (
            saved[:10]
        )
        acc, sigmoid, new, state, hidden, output = zip(saved[10:], ctx.hows, strict=True)
        grad_raw, of_output = _back(grad_output, raw, *output)
        grad_squashed, of_hidden = _back(grad_raw * quant_open[:, 2 * size :], squashed, *hidden)
        grad_cell = grad_cell + torch.ops.aten.tanh_backward(grad_squashed, squashed)
        grad_total, of_sum = _back(grad_cell, total, *state)
        grad_parts, of_parts = _back(torch.cat([grad_total, grad_total], dim=1), parts, *state)
        grad_pair = grad_parts * quant_open[:, : 2 * size]
        grad_new, of_new = _back(grad_pair[:, :size], entering, *new)
        grad_open = torch.cat([grad_parts * pair, grad_raw * quant_squashed], dim=1)
        grad_open, of_gates = _back(grad_open, open_, *sigmoid)
        opened = torch.ops.aten.sigmoid_backward(grad_open, open_)
        entered = torch.ops.aten.tanh_backward(grad_new, entering)
        grad_gates, of_acc = _back(torch.cat([opened, entered], dim=1), gates, *acc)
        of_state = of_sum if of_parts is None or of_sum is None else of_sum + of_parts
        scales = (of_acc, of_gates, of_new, of_state, of_hidden, of_output)
        return grad_gates, grad_pair[:, size:], None, *scales


def lstm_step(gates: Tensor, cell: Tensor, ranges: CellRanges) -> tuple[Tensor, Tensor]:
    """Output and cell state after one step; ``q`` quantizes by a range, or is the identity where there is none.

    ``a = q(gates)``, ``i, f, o = q(sigmoid(a))``, ``g = q(tanh(a))``, ``c = q(q(i g) + q(f c))``, ``h = q(o q(tanh(c)))``.

    Args:
        gates: accumulators of input, forget, output and new value, side by side, ``(N, 4 H)``.
        cell: the state before, ``(N, H)``.
        ranges: the quantizers.

    Returns:
        Output and state, ``(N, H)`` each.
    """
    scales = [None if r is None else r.scale for r in ranges]
    hows = tuple(None if r is None else r.how for r in ranges)
    if not torch.is_grad_enabled():
        return _forward_alone(gates, cell, hows, scales)
    return apply(_LSTMStep, gates, cell, hows, *scales)  # type: ignore[no-any-return]


def _forward_alone(gates: Tensor, cell: Tensor, hows: Any, scales: Any) -> tuple[Tensor, Tensor]:
    return _LSTMStep.forward(_Nothing(), gates, cell, hows, *scales)  # type: ignore[no-any-return]


class _Nothing:
    """Stands for a context where nothing is kept."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep nothing."""
