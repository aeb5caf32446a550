"""Layers of the library keep the contract that layers of one's own are held to."""

import torch
from torch import nn

from qframework.layers import QuantConv2d, QuantEltwiseAdd, QuantLinear, QuantLSTM, QuantReLU
from qframework.quantizers import Int8ActPerTensorFloat
from qframework.testing import LayerContract


class TestLinear(LayerContract):
    def layer(self, **keywords):
        return QuantLinear(16, 8, **keywords)

    def sample(self):
        return torch.randn(4, 16)

    def float_layer(self):
        return nn.Linear(16, 8)


class TestConvolution(LayerContract):
    prefix = "input_"
    without = {"weight_quant": None, "input_quant": None}

    def layer(self, **keywords):
        return QuantConv2d(2, 4, 3, **{"input_quant": Int8ActPerTensorFloat} | keywords)

    def sample(self):
        return torch.randn(2, 2, 6, 6)

    def float_layer(self):
        return nn.Conv2d(2, 4, 3)


class TestReLU(LayerContract):
    prefix = ""
    without = {"act_quant": None}

    def layer(self, **keywords):
        return QuantReLU(return_quant_tensor=True, **keywords)

    def sample(self):
        return torch.randn(4, 16)


class TestAddition(LayerContract):
    """Two inputs."""

    prefix = "input_"

    def layer(self, **keywords):
        return QuantEltwiseAdd(**keywords)

    def sample(self):
        return torch.randn(4, 16), torch.randn(4, 16)


class TestLSTM(LayerContract):
    """Results that are tuples of tuples."""

    def layer(self, **keywords):
        return QuantLSTM(4, 6, batch_first=True, **keywords)

    def sample(self):
        return torch.randn(2, 3, 4)
