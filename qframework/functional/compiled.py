"""The fused functions as single passes over memory, compiled once and shared by all layers.

Used with ``qframework.settings.kernels = 'compiled'`` for large tensors in eager mode. ``torch.compile`` makes one version for each
dtype, device and rank, whatever the sizes, and keeps it on disk.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from qframework.configuration import settings
from qframework.functional.autograd import transforms_active
from qframework.functional.straight_through import ROUNDINGS

#: Smaller tensors are quicker by the ordinary functions.
_LARGE = 1 << 15


def wants_compiled(x: Tensor, scale: Tensor) -> bool:
    """Whether a compiled function should do the work for ``x``.

    Scales of one element, or one for each index of the first axis.
    """
    return (
        settings.kernels == "compiled"
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.numel() >= _LARGE
        and (scale.numel() == 1 or _is_per_row(x, scale))
        and not torch.compiler.is_compiling()
        and not transforms_active()
    )


def _is_per_row(x: Tensor, scale: Tensor) -> bool:
    return scale.dim() == x.dim() and scale.shape[0] == scale.numel() == x.shape[0]


def _shaped(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Flat with a 0-dim scale, or rows with a column of scales, so that few versions are compiled."""
    x = x.detach()
    if scale.numel() == 1:
        return x.reshape(-1), scale.reshape(())
    return x.reshape(x.shape[0], -1), scale.reshape(-1, 1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _quantize(x: Tensor, scale: Tensor, minimum: Tensor, maximum: Tensor, rounding: str) -> Tensor:
    q = ROUNDINGS[rounding](_wide(x) / scale)
    return (torch.clamp(q, minimum, maximum) * scale).to(x.dtype)


def _range_gradient(
    g: Tensor,
    x: Tensor,
    scale: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    low: Tensor,
    high: Tensor,
    rounding: str,
    rectify: bool,
) -> tuple[Tensor, Tensor]:
    exact, wide = _wide(x) / scale, _wide(g)
    rounded = ROUNDINGS[rounding](exact)
    place = exact if rectify else rounded
    inside = (place > low) & (place < high)
    error = torch.clamp(rounded, minimum, maximum) - torch.where(inside, exact, 0.0)
    total = (wide * error).sum(dim=-1, keepdim=True, dtype=torch.float64)
    return torch.where(inside, g, 0.0), total


def _scale_gradient(
    g: Tensor, x: Tensor, scale: Tensor, minimum: Tensor, maximum: Tensor, rounding: str
) -> Tensor:
    exact = _wide(x) / scale
    error = torch.clamp(ROUNDINGS[rounding](exact), minimum, maximum) - exact
    return (_wide(g) * error).sum(dim=-1, keepdim=True, dtype=torch.float64)


def _spread(g: Tensor, x: Tensor, top: Tensor, grad_top: Tensor) -> Tensor:
    largest = x.abs() == top
    share = torch.where(top > 0, grad_top / largest.sum(), 0.0)
    return torch.where(largest, g + share * x.sign(), g).to(g.dtype)


@lru_cache(maxsize=256)
def _version(function: Any, *kind: Any) -> Any:
    # A code object of its own for each kind: the compiler limits how many versions one may have.
    code = function.__code__.replace(co_name="_".join(map(str, (function.__name__, *kind))))
    own = FunctionType(code, function.__globals__, argdefs=function.__defaults__)
    return torch.compile(own, dynamic=True, fullgraph=True)


@lru_cache(maxsize=1024)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bound as a tensor: numbers cost a compiled function far more."""
    return torch.tensor(value, dtype=dtype, device=device)


def _call(function: Any, x: Tensor, *others: Any) -> Any:
    static = tuple(o for o in others if isinstance(o, (str, bool)))
    version = _version(function, x.dtype, x.dim(), x.device.type, *static)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    operands = [
        o.detach()
        if isinstance(o, Tensor)
        else _number(o, dtype, x.device)
        if isinstance(o, float)
        else o
        for o in others
    ]
    return version(x, *operands)


def quantize(x: Tensor, scale: Tensor, minimum: float, maximum: float, rounding: str) -> Tensor:
    """``clamp(round(x / scale)) * scale`` in one pass."""
    operands = _shaped(x, scale)
    return _call(_quantize, *operands, minimum, maximum, rounding).view(x.shape)  # type: ignore[no-any-return]


def range_gradient(g: Tensor, x: Tensor, scale: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of the scale of a range that masks, in one pass."""
    operands = _shaped(x, scale)
    grad_x, total = _call(_range_gradient, g.reshape(operands[0].shape), *operands, *settings)
    return grad_x.view(x.shape), total.reshape(scale.shape).to(scale.dtype)


def scale_gradient(g: Tensor, x: Tensor, scale: Tensor, *settings: Any) -> Tensor:
    """The gradient of the scale of a range that doesn't mask, in one pass."""
    operands = _shaped(x, scale)
    total = _call(_scale_gradient, g.reshape(operands[0].shape), *operands, *settings)
    return total.reshape(scale.shape).to(scale.dtype)  # type: ignore[no-any-return]


def spread_evenly(g: Tensor, x: Tensor, top: Tensor, grad_top: Tensor) -> Tensor:
    """``g``, and ``grad_top`` shared by the elements of magnitude ``top``, in two passes."""
    flat = _call(_spread, g.reshape(-1), x.detach().reshape(-1), top, grad_top)
    return flat.view(x.shape)  # type: ignore[no-any-return]
