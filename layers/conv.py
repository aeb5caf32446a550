"""Convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qframework.functional import convolution
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat


class _QuantConv(QuantWeightBiasInputOutputLayer):
    """What convolutions of all dimensions share; ``padding='same'`` with a stride is emulated.

    Then the output has ``ceil(size / stride)`` elements along each axis, and an odd element of padding goes to the
    end, as in TensorFlow.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: Any
    in_channels: int
    is_same_padded_strided: bool

    def _init_conv(self, conv: type[nn.Module], padding: Any, options: dict[str, Any]) -> None:
        """Construct the torch layer, with the strided 'same' padding that it refuses done here."""
        stride = options["stride"]
        strides = (stride,) if isinstance(stride, int) else tuple(stride)
        strided_same = (
            padding == "same" and options["padding_mode"] == "zeros" and any(s > 1 for s in strides)
        )
        options["bias"] = bool(options["bias"])
        conv.__init__(self, padding=0 if strided_same else padding, **options)
        self.is_same_padded_strided = strided_same

    @property
    def channelwise_separable(self) -> bool:
        """Whether each output channel depends on one input channel alone."""
        return self.groups == self.in_channels

    def _same_padding(self, x: Any) -> Any:
        pads: list[int] = []
        spatial = x.shape[-len(self.kernel_size) :]
        for size, k, s, d in zip(
            spatial, self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.pad(x, pads)

    def _compute(self, x: Any, weight: Any, bias: Any, *how: Any) -> Any:
        if self.is_same_padded_strided:
            x = self._same_padding(x)
        if self.padding_mode != "zeros":  # type: ignore[has-type]
            return self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``torch.nn.Conv1d`` with quantized weight, bias, input and output.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, bias: as in torch;
            ``padding='same'`` also with a stride.
        weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
        bias_quant: quantizer of the bias, likewise.
        input_quant: quantizer of the input, likewise.
        output_quant: quantizer of the output, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] | str = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool | None = True,
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = None,
        input_quant: Any = None,
        output_quant: Any = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        options = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }
        self._init_conv(nn.Conv1d, padding, options)
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``torch.nn.Conv2d`` with quantized weight, bias, input and output.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, bias: as in torch;
            ``padding='same'`` also with a stride.
        weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
        bias_quant: quantizer of the bias, likewise.
        input_quant: quantizer of the input, likewise.
        output_quant: quantizer of the output, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool | None = True,
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = None,
        input_quant: Any = None,
        output_quant: Any = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        options = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }
        self._init_conv(nn.Conv2d, padding, options)
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )


class QuantConv3d(_QuantConv, nn.Conv3d):
    """``torch.nn.Conv3d`` with quantized weight, bias, input and output.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, bias: as in torch;
            ``padding='same'`` also with a stride.
        weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
        bias_quant: quantizer of the bias, likewise.
        input_quant: quantizer of the input, likewise.
        output_quant: quantizer of the output, likewise.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
        device: of parameters and quantizers.
        dtype: of the parameters.
        **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

    Raises:
        QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | str = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool | None = True,
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = None,
        input_quant: Any = None,
        output_quant: Any = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        options = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }
        self._init_conv(nn.Conv3d, padding, options)
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )
