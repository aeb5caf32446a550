"""Multiply-accumulates and bit operations, worked out by hand; and that counting leaves no trace."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from qframework.graph import summary
from qframework.layers import (
    QuantIdentity,
    QuantLinear,
    QuantMatMul,
    QuantMultiheadAttention,
    QuantReLU,
)


@pytest.fixture(autouse=True)
def deterministic() -> None:
    torch.manual_seed(0)


def only(found):
    (layer,) = (x for x in found.layers if x.macs is not None)
    return layer


class Twice(nn.Module):
    """One layer, which is given 8 bits and 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = QuantIdentity(bit_width=8), QuantIdentity(bit_width=4)
        self.shared = QuantLinear(4, 4, bias=False)

    def forward(self, x):
        return self.shared(self.narrow(self.shared(self.wide(x))))


def test_a_shared_layer_counts_each_call_with_its_own_input_bits() -> None:
    layer = only(summary(Twice(), torch.randn(1, 4)))
    assert layer.macs == 32
    assert layer.bops == 16 * 8 * 8 + 16 * 8 * 4
    assert layer.input_bits == 6 and layer.weight_bits == 8


def test_inputs_given_by_keyword_are_inputs() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.linear = QuantIdentity(bit_width=5), QuantLinear(4, 2)

        def forward(self, x):
            return self.linear(input=self.act(x))

    layer = only(summary(ByKeyword(), torch.randn(3, 4)))
    assert (layer.macs, layer.input_bits) == (3 * 4 * 2, 5)


def test_packed_sequences_count_their_steps_alone() -> None:
    packed = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    layer = only(summary(nn.LSTM(3, 4), packed))
    assert layer.macs == 7 * (4 * 4 * (3 + 4))
    assert layer.bops == layer.macs * 32 * 32


def test_float_attention_counts_projections_and_products() -> None:
    x = torch.randn(1, 5, 8)
    layer = only(summary(nn.MultiheadAttention(8, 2, batch_first=True), x, x, x))
    assert layer.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8


def test_the_fast_path_of_an_encoder_layer_is_counted_too() -> None:
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    found = summary(model.eval(), torch.randn(1, 5, 8))
    assert found.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16


def test_quantized_attention_counts_projections_by_layer_and_products_of_activations() -> None:
    x = torch.randn(1, 5, 8)
    model = QuantMultiheadAttention(8, 2, batch_first=True, attn_output_weights_bit_width=4)
    layers = {x.name: x for x in summary(model, x, x, x).layers}
    products = layers["(the model)"]
    assert products.macs == 2 * 5 * 5 * 8
    assert products.bops == 5 * 5 * 8 * 8 * 8 + 5 * 5 * 8 * 4 * 8
    assert layers["in_proj"].macs == 3 * 5 * 8 * 8
    assert layers["out_proj"].macs == 5 * 8 * 8


def test_products_of_two_activations() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = QuantIdentity(bit_width=3)
            self.product = QuantMatMul(input_quant=None, other_bit_width=7)

        def forward(self, a, b):
            return self.product(self.act(a), b)

    layer = only(summary(Product(), torch.randn(2, 3, 4), torch.randn(2, 4, 5)))
    assert layer.macs == 2 * 3 * 4 * 5
    assert layer.bops == layer.macs * 3 * 7


def test_what_is_written_into_afterwards_has_no_known_bits() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.last = QuantReLU(bit_width=5), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.act(x).mul_(0.3))

    assert only(summary(InPlace(), torch.randn(1, 4))).input_bits == 32


def test_integer_parameters_count_their_bits() -> None:
    model = nn.Linear(4, 2, bias=False)
    model.weight = nn.Parameter(torch.ones(2, 4, dtype=torch.int8), requires_grad=False)
    (layer,) = summary(model).layers
    assert layer.weight_bits == 8 and layer.tensors[0].size_in_bits == 64


def test_a_model_without_storage_is_counted() -> None:
    with torch.device("meta"):
        model = nn.Sequential(QuantIdentity(bit_width=6), QuantLinear(8, 4, weight_bit_width=3))
        found = summary(model, torch.empty(2, 8))
    layer = only(found)
    assert (layer.macs, layer.input_bits, layer.weight_bits) == (64, 6, 3)
    assert layer.tensors[0].scale_min is None


def test_random_numbers_and_warnings_to_come_stay_as_they_were() -> None:
    model = nn.Sequential(QuantReLU(), nn.Dropout(0.5)).train()
    x = torch.randn(2, 4)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.warns(UserWarning, match="no data"):
        model.eval()(x)


def test_a_model_that_raises_is_left_as_it_was() -> None:
    model = nn.Sequential(QuantReLU(), nn.Linear(4, 2)).train()
    with pytest.raises(RuntimeError):
        summary(model, torch.randn(2, 5))
    assert model.training and not any(m._forward_hooks for m in model.modules())
