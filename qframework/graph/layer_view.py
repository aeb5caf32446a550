"""The weight of a layer as a matrix, and its input as the vectors that the matrix is multiplied with.

Column-by-column algorithms, equalization and corrections all see linear layers and convolutions of every kind like this:
groups of matrices ``(groups, columns, rows)``, a column for each element of the window of an input channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.layers.linear import TransposedLinear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (nn.Linear, TransposedLinear)
WEIGHTED = (*LINEAR, *CONVOLUTIONS, *TRANSPOSED)


class LayerView:
    """A linear layer or a convolution, float or quantized.

    Args:
        layer: of torch, or a quantized one.

    Raises:
        TypeError: another kind of layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        if not isinstance(layer, WEIGHTED):
            raise TypeError(
                f"{type(layer).__name__} is neither a linear layer nor a convolution; allowed: "
                f"{', '.join(k.__name__ for k in WEIGHTED)} and their quantized forms"
            )
        self.layer: Any = layer
        self.is_linear = isinstance(layer, LINEAR)
        self.is_transposed_linear = isinstance(layer, TransposedLinear)
        self.is_transposed = isinstance(layer, TRANSPOSED)
        self.groups = 1 if self.is_linear else int(getattr(layer, "groups", 1))

    @property
    def output_axis(self) -> int:
        """The axis of the weight along which output channels lie, those of a group in a grouped transposed convolution."""
        return 1 if self.is_transposed or self.is_transposed_linear else 0

    def channel_axis(self, output: Tensor) -> int:
        """The axis of the layer's output along which its channels lie."""
        return output.dim() - (1 if self.is_linear else 1 + len(self.layer.kernel_size))

    # ------------------------------------------------------------ weights

    def to_matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``(groups, columns, rows)``."""
        g = self.groups
        if self.is_linear:
            return (weight if self.is_transposed_linear else weight.t()).unsqueeze(0)
        if self.is_transposed:
            kernel = tuple(range(2, weight.dim()))
            split = weight.flip(kernel).flatten(2).unflatten(0, (g, -1))  # (g, in, out, k)
            return split.transpose(2, 3).flatten(1, 2)  # type: ignore[no-any-return]
        return weight.flatten(1).unflatten(0, (g, -1)).transpose(1, 2)  # type: ignore[no-any-return]

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        shape = self.layer.weight.shape
        if self.is_linear:
            return matrix[0] if self.is_transposed_linear else matrix[0].t()
        if self.is_transposed:
            kernel = tuple(range(2, len(shape)))
            split = matrix.unflatten(1, (shape[0] // self.groups, -1)).transpose(2, 3)
            return split.reshape(shape).flip(kernel)  # type: ignore[no-any-return]
        return matrix.transpose(1, 2).reshape(shape)

    def channels_of_columns(self) -> Tensor:
        """``(groups, columns)``: the input channel that a column belongs to."""
        if self.is_linear:
            count = self.layer.in_features
            return torch.arange(count).unsqueeze(0)
        window = int(torch.Size(self.layer.kernel_size).numel())
        channels = torch.arange(self.layer.in_channels).reshape(self.groups, -1)
        return channels.repeat_interleave(window, dim=1)

    # ------------------------------------------------------------ inputs

    def vectors(self, x: Tensor) -> Tensor:
        """The input as ``(groups, columns, count)``, so that ``matrix.transpose(1, 2) @ vectors`` is the output.

        Args:
            x: in a shape that the layer takes, with or without a batch axis.
        """
        if self.is_linear:
            return x.reshape(-1, x.shape[-1]).t().unsqueeze(0)
        spatial = len(self.layer.kernel_size)
        if x.dim() == spatial + 1:
            x = x.unsqueeze(0)
        return self._windows(x, spatial)

    def _windows(self, x: Tensor, spatial: int) -> Tensor:
        layer = self.layer
        stride: Sequence[int] = layer.stride
        if self.is_transposed:
            x, stride = _spread(x, stride), [1] * spatial
            x = F.pad(x, self._transposed_padding())
        else:
            x = self._padded(x)
        for axis, (k, d, s) in enumerate(
            zip(layer.kernel_size, layer.dilation, stride, strict=True), start=2
        ):
            x = x.unfold(axis, (k - 1) * d + 1, s)[..., ::d]
        # (batch, channels, *positions, *kernel) -> (groups, channels of a group * kernel, batch * positions)
        places, kernel = range(2, 2 + spatial), range(2 + spatial, 2 + 2 * spatial)
        x = x.permute(1, *kernel, 0, *places)
        return x.reshape(self.groups, -1, x.shape[1 + spatial :].numel())

    def _transposed_padding(self) -> list[int]:
        layer, pads = self.layer, list[int]()
        for k, d, p, extra in zip(
            layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
        ):
            side = (k - 1) * d - p
            pads = [side, side + extra, *pads]
        return pads

    def _padded(self, x: Tensor) -> Tensor:
        layer = self.layer
        if getattr(layer, "is_same_padded_strided", False):
            return layer._same_padding(x)  # type: ignore[no-any-return]
        if layer.padding_mode != "zeros":
            mode = layer.padding_mode
            return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        if isinstance(layer.padding, str):
            pads = list(layer._reversed_padding_repeated_twice)
            if layer.padding == "valid":
                pads = [0] * len(pads)
            return F.pad(x, pads)
        return F.pad(x, [p for n in reversed(layer.padding) for p in (n, n)])


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Zeros between the elements along spatial axes."""
    shape = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    result = x.new_zeros(*x.shape[:2], *shape)
    result[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return result
