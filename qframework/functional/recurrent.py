"""All steps of quantized recurrent cells whose quantizers have known scales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qframework.functional.quantize import fake_quantize
from qframework.functional.registry import defined
from qframework.functional.rules import IntegerGrid


class Range(NamedTuple):
    """A quantizer whose scale is known.

    Attributes:
        scale: a number, or one for each column.
        grid: its integers; bounds are numbers, or tensors with one for each column.
    """

    scale: Tensor
    grid: IntegerGrid


class RNNRanges(NamedTuple):
    """The quantizers of an Elman cell, None where there is none.

    Attributes:
        accumulator: of the sum of products.
        output: of the output.
    """

    accumulator: Range | None
    output: Range | None


class LSTMRanges(NamedTuple):
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


class GRURanges(NamedTuple):
    """The quantizers of a GRU cell, None where there is none.

    Attributes:
        accumulators: of the gates.
        from_state: of what the state adds to the new value.
        entering: of the new value's sum.
        gates: of the results of the sigmoids.
        new: of the hyperbolic tangent of the new value.
        output: of the output.
    """

    accumulators: Range | None
    from_state: Range | None
    entering: Range | None
    gates: Range | None
    new: Range | None
    output: Range | None


def in_order(length: int, reverse: bool) -> Iterable[int]:
    """The steps as they are taken.

    Args:
        length: how many.
        reverse: take the last one first.
    """
    return range(length - 1, -1, -1) if reverse else range(length)


def _quantized(x: Tensor, range_: Range | None) -> Tensor:
    return x if range_ is None else fake_quantize(x, range_.scale, None, range_.grid)


def _stacked(outputs: list[Tensor], reverse: bool) -> Tensor:
    return torch.stack(outputs[::-1] if reverse else outputs)


@defined
def rnn_sequence(
    products: Tensor,
    hidden: Tensor,
    first: Tensor,
    ranges: RNNRanges,
    relu: bool,
    reverse: bool,
) -> Tensor:
    """Outputs of all steps, ``h = q(f(q(x + W h)))``; ``q`` quantizes by a range, or is the identity where there is none.

    Args:
        products: what the inputs add to the accumulator, ``(T, N, H)``.
        hidden: the weights of the state, ``(H, H)``.
        first: the output before, ``(N, H)``.
        ranges: the quantizers.
        relu: ``f`` is a ReLU, not a hyperbolic tangent.
        reverse: take the last step first.

    Returns:
        Outputs ``(T, N, H)``.
    """
    h, outputs = first, []
    for t in in_order(len(products), reverse):
        total = _quantized(torch.addmm(products[t], h, hidden), ranges.accumulator)
        h = _quantized(torch.relu(total) if relu else torch.tanh(total), ranges.output)
        outputs.append(h)
    return _stacked(outputs, reverse)


@defined
def lstm_sequence(
    products: Tensor,
    hidden: Tensor,
    first: tuple[Tensor, Tensor],
    ranges: LSTMRanges,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs of all steps and the last cell state; ``q`` quantizes by a range, or is the identity where there is none.

    ``a = q(x + W h)``, ``o, i, f = q(sigmoid(a))``, ``g = q(tanh(a))``, ``c = q(q(i g) + q(f c))``, ``h = q(o q(tanh(c)))``.

    Args:
        products: what the inputs add to the accumulators of ``o, i, f, g``, side by side, ``(T, N, 4 H)``.
        hidden: the weights of the state, ``(H, 4 H)``.
        first: output and cell state before, ``(N, H)`` each.
        ranges: the quantizers.
        reverse: take the last step first.

    Returns:
        Outputs ``(T, N, H)`` and the cell state after the step that was taken last, ``(N, H)``.
    """
    h, c = first
    size, outputs = h.shape[1], []
    for t in in_order(len(products), reverse):
        summed = _quantized(torch.addmm(products[t], h, hidden), ranges.accumulators)
        opened = _quantized(torch.sigmoid(summed[:, : 3 * size]), ranges.gates)
        new = _quantized(torch.tanh(summed[:, 3 * size :]), ranges.new)
        leaving, entering, remembered = opened.split(size, dim=1)
        entered = _quantized(entering * new, ranges.state)
        c = _quantized(entered + _quantized(remembered * c, ranges.state), ranges.state)
        h = _quantized(leaving * _quantized(torch.tanh(c), ranges.hidden), ranges.output)
        outputs.append(h)
    return _stacked(outputs, reverse), c


@defined
def gru_sequence(
    products: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    first: Tensor,
    ranges: GRURanges,
    reverse: bool,
) -> Tensor:
    """Outputs of all steps; ``q`` quantizes by a range, or is the identity where there is none.

    ``r, z = q(sigmoid(q(x + W h)))``, ``n = q(tanh(q(x_n + r q(W_n h + b_n))))``, ``h = q(n + z (h - n))``.

    Args:
        products: what the inputs add to ``r, z, n``, side by side, ``(T, N, 3 H)``.
        hidden: the weights of the state, ``(H, 3 H)``.
        bias: ``b_n``, ``(H,)``.
        first: the output before, ``(N, H)``.
        ranges: the quantizers.
        reverse: take the last step first.

    Returns:
        Outputs ``(T, N, H)``.
    """
    h, outputs = first, []
    size = h.shape[1]
    for t in in_order(len(products), reverse):
        moved = torch.mm(h, hidden)
        summed = products[t][:, : 2 * size] + moved[:, : 2 * size]
        opened = _quantized(torch.sigmoid(_quantized(summed, ranges.accumulators)), ranges.gates)
        from_state = moved[:, 2 * size :]
        if bias is not None:
            from_state = from_state + bias.to(from_state.dtype)
        from_state = _quantized(from_state, ranges.from_state)
        total = products[t][:, 2 * size :] + opened[:, :size] * from_state
        new = _quantized(torch.tanh(_quantized(total, ranges.entering)), ranges.new)
        h = _quantized(new + opened[:, size:] * (h - new), ranges.output)
        outputs.append(h)
    return _stacked(outputs, reverse)
