"""Recurrent layers on the machine of :mod:`integer_machine`."""

from __future__ import annotations

from typing import Any

import torch
from integer_machine import (
    Integers,
    add,
    bias_on,
    lookup,
    matmul,
    multiply,
    quantize,
    requantize,
    rows,
)


class Gate:
    """The products of a gate: of the input with its bias, and of the state."""

    def __init__(self, direction: Any, name: str) -> None:
        own = direction.parameters_of(name)
        quantizer = own.input_weight.weight_quant
        assert own.hidden_weight.weight_quant is quantizer
        self.input = rows(quantize(quantizer, own.input_weight.weight))
        self.hidden = rows(quantize(quantizer, own.hidden_weight.weight))
        self.bias, self.hidden_bias = own.bias, own.hidden_bias

    def of_input(self, x: Integers) -> Integers:
        acc = matmul(x, self.input)
        return acc if self.bias is None else add(acc, bias_on(acc.scale, self.bias))

    def of_both(self, x: Integers, h: Integers) -> tuple[Integers, ...]:
        """One accumulator where input and state are on one grid, else two."""
        products = self.of_input(x), matmul(h, self.hidden)
        return (add(*products),) if torch.equal(x.scale, h.scale) else products


def rnn(direction: Any, gates: dict[str, Gate], x: Integers, h: Integers) -> tuple[Integers]:
    cell = direction.cell
    function = {"tanh": torch.tanh, "relu": torch.relu}[direction.nonlinearity]
    acc = requantize(cell.gate_acc_quant, *gates[""].of_both(x, h))
    return (lookup(cell.output_quant, function, acc),)


def gru(direction: Any, gates: dict[str, Gate], x: Integers, h: Integers) -> tuple[Integers]:
    cell = direction.cell
    acc = requantize(cell.reset_acc_quant, *gates["reset"].of_both(x, h))
    reset = lookup(cell.reset_sigmoid_quant, torch.sigmoid, acc)
    acc = requantize(cell.update_acc_quant, *gates["update"].of_both(x, h))
    update = lookup(cell.update_sigmoid_quant, torch.sigmoid, acc)
    gate = gates["new"]
    of_state = [matmul(h, gate.hidden)]
    if gate.hidden_bias is not None:
        # The one float constant: it is added as the sum is scaled.
        of_state.append(gate.hidden_bias)
    of_state = requantize(cell.new_hidden_acc_quant, *of_state)
    acc = requantize(cell.new_acc_quant, gate.of_input(x), multiply(reset, of_state))
    new = lookup(cell.new_tanh_quant, torch.tanh, acc)
    less = multiply(update, new)
    terms = new, less._replace(codes=-less.codes), multiply(update, h)
    return (requantize(cell.output_quant, *terms),)


def lstm(
    direction: Any, gates: dict[str, Gate], x: Integers, h: Integers, c: Integers
) -> tuple[Integers, Integers]:
    cell = direction.cell

    def gate(name: str, kind: str, function: Any) -> Integers:
        acc = requantize(getattr(cell, f"{name}_acc_quant"), *gates[name].of_both(x, h))
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


def run(layer: Any, step: Any, x: Integers, states: list[Any]) -> tuple[Integers, list[Any]]:
    """All layers and directions over a sequence.

    Args:
        layer: whose parameters and scales are taken.
        step: :func:`rnn`, :func:`gru` or :func:`lstm`.
        x: ``(T, N, features)``, on the grid of input and states.
        states: the first ones, for each kind ``(layers * directions, N, hidden)`` or None.

    Returns:
        The outputs, and the last states, a tuple for each direction.
    """
    last, place = [], 0
    for directions in layer.layers:
        outputs = []
        for direction in directions:
            holders = [
                direction.cell.output_quant,
                getattr(direction.cell, "cell_state_quant", None),
            ]
            now = tuple(
                quantize(
                    q, torch.zeros(x.codes.shape[1], layer.hidden_size) if s is None else s[place]
                )
                for q, s in zip(holders, states, strict=False)
            )
            gates = {name: Gate(direction, name) for name in direction.gates}
            order = (
                range(len(x.codes)) if direction is directions[0] else reversed(range(len(x.codes)))
            )
            seen = {}
            for t in order:
                now = step(direction, gates, x.view(lambda codes, t=t: codes[t]), *now)
                seen[t] = now[0].codes
            outputs.append(torch.stack([seen[t] for t in range(len(x.codes))]))
            last.append(now)
            place += 1
        x = now[0]._replace(codes=torch.cat(outputs, -1))
    return x, last
