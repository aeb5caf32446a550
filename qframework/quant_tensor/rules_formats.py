"""Which functions keep minifloats, groups and codebooks: those that move elements, or choose among them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

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


def _float_embedding(index: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of a table of minifloats on one scale."""
    max_norm = kwargs.get("max_norm", args[1] if len(args) > 1 else None)
    if not isinstance(weight, FloatQuantTensor) or max_norm is not None or weight.scale.numel() > 1:
        return NotImplemented
    return weight.replace(value=F.embedding(index, weight.value, *args, **kwargs))


def _float_concatenation(tensors: Any, dim: int = 0, *, out: Any = None) -> Any:
    """Joined, where format and scale are one; in training scales that differ are averaged, as those of integers are."""
    first = tensors[0]
    alike = out is None and all(isinstance(t, FloatQuantTensor) for t in tensors)
    if not alike or not all(_same_format(first, t) for t in tensors[1:]):
        return NotImplemented
    value = torch.cat([t.value for t in tensors], dim)
    if all(_same_scale(first, t) for t in tensors[1:]):
        return first.replace(value=value)
    if not all(t.training for t in tensors):
        return NotImplemented
    scale = torch.stack([t.scale.reshape(()) for t in tensors]).mean()
    return first.replace(value=value, scale=scale, source=None)


def _same_format(a: Any, b: Any) -> bool:
    same = (a.signed, a.saturating, a.inf_values, a.nan_values)
    if same != (b.signed, b.saturating, b.inf_values, b.nan_values):
        return False
    if not a.scale.numel() == 1 == b.scale.numel():
        return False
    if a.source is not None and a.source == b.source and scale_only(a.source) != a.source:
        return True  # a source stands for a grid
    return all(getattr(a, n) is getattr(b, n) for n in _FORMAT)


def _same_scale(a: Any, b: Any) -> bool:
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
