"""The cells of recurrent layers, in one layer and direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.functional import (
    GRURanges,
    LSTMRanges,
    RNNRanges,
    gru_sequence,
    lstm_sequence,
    rnn_sequence,
)
from qframework.layers.recurrent_direction import RecurrentDirection
from qframework.layers.recurrent_steps import OutputStep, UnknownScale, range_of, step_of
from qframework.quant_tensor import dequantize


def _first(state: Any, like: Tensor, size: int, step: Any) -> Tensor:
    """A quantized first state, or zeros."""
    if state is None:
        return like.new_zeros(like.shape[1], size)
    return step(dequantize(state))  # type: ignore[no-any-return]


def _steps(products: Tensor, reverse: bool) -> Any:
    steps = products.unbind(0)
    return reversed(steps) if reverse else steps


def _ranges(kind: Any, size: int, like: Tensor, *quantizers: list[Any]) -> Any:
    """The quantizers of a cell, where all scales are known, else None."""
    try:
        return kind(*(range_of(proxies, size, like) for proxies in quantizers))
    except UnknownScale:
        return None


class RNNDirection(RecurrentDirection):
    """``h = q(f(q(gates)))``."""

    gates = torch_gates = ("",)
    nonlinearity = "tanh"

    def run(self, x: Any, states: tuple[Any, ...], reverse: bool) -> tuple[Any, tuple[Any, ...]]:
        """Outputs and the last state."""
        products, hidden = self._projected(x)
        cell: Any = self.cell
        size = hidden.shape[0]
        output = OutputStep(cell.output_quant, products)
        h = _first(states[0], products, size, output)
        ranges = _ranges(RNNRanges, size, products, [cell.gate_acc_quant], [cell.output_quant])
        if ranges is not None:
            relu = self.nonlinearity == "relu"
            outputs = rnn_sequence(products, hidden, h, ranges, relu, reverse)
            return output.wrap(outputs), (output.last(outputs[0 if reverse else -1]),)
        acc = step_of([cell.gate_acc_quant], [0], size, products)
        function = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        values = []
        for step in _steps(products, reverse):
            h = output(function(acc(torch.addmm(step, h, hidden))))
            values.append(h)
        return self._collect(output, values, reverse), (output.last(h),)


class LSTMDirection(RecurrentDirection):
    """See :func:`~qframework.functional.lstm_sequence`."""

    gates = ("output", "input", "forget", "cell")
    torch_gates = ("input", "forget", "cell", "output")

    def run(self, x: Any, states: tuple[Any, ...], reverse: bool) -> tuple[Any, tuple[Any, ...]]:
        """Outputs and the last hidden and cell states."""
        products, hidden = self._projected(x)
        cell: Any = self.cell
        size = hidden.shape[0]
        output = OutputStep(cell.output_quant, products)
        state = OutputStep(cell.cell_state_quant, products)
        h, c = _first(states[0], products, size, output), _first(states[1], products, size, state)
        acc_quants = [getattr(cell, f"{g}_acc_quant") for g in self.gates]
        sigmoid_quants = [getattr(cell, f"{g}_sigmoid_quant") for g in self.gates[:3]]
        ranges = _ranges(
            LSTMRanges,
            size,
            products,
            acc_quants,
            sigmoid_quants,
            [cell.cell_tanh_quant],
            [cell.cell_state_quant],
            [cell.hidden_state_tanh_quant],
            [cell.output_quant],
        )
        if ranges is not None:
            outputs, c = lstm_sequence(products, hidden, (h, c), ranges, reverse)
            last = output.last(outputs[0 if reverse else -1])
            return output.wrap(outputs), (last, state.last(c))
        acc = step_of(acc_quants, [1, 2, 3, 0], size, products)
        sigmoid = step_of(sigmoid_quants, [1, 2, 0], size, products)
        tanh = step_of([cell.cell_tanh_quant], [0], size, products)
        # What is forgotten comes first where statistics are collected.
        two = step_of([cell.cell_state_quant] * 2, [1, 0], size, products)
        one = step_of([cell.cell_state_quant], [0], size, products)
        traced = torch.compiler.is_compiling()
        hidden_tanh = step_of([cell.hidden_state_tanh_quant], [0], size, products)
        values = []
        for step in _steps(products, reverse):
            gates = acc(torch.addmm(step, h, hidden))
            gated, entering = gates.split([3 * size, size], dim=1)
            gated = sigmoid(torch.sigmoid(gated))
            entering = tanh(torch.tanh(entering))
            if traced:  # a compiler joins what is done to parts, but not the parts
                forgotten = one(gated[:, 2 * size :] * c)
                c = state(one(gated[:, size : 2 * size] * entering) + forgotten)
            else:
                parts = two(gated[:, size:] * torch.cat([entering, c], dim=1))
                c = state(parts[:, :size] + parts[:, size:])
            h = output(gated[:, :size] * hidden_tanh(torch.tanh(c)))
            values.append(h)
        return self._collect(output, values, reverse), (output.last(h), state.last(c))


class CoupledLSTMDirection(RecurrentDirection):
    """The same with ``f = q(1 - i)``."""

    gates = ("input", "output", "cell")
    torch_gates = ("input", "forget", "cell", "output")

    def run(self, x: Any, states: tuple[Any, ...], reverse: bool) -> tuple[Any, tuple[Any, ...]]:
        """Outputs and the last hidden and cell states."""
        products, hidden = self._projected(x)
        cell: Any = self.cell
        size = hidden.shape[0]
        output = OutputStep(cell.output_quant, products)
        state = OutputStep(cell.cell_state_quant, products)
        acc = step_of(
            [getattr(cell, f"{g}_acc_quant") for g in self.gates], [0, 2, 1], size, products
        )
        entering_gate = step_of([cell.input_sigmoid_quant], [0], size, products)
        output_gate = step_of([cell.output_sigmoid_quant], [0], size, products)
        tanh = step_of([cell.cell_tanh_quant], [0], size, products)
        hidden_tanh = step_of([cell.hidden_state_tanh_quant], [0], size, products)
        h, c = _first(states[0], products, size, output), _first(states[1], products, size, state)
        values = []
        for step in _steps(products, reverse):
            first, second, third = acc(torch.addmm(step, h, hidden)).split(size, dim=1)
            entering = entering_gate(torch.sigmoid(first))
            kept = entering_gate(1 - entering)
            new = tanh(torch.tanh(third))
            leaving = output_gate(torch.sigmoid(second))
            remembered = state(kept * c)
            c = state(remembered + state(entering * new))
            h = output(leaving * hidden_tanh(torch.tanh(c)))
            values.append(h)
        return self._collect(output, values, reverse), (output.last(h), state.last(c))


class GRUDirection(RecurrentDirection):
    """``n = q(tanh(q(x_n + r q(h_n))))``, ``h = q((1 - z) n + z h)``."""

    gates = torch_gates = ("reset", "update", "new")

    def run(self, x: Any, states: tuple[Any, ...], reverse: bool) -> tuple[Any, tuple[Any, ...]]:
        """Outputs and the last state."""
        products, hidden = self._projected(x)
        cell: Any = self.cell
        size = hidden.shape[0]
        output = OutputStep(cell.output_quant, products)
        h = _first(states[0], products, size, output)
        own_bias: Any = self.parameters_of("new").hidden_bias
        ranges = _ranges(
            GRURanges,
            size,
            products,
            [cell.reset_acc_quant, cell.update_acc_quant],
            [cell.new_hidden_acc_quant],
            [cell.new_acc_quant],
            [cell.reset_sigmoid_quant, cell.update_sigmoid_quant],
            [cell.new_tanh_quant],
            [cell.output_quant],
        )
        if ranges is not None:
            outputs = gru_sequence(products, hidden, own_bias, h, ranges, reverse)
            return output.wrap(outputs), (output.last(outputs[0 if reverse else -1]),)
        acc = step_of([cell.reset_acc_quant, cell.update_acc_quant], [0, 1], size, products)
        hidden_acc = step_of([cell.new_hidden_acc_quant], [0], size, products)
        new_acc = step_of([cell.new_acc_quant], [0], size, products)
        sigmoid = step_of(
            [cell.reset_sigmoid_quant, cell.update_sigmoid_quant], [0, 1], size, products
        )
        tanh = step_of([cell.new_tanh_quant], [0], size, products)
        values = []
        for step in _steps(products, reverse):
            moved = torch.mm(h, hidden)
            gated = sigmoid(torch.sigmoid(acc(step[:, : 2 * size] + moved[:, : 2 * size])))
            from_state = moved[:, 2 * size :]
            if own_bias is not None:
                from_state = from_state + own_bias.to(from_state.dtype)
            from_state = hidden_acc(from_state)
            new = tanh(torch.tanh(new_acc(step[:, 2 * size :] + gated[:, :size] * from_state)))
            h = output(new + gated[:, size:] * (h - new))
            values.append(h)
        return self._collect(output, values, reverse), (output.last(h),)
