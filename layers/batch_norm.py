"""Batch norms in evaluation, as a multiplication and an addition."""

from __future__ import annotations

import torch
from torch import Tensor


def mul_add_from_bn(
    bn_mean: Tensor,
    bn_var: Tensor,
    bn_eps: float,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Factor and summand of a batch norm with running statistics: ``gamma / sqrt(var + eps)``, ``beta - mean * factor``.

    Args:
        bn_mean: running mean, ``(C,)``.
        bn_var: running variance, ``(C,)``.
        bn_eps: added to the variance.
        bn_weight: ``gamma``; None for 1.
        bn_bias: ``beta``; None for 0.
    """
    factor = torch.rsqrt(bn_var + bn_eps)
    if bn_weight is not None:
        factor = factor * bn_weight
    shift = -bn_mean * factor
    return factor, shift if bn_bias is None else shift + bn_bias
