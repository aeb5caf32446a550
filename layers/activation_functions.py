"""Torch's activation functions with a quantized result; each is the torch layer too, its parameters and settings included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qframework.inject import PolicyTypeError
from qframework.layers.activation import build_act_proxies
from qframework.layers.base import QuantLayer
from qframework.proxy import ActQuantProxyFromInjector
from qframework.quant_tensor import dequantize
from qframework.quantizers.scaled_int import Int8ActPerTensorFloat, Uint8ActPerTensorFloat


class _QuantFunction(QuantLayer):
    """Mixin in front of a torch activation: quantize the input, apply, quantize the result."""

    act_quant: ActQuantProxyFromInjector
    input_quant: ActQuantProxyFromInjector

    def _init_act(
        self, act_quant: Any, input_quant: Any, return_quant_tensor: bool, keywords: dict[str, Any]
    ) -> None:
        """The last step of a constructor."""
        self.return_quant_tensor = return_quant_tensor
        self.input_quant, self.act_quant = build_act_proxies(self, act_quant, input_quant, keywords)
        theirs = self.act_quant.activation_impl
        if theirs is not None:
            raise PolicyTypeError(
                f"{type(self).__name__}.act_quant: the quantizer to share applies {type(theirs).__name__} first; share "
                "that of a QuantIdentity"
            )

    def forward(self, input: Any) -> Any:
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

    def _remedy(self) -> str:
        return "Give act_quant=Int8ActPerTensorFloat, or return_quant_tensor=False."


class QuantReLU6(_QuantFunction, nn.ReLU6):
    """``min(max(x, 0), 6)``, quantized.

    Args:
        act_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        input_quant: quantizer of the input, likewise.
        return_quant_tensor: return a quantized tensor rather than a tensor.
        **kwargs: names to bind anew in ``act_quant`` (with or without the prefix ``act_``), or in ``input_quant``
            (prefix ``input_``).

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        act_quant: Any = Uint8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.ReLU6.__init__(self)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantLeakyReLU(_QuantFunction, nn.LeakyReLU):
    """``max(x, 0) + negative_slope * min(x, 0)``, quantized; other arguments as for :class:`QuantReLU6`."""

    def __init__(
        self,
        negative_slope: float = 1e-2,
        act_quant: Any = Int8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.LeakyReLU.__init__(self, negative_slope)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantPReLU(_QuantFunction, nn.PReLU):
    """``max(x, 0) + weight * min(x, 0)`` with a learned slope, quantized; other arguments as for :class:`QuantReLU6`."""

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        act_quant: Any = Int8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.PReLU.__init__(self, num_parameters, init, device, dtype)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantELU(_QuantFunction, nn.ELU):
    """``max(x, 0) + alpha * (exp(min(x, 0)) - 1)``, quantized; other arguments as for :class:`QuantReLU6`."""

    def __init__(
        self,
        alpha: float = 1.0,
        act_quant: Any = Int8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.ELU.__init__(self, alpha)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantGELU(_QuantFunction, nn.GELU):
    """``x * Phi(x)``, or its tanh form with ``approximate='tanh'``, quantized; others as for :class:`QuantReLU6`."""

    def __init__(
        self,
        approximate: str = "none",
        act_quant: Any = Int8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.GELU.__init__(self, approximate)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantSiLU(_QuantFunction, nn.SiLU):
    """``x / (1 + exp(-x))``, quantized; arguments as for :class:`QuantReLU6`."""

    def __init__(
        self,
        act_quant: Any = Int8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.SiLU.__init__(self)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantHardSigmoid(_QuantFunction, nn.Hardsigmoid):
    """``clamp(x / 6 + 1 / 2, 0, 1)``, quantized; arguments as for :class:`QuantReLU6`."""

    def __init__(
        self,
        act_quant: Any = Uint8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Hardsigmoid.__init__(self)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)


class QuantSoftmax(_QuantFunction, nn.Softmax):
    """``exp(x) / sum(exp(x))`` along ``dim``, quantized; other arguments as for :class:`QuantReLU6`."""

    def __init__(
        self,
        dim: int | None = None,
        act_quant: Any = Uint8ActPerTensorFloat,
        input_quant: Any = None,
        return_quant_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Softmax.__init__(self, dim)
        self._init_act(act_quant, input_quant, return_quant_tensor, kwargs)
