"""Entries of a codebook in a dequantized tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from qframework.functional import grouped_shape, join_groups, split_groups, upcast
from qframework.quant_tensor.decaying import DecayingRecord
from qframework.quant_tensor.int_quant_tensor import TOLERANCE
from qframework.quant_tensor.record import fill, register
from qframework.quant_tensor.source import Source
from qframework.quant_tensor.validation import check_fields


class CodebookQuantTensor(DecayingRecord):
    """A tensor of codebook entries in dequantized form: ``value = codebook[index] * scale``.

    Args:
        value: floating-point tensor of any shape.
        scale: positive; a number, or a tensor that broadcasts to ``value``; of the grouped shape with
            ``group_size``.
        codebook: entries in increasing order, ``(n,)``.
        training: whether it was made in training mode.
        group_size: elements of a group that shares a scale; None without groups.
        group_dim: axis that is split into groups.
        source: where the scale comes from.

    Raises:
        TypeError: a field of a type that it can't be.
        ValueError: a scale that isn't positive and finite, a shape that doesn't broadcast, entries out of order.
    """

    tensor_names = ("value", "scale_", "zero_point", "codebook")
    static_names = (
        "signed",
        "training",
        "source",
        "symmetric",
        "has_zero",
        "block_size",
        "block_dim",
    )

    scale_: Tensor
    codebook: Tensor
    block_size: int | None
    block_dim: int | None

    def __init__(
        self,
        value: Tensor,
        scale: Tensor | float,
        codebook: Tensor,
        training: bool = False,
        group_size: int | None = None,
        group_dim: int | None = None,
        source: Source = None,
    ) -> None:
        whole = value
        if group_size is not None and group_dim is not None:
            whole = split_groups(value, group_size, group_dim)
        _, scale, zero, _, _, training = check_fields(whole, scale, 0.0, 1.0, True, training)
        if codebook.dim() != 1 or not bool((codebook[1:] > codebook[:-1]).all()):
            raise ValueError("codebook must be one row of entries in increasing order")
        signed, has_zero = bool((codebook < 0).any()), bool((codebook == 0).any())
        static = (signed, training, source, True, has_zero, group_size, group_dim)
        fill(self, (value, scale, zero, codebook, *static))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The scale, that broadcasts to ``value``; of its shape where groups have scales."""
        if self.block_size is None or self.block_dim is None:
            return self.scale_
        whole = grouped_shape(self.value.shape, self.block_size, self.block_dim)
        return join_groups(self.scale_.expand(whole), self.block_dim, self.value.shape)

    def _nearest(self) -> tuple[Tensor, Tensor]:
        """The index of the nearest entry, and ``value / scale``."""
        v = upcast(self.value) / self.scale
        middles = (self.codebook[1:] + self.codebook[:-1]) / 2
        return torch.bucketize(v, middles.to(v.dtype)), v

    def codes(self) -> Tensor:
        """The indices into the codebook, uint8 up to 256 entries, else int32."""
        return self._nearest()[0].to(torch.uint8 if self.codebook.numel() <= 256 else torch.int32)

    @property
    def is_valid(self) -> bool:
        """Whether ``value / scale`` are, up to rounding errors, entries of the codebook. Reads all values."""
        with torch.no_grad():
            index, v = self._nearest()
            entry = self.codebook.to(v.dtype)[index]
            gaps = (self.codebook[1:] - self.codebook[:-1]).min()
            room = TOLERANCE.get(self.value.dtype, 0.2) * gaps
            return bool(((v - entry).abs() < room).all())


register(CodebookQuantTensor)
