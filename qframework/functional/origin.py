"""What quantized values were made of, so that whoever needs them in the backward pass can make them anew.

A quantizer keeps its input for the backward pass, and the layer behind it would keep the quantized values, too. But these are
``quantize(input)``, one pass over memory where C++ functions compute: such layers keep the quantizer's input, which is kept
anyway.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qframework.configuration import settings
from qframework.functional.autograd import forward_mode_active, transforms_active
from qframework.functional.native import tensors


class Origin(NamedTuple):
    """Values before they were quantized, and what they were quantized by.

    Attributes:
        x: the values.
        scale, zero_point: as for :func:`~qframework.functional.fake_quantize`.
        how: the other arguments of it.
    """

    x: Tensor
    scale: Tensor
    zero_point: Tensor | None
    how: tuple[Any, ...]


class _Noted(NamedTuple):
    quantized: weakref.ref[Tensor]
    place: int
    version: int
    version_before: int
    origin: Origin


#: By the ``id`` of the quantized tensor, as long as it is there and its gradient wasn't computed.
_noted: dict[int, _Noted] = {}


def note(
    y: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, how: tuple[Any, ...]
) -> None:
    """Remember what ``y`` was made of, for a layer that is called with it.

    Args:
        y: quantized values, as a fused function returned them.
        x: see :class:`Origin`.
        scale: likewise.
        zero_point: likewise.
        how: likewise.
    """
    if not y.requires_grad or type(y) is not Tensor or settings.recompute == "never":
        return
    if settings.recompute == "auto" and not (
        x.numel() >= tensors.SMALLEST and x.is_cpu and settings.kernels in tensors.SETTINGS
    ):
        return
    key = id(y)

    def forget(_: Any) -> None:
        _noted.pop(key, None)

    origin = Origin(x, scale.detach(), None if zero_point is None else zero_point.detach(), how)
    place = (weakref.ref(y, forget), y.data_ptr(), y._version, x._version)
    _noted[key] = _Noted(*place, origin)
    node: Any = y.grad_fn
    node.noted = key


def origin_of(y: Tensor) -> Origin | None:
    """What ``y`` was made of; None where that isn't known, where one of both was written to since, and where it doesn't count."""
    noted = _noted.get(id(y))
    if (
        noted is None
        or noted.quantized() is not y
        or noted.place != y.data_ptr()
        or noted.version != y._version
        or noted.version_before != noted.origin.x._version
        or not torch.is_grad_enabled()
        or transforms_active()
        or forward_mode_active()
        or torch.is_autocast_enabled(y.device.type)
        or torch._C._get_tracing_state() is not None
    ):
        return None
    return noted.origin


def forget_origin(node: Any) -> None:
    """Let go of what is known of the result of a node, as its gradient has been computed."""
    _noted.pop(getattr(node, "noted", 0), None)
