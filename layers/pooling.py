"""Average pooling whose wider result is truncated to a bit width.

Max pooling needs no layer: ``torch.nn.MaxPool2d`` keeps quantized tensors.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from qframework.layers.accumulator import QuantTruncLayer
from qframework.proxy import Quantizer
from qframework.quant_tensor import IntQuantTensor, TensorLike, dequantize
from qframework.quant_tensor.rules_pool import averaged, per_position, window_sizes
from qframework.quantizers.trunc import RoundTo8bit


class _TruncPool(QuantTruncLayer):
    def _truncated(self, x: Any, value: Any, area: int) -> Any:
        """The truncated means of windows of ``x``."""
        if not isinstance(x, IntQuantTensor):
            return self._pack(value)
        if not isinstance(value, IntQuantTensor):
            # Windows that overlap the border have another divisor; they are rounded to the grid of whole ones.
            if per_position(x, 2):
                return self._pack(value)
            value = averaged(x, value, area, area)
        return self._pack(self.trunc_quant(value))

    def _remedy(self) -> str:
        return "Feed the layer a quantized tensor (return_quant_tensor=True on the layer before), or return_quant_tensor=False."


class TruncAvgPool2d(_TruncPool, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` of quantized tensors: the sum of integers on ``scale / area``, truncated.

    A float input is pooled and stays a float tensor.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in torch.
        trunc_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs a quantized input.
        **kwargs: names to bind anew in ``trunc_quant`` (with or without the prefix ``trunc_``).

    Raises:
        QuantizerError: the quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        trunc_quant: Quantizer = RoundTo8bit,
        return_quant_tensor: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.AvgPool2d.__init__(
            self, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
        self._init_trunc(trunc_quant, return_quant_tensor, kwargs)

    def forward(self, input: TensorLike) -> Any:
        """Pool ``input``, float or quantized, (N, C, H, W) or (C, H, W).

        Raises:
            RuntimeError: a quantized result of a float input.
        """
        height, width = window_sizes(self.kernel_size, 2)
        given: Any = input if isinstance(input, IntQuantTensor) else dequantize(input)
        pooled = F.avg_pool2d(
            given,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
        return self._truncated(input, pooled, self.divisor_override or height * width)


class TruncAdaptiveAvgPool2d(_TruncPool, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` of quantized tensors, truncated; see :class:`TruncAvgPool2d`.

    Args:
        output_size: as in torch.
        trunc_quant: quantizer of the result: a class, another layer's proxy to share, or None.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs a quantized input.
        **kwargs: names to bind anew in ``trunc_quant`` (with or without the prefix ``trunc_``).

    Raises:
        QuantizerError: the quantizer can't be built, or a keyword is unknown; a TypeError or ValueError too.
    """

    def __init__(
        self,
        output_size: int | tuple[int | None, int | None],
        trunc_quant: Quantizer = RoundTo8bit,
        return_quant_tensor: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.AdaptiveAvgPool2d.__init__(self, output_size)
        self._init_trunc(trunc_quant, return_quant_tensor, kwargs)

    @staticmethod
    def compute_kernel_size_stride(
        input_shape: tuple[int, int], output_shape: tuple[int, int]
    ) -> tuple[list[int], list[int]]:
        """Kernel size and stride of the pooling that gives ``output_shape``: ``s = in // out``, ``k = in - (out - 1) s``."""
        strides = [n // m for n, m in zip(input_shape, output_shape, strict=True)]
        sizes = [
            n - (m - 1) * s for n, m, s in zip(input_shape, output_shape, strides, strict=True)
        ]
        return sizes, strides

    def forward(self, input: TensorLike) -> Any:
        """Pool ``input``, float or quantized, (N, C, H, W) or (C, H, W).

        Raises:
            RuntimeError: a quantized result of a float input.
        """
        given: Any = input if isinstance(input, IntQuantTensor) else dequantize(input)
        pooled = F.adaptive_avg_pool2d(given, self.output_size)  # type: ignore[arg-type]
        before, after = tuple(input.shape[-2:]), tuple(pooled.shape[-2:])
        sizes, _ = self.compute_kernel_size_stride(before, after)  # type: ignore[arg-type]
        return self._truncated(input, pooled, sizes[0] * sizes[1])
