"""From quantized weights to whole numbers that files hold, and back to weights that quantize to them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qframework.functional import upcast
from qframework.quant_tensor import (
    CodebookQuantTensor,
    FloatQuantTensor,
    GroupwiseFloatQuantTensor,
    GroupwiseIntQuantTensor,
    IntQuantTensor,
)

#: Levels of a table, so that it stays small beside the codes.
_LARGEST_TABLE = 4096


class NoCodes(Exception):
    """A quantized tensor that codes can't stand for; the message says why."""


class Codes(NamedTuple):
    """A quantized tensor without its scales.

    Attributes:
        form: ``"integer"``: a code stands for the integer ``low + step * code``; ``"table"``: for an entry of ``levels``.
        codes: int64, from 0, of the shape of the tensor.
        bits: that each of them needs.
        low: the smallest integer.
        step: between integers.
        levels: values in units of the scale, in increasing order, float32; None for integers.
    """

    form: Literal["integer", "table"]
    codes: Tensor
    bits: int
    low: int
    step: int
    levels: Tensor | None


@torch.no_grad()
def codes_of(q: Any) -> Codes:
    """The codes of a quantized weight.

    Raises:
        NoCodes: infinities or NaN, too many levels, a class that isn't known.
    """
    if isinstance(q, (IntQuantTensor, GroupwiseIntQuantTensor)):
        try:
            integers = q.int().to(torch.int64)
        except RuntimeError as error:
            raise NoCodes(str(error)) from None
        if not integers.numel():
            return Codes("integer", integers, 1, 0, 1, None)
        low, high = (int(t) for t in integers.aminmax())
        # a sign alone: -1 and 1
        step = 2 if (low, high) == (-1, 1) and not bool((integers == 0).any()) else 1
        return Codes(
            "integer", (integers - low) // step, _bits((high - low) // step), low, step, None
        )
    if isinstance(q, CodebookQuantTensor):
        if not q.is_valid:
            raise NoCodes("values that aren't entries of the codebook")
        levels, codes = q.codebook.detach().float(), q.codes().to(torch.int64)
        return Codes("table", codes, _bits(levels.numel() - 1), 0, 1, levels)
    if isinstance(q, (FloatQuantTensor, GroupwiseFloatQuantTensor)):
        numbers = q.minifloat().float()
        if not bool(torch.isfinite(numbers).all()):
            raise NoCodes("infinities or NaN")
        levels, codes = torch.unique(numbers, return_inverse=True)
        if levels.numel() > _LARGEST_TABLE:
            raise NoCodes(f"{levels.numel()} different numbers")
        return Codes("table", codes, _bits(levels.numel() - 1), 0, 1, levels)
    raise NoCodes(f"{type(q).__name__} has no codes")


def _bits(largest: int) -> int:
    return max(1, largest.bit_length())


@torch.no_grad()
def same_codes(q: Any, wanted: Codes) -> Tensor:
    """Where a quantized weight has codes that are wanted: a bool tensor of its shape."""
    if wanted.levels is None:
        return q.int().to(torch.int64) == wanted.low + wanted.step * wanted.codes  # type: ignore[no-any-return]
    if isinstance(q, CodebookQuantTensor):
        found = q.codebook.float()[q.codes().to(torch.int64)]
    else:
        found = q.minifloat().float()
    return found == wanted.levels[wanted.codes]  # type: ignore[no-any-return]


@torch.no_grad()
def weight_for(proxy: Any, wanted: Codes, like: Tensor) -> Tensor:
    """A float weight that a quantizer makes these codes of.

    That is the dequantized weight, where it rounds to nearest; elsewhere it is moved by half a step.

    Args:
        proxy: in evaluation mode; its scale and zero point don't depend on the weight.
        wanted: the codes.
        like: a weight of the right shape, dtype and device.

    Raises:
        NoCodes: there is no such weight.
    """
    now = proxy(like)
    if type(now) is Tensor:
        raise NoCodes("the weight isn't quantized")
    scale = upcast(now.scale.detach())
    pre = getattr(proxy, "pre_scale", None)
    if pre is not None:
        steps = upcast(pre().detach())
        shift = upcast(proxy.pre_zero_point().detach())
    else:
        steps, shift = scale, upcast(now.zero_point.detach())
    if wanted.levels is None:
        levels = (wanted.low + wanted.step * wanted.codes).to(scale.dtype) - shift
        half = torch.full_like(levels, 0.5)
    else:
        levels = wanted.levels.to(scale)[wanted.codes]
        half = levels.abs() / 64
    weight, missing = (
        like.detach().clone(),
        torch.ones(like.shape, dtype=torch.bool, device=like.device),
    )
    for moved in (levels, levels + half, levels - half):
        candidate = torch.where(missing, (moved * steps).to(like.dtype), weight)
        try:
            made = proxy(candidate)
            if made.value.shape != like.shape:
                raise NoCodes(f"its scale makes {tuple(made.value.shape)} of {tuple(like.shape)}")
            right = same_codes(made, wanted)
        except RuntimeError as error:
            raise NoCodes(str(error)) from None
        weight, missing = candidate, ~right
        if not bool(missing.any()):
            return weight
    raise NoCodes(f"its quantizer doesn't give {int(missing.sum())} of the codes again")
