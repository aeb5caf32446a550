"""What recurrent layers load and save."""

import copy
import io

import pytest
import torch
from torch import nn

from qframework.layers import QuantGRU, QuantLSTM, QuantRNN

KINDS = {"RNN": QuantRNN, "LSTM": QuantLSTM, "GRU": QuantGRU}


def test_torch_weights_of_other_sizes_are_size_mismatches() -> None:
    for other in (nn.LSTM(5, 3), nn.LSTM(4, 5), nn.GRU(4, 3)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            QuantLSTM(4, 3).load_state_dict(other.state_dict())
    state = nn.RNN(4, 3).state_dict()
    state["bias_hh_l0"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="two biases differ in size"):
        QuantRNN(4, 3).load_state_dict(state)


def test_a_coupled_layer_takes_all_gates_but_forget_from_torch() -> None:
    torch.manual_seed(0)
    reference, layer = nn.LSTM(4, 3), QuantLSTM(4, 3, coupled_input_forget_gates=True)
    with pytest.raises(RuntimeError, match="rows of the forget gate"):
        layer.load_state_dict(reference.state_dict())
    missing, unexpected = layer.load_state_dict(reference.state_dict(), strict=False)
    assert missing == [] and len(unexpected) == 4
    rows = dict(
        zip(("input", "forget", "cell", "output"), reference.weight_hh_l0.chunk(4), strict=True)
    )
    for gate in layer.layers[0][0].gates:
        hidden = layer.layers[0][0].parameters_of(gate).hidden_weight.weight
        assert torch.equal(hidden, rows[gate])


def test_weights_that_differ_are_unexpected_where_they_are_shared() -> None:
    layer = QuantGRU(4, 3, bidirectional=True, shared_input_hidden_weights=True)
    state = nn.GRU(4, 3, bidirectional=True).state_dict()
    with pytest.raises(RuntimeError, match=r"layers\.0\.0, which shares it"):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).unexpected_keys
    for name in ("weight_ih_l0", "bias_ih_l0"):
        state[f"{name}_reverse"] = state[name]
    layer.load_state_dict(state)
    layer.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_states_survive_saving_and_pickling(kind) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](4, 3, num_layers=2)
    x = torch.randn(3, 2, 4)
    layer(x), layer.eval()
    other = KINDS[kind](4, 3, num_layers=2)
    other.load_state_dict(layer.state_dict()), other.eval()
    file = io.BytesIO()
    torch.save(layer, file), file.seek(0)
    for again in (other, torch.load(file, weights_only=False), copy.deepcopy(layer)):
        assert torch.equal(again(x)[0], layer(x)[0])
