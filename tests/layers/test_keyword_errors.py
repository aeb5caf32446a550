"""Layers of several parts tell of keywords as they were given."""

import pytest

from qframework.inject import QuantizerError
from qframework.layers import QuantGRU, QuantLSTM, QuantMultiheadAttention


@pytest.mark.parametrize("kind", [QuantLSTM, QuantGRU])
@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"weight_bits": 4}, r"\.weight_quant .* weight_bits=4. Did you mean 'weight_bit_width'"),
        ({"weight_bit_width": 0}, r"\.weight_quant .* weight_bit_width=0: must be"),
        ({"gate_acc_bit_width": 99}, r"\.gate_acc_quant .* gate_acc_bit_width=99: must be"),
        ({"sigmoid_bits": 4}, r"\.sigmoid_quant .* sigmoid_bits=4"),
    ],
)
def test_recurrent_layers_tell_of_keywords_as_they_were_given(kind, keywords, words) -> None:
    with pytest.raises(QuantizerError, match=f"^{kind.__name__}{words}"):
        kind(4, 3, **keywords)


def test_a_keyword_of_one_gate_is_told_of_by_its_own_name() -> None:
    with pytest.raises(
        QuantizerError, match=r"forget_gate_weight_bits=2.*'forget_gate_weight_bit_w"
    ):
        QuantLSTM(4, 3, weight_bit_width=4, forget_gate_weight_bits=2)


def test_attention_offers_the_tensors_that_a_misspelled_name_may_be_for() -> None:
    with pytest.raises(QuantizerError, match="in_proj_weight_bit_width, out_proj_weight_bit_width"):
        QuantMultiheadAttention(4, 2, weight_bits=3)
