"""Recurrent layers: Elman, LSTM, GRU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qframework.layers.recurrent import QuantRecurrent, RecurrentDirection, ValueErrorAsRuntime
from qframework.layers.recurrent_steps import OutputStep, step_of
from qframework.proxy.base import plain
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)


def _first(state: Any, like: Tensor, size: int, step: Any) -> Tensor:
    """A quantized first state, or zeros."""
    if state is None:
        return like.new_zeros(like.shape[1], size)
    return step(plain(state))  # type: ignore[no-any-return]


def _steps(products: Tensor, reverse: bool) -> Any:
    steps = products.unbind(0)
    return reversed(steps) if reverse else steps


class _RNNDirection(RecurrentDirection):
    gates = torch_gates = ("",)
    nonlinearity = "tanh"

    def run(self, x: Any, states: tuple[Any, ...], reverse: bool) -> tuple[Any, tuple[Any, ...]]:
        """Outputs and the last state."""
        products, hidden = self._projected(x)
        cell: Any = self.cell
        size = hidden.shape[0]
        output = OutputStep(cell.output_quant, products)
        acc = step_of([cell.gate_acc_quant], [0], size, products)
        h = _first(states[0], products, size, output)
        function = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        values = []
        for step in _steps(products, reverse):
            h = output(function(acc(torch.addmm(step, h, hidden))))
            values.append(h)
        return self._collect(output, values, reverse), (output.last(h),)


class _LSTMDirection(RecurrentDirection):
    gates = ("input", "forget", "output", "cell")
    torch_gates = ("input", "forget", "cell", "output")

    def run(self, x: Any, states: tuple[Any, ...], reverse: bool) -> tuple[Any, tuple[Any, ...]]:
        """Outputs and the last hidden and cell states."""
        products, hidden = self._projected(x)
        cell: Any = self.cell
        size = hidden.shape[0]
        order = [0, 1, 3, 2]
        output = OutputStep(cell.output_quant, products)
        state = OutputStep(cell.cell_state_quant, products)
        acc = step_of([getattr(cell, f"{g}_acc_quant") for g in self.gates], order, size, products)
        sigmoid = step_of(
            [getattr(cell, f"{g}_sigmoid_quant") for g in self.gates[:3]], [0, 1, 2], size, products
        )
        tanh = step_of([cell.cell_tanh_quant], [0], size, products)
        # What is forgotten comes first where statistics are collected.
        two = step_of([cell.cell_state_quant] * 2, [1, 0], size, products)
        one = step_of([cell.cell_state_quant], [0], size, products)
        traced = torch.compiler.is_compiling()
        hidden_tanh = step_of([cell.hidden_state_tanh_quant], [0], size, products)
        h, c = _first(states[0], products, size, output), _first(states[1], products, size, state)
        values = []
        for step in _steps(products, reverse):
            gates = acc(torch.addmm(step, h, hidden))
            gated, entering = gates.split([3 * size, size], dim=1)
            gated = sigmoid(torch.sigmoid(gated))
            entering = tanh(torch.tanh(entering))
            if traced:  # a compiler joins what is done to parts, but not the parts
                forgotten = one(gated[:, size : 2 * size] * c)
                c = state(one(gated[:, :size] * entering) + forgotten)
            else:
                parts = two(gated[:, : 2 * size] * torch.cat([entering, c], dim=1))
                c = state(parts[:, :size] + parts[:, size:])
            h = output(gated[:, 2 * size :] * hidden_tanh(torch.tanh(c)))
            values.append(h)
        return self._collect(output, values, reverse), (output.last(h), state.last(c))


class _CoupledLSTMDirection(RecurrentDirection):
    gates = ("input", "output", "cell")
    torch_gates = ("input", "cell", "output")

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


class _GRUDirection(RecurrentDirection):
    gates = torch_gates = ("reset", "update", "new")

    def run(self, x: Any, states: tuple[Any, ...], reverse: bool) -> tuple[Any, tuple[Any, ...]]:
        """Outputs and the last state."""
        products, hidden = self._projected(x)
        cell: Any = self.cell
        size = hidden.shape[0]
        output = OutputStep(cell.output_quant, products)
        acc = step_of([cell.reset_acc_quant, cell.update_acc_quant], [0, 1], size, products)
        hidden_acc = step_of([cell.new_hidden_acc_quant], [0], size, products)
        new_acc = step_of([cell.new_acc_quant], [0], size, products)
        sigmoid = step_of(
            [cell.reset_sigmoid_quant, cell.update_sigmoid_quant], [0, 1], size, products
        )
        tanh = step_of([cell.new_tanh_quant], [0], size, products)
        h = _first(states[0], products, size, output)
        own_bias: Any = self.parameters_of("new").hidden_bias
        values = []
        for step in _steps(products, reverse):
            moved = torch.mm(h, hidden)
            gated = sigmoid(torch.sigmoid(acc(step[:, : 2 * size] + moved[:, : 2 * size])))
            from_state = moved[:, 2 * size :]
            from_state = hidden_acc(from_state if own_bias is None else from_state + own_bias)
            new = tanh(torch.tanh(new_acc(step[:, 2 * size :] + gated[:, :size] * from_state)))
            h = output(new + gated[:, size:] * (h - new))
            values.append(h)
        return self._collect(output, values, reverse), (output.last(h),)


class QuantRNN(QuantRecurrent):
    """``torch.nn.RNN`` with quantized weights, bias, input, accumulators and states.

    ``h = io(f(gate_acc(W_ih x + W_hh h + b)))``. Input and state have one quantizer; torch's weights load into it.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, bidirectional: as in torch; the two
            biases of torch are one, their sum.
        weight_quant: quantizer of the weights; those for input and state share one.
        bias_quant: quantizer of the bias.
        io_quant: quantizer of input and states, of all layers and directions.
        gate_acc_quant: quantizer of the accumulator.
        shared_input_hidden_weights: both directions have the same weights for the input.
        return_quant_tensor: return quantized tensors; needs ``io_quant``.
        quantize_output_only: leave the input as it comes.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``io_``, ``gate_acc_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        RuntimeError: arguments that exclude each other.
    """

    direction_class = _RNNDirection
    cell_quantizers = {"gate_acc_quant": "gate_acc", "output_quant": "io"}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = Int32Bias,
        io_quant: Any = Int8ActPerTensorFloat,
        gate_acc_quant: Any = Int8ActPerTensorFloat,
        shared_input_hidden_weights: bool = False,
        return_quant_tensor: bool = False,
        quantize_output_only: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"QuantRNN: nonlinearity={nonlinearity!r}; allowed are 'tanh' and 'relu'"
            )
        self.nonlinearity = nonlinearity
        self._init_recurrent(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional,
            {
                "weight": weight_quant,
                "bias": bias_quant,
                "io": io_quant,
                "gate_acc": gate_acc_quant,
            },
            shared_input_hidden_weights,
            return_quant_tensor,
            quantize_output_only,
            {},
            device,
            dtype,
            kwargs,
        )
        for direction in self.modules():
            if isinstance(direction, _RNNDirection):
                direction.nonlinearity = nonlinearity

    def forward(self, inp: Any, hx: Any = None) -> tuple[Any, Any]:
        """Run over a sequence.

        Args:
            inp: ``(T, N, input_size)``, with ``batch_first`` ``(N, T, input_size)``, or ``(T, input_size)``.
            hx: first state, ``(layers * directions, N, hidden_size)``; zeros when None.

        Returns:
            Outputs ``(T, N, directions * hidden_size)`` and the last states, in the shape of ``hx``.

        Raises:
            ValueError: other shapes.
            TypeError: a PackedSequence.
        """
        out, (last,), single = self._forward(inp, [hx])
        return self._pack(out), self._pack_states(last, single)


class QuantGRU(QuantRecurrent):
    """``torch.nn.GRU`` with quantized weights, biases, input, accumulators, gates and states.

    ``r, z = sigmoid(...)``, ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``, ``h = io((1 - z) n + z h)``, with a
    quantizer on each sum and on each function's result. Torch's weights load into it; ``b_hn`` stays in floats.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional: as in torch.
        weight_quant: quantizer of the weights; those of a gate for input and state share one.
        bias_quant: quantizer of the biases.
        io_quant: quantizer of input and states, of all layers and directions.
        gate_acc_quant: quantizer of the accumulators ``reset_acc``, ``update_acc``, ``new_hidden_acc``, ``new_acc``.
        sigmoid_quant: quantizer of the gates ``reset_sigmoid`` and ``update_sigmoid``.
        tanh_quant: quantizer of ``new_tanh``.
        shared_input_hidden_weights: both directions have the same weights for the input.
        shared_intra_layer_weight_quant: the gates of a layer share a weight quantizer.
        shared_intra_layer_gate_acc_quant: they share that of their accumulators.
        return_quant_tensor: return quantized tensors; needs ``io_quant``.
        quantize_output_only: leave the input as it comes.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``io_``, ``gate_acc_``,
            ``sigmoid_``, ``tanh_``; for one gate ``reset_gate_weight_``, ``update_acc_``, ``new_tanh_`` and so on,
            which win. ``reset_acc_quant=...`` gives one another class.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        RuntimeError: arguments that exclude each other.
    """

    direction_class = _GRUDirection
    kinds = ("weight_", "bias_", "io_", "gate_acc_", "sigmoid_", "tanh_")
    hidden_biases = ("new",)
    cell_quantizers = {
        "reset_acc_quant": "gate_acc",
        "update_acc_quant": "gate_acc",
        "new_hidden_acc_quant": "gate_acc",
        "new_acc_quant": "gate_acc",
        "reset_sigmoid_quant": "sigmoid",
        "update_sigmoid_quant": "sigmoid",
        "new_tanh_quant": "tanh",
        "output_quant": "io",
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = Int32Bias,
        io_quant: Any = Int8ActPerTensorFloat,
        gate_acc_quant: Any = Int8ActPerTensorFloat,
        sigmoid_quant: Any = Uint8ActPerTensorFloat,
        tanh_quant: Any = Int8ActPerTensorFloat,
        shared_input_hidden_weights: bool = False,
        shared_intra_layer_weight_quant: bool = False,
        shared_intra_layer_gate_acc_quant: bool = False,
        return_quant_tensor: bool = False,
        quantize_output_only: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._init_recurrent(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional,
            {
                "weight": weight_quant,
                "bias": bias_quant,
                "io": io_quant,
                "gate_acc": gate_acc_quant,
                "sigmoid": sigmoid_quant,
                "tanh": tanh_quant,
            },
            shared_input_hidden_weights,
            return_quant_tensor,
            quantize_output_only,
            {
                "weight": shared_intra_layer_weight_quant,
                "gate_acc": shared_intra_layer_gate_acc_quant,
            },
            device,
            dtype,
            kwargs,
        )

    def forward(self, inp: Any, hx: Any = None) -> tuple[Any, Any]:
        """Run over a sequence; arguments and result as for :meth:`QuantRNN.forward`."""
        out, (last,), single = self._forward(inp, [hx])
        return self._pack(out), self._pack_states(last, single)


_LSTM_CELL = {
    "output_quant": "io",
    "cell_state_quant": "cell_state",
    "input_acc_quant": "gate_acc",
    "forget_acc_quant": "gate_acc",
    "cell_acc_quant": "gate_acc",
    "output_acc_quant": "gate_acc",
    "input_sigmoid_quant": "sigmoid",
    "forget_sigmoid_quant": "sigmoid",
    "cell_tanh_quant": "tanh",
    "output_sigmoid_quant": "sigmoid",
    "hidden_state_tanh_quant": "tanh",
}


class QuantLSTM(QuantRecurrent):
    """``torch.nn.LSTM`` with quantized weights, biases, input, accumulators, gates and states.

    ``i, f, o = sigmoid(acc(...))``, ``g = tanh(acc(...))``, ``c = s(s(f c) + s(i g))``, ``h = io(o t(tanh(c)))``: each
    accumulator, each function's result, each product and sum of the cell state and the output is quantized. Torch's
    weights load into it.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional: as in torch; the two biases of torch
            are one, their sum.
        weight_quant: quantizer of the weights; those of a gate for input and state share one.
        bias_quant: quantizer of the biases.
        io_quant: quantizer of input and hidden states, of all layers and directions.
        gate_acc_quant: quantizer of the accumulators ``input_acc``, ``forget_acc``, ``cell_acc``, ``output_acc``.
        sigmoid_quant: quantizer of ``input_sigmoid``, ``forget_sigmoid``, ``output_sigmoid``.
        tanh_quant: quantizer of ``cell_tanh`` and ``hidden_state_tanh``.
        cell_state_quant: quantizer of the cell state and of what it is the sum of.
        coupled_input_forget_gates: ``f = 1 - i``; such a layer has no forget gate, and torch's weights don't fit.
        cat_output_cell_states: return the cell states of all layers as one tensor, else as a list.
        shared_input_hidden_weights: both directions have the same weights for the input.
        shared_intra_layer_weight_quant: the gates of a layer share a weight quantizer.
        shared_intra_layer_gate_acc_quant: they share that of their accumulators.
        shared_cell_state_quant: all layers and directions share a quantizer of the cell state.
        return_quant_tensor: return quantized tensors; needs ``io_quant``.
        quantize_output_only: leave the input as it comes.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``io_``, ``gate_acc_``,
            ``sigmoid_``, ``tanh_``, ``cell_state_``; for one of them ``forget_gate_weight_``, ``forget_acc_``,
            ``output_sigmoid_``, ``hidden_state_tanh_`` and so on, which win. ``forget_acc_quant=...`` gives one
            another class.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        RuntimeError: arguments that exclude each other.
    """

    direction_class = _LSTMDirection
    state_names = ("hx", "cx")
    kinds = ("weight_", "bias_", "io_", "gate_acc_", "sigmoid_", "tanh_", "cell_state_")
    cell_quantizers = _LSTM_CELL

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = Int32Bias,
        io_quant: Any = Int8ActPerTensorFloat,
        gate_acc_quant: Any = Int8ActPerTensorFloat,
        sigmoid_quant: Any = Uint8ActPerTensorFloat,
        tanh_quant: Any = Int8ActPerTensorFloat,
        cell_state_quant: Any = Int8ActPerTensorFloat,
        coupled_input_forget_gates: bool = False,
        cat_output_cell_states: bool = True,
        shared_input_hidden_weights: bool = False,
        shared_intra_layer_weight_quant: bool = False,
        shared_intra_layer_gate_acc_quant: bool = False,
        shared_cell_state_quant: bool = True,
        return_quant_tensor: bool = False,
        quantize_output_only: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        many = num_layers * (1 + bidirectional) > 1
        if cat_output_cell_states and return_quant_tensor and many and not shared_cell_state_quant:
            raise ValueErrorAsRuntime(
                "QuantLSTM: cell states on different grids can't be returned as one quantized tensor; give "
                "shared_cell_state_quant=True, or cat_output_cell_states=False"
            )
        self.cat_output_cell_states = cat_output_cell_states
        if coupled_input_forget_gates:
            self.direction_class = _CoupledLSTMDirection  # type: ignore[misc, assignment]
            self.cell_quantizers = {  # type: ignore[misc]
                n: k for n, k in _LSTM_CELL.items() if not n.startswith("forget")
            }
        self._init_recurrent(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional,
            {
                "weight": weight_quant,
                "bias": bias_quant,
                "io": io_quant,
                "gate_acc": gate_acc_quant,
                "sigmoid": sigmoid_quant,
                "tanh": tanh_quant,
                "cell_state": cell_state_quant,
            },
            shared_input_hidden_weights,
            return_quant_tensor,
            quantize_output_only,
            {
                "weight": shared_intra_layer_weight_quant,
                "gate_acc": shared_intra_layer_gate_acc_quant,
                "cell_state": shared_cell_state_quant,
            },
            device,
            dtype,
            kwargs,
        )

    def forward(self, inp: Any, hx: Any = None, cx: Any = None) -> tuple[Any, tuple[Any, Any]]:
        """Run over a sequence.

        Args:
            inp: ``(T, N, input_size)``, with ``batch_first`` ``(N, T, input_size)``, or ``(T, input_size)``.
            hx: first hidden state, ``(layers * directions, N, hidden_size)``, or a pair of it and ``cx``; zeros when
                None.
            cx: first cell state, likewise.

        Returns:
            Outputs ``(T, N, directions * hidden_size)`` and a pair of the last hidden and cell states.

        Raises:
            ValueError: other shapes.
            TypeError: a PackedSequence.
        """
        if isinstance(hx, (tuple, list)):
            hx, cx = hx
        out, (hidden, cell), single = self._forward(inp, [hx, cx])
        cells: Any
        if self.cat_output_cell_states:
            cells = self._pack_states(cell, single)
        else:
            cells = [self._pack(c if single else c.unsqueeze(0)) for c in cell]
        return self._pack(out), (self._pack_states(hidden, single), cells)
