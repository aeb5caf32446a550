"""Upsampling and dropout of quantized tensors."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from qframework.functional import round_ste, tensor_clamp, tensor_clamp_ste
from qframework.layers.base import QuantLayer
from qframework.quant_tensor import IntQuantTensor, TensorLike, dequantize
from qframework.quant_tensor.algebra import bounds
from qframework.quant_tensor.rules_pool import per_position

_Size = int | tuple[int, int] | None
_Factor = float | tuple[float, float] | None


class QuantUpsample(QuantLayer, nn.Upsample):
    """``torch.nn.Upsample`` of quantized tensors; interpolated values are rounded to the grid of the input.

    Bicubic interpolation overshoots; what is beyond the integers of the input saturates.

    Args:
        size, scale_factor, mode, align_corners: as in torch.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs a quantized input.
    """

    def __init__(
        self,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        return_quant_tensor: bool = True,
    ) -> None:
        nn.Upsample.__init__(self, size, scale_factor, mode, align_corners)
        self.return_quant_tensor = return_quant_tensor

    def forward(self, input: TensorLike) -> Any:
        """Interpolate ``input``, float or quantized.

        Raises:
            RuntimeError: a quantized result of a float input, or of scales that differ between positions.
        """
        exact = self.mode in ("nearest", "nearest-exact")
        given: Any = input if exact and isinstance(input, IntQuantTensor) else dequantize(input)
        y: Any = F.interpolate(given, self.size, self.scale_factor, self.mode, self.align_corners)
        if not exact and isinstance(input, IntQuantTensor):
            if not per_position(input, input.dim() - 2):
                q = round_ste(y / input.scale + input.zero_point)
                # others stay within, but for what a short dtype rounds beyond an end
                clamp = tensor_clamp if self.mode == "bicubic" else tensor_clamp_ste
                q = clamp(q, *(b.to(q.dtype) for b in bounds(input)))
                y = input.replace(value=(q - input.zero_point) * input.scale)
        return self._pack(y)

    def _remedy(self) -> str:
        return "Feed the layer a tensor quantized by one scale (for each channel), or return_quant_tensor=False."


class QuantUpsamplingBilinear2d(QuantUpsample):
    """Bilinear upsampling of quantized tensors (N, C, H, W), corners aligned, rounded to the grid of the input.

    Args:
        size, scale_factor: as in torch.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs a quantized input.
    """

    def __init__(
        self, size: _Size = None, scale_factor: _Factor = None, return_quant_tensor: bool = True
    ) -> None:
        super().__init__(size, scale_factor, "bilinear", True, return_quant_tensor)


class QuantUpsamplingNearest2d(QuantUpsample):
    """Nearest upsampling of quantized tensors (N, C, H, W).

    Args:
        size, scale_factor: as in torch.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs a quantized input.
    """

    def __init__(
        self, size: _Size = None, scale_factor: _Factor = None, return_quant_tensor: bool = True
    ) -> None:
        super().__init__(size, scale_factor, "nearest", None, return_quant_tensor)


class QuantDropout(QuantLayer, nn.Dropout):
    """Dropout of quantized tensors: zeros are on their grid, and the factor ``1 / (1 - p)`` goes to the scale.

    Args:
        p: probability of a zero, in training.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs a quantized input.
    """

    def __init__(self, p: float = 0.5, return_quant_tensor: bool = True) -> None:
        nn.Dropout.__init__(self, p)
        self.return_quant_tensor = return_quant_tensor

    def forward(self, input: TensorLike) -> Any:
        """Drop elements of ``input``, float or quantized, in training.

        Raises:
            RuntimeError: a quantized result of a float input, or of a grid without 0.
        """
        if not isinstance(input, IntQuantTensor):
            return self._pack(F.dropout(dequantize(input), self.p, self.training))
        if not self.training or self.p == 0:
            return self._pack(input)
        value = F.dropout(input.value, self.p, True)
        if not input.has_zero or self.p == 1:
            return self._pack(value)
        return self._pack(input.replace(value=value, scale=input.scale / (1 - self.p), source=None))

    def _remedy(self) -> str:
        return "Feed the layer a quantized tensor whose grid has 0, or return_quant_tensor=False."
