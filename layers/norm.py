"""Normalization over features: statistics in float, of the quantized input; quantized factor and summand.

The result is a float tensor unless the output is quantized: the grid of the input means nothing to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.proxy import Quantizer
from qframework.quant_tensor import TensorLike, dequantize
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat


class _QuantNorm(QuantWeightBiasInputOutputLayer):
    def _init_norm(self, *quantizers: Any) -> None:
        """The last step of a constructor; a layer without a weight has none to quantize."""
        weight_quant, *others = quantizers
        self._init_quant(None if self.weight is None else weight_quant, *others)
        if self.bias_quant.tensor_quant is not None and self.bias_quant.requires_input_scale:
            raise ValueError(
                f"{type(self).__name__}.bias_quant: {self.bias_quant.quantizer.__name__} takes input scale times weight "
                "scale, which a normalized input doesn't have; use Int8BiasPerTensorFloatInternalScaling or its kind"
            )

    def _remedy(self) -> str:
        return "Give output_quant=Int8ActPerTensorFloat, or return_quant_tensor=False."


class QuantLayerNorm(_QuantNorm, nn.LayerNorm):
    """``torch.nn.LayerNorm`` with quantized weight, bias, input and output.

    Args:
        normalized_shape, eps, elementwise_affine, bias: as in torch.
        weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
        bias_quant: quantizer of the bias (a class, another layer's proxy to share, or None), with a scale of its own.
        input_quant: quantizer of the input: a class, a proxy to share, or None.
        output_quant: quantizer of the output: a class, a proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs ``output_quant``.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        ValueError: a bias quantizer that takes the scale of the input.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = None,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.LayerNorm.__init__(
            self, normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype
        )
        self._init_norm(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        shape = list(self.normalized_shape)
        return F.layer_norm(dequantize(x), shape, dequantize(weight), dequantize(bias), self.eps)


class QuantRMSNorm(_QuantNorm, nn.RMSNorm):
    """``torch.nn.RMSNorm`` with quantized weight, input and output.

    Args:
        normalized_shape, eps, elementwise_affine: as in torch.
        weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
        input_quant: quantizer of the input: a class, a proxy to share, or None.
        output_quant: quantizer of the output: a class, a proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs ``output_quant``.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.RMSNorm.__init__(
            self, normalized_shape, eps, elementwise_affine, device=device, dtype=dtype
        )
        self.register_parameter("bias", None)
        self._init_norm(weight_quant, None, input_quant, output_quant, return_quant_tensor, kwargs)

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        return F.rms_norm(dequantize(x), list(self.normalized_shape), dequantize(weight), self.eps)


class QuantGroupNorm(_QuantNorm, nn.GroupNorm):
    """``torch.nn.GroupNorm`` with quantized weight, bias, input and output.

    Args:
        num_groups, num_channels, eps, affine: as in torch.
        weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
        bias_quant: quantizer of the bias (a class, another layer's proxy to share, or None), with a scale of its own.
        input_quant: quantizer of the input: a class, a proxy to share, or None.
        output_quant: quantizer of the output: a class, a proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs ``output_quant``.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        ValueError: a bias quantizer that takes the scale of the input.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = None,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.GroupNorm.__init__(
            self, num_groups, num_channels, eps, affine, device=device, dtype=dtype
        )
        self._init_norm(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        return F.group_norm(
            dequantize(x), self.num_groups, dequantize(weight), dequantize(bias), self.eps
        )
