"""Recurrent layers again in integers: each step of the cell on a machine that knows no floats."""

from __future__ import annotations

import pytest
import torch
from integer_machine import (
    ARITHMETIC,
    Integers,
    add,
    assert_same,
    bias_on,
    enlarge,
    lookup,
    matmul,
    multiply,
    quantize,
    requantize,
    rows,
    varied,
)

from qframework.graph import calibration_mode
from qframework.layers import QuantGRU, QuantLSTM, QuantRNN

SHAPES = {
    "one": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "bidirectional": True, "shared_input_hidden_weights": True},
}
#: bits of weights, input and states, accumulators, gates
BITS = {"8": (8, 8, 8, 8), "4": (4, 4, 4, 4), "mixed": (5, 6, 12, 7)}
T, N, FEATURES, HIDDEN = 5, 3, 6, 4


class Gate:
    """The products of a gate: of the input with its bias, and of the state."""

    def __init__(self, direction, name: str) -> None:
        own = direction.parameters_of(name)
        quantizer = own.input_weight.weight_quant
        assert own.hidden_weight.weight_quant is quantizer
        self.input = rows(quantize(quantizer, own.input_weight.weight))
        self.hidden = rows(quantize(quantizer, own.hidden_weight.weight))
        self.bias, self.hidden_bias = own.bias, own.hidden_bias

    def of_input(self, x: Integers) -> Integers:
        acc = matmul(x, self.input)
        return acc if self.bias is None else add(acc, bias_on(acc.scale, self.bias))

    def of_both(self, x: Integers, h: Integers) -> Integers:
        return add(self.of_input(x), matmul(h, self.hidden))


def rnn(direction, gates, x, h):
    cell = direction.cell
    function = {"tanh": torch.tanh, "relu": torch.relu}[direction.nonlinearity]
    acc = requantize(cell.gate_acc_quant, gates[""].of_both(x, h))
    return (lookup(cell.output_quant, function, acc),)


def gru(direction, gates, x, h):
    cell = direction.cell
    acc = requantize(cell.reset_acc_quant, gates["reset"].of_both(x, h))
    reset = lookup(cell.reset_sigmoid_quant, torch.sigmoid, acc)
    acc = requantize(cell.update_acc_quant, gates["update"].of_both(x, h))
    update = lookup(cell.update_sigmoid_quant, torch.sigmoid, acc)
    gate = gates["new"]
    of_state = [matmul(h, gate.hidden)]
    if gate.hidden_bias is not None:
        of_state.append(
            gate.hidden_bias
        )  # the one float constant: it is added as the sum is scaled
    of_state = requantize(cell.new_hidden_acc_quant, *of_state)
    acc = requantize(cell.new_acc_quant, gate.of_input(x), multiply(reset, of_state))
    new = lookup(cell.new_tanh_quant, torch.tanh, acc)
    less = multiply(update, new)
    terms = new, less._replace(codes=-less.codes), multiply(update, h)
    return (requantize(cell.output_quant, *terms),)


def lstm(direction, gates, x, h, c):
    cell = direction.cell

    def gate(name, kind, function):
        acc = requantize(getattr(cell, f"{name}_acc_quant"), gates[name].of_both(x, h))
        return lookup(getattr(cell, f"{name}_{kind}_quant"), function, acc)

    entering = gate("input", "sigmoid", torch.sigmoid)
    if "forget" not in gates:  # coupled
        kept = lookup(cell.input_sigmoid_quant, lambda v: 1 - v, entering)
    else:
        kept = gate("forget", "sigmoid", torch.sigmoid)
    leaving = gate("output", "sigmoid", torch.sigmoid)
    new = gate("cell", "tanh", torch.tanh)
    state = cell.cell_state_quant
    old, fresh = requantize(state, multiply(kept, c)), requantize(state, multiply(entering, new))
    c = requantize(state, add(old, fresh))  # one grid: clamped only
    shown = lookup(cell.hidden_state_tanh_quant, torch.tanh, c)
    return requantize(cell.output_quant, multiply(leaving, shown)), c


def run(layer, step, x: Integers, states: list) -> tuple[Integers, list[list[Integers]]]:
    """All layers and directions over ``(T, N, features)``; the last states, a list for each direction."""
    last, place = [], 0
    for directions in layer.layers:
        outputs = []
        for direction in directions:
            holders = [
                direction.cell.output_quant,
                getattr(direction.cell, "cell_state_quant", None),
            ]
            now = tuple(quantize(q, s[place]) for q, s in zip(holders, states, strict=False))
            gates = {name: Gate(direction, name) for name in direction.gates}
            order = range(T) if direction is directions[0] else reversed(range(T))
            seen = {}
            for t in order:
                now = step(direction, gates, x.view(lambda codes, t=t: codes[t]), *now)
                seen[t] = now[0].codes
            outputs.append(torch.stack([seen[t] for t in range(T)]))
            last.append(now)
            place += 1
        x = now[0]._replace(codes=torch.cat(outputs, -1))
    return x, last


KINDS = {
    "RNN": (QuantRNN, rnn, {}),
    "RNN-relu": (QuantRNN, rnn, {"nonlinearity": "relu"}),
    "GRU": (QuantGRU, gru, {}),
    "LSTM": (QuantLSTM, lstm, {}),
    "coupled-LSTM": (QuantLSTM, lstm, {"coupled_input_forget_gates": True}),
}


def build(kind: str, quantizers, bits, **options):
    make, _, own = KINDS[kind]
    weight, signed, unsigned = quantizers
    given = {"weight_quant": weight, "io_quant": signed, "gate_acc_quant": signed}
    widths = dict(zip(("weight", "io", "gate_acc"), bits, strict=False))
    if make is not QuantRNN:
        given |= {"sigmoid_quant": unsigned, "tanh_quant": signed}
        widths |= {"sigmoid": bits[3], "tanh": bits[3]}
    if make is QuantLSTM:
        given |= {"cell_state_quant": signed}
        widths |= {"cell_state": bits[3]}
    given |= {f"{name}_bit_width": width for name, width in widths.items()}
    return make(FEATURES, HIDDEN, return_quant_tensor=True, **own, **given, **options)


CASES = [
    ("one", "8", 0),
    ("two layers, both directions", "mixed", 1),
    ("two layers, both directions", "4", 2),
    ("no bias", "8", 3),
]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("shape", "bits", "seed"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_layer_is_its_integer_machine(kind, shape, bits, seed, arithmetic) -> None:
    torch.manual_seed(seed)
    quantizers, dtype = ARITHMETIC[arithmetic]
    layer = build(kind, quantizers, BITS[bits], **SHAPES[shape]).to(dtype)
    enlarge(layer)
    x = torch.randn(T, N, FEATURES, dtype=dtype)
    count = layer.num_layers * (1 + layer.bidirectional)
    states = [torch.randn(count, N, HIDDEN, dtype=dtype) / 2 for _ in layer.state_names]
    with calibration_mode(layer), torch.no_grad():
        layer(x, *states)
    layer.eval()
    with torch.no_grad():
        out, ends = layer(x, *states)
    expected, last = run(layer, KINDS[kind][1], quantize(layer.io_quant, x), states)
    assert_same(out, expected)
    assert varied(expected)
    for i, end in enumerate(ends if isinstance(ends, tuple) else (ends,)):
        assert_same(end, last[0][i]._replace(codes=torch.stack([now[i].codes for now in last])))
