"""Fully connected layers."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import nn

from qframework.functional import linear
from qframework.layers.keywords import WeightLayerKeywords
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.proxy import Quantizer
from qframework.quant_tensor import TensorLike
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat


class QuantLinear(QuantWeightBiasInputOutputLayer, nn.Linear):
    """``torch.nn.Linear`` with quantized weight, bias, input and output.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: whether there is a bias.
        weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
        bias_quant: quantizer of the bias: a class, a proxy to share, or None.
        input_quant: quantizer of the input: a class, a proxy to share, or None.
        output_quant: quantizer of the output: a class, a proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool | None = True,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = None,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Unpack[WeightLayerKeywords],
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bool(bias), device=device, dtype=dtype)
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )

    @property
    def channelwise_separable(self) -> bool:
        """Whether each output channel depends on one input channel alone."""
        return False

    @property
    def out_channels(self) -> int:
        """The output features."""
        return self.out_features

    @property
    def per_elem_ops(self) -> int:
        """Multiplications and additions for an element of the output."""
        return 2 * self.in_features

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        return linear(x, weight, bias)


class TransposedLinear(nn.Module):
    """``x @ weight + bias``: a linear layer that holds its weight as ``(in_features, out_features)``.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        options: Any = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(in_features, out_features, **options))
        nn.init.normal_(self.weight, std=in_features**-0.5)
        start = nn.Parameter(torch.zeros(out_features, **options)) if bias else None
        self.register_parameter("bias", start)

    def extra_repr(self) -> str:
        """Settings."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def forward(self, input: torch.Tensor) -> Any:
        """Apply to an input ``(..., in_features)``."""
        return linear(input, self.weight.t(), self.bias)


class QuantTransposedLinear(QuantWeightBiasInputOutputLayer, TransposedLinear):
    """:class:`TransposedLinear`, as GPT-2 has it, with quantized weight, bias, input and output.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bias: whether there is a bias.
        weight_quant: quantizer of the weight, whose channels are along its second axis; of the kinds of :class:`QuantLinear`.
        bias_quant: quantizer of the bias, of the same kinds.
        input_quant: quantizer of the input, of the same kinds.
        output_quant: quantizer of the output, of the same kinds.
        return_quant_tensor: return a quantized tensor rather than a tensor.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    output_channel_dim = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool | None = True,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = None,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Unpack[WeightLayerKeywords],
    ) -> None:
        TransposedLinear.__init__(self, in_features, out_features, bool(bias), device, dtype)
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        return linear(x, weight.transpose(0, 1), bias)
