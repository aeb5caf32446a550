"""A factor and a summand for each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.layers.batch_norm import mul_add_from_bn
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.proxy import Quantizer
from qframework.quant_tensor import TensorLike
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat


class ScaleBias(nn.Module):
    """``x * weight + bias`` for each channel.

    Args:
        num_features: number of channels.
        bias: whether there is a summand.
        runtime_shape: of weight and bias beside the input, -1 for the channels.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_features: int,
        bias: bool,
        runtime_shape: tuple[int, ...] = (1, -1, 1, 1),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.runtime_shape = num_features, tuple(runtime_shape)
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        start = torch.zeros(num_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(start) if bias else None)

    def extra_repr(self) -> str:
        """Settings."""
        return f"{self.num_features}, bias={self.bias is not None}"

    def _shape(self, x: TensorLike) -> tuple[int, ...]:
        """Of weight and bias beside ``x``."""
        return self.runtime_shape

    def _apply_to(self, x: Any, weight: TensorLike, bias: TensorLike | None) -> Any:
        shape = self._shape(x)
        y = x * weight.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    def forward(self, input: Tensor) -> Any:
        """Apply to ``input``, which ``runtime_shape`` broadcasts to."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return self._apply_to(input, self.weight, bias)


class QuantScaleBias(QuantWeightBiasInputOutputLayer, ScaleBias):
    """:class:`ScaleBias` with quantized weight, bias, input and output.

    Args:
        num_features: number of channels.
        bias: whether there is a summand.
        weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
        bias_quant: quantizer of the bias: a class, a proxy to share, or None.
        input_quant: quantizer of the input: a class, a proxy to share, or None.
        output_quant: quantizer of the output: a class, a proxy to share, or None.
        runtime_shape: of weight and bias beside the input, -1 for the channels.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        num_features: int,
        bias: bool,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = None,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        runtime_shape: tuple[int, ...] = (1, -1, 1, 1),
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        ScaleBias.__init__(self, num_features, bias, runtime_shape, device, dtype)
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        return self._apply_to(x, weight, bias)


class _BatchNormToQuantScaleBias(QuantScaleBias):
    """A batch norm in evaluation as a quantized factor and summand; loads the state dict of one."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = None,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features,
            True,
            weight_quant,
            bias_quant,
            input_quant,
            output_quant,
            (1, -1),
            return_quant_tensor,
            device,
            dtype,
            **kwargs,
        )
        self.eps = eps

    def _shape(self, x: TensorLike) -> tuple[int, ...]:
        return (1, -1, *[1] * (x.dim() - 2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mean, var = (state_dict.pop(prefix + n, None) for n in ("running_mean", "running_var"))
        state_dict.pop(prefix + "num_batches_tracked", None)
        if mean is not None and var is not None:
            gamma, beta = (state_dict.get(prefix + n) for n in ("weight", "bias"))
            factor, shift = mul_add_from_bn(mean, var, self.eps, gamma, beta)
            state_dict[prefix + "weight"], state_dict[prefix + "bias"] = factor, shift
        super()._load_from_state_dict(state_dict, prefix, *args)


class BatchNorm1dToQuantScaleBias(_BatchNormToQuantScaleBias):
    """A batch norm of (N, C) or (N, C, L) as a quantized factor and summand; loads its state dict, strictly too.

    Args:
        num_features: number of channels.
        eps: of the batch norm.
        weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, device, dtype, kwargs: see
            :class:`QuantScaleBias`.
    """


class BatchNorm2dToQuantScaleBias(_BatchNormToQuantScaleBias):
    """A batch norm of (N, C, H, W) as a quantized factor and summand; see :class:`BatchNorm1dToQuantScaleBias`."""


class BatchNorm3dToQuantScaleBias(_BatchNormToQuantScaleBias):
    """A batch norm of (N, C, D, H, W) as a quantized factor and summand; see :class:`BatchNorm1dToQuantScaleBias`."""
