"""Which functions keep minifloats, groups and codebooks: those that move elements, or choose among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qframework.quant_tensor.base import TensorLike
from qframework.quant_tensor.codebook_quant_tensor import CodebookQuantTensor
from qframework.quant_tensor.float_quant_tensor import FloatQuantTensor
from qframework.quant_tensor.groups import GroupwiseFloatQuantTensor, GroupwiseIntQuantTensor
from qframework.quant_tensor.registry import RULES
from qframework.quant_tensor.source import same_source, scale_only

_FORMAT = (
    "exponent_bit_width",
    "mantissa_bit_width",
    "exponent_bias",
)


def _places(*names: str) -> list[Any]:
    found = (getattr(p, n, None) for n in names for p in (torch, F, torch.Tensor))
    return [f for f in found if f is not None]


#: Element by element, or not at all: whatever the shape of the scale is.
_ELEMENTS = _places("relu", "dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d")
_ELEMENTS += _places("feature_alpha_dropout")
#: Movements and choices; the scale moves along.
_MOVES = _places(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "unsqueeze", "flip",
    "unflatten", "expand", "expand_as", "repeat", "tile", "roll", "rot90", "chunk",
    "unsafe_chunk", "split", "tensor_split", "unbind", "narrow", "select", "index_select",
    "gather", "take_along_dim", "repeat_interleave", "diagonal", "t", "ravel", "pixel_shuffle",
    "pixel_unshuffle", "__getitem__", "reshape", "view", "view_as", "reshape_as", "flatten",
    "squeeze", "pad", "interpolate", "upsample",
)  # fmt: skip
_MOVES += [torch.Tensor.T.__get__, torch.Tensor.mT.__get__]  # type: ignore[attr-defined]
_MOVES += [f for f in RULES if "max_pool" in getattr(f, "__name__", "")]


def _float_embedding(
    index: Tensor,
    weight: TensorLike,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rows of a table of minifloats on one scale."""
    if not isinstance(weight, FloatQuantTensor) or max_norm is not None or weight.scale.numel() > 1:
        return NotImplemented
    value = F.embedding(
        index, weight.value, padding_idx, None, norm_type, scale_grad_by_freq, sparse
    )
    return weight.replace(value=value)


def _float_concatenation(
    tensors: Sequence[TensorLike], dim: int = 0, *, out: Tensor | None = None
) -> Any:
    """Joined, where format and scale are one; in training scales that differ are averaged, as those of integers are."""
    parts = [t for t in tensors if isinstance(t, FloatQuantTensor)]
    if out is not None or len(parts) < len(tensors):
        return NotImplemented
    first, others = parts[0], parts[1:]
    if not all(_same_format(first, t) for t in others):
        return NotImplemented
    value = torch.cat([t.value for t in parts], dim)
    if all(_same_scale(first, t) for t in others):
        return first.replace(value=value)
    if not all(t.training for t in parts):
        return NotImplemented
    scale = torch.stack([t.scale.reshape(()) for t in parts]).mean()
    return first.replace(value=value, scale=scale, source=None)


def _same_format(a: FloatQuantTensor, b: FloatQuantTensor) -> bool:
    same = (a.signed, a.saturating, a.inf_values, a.nan_values)
    if same != (b.signed, b.saturating, b.inf_values, b.nan_values):
        return False
    if not a.scale.numel() == 1 == b.scale.numel():
        return False
    if a.source is not None and a.source == b.source and scale_only(a.source) != a.source:
        return True  # a source stands for a grid
    return all(getattr(a, n) is getattr(b, n) for n in _FORMAT)


def _same_scale(a: FloatQuantTensor, b: FloatQuantTensor) -> bool:
    return a is b or (a.source is not None and a.source == b.source and same_source(a, b))


_elements = {f: RULES[f] for f in _ELEMENTS if f in RULES}
_all = {**_elements, **{f: RULES[f] for f in _MOVES if f in RULES}}

GroupwiseIntQuantTensor.rules = _elements
GroupwiseFloatQuantTensor.rules = _elements
CodebookQuantTensor.rules = _elements
FloatQuantTensor.rules = {
    **_all,
    F.embedding: _float_embedding,
    **dict.fromkeys(_places("cat", "concat", "concatenate"), _float_concatenation),
}
