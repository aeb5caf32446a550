"""Torch's activation functions with a quantized result; each is the torch layer too, its parameters and settings included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import nn

from qframework.inject import PolicyTypeError
from qframework.layers.activation import DEFAULT, Default, QuantActLayer
from qframework.layers.keywords import ActLayerKeywords
from qframework.proxy import Quantizer
from qframework.quant_tensor import TensorLike, dequantize
from qframework.quantizers.scaled_int import Uint8ActPerTensorFloat


class _QuantFunction(QuantActLayer):
    """Mixin in front of a torch activation: quantize the input, apply, quantize the result."""

    def _init_act(
        self,
        act_quant: Quantizer | Default,
        input_quant: Quantizer,
        return_quant_tensor: bool,
        keywords: Mapping[str, object],
    ) -> None:
        super()._init_act(act_quant, input_quant, return_quant_tensor, keywords)
        theirs = self.act_quant.activation_impl
        if theirs is not None:
            raise PolicyTypeError(
                f"{type(self).__name__}.act_quant: the quantizer to share applies {type(theirs).__name__} first; share "
                "that of a QuantIdentity"
            )

    def forward(self, input: TensorLike) -> Any:
        """Apply and quantize.

        Args:
            input: float or quantized tensor of any shape.

        Returns:
            A tensor, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: a quantized result is asked for and the quantizer is off.
        """
        if not self.input_quant.is_idle:
            input = self.input_quant(input)
        return self._pack(self.act_quant(super().forward(dequantize(input))))  # type: ignore[misc]


class QuantReLU6(_QuantFunction, nn.ReLU6):
    """``min(max(x, 0), 6)``, quantized."""

    default_act_quant = Uint8ActPerTensorFloat


class QuantSiLU(_QuantFunction, nn.SiLU):
    """``x / (1 + exp(-x))``, quantized."""


class QuantHardSigmoid(_QuantFunction, nn.Hardsigmoid):
    """``clamp(x / 6 + 1 / 2, 0, 1)``, quantized."""

    default_act_quant = Uint8ActPerTensorFloat


class QuantLeakyReLU(_QuantFunction, nn.LeakyReLU):
    """``max(x, 0) + negative_slope * min(x, 0)``, quantized."""

    def __init__(
        self,
        negative_slope: float = 1e-2,
        act_quant: Quantizer | Default = DEFAULT,
        input_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        **kwargs: Unpack[ActLayerKeywords],
    ) -> None:
        nn.LeakyReLU.__init__(self, negative_slope)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantPReLU(_QuantFunction, nn.PReLU):
    """``max(x, 0) + weight * min(x, 0)`` with a learned slope, quantized."""

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        act_quant: Quantizer | Default = DEFAULT,
        input_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Unpack[ActLayerKeywords],
    ) -> None:
        nn.PReLU.__init__(self, num_parameters, init, device, dtype)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantELU(_QuantFunction, nn.ELU):
    """``max(x, 0) + alpha * (exp(min(x, 0)) - 1)``, quantized."""

    def __init__(
        self,
        alpha: float = 1.0,
        act_quant: Quantizer | Default = DEFAULT,
        input_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        **kwargs: Unpack[ActLayerKeywords],
    ) -> None:
        nn.ELU.__init__(self, alpha)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantGELU(_QuantFunction, nn.GELU):
    """``x * Phi(x)``, or its tanh form with ``approximate='tanh'``, quantized."""

    def __init__(
        self,
        approximate: str = "none",
        act_quant: Quantizer | Default = DEFAULT,
        input_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        **kwargs: Unpack[ActLayerKeywords],
    ) -> None:
        nn.GELU.__init__(self, approximate)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantSoftmax(_QuantFunction, nn.Softmax):
    """``exp(x) / sum(exp(x))`` along the axis ``dim``, quantized."""

    default_act_quant = Uint8ActPerTensorFloat

    def __init__(
        self,
        dim: int | None = None,
        act_quant: Quantizer | Default = DEFAULT,
        input_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        **kwargs: Unpack[ActLayerKeywords],
    ) -> None:
        nn.Softmax.__init__(self, dim)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)
