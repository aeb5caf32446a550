"""Functions of single elements that keep a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qframework.quant_tensor.algebra import bounds, in_float64
from qframework.quant_tensor.base import QuantTensor, TensorLike
from qframework.quant_tensor.int_quant_tensor import IntQuantTensor
from qframework.quant_tensor.record import Record
from qframework.quant_tensor.registry import rule
from qframework.quant_tensor.source import can_read

#: The least or the largest value of a clamp; None for none.
Bound = TensorLike | float | None


@rule("relu")
def _relu(q: Record, inplace: bool = False) -> Any:
    """``max(q, 0)`` is on the grid when 0 is."""
    return q.replace(value=F.relu(q.value)) if q.has_zero else NotImplemented


def _reaches(q: IntQuantTensor, bound: float | None, least: bool) -> bool:
    """Whether clamping at a number is known to stay on the grid: it is a point of it, or beyond all of them."""
    if bound is None or (bound == 0 and q.has_zero):
        return True
    if not can_read(q.scale, q.zero_point, q.bit_width):
        return False
    with torch.no_grad():
        steps = bound / in_float64(q.scale) + q.zero_point
        nearest = steps.round()
        low, high = bounds(q)
        point = ((steps - nearest).abs() < 1e-4) & (nearest >= low) & (nearest <= high)
        if q.symmetric and not q.has_zero:
            point &= nearest != 0
        return bool((point | (steps <= low if least else steps >= high)).all())


def _clamp(q: Tensor | IntQuantTensor, min: Bound = None, max: Bound = None) -> Any:
    """Bounds that are points of the grid keep it, as do bounds beyond its ends; others leave it."""
    tensors = (Tensor, QuantTensor)
    if isinstance(q, Tensor) or isinstance(min, tensors) or isinstance(max, tensors):
        return NotImplemented
    if not (_reaches(q, min, True) and _reaches(q, max, False)):
        return NotImplemented
    return q.replace(value=q.value.clamp(min, max))


rule("clamp", "clip")(_clamp)


@rule("clamp_min")
def _clamp_min(q: Tensor | IntQuantTensor, min: Bound) -> Any:
    return _clamp(q, min)


@rule("clamp_max")
def _clamp_max(q: Tensor | IntQuantTensor, max: Bound) -> Any:
    return _clamp(q, None, max)


@rule("relu6", method=False)
def _relu6(q: IntQuantTensor, inplace: bool = False) -> Any:
    return _clamp(q, 0.0, 6.0)


@rule("hardtanh", method=False)
def _hardtanh(
    q: IntQuantTensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    return _clamp(q, min_val, max_val)


def _dropout_rule(name: str) -> None:
    def apply(q: Record, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """In evaluation the tensor itself; in training dropout rescales, off the grid."""
        return NotImplemented if training and p != 0 else q

    rule(name, method=False)(apply)


for _name in (
    "dropout",
    "alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
):
    _dropout_rule(_name)
