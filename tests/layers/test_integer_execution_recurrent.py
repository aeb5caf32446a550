"""Recurrent layers again in integers: each step of the cell on a machine that knows no floats."""

from __future__ import annotations

import pytest
import torch
from integer_machine import ARITHMETIC, FLOAT, assert_same, enlarge, quantize, settle, varied
from integer_recurrent import gru, lstm, rnn, run

from qframework.layers import QuantGRU, QuantIdentity, QuantLSTM, QuantRNN
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    ShiftedUint8ActPerTensorFloat,
)

SHAPES = {
    "one": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "bidirectional": True, "shared_input_hidden_weights": True},
}
#: bits of weights, input and states, accumulators, gates
BITS = {"8": (8, 8, 8, 8), "4": (4, 4, 4, 4), "mixed": (5, 6, 12, 7)}
T, N, FEATURES, HIDDEN = 4, 3, 6, 4

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
    ("no bias", "4", 2),
]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("shape", "bits", "seed"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_layer_is_its_integer_machine(kind, shape, bits, seed, arithmetic) -> None:
    torch.manual_seed(seed)
    quantizers, dtype = ARITHMETIC[arithmetic]
    layer = build(kind, quantizers, BITS[bits], **SHAPES[shape]).to(dtype)
    assert_is_its_machine(layer, KINDS[kind][1], dtype)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_so_it_is_with_a_scale_for_each_row_of_the_weights(kind) -> None:
    torch.manual_seed(0)
    _, signed, unsigned = FLOAT
    quantizers = Int8WeightPerChannelFloat, signed, unsigned
    layer = build(kind, quantizers, BITS["mixed"], bidirectional=True).double()
    assert_is_its_machine(layer, KINDS[kind][1], torch.float64)


def test_so_it_is_with_other_bits_and_one_quantizer_for_all_gates() -> None:
    torch.manual_seed(1)
    layer = build(
        "LSTM",
        FLOAT,
        BITS["8"],
        num_layers=2,
        shared_intra_layer_weight_quant=True,
        shared_intra_layer_gate_acc_quant=True,
        hidden_state_tanh_bit_width=5,
        output_sigmoid_bit_width=3,
    ).double()
    assert_is_its_machine(layer, lstm, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_so_it_is_with_zero_points(kind) -> None:
    torch.manual_seed(0)
    shifted = ShiftedUint8ActPerTensorFloat
    quantizers = Int8WeightPerTensorFloat, shifted, shifted
    layer = build(kind, quantizers, BITS["8"], bidirectional=True).double()
    assert_is_its_machine(layer, KINDS[kind][1], torch.float64)
    assert int(layer.io_quant.zero_point()) != 0


@pytest.mark.parametrize("kind", KINDS)
def test_so_it_is_with_an_input_on_a_grid_of_its_own(kind) -> None:
    torch.manual_seed(1)
    layer = build(kind, FLOAT, BITS["8"], num_layers=2, quantize_output_only=True).double()
    entry = QuantIdentity(Int8ActPerTensorFloat, bit_width=6, return_quant_tensor=True).double()
    assert_is_its_machine(layer, KINDS[kind][1], torch.float64, entry)


def assert_is_its_machine(layer, step, dtype: torch.dtype, entry=None) -> None:
    """Compare outputs and last states; ``entry`` quantizes the input of a layer that doesn't."""
    enlarge(layer)
    x = torch.randn(T, N, FEATURES, dtype=dtype)
    count = layer.num_layers * (1 + layer.bidirectional)
    states = [torch.randn(count, N, HIDDEN, dtype=dtype) / 2 for _ in layer.state_names]
    if entry is not None:
        settle(entry, x)
    settle(layer, x if entry is None else entry(x), *states)
    with torch.no_grad():
        out, ends = layer(x if entry is None else entry(x), *states)
    expected, last = run(
        layer, step, quantize(layer.io_quant if entry is None else entry.act_quant, x), states
    )
    assert_same(out, expected)
    assert varied(expected)
    for i, end in enumerate(ends if isinstance(ends, tuple) else (ends,)):
        assert_same(end, last[0][i]._replace(codes=torch.stack([now[i].codes for now in last])))
