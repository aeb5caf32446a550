"""Every layer by itself, behind a quantized input, in all targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import calibrated

import qframework.layers as layers
from qframework.export import verify
from qframework.export.targets import is_installed
from qframework.layers.base import QuantLayer
from qframework.quant_tensor import QuantTensor
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFloat,
    ShiftedUint8WeightPerTensorFloat,
)

IMAGE, SEQUENCE = (2, 4, 6, 6), (2, 4, 6)
OF_ALL: dict[str, Any] = {
    "weight_quant": Int8WeightPerChannelFloat,
    "bias_quant": Int8BiasPerTensorFloatInternalScaling,
    "output_quant": Int8ActPerTensorFloat,
}


class Second(nn.Module):
    """The first of several results; two operands where a layer takes them."""

    def __init__(self, layer: nn.Module, how: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.input = layers.QuantIdentity(return_quant_tensor=True)
        self.layer, self.how = layer, how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.layer, self.input(x))


def once(layer: Any, x: Any) -> Any:
    return layer(x)


def both(layer: Any, x: Any) -> Any:
    return layer(x, x)


def three(layer: Any, x: Any) -> Any:
    return layer(x, x, x)


def triple(layer: Any, x: Any) -> Any:
    return layer(x, x, x, need_weights=False)[0]


def where_quantized(layer: Any, x: Any) -> Any:
    """Calibration hands on floats, which a truncation doesn't take."""
    return layer(x) if isinstance(x, QuantTensor) else x


#: Layer: arguments, shape of the input, how it is called.
TABLE: dict[str, tuple[dict[str, Any], Any, Callable[[Any, Any], Any]]] = {
    "QuantLinear": ({"in_features": 6, "out_features": 4, **OF_ALL}, SEQUENCE, once),
    "QuantTransposedLinear": ({"in_features": 6, "out_features": 4, **OF_ALL}, SEQUENCE, once),
    "QuantConv1d": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, **OF_ALL}, SEQUENCE, once),
    "QuantConv2d": (
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "stride": 2, "padding": 1, **OF_ALL},
        IMAGE,
        once,
    ),
    "QuantConv3d": ({"in_channels": 2, "out_channels": 3, "kernel_size": 2, **OF_ALL}, (2, 2, 4, 4, 4), once),
    "QuantConvTranspose1d": ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, **OF_ALL}, SEQUENCE, once),
    "QuantConvTranspose2d": (
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2, **OF_ALL},
        IMAGE,
        once,
    ),
    "QuantConvTranspose3d": ({"in_channels": 2, "out_channels": 3, "kernel_size": 2, **OF_ALL}, (2, 2, 3, 3, 3), once),
    "QuantScaleBias": ({"num_features": 4, "bias": True, "output_quant": Int8ActPerTensorFloat}, IMAGE, once),
    "BatchNorm1dToQuantScaleBias": ({"num_features": 4}, SEQUENCE, once),
    "BatchNorm2dToQuantScaleBias": ({"num_features": 4}, IMAGE, once),
    "BatchNorm3dToQuantScaleBias": ({"num_features": 2}, (2, 2, 3, 3, 3), once),
    "QuantLayerNorm": ({"normalized_shape": 6, "output_quant": Int8ActPerTensorFloat}, SEQUENCE, once),
    "QuantRMSNorm": ({"normalized_shape": 6, "output_quant": Int8ActPerTensorFloat}, SEQUENCE, once),
    "QuantGroupNorm": ({"num_groups": 2, "num_channels": 4, "output_quant": Int8ActPerTensorFloat}, IMAGE, once),
    "QuantEmbedding": (
        {"num_embeddings": 7, "embedding_dim": 4, "weight_quant": ShiftedUint8WeightPerTensorFloat},
        None,
        once,
    ),
    "QuantEmbeddingBag": ({"num_embeddings": 7, "embedding_dim": 4}, None, once),
    **{
        f"Quant{name}": ({}, SEQUENCE, once)
        for name in (
            *("Identity", "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU"),
            *("Sigmoid", "Tanh", "HardSwish", "HardSigmoid"),
        )
    },
    "QuantHardTanh": ({"min_val": -1.0, "max_val": 1.0}, SEQUENCE, once),
    "QuantSoftmax": ({"dim": -1}, SEQUENCE, once),
    "QuantRNN": ({"input_size": 6, "hidden_size": 4, "bidirectional": True}, SEQUENCE, once),
    "QuantLSTM": (
        {"input_size": 6, "hidden_size": 4, "num_layers": 2, "coupled_input_forget_gates": True},
        SEQUENCE,
        once,
    ),
    "QuantGRU": ({"input_size": 6, "hidden_size": 4, "num_layers": 2, "bidirectional": True}, SEQUENCE, once),
    "QuantEltwiseAdd": ({}, SEQUENCE, both),
    "QuantEltwiseMul": ({}, SEQUENCE, both),
    "QuantMatMul": (
        {"output_quant": Int8ActPerTensorFloat},
        SEQUENCE,
        lambda layer, x: layer(x, x.transpose(1, 2)),
    ),
    "QuantCat": ({}, SEQUENCE, lambda layer, x: layer([x, x])),
    "TruncAvgPool2d": ({"kernel_size": 2, "bit_width": 6}, IMAGE, once),
    "TruncAdaptiveAvgPool2d": ({"output_size": 3}, IMAGE, once),
    "TruncQuantAccumulator": ({"bit_width": 5}, IMAGE, where_quantized),
    "QuantUpsample": ({"scale_factor": 2, "mode": "bilinear"}, IMAGE, once),
    "QuantUpsamplingBilinear2d": ({"scale_factor": 2}, IMAGE, once),
    "QuantUpsamplingNearest2d": ({"scale_factor": 2}, IMAGE, once),
    "QuantDropout": ({}, IMAGE, once),
    "QuantMultiheadAttention": ({"embed_dim": 6, "num_heads": 2, "batch_first": True}, SEQUENCE, triple),
    "QuantScaledDotProductAttention": ({"sdpa_output_quant": Int8ActPerTensorFloat}, SEQUENCE, three),
    "QuantTransformerEncoderLayer": ({"d_model": 6, "nhead": 2, "dim_feedforward": 8, "batch_first": True}, SEQUENCE, once),
    "HadamardClassifier": ({"in_channels": 6, "out_channels": 4}, (2, 6), once),
}  # fmt: skip
#: Bases, and what the table has under another name.
BASES = {"QuantWBIOL", "QuantWeightBiasInputOutputLayer", "QuantNonLinearActLayer"}


def test_the_table_holds_every_layer() -> None:
    public = {
        n
        for n in layers.__all__
        if isinstance(getattr(layers, n), type) and issubclass(getattr(layers, n), QuantLayer)
    }
    assert public - BASES == TABLE.keys()


@pytest.mark.slow
@pytest.mark.table(3)
@pytest.mark.parametrize("name", TABLE)
def test_a_layer_gives_the_same_in_all_targets(name: str) -> None:
    torch.manual_seed(0)
    arguments, shape, how = TABLE[name]
    layer = getattr(layers, name)(**arguments)
    if shape is None:
        model, x = nn.Sequential(layer), torch.randint(0, 7, (3, 2))
    else:
        model, x = Second(layer, how), torch.randn(shape)
    calibrated(model, x)
    for target in filter(is_installed, ("integer", "torch", "onnxruntime", "qonnx")):
        if (name, target) == ("QuantEmbeddingBag", "qonnx"):
            continue  # the package doesn't execute the loop that ONNX has for it
        report = verify(model, x, target)
        assert report.explained, report


def test_weights_of_one_scale_are_the_same_as_of_channels() -> None:
    layer = layers.QuantLinear(6, 4, weight_quant=Int8WeightPerTensorFloat)
    x = torch.randn(2, 6)
    assert verify(calibrated(layer, x), x, "integer").explained
