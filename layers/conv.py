"""Convolutions."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Generic, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.functional import convolution
from qframework.layers.keywords import WeightLayerKeywords
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.proxy import Quantizer
from qframework.quant_tensor import TensorLike
from qframework.quantizers.scaled_int import Int8WeightPerTensorFloat

#: A number for each spatial axis.
Size = TypeVar("Size", bound=tuple[int, ...])


class _QuantConv(QuantWeightBiasInputOutputLayer, Generic[Size]):
    """What convolutions of all dimensions share; ``padding='same'`` with a stride is emulated.

    Then the output has ``ceil(size / stride)`` elements along each axis, and an odd element of padding goes to the
    end, as in TensorFlow.
    """

    float_layer: ClassVar[type[nn.Module]]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: Any
    in_channels: int
    is_same_padded_strided: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size,
        stride: int | Size = 1,  # type: ignore[assignment]
        padding: int | Size | str = 0,  # type: ignore[assignment]
        dilation: int | Size = 1,  # type: ignore[assignment]
        groups: int = 1,
        padding_mode: str = "zeros",
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
        """Build the torch layer and its quantizers.

        Args:
            in_channels: of the input.
            out_channels: of the output.
            kernel_size: elements of a window, one number or one for each spatial axis.
            stride: steps between windows, in elements.
            padding: elements on both sides, ``'valid'`` or ``'same'``; ``'same'`` also with a stride.
            dilation: steps between the elements of a window.
            groups: of channels that see each other alone.
            padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
            bias: add a learned number for each output channel.
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
        steps = (stride,) if isinstance(stride, int) else stride
        zeros = padding_mode == "zeros"
        # Torch refuses it.
        strided_same = padding == "same" and zeros and any(s > 1 for s in steps)
        options: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": 0 if strided_same else padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "bias": bool(bias),
            "device": device,
            "dtype": dtype,
        }
        self.float_layer.__init__(self, **options)
        self.is_same_padded_strided = strided_same
        self._init_quant(
            weight_quant, bias_quant, input_quant, output_quant, return_quant_tensor, kwargs
        )

    @property
    def channelwise_separable(self) -> bool:
        """Whether each output channel depends on one input channel alone."""
        return self.groups == self.in_channels

    @property
    def per_elem_ops(self) -> int:
        """Multiplications and additions for an element of the output."""
        return 2 * math.prod(self.kernel_size) * (self.in_channels // self.groups)

    def _same_padding(self, x: Any) -> Tensor:
        pads: list[int] = []
        spatial = x.shape[-len(self.kernel_size) :]
        for size, k, s, d in zip(
            spatial, self.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.pad(x, pads)

    def _compute(
        self, x: TensorLike, weight: TensorLike, bias: TensorLike | None, *how: object
    ) -> Any:
        if self.is_same_padded_strided:
            x = self._same_padding(x)
        if self.padding_mode != "zeros":  # type: ignore[attr-defined]
            return self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return convolution(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantConv1d(_QuantConv[tuple[int]], nn.Conv1d):
    """``torch.nn.Conv1d`` with quantized weight, bias, input and output."""

    float_layer = nn.Conv1d


class QuantConv2d(_QuantConv[tuple[int, int]], nn.Conv2d):
    """``torch.nn.Conv2d`` with quantized weight, bias, input and output."""

    float_layer = nn.Conv2d


class QuantConv3d(_QuantConv[tuple[int, int, int]], nn.Conv3d):
    """``torch.nn.Conv3d`` with quantized weight, bias, input and output."""

    float_layer = nn.Conv3d
