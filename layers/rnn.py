"""Recurrent layers: Elman, LSTM, GRU."""

from __future__ import annotations

from typing import Any

import torch

from qframework.layers.base import ArgumentsError
from qframework.layers.recurrent import QuantRecurrent
from qframework.layers.recurrent_cells import (
    CoupledLSTMDirection,
    GRUDirection,
    LSTMDirection,
    RNNDirection,
)
from qframework.proxy import Quantizer
from qframework.quant_tensor import TensorLike
from qframework.quantizers.scaled_int import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)


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

    direction_class = RNNDirection
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
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = Int32Bias,
        io_quant: Quantizer = Int8ActPerTensorFloat,
        gate_acc_quant: Quantizer = Int8ActPerTensorFloat,
        shared_input_hidden_weights: bool = False,
        return_quant_tensor: bool = False,
        quantize_output_only: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        dropout: float = 0.0,
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
            dropout,
            kwargs,
        )
        for direction in self.modules():
            if isinstance(direction, RNNDirection):
                direction.nonlinearity = nonlinearity

    def forward(self, input: TensorLike, hx: Any = None) -> tuple[Any, Any]:
        """Run over a sequence.

        Args:
            input: ``(T, N, input_size)``, with ``batch_first`` ``(N, T, input_size)``, or ``(T, input_size)``.
            hx: first state, ``(layers * directions, N, hidden_size)``; zeros when None.

        Returns:
            Outputs ``(T, N, directions * hidden_size)`` and the last states, in the shape of ``hx``.

        Raises:
            ValueError: other shapes.
            TypeError: a PackedSequence.
        """
        out, (last,), single = self._forward(input, [hx])
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

    direction_class = GRUDirection
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
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = Int32Bias,
        io_quant: Quantizer = Int8ActPerTensorFloat,
        gate_acc_quant: Quantizer = Int8ActPerTensorFloat,
        sigmoid_quant: Quantizer = Uint8ActPerTensorFloat,
        tanh_quant: Quantizer = Int8ActPerTensorFloat,
        shared_input_hidden_weights: bool = False,
        shared_intra_layer_weight_quant: bool = False,
        shared_intra_layer_gate_acc_quant: bool = False,
        return_quant_tensor: bool = False,
        quantize_output_only: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        dropout: float = 0.0,
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
            dropout,
            kwargs,
        )

    def forward(self, input: TensorLike, hx: Any = None) -> tuple[Any, Any]:
        """Run over a sequence; arguments and result as for :meth:`QuantRNN.forward`."""
        out, (last,), single = self._forward(input, [hx])
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
        coupled_input_forget_gates: ``f = 1 - i``; such a layer has no forget gate, and torch's rows for it are
            unexpected when loaded strictly, else left out.
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

    direction_class = LSTMDirection
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
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = Int32Bias,
        io_quant: Quantizer = Int8ActPerTensorFloat,
        gate_acc_quant: Quantizer = Int8ActPerTensorFloat,
        sigmoid_quant: Quantizer = Uint8ActPerTensorFloat,
        tanh_quant: Quantizer = Int8ActPerTensorFloat,
        cell_state_quant: Quantizer = Int8ActPerTensorFloat,
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
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        many = num_layers * (1 + bidirectional) > 1
        if cat_output_cell_states and return_quant_tensor and many and not shared_cell_state_quant:
            raise ArgumentsError(
                "QuantLSTM: cell states on different grids can't be returned as one quantized tensor; give "
                "shared_cell_state_quant=True, or cat_output_cell_states=False"
            )
        self.cat_output_cell_states = cat_output_cell_states
        if coupled_input_forget_gates:
            self.direction_class = CoupledLSTMDirection  # type: ignore[misc, assignment]
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
            dropout,
            kwargs,
        )
        if return_quant_tensor:
            state_quant = self.layers[0][0].cell.cell_state_quant  # type: ignore[index, union-attr]
            self._check_returned("cell_state_quant", state_quant, "the cell states")

    def forward(
        self, input: TensorLike, hx: Any = None, cx: Any = None
    ) -> tuple[Any, tuple[Any, Any]]:
        """Run over a sequence.

        Args:
            input: ``(T, N, input_size)``, with ``batch_first`` ``(N, T, input_size)``, or ``(T, input_size)``.
            hx: first hidden state, ``(layers * directions, N, hidden_size)``, or a pair of it and ``cx``; zeros when
                None.
            cx: first cell state, ``(layers * directions, N, hidden)``, or a list as it is returned without ``cat_output_cell_states``.

        Returns:
            Outputs ``(T, N, directions * hidden_size)`` and a pair of the last hidden and cell states.

        Raises:
            ValueError: other shapes.
            TypeError: a PackedSequence.
        """
        if isinstance(hx, (tuple, list)):
            hx, cx = hx
        out, (hidden, cell), single = self._forward(input, [hx, cx])
        cells: Any
        if self.cat_output_cell_states:
            cells = self._pack_states(cell, single)
        else:
            cells = [self._pack(c if single else c.unsqueeze(0)) for c in cell]
        return self._pack(out), (self._pack_states(hidden, single), cells)
