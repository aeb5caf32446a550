"""In which precision quantizers compute: half precision can't hold 256 integers and a fraction."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a quantizer's own numbers beside values of ``dtype``: float32, or float64.

    Args:
        dtype: of the values; torch's default where None.
    """
    if dtype is None:
        dtype = torch.get_default_dtype()
    return torch.float32 if dtype in _HALF else dtype


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype is float16 or bfloat16."""
    return dtype in _HALF


def floating(x: Tensor) -> Tensor:
    """``x`` itself where it is of a floating-point dtype, else in torch's default one, as the pixels of images are."""
    return x if x.dtype.is_floating_point else x.to(torch.get_default_dtype())


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32 where it is of half precision, in torch's default dtype where it holds integers, else ``x`` itself."""
    x = floating(x)
    return x.float() if x.dtype in _HALF else x
