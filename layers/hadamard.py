"""A classifier whose weights are a fixed matrix of 1 and -1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.constants import StatelessBuffer
from qframework.functional import linear
from qframework.layers.base import QuantLayer
from qframework.quant_tensor import IntQuantTensor, TensorLike, dequantize


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's Hadamard matrix: entries 1 and -1, orthogonal rows.

    Args:
        size: a power of two.
    """
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)]
        )
    return matrix


class HadamardClassifier(QuantLayer):
    """A last layer without weights to learn: ``-scale * H x / ||x||`` (https://arxiv.org/abs/1801.04540).

    ``H`` is the corner of a Hadamard matrix, ``||x||`` the Frobenius norm of the whole input, its batch included, so
    that the logits of a sample are known up to a positive factor. State-dict key: ``scale``.

    Args:
        in_channels: size of the last axis of the input.
        out_channels: number of classes.
        fixed_scale: keep the scale as it starts, ``1 / sqrt(out_channels)``, rather than learn it.
        return_quant_tensor: return an ``IntQuantTensor`` rather than a tensor; needs a quantized input.
        device: of the scale and the matrix.
        dtype: of the scale.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        fixed_scale: bool = False,
        return_quant_tensor: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.fixed_scale, self.return_quant_tensor = fixed_scale, return_quant_tensor
        size = 1 << (max(in_channels, out_channels) - 1).bit_length()
        corner = hadamard_matrix(size)[:out_channels, :in_channels]
        self.matrix = StatelessBuffer(corner, device=device or torch.empty(0).device)
        start = torch.full((), out_channels**-0.5, device=device, dtype=dtype)
        if fixed_scale:
            self.register_buffer("scale", start)
        else:
            self.scale = nn.Parameter(start)

    @property
    def proj(self) -> Tensor:
        """``H``, ``(out_channels, in_channels)``."""
        return self.matrix()  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Settings."""
        text = f"{self.in_channels}, {self.out_channels}, fixed_scale={self.fixed_scale}"
        return f"{text}, return_quant_tensor=True" if self.return_quant_tensor else text

    def forward(self, input: TensorLike) -> Any:
        """Logits of ``input``.

        Args:
            input: float or quantized tensor, ``(..., in_channels)``.

        Returns:
            ``(..., out_channels)``; with ``return_quant_tensor`` quantized, on the scale of the input times
            ``scale / ||x||``.

        Raises:
            RuntimeError: a quantized result of an input that isn't quantized, or has a zero point or several scales.
        """
        value = dequantize(input)
        matrix = -self.proj.to(value.dtype)
        norm = torch.linalg.vector_norm(value)
        factor = self.scale / norm.clamp_min(torch.finfo(value.dtype).tiny)
        if not self.return_quant_tensor or not isinstance(input, IntQuantTensor):
            return self._pack(linear(value, matrix, None) * factor.to(value.dtype))
        one = torch.ones((), dtype=input.scale.dtype, device=value.device)
        zero = torch.zeros_like(one)
        weight = IntQuantTensor.unchecked(
            matrix, one, zero, one, True, self.training, symmetric=True, has_zero=False
        )
        product: Any = linear(input, weight, None)
        if isinstance(product, IntQuantTensor):
            product = product.set(
                value=product.value * factor.to(value.dtype), scale=product.scale * factor
            )
        return self._pack(product)

    def _remedy(self) -> str:
        return (
            "Feed the layer a quantized tensor with one scale and without a zero point (return_quant_tensor=True on "
            "the layer before), or return_quant_tensor=False."
        )
