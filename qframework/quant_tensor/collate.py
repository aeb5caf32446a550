"""Quantized tensors in batches that ``torch.utils.data.default_collate`` makes of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from qframework.quant_tensor.base import QuantTensor


def collate_quantized(
    batch: Sequence[QuantTensor],
    *,
    collate_fn_map: dict[type | tuple[type, ...], Callable[..., Any]] | None = None,
) -> Any:
    """Samples stacked along a new first axis, quantized where they are on one grid; arguments as torch gives them."""
    return torch.stack(list(batch))  # type: ignore[arg-type]


default_collate_fn_map[QuantTensor] = collate_quantized
