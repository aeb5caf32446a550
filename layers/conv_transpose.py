"""Transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qframework.functional import transposed_convolution
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat


class _QuantConvTranspose(QuantWeightBiasInputOutputLayer):
    """What transposed convolutions of all dimensions share.

    The weight has shape ``(in, out / groups, *kernel)``. A scale per channel is one for each of ``out / groups``
    positions, the same in all groups.
    """

    output_channel_dim = 1
    stride: tuple[int, ...]
    padding: Any
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_channels: int
    out_channels: int

    @property
    def channelwise_separable(self) -> bool:
        """Whether each output channel depends on one input channel alone."""
        return self.groups == self.in_channels

    def _output_channels(self) -> int:
        return self.out_channels

    def _beside_weight(self, channels: Tensor) -> Tensor:
        weight = self.weight
        each = channels.reshape(self.groups, -1).repeat_interleave(
            weight.shape[0] // self.groups, dim=0
        )
        return each.reshape(*each.shape, *[1] * (weight.dim() - 2))

    def _compute(self, x: Any, weight: Any, bias: Any, *how: Any) -> Any:
        spatial = len(self.kernel_size)
        output_size = how[0] if how else None
        output_padding = self._output_padding(  # type: ignore[operator]
            x, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return transposed_convolution(
            x, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )

    def forward(self, input: Any, output_size: Sequence[int] | None = None) -> Any:
        """Apply the layer.

        Args:
            input: float or quantized tensor, in the shape that the torch layer takes.
            output_size: spatial size of the result, where the stride leaves a choice.

        Returns:
            A tensor, or with ``return_quant_tensor`` a quantized tensor.

        Raises:
            RuntimeError: as for the other layers with weights.
            ValueError: an output size that the stride doesn't reach.
        """
        return super().forward(input, output_size)


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with quantized weight, bias, input and output.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode:
            as in torch.
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
        padding: int | tuple[int] = 0,
        output_padding: int | tuple[int] = 0,
        groups: int = 1,
        bias: bool | None = True,
        dilation: int | tuple[int] = 1,
        padding_mode: str = "zeros",
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = None,
        input_quant: Any = None,
        output_quant: Any = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.ConvTranspose1d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            output_padding,  # type: ignore[arg-type]
            groups,
            bool(bias),
            dilation,  # type: ignore[arg-type]
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with quantized weight, bias, input and output.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode:
            as in torch.
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
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool | None = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = None,
        input_quant: Any = None,
        output_quant: Any = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.ConvTranspose2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            output_padding,  # type: ignore[arg-type]
            groups,
            bool(bias),
            dilation,  # type: ignore[arg-type]
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with quantized weight, bias, input and output.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode:
            as in torch.
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
        padding: int | tuple[int, int, int] = 0,
        output_padding: int | tuple[int, int, int] = 0,
        groups: int = 1,
        bias: bool | None = True,
        dilation: int | tuple[int, int, int] = 1,
        padding_mode: str = "zeros",
        weight_quant: Any = Int8WeightPerTensorFloat,
        bias_quant: Any = None,
        input_quant: Any = None,
        output_quant: Any = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.ConvTranspose3d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            output_padding,  # type: ignore[arg-type]
            groups,
            bool(bias),
            dilation,  # type: ignore[arg-type]
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )
