"""What attention may not look at: from the masks that torch's functions take to one of each kind.

A mask becomes two things: ``blocked``, a bool tensor that is true where a key is out of bounds, and ``bias``, what a
float mask adds to the scores. Both broadcast to the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qframework.proxy.naming import qualified_name


class Masks(NamedTuple):
    """Which keys are out of bounds, and what is added to scores; None for nothing."""

    blocked: Tensor | None = None
    bias: Tensor | None = None


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """True where a key comes after the query; query ``i`` looks at keys 0 to ``i``. Shape ``(queries, keys)``."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


def check_mask(
    layer: nn.Module, name: str, mask: Tensor, allowed: tuple[tuple[int, ...], ...]
) -> None:
    """Raise when a mask is neither bool nor float, or has another shape than those allowed.

    Raises:
        TypeError: the dtype.
        ValueError: the shape.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{qualified_name(layer)}: {name} must be bool or floating-point, got {mask.dtype}; "
            f"{name}.bool() makes it one"
        )
    # by rank first: sizes that a compiler leaves open aren't compared without need
    if not any(mask.dim() == len(shape) and tuple(mask.shape) == shape for shape in allowed):
        shapes = " or ".join(str(shape) for shape in allowed)
        raise ValueError(
            f"{qualified_name(layer)}: {name} must be {shapes}, got {tuple(mask.shape)}"
        )


def merge_masks(*masks: Tensor | None) -> Masks:
    """One of each kind, from masks that broadcast to each other: bool ones (true: out of bounds) and float ones."""
    blocked: Tensor | None = None
    bias: Tensor | None = None
    for mask in masks:
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            blocked = mask if blocked is None else blocked | mask
        else:
            bias = mask if bias is None else bias + mask
    return Masks(blocked, bias)


def with_unmasked_keys(mask: Tensor | None, count: int) -> Tensor | None:
    """A mask for ``count`` more keys at the end, which all may look at."""
    return mask if mask is None or not count else F.pad(mask, (0, count))
