"""Transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Unpack

import torch
from torch import Tensor, nn

from qframework.functional import transposed_convolution
from qframework.layers.conv import Size
from qframework.layers.keywords import WeightLayerKeywords
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.proxy import Quantizer
from qframework.quant_tensor import TensorLike
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat


class _QuantConvTranspose(QuantWeightBiasInputOutputLayer, Generic[Size]):
    """What transposed convolutions of all dimensions share.

    The weight has shape ``(in, out / groups, *kernel)``. A scale per channel is one for each of ``out / groups``
    positions, the same in all groups.
    """

    float_layer: ClassVar[type[nn.Module]]
    output_channel_dim = 1
    stride: tuple[int, ...]
    padding: Any
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_channels: int
    out_channels: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size,
        stride: int | Size = 1,  # type: ignore[assignment]
        padding: int | Size = 0,  # type: ignore[assignment]
        output_padding: int | Size = 0,  # type: ignore[assignment]
        groups: int = 1,
        bias: bool | None = True,
        dilation: int | Size = 1,  # type: ignore[assignment]
        padding_mode: str = "zeros",
        weight_quant: Quantizer = Int8WeightPerTensorFloat,
        bias_quant: Quantizer = None,
        input_quant: Quantizer = None,
        output_quant: Quantizer = None,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Unpack[WeightLayerKeywords],
    ) -> None:
        """Build the torch layer and its quantizers.

        Args:
            in_channels: of the input.
            out_channels: of the output.
            kernel_size: elements of a window, one number or one for each spatial axis.
            stride: steps between windows of the output, in elements.
            padding: elements that are left out on both sides of the output.
            output_padding: elements that are added on one side of the output.
            groups: of channels that see each other alone.
            bias: add a learned number for each output channel.
            dilation: steps between the elements of a window.
            padding_mode: ``'zeros'``.
            weight_quant: quantizer of the weight: a class, another layer's proxy to share, or None.
            bias_quant: quantizer of the bias, of the same kinds.
            input_quant: quantizer of the input, of the same kinds.
            output_quant: quantizer of the output, of the same kinds.
            return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor.
            device: of parameters and quantizers.
            dtype: of the parameters.
            **kwargs: names to bind anew in a quantizer, prefixed ``weight_``, ``bias_``, ``input_``, ``output_``.

        Raises:
            QuantizerError: a quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
        """
        options: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "groups": groups,
            "bias": bool(bias),
            "dilation": dilation,
            "padding_mode": padding_mode,
            "device": device,
            "dtype": dtype,
        }
        self.float_layer.__init__(self, **options)
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )

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

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        spatial = len(self.kernel_size)
        output_size = how[0] if how else None
        output_padding = self._output_padding(  # type: ignore[operator]
            x, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
        )
        return transposed_convolution(
            x, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )

    def forward(self, input: TensorLike, output_size: Sequence[int] | None = None) -> Any:  # type: ignore[override]
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


class QuantConvTranspose1d(_QuantConvTranspose[tuple[int]], nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with quantized weight, bias, input and output."""

    float_layer = nn.ConvTranspose1d


class QuantConvTranspose2d(_QuantConvTranspose[tuple[int, int]], nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with quantized weight, bias, input and output."""

    float_layer = nn.ConvTranspose2d


class QuantConvTranspose3d(_QuantConvTranspose[tuple[int, int, int]], nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with quantized weight, bias, input and output."""

    float_layer = nn.ConvTranspose3d
