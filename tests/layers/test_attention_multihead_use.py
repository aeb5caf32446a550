"""What multi-head attention refuses, and how it compiles and exports."""

import copy

import pytest
import torch
from torch import nn

from qframework.layers import QuantMultiheadAttention

QUERIES, KEYS, BATCH, SIZE, HEADS = 5, 6, 3, 8, 2
X = torch.randn(QUERIES, BATCH, SIZE)


@pytest.mark.parametrize(
    ("arguments", "call", "error", "says"),
    [
        ((X, X, X[:4]), {}, ValueError, "same length"),
        ((X, X[:, :2], X[:, :2]), {}, ValueError, "same batch size, axis 1"),
        ((X, X[..., :4], X), {}, ValueError, "sizes 8, 8 and 8"),
        ((X, X[:, 0], X[:, 0]), {}, ValueError, "2 or all 3 axes"),
        ((X[None],) * 3, {}, ValueError, "2 or all 3 axes"),
        ((X, X, X), {"attn_mask": torch.ones(5, 4).bool()}, ValueError, r"\(5, 5\) or \(6, 5, 5\)"),
        ((X, X, X), {"key_padding_mask": torch.ones(5).bool()}, ValueError, r"must be \(3, 5\)"),
        ((X, X, X), {"attn_mask": torch.ones(5, 5).byte()}, TypeError, "torch.uint8"),
    ],
)
def test_what_does_not_fit_is_said(arguments, call, error, says) -> None:
    with pytest.raises(error, match=says):
        QuantMultiheadAttention(SIZE, HEADS)(*arguments, **call)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_heads": 3}, ValueError, "multiple of num_heads"),
        ({"num_heads": 0}, ValueError, "greater than 0"),
        ({"num_heads": 2, "kdim": 4}, ValueError, "packed_in_proj=False"),
        ({"num_heads": 2, "in_proj_weigth_bit_width": 4}, TypeError, "in_proj_weight_bit_width"),
        ({"num_heads": 2, "v_bit_widht": 4}, TypeError, "Did you mean 'v_bit_width'"),
        (
            {"num_heads": 2, "out_proj_weight_bit_widht": 4},
            TypeError,
            r"QuantMultiheadAttention\.out_proj: .* Did you mean 'weight_bit_width'",
        ),
        (
            {"num_heads": 2, "in_proj_weight_bit_width": 40},
            ValueError,
            r"in_proj: .*weight_bit_width",
        ),
    ],
)
def test_what_cannot_be_built_is_said(options, error, says) -> None:
    with pytest.raises(error, match=says):
        QuantMultiheadAttention(SIZE, **options)


@pytest.mark.slow
def test_it_compiles_and_exports_whole() -> None:
    torch.manual_seed(0)
    x, other = torch.randn(QUERIES, BATCH, SIZE), torch.randn(KEYS, BATCH, SIZE)
    ours = QuantMultiheadAttention(SIZE, HEADS)
    ours(x, x, x)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    ours.eval()
    close = {"rtol": 1e-4, "atol": 1e-4}
    out, weights = compiled(x, x, x, attn_mask=mask)
    expected, expected_weights = ours(x, x, x, attn_mask=mask)
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(weights, expected_weights, **close)
    out.sum().backward()
    assert ours.in_proj.weight.grad is not None
    program = torch.export.export(ours, (x, other, other))
    torch.testing.assert_close(program.module()(x, other, other), ours(x, other, other), **close)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_with_keys_of_another_length(training) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(QUERIES, BATCH, SIZE), torch.randn(KEYS, BATCH, SIZE)
    ours = QuantMultiheadAttention(SIZE, HEADS)
    ours(x, x, x), ours.train(training)
    copied = copy.deepcopy(ours)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, other, other), ours(x, other, other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        got.sum().backward(retain_graph=True)
    assert copied.in_proj.weight.grad is not None


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = QuantMultiheadAttention(SIZE, HEADS, batch_first=True)

    def forward(self, x, attn_mask, padding):
        return self.attention(x, x, x, attn_mask=attn_mask, key_padding_mask=padding)


@pytest.mark.slow
def test_an_export_leaves_length_and_batch_size_open() -> None:
    def arguments(batch: int, length: int):
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[0, -1] = True
        return torch.randn(batch, length, SIZE), torch.randn(length, length), padding

    model = SelfAttention()
    model(*arguments(2, 5))
    model.eval()
    batch, length = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length"))
    open_axes = ({0: batch, 1: length}, {0: length, 1: length}, {0: batch, 1: length})
    program = torch.export.export(model, arguments(2, 5), dynamic_shapes=open_axes)
    other = arguments(7, 9)
    torch.testing.assert_close(program.module()(*other), model(*other))
