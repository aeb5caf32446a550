"""Recurrent layers and attention with the keywords of their parts."""

import torch
from brevitas.nn import QuantLSTM as LSTM, QuantMultiheadAttention, QuantRNN
from brevitas import nn as qnn, quant as q
from brevitas.quant_tensor import QuantTensor

torch.manual_seed(0)
lstm = LSTM(6, 5, weight_bit_width=4, io_quant=q.Int8ActPerTensorFloat, gate_acc_bit_width=6, return_quant_tensor=True)
x = torch.randn(7, 3, 6)
out, (h, c) = lstm(x)
assert isinstance(out, QuantTensor) and out.shape == (7, 3, 5) and h.shape == (1, 3, 5)
rnn = QuantRNN(6, 5, batch_first=True, weight_quant=q.Int8WeightPerTensorFloat, bidirectional=True)
assert rnn(x)[0].shape == (7, 3, 10)
attention = QuantMultiheadAttention(
    8, 2, packed_in_proj=True, in_proj_weight_bit_width=4, attn_output_weights_bit_width=8, batch_first=True
)
y = torch.randn(2, 4, 8)
out, weights = attention(y, y, y)
out.sum().backward()
assert weights.shape == (2, 4, 4) and attention.in_proj.weight.grad is not None
table = qnn.QuantEmbedding(11, 4, weight_bit_width=4, return_quant_tensor=True)
assert table(torch.tensor([1, 2])).bit_width == 4
both = qnn.QuantEltwiseAdd(return_quant_tensor=True)(torch.randn(2, 3), torch.randn(2, 3))
assert isinstance(both, QuantTensor)
