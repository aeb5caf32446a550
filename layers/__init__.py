"""Quantized layers."""

from qframework.layers.accumulator import TruncQuantAccumulator
from qframework.layers.activation import (
    QuantHardSwish,
    QuantHardTanh,
    QuantIdentity,
    QuantNonLinearActLayer,
    QuantReLU,
    QuantSigmoid,
    QuantTanh,
)
from qframework.layers.activation_functions import (
    QuantELU,
    QuantGELU,
    QuantHardSigmoid,
    QuantLeakyReLU,
    QuantPReLU,
    QuantReLU6,
    QuantSiLU,
    QuantSoftmax,
)
from qframework.layers.attention import (
    QuantScaledDotProductAttention,
    ScaledDotProductAttention,
)
from qframework.layers.attention_multihead import QuantMultiheadAttention
from qframework.layers.batch_norm import mul_add_from_bn
from qframework.layers.conv import QuantConv1d, QuantConv2d, QuantConv3d
from qframework.layers.conv_transpose import (
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from qframework.layers.eltwise import QuantCat, QuantEltwiseAdd, QuantEltwiseMul, QuantMatMul
from qframework.layers.embedding import QuantEmbedding, QuantEmbeddingBag
from qframework.layers.hadamard import HadamardClassifier
from qframework.layers.linear import QuantLinear, QuantTransposedLinear, TransposedLinear
from qframework.layers.norm import QuantGroupNorm, QuantLayerNorm, QuantRMSNorm
from qframework.layers.pooling import TruncAdaptiveAvgPool2d, TruncAvgPool2d
from qframework.layers.rnn import QuantGRU, QuantLSTM, QuantRNN
from qframework.layers.scale_bias import (
    BatchNorm1dToQuantScaleBias,
    BatchNorm2dToQuantScaleBias,
    BatchNorm3dToQuantScaleBias,
    QuantScaleBias,
    ScaleBias,
)
from qframework.layers.transformer import QuantTransformerEncoderLayer
from qframework.layers.upsample import (
    QuantDropout,
    QuantUpsample,
    QuantUpsamplingBilinear2d,
    QuantUpsamplingNearest2d,
)
from qframework.layers.wbiol import QuantWBIOL, QuantWeightBiasInputOutputLayer

__all__ = [
    "QuantGRU",
    "QuantLSTM",
    "QuantRNN",
    "BatchNorm1dToQuantScaleBias",
    "BatchNorm2dToQuantScaleBias",
    "BatchNorm3dToQuantScaleBias",
    "HadamardClassifier",
    "QuantCat",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantDropout",
    "QuantELU",
    "QuantEltwiseAdd",
    "QuantEltwiseMul",
    "QuantEmbedding",
    "QuantEmbeddingBag",
    "QuantGELU",
    "QuantGroupNorm",
    "QuantHardSigmoid",
    "QuantHardSwish",
    "QuantHardTanh",
    "QuantIdentity",
    "QuantLayerNorm",
    "QuantLeakyReLU",
    "QuantLinear",
    "QuantMatMul",
    "QuantMultiheadAttention",
    "QuantNonLinearActLayer",
    "QuantPReLU",
    "QuantRMSNorm",
    "QuantReLU",
    "QuantReLU6",
    "QuantScaleBias",
    "QuantScaledDotProductAttention",
    "QuantSiLU",
    "QuantSigmoid",
    "QuantSoftmax",
    "QuantTanh",
    "QuantTransformerEncoderLayer",
    "QuantTransposedLinear",
    "QuantUpsample",
    "QuantUpsamplingBilinear2d",
    "QuantUpsamplingNearest2d",
    "QuantWBIOL",
    "QuantWeightBiasInputOutputLayer",
    "ScaleBias",
    "ScaledDotProductAttention",
    "TransposedLinear",
    "TruncAdaptiveAvgPool2d",
    "TruncAvgPool2d",
    "TruncQuantAccumulator",
    "mul_add_from_bn",
]
