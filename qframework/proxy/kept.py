"""Weights whose scale and zero point are kept, because the float weights that they were computed from are gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qframework.core.following import FollowsParameters
from qframework.core.scaling.kept import Kept, KeptScale, KeptZeroPoint

if TYPE_CHECKING:
    from qframework.proxy.base import QuantProxy

#: Parts of a tensor quantizer that give a scale or a zero point, and what stands for them when it is kept.
_SLOTS: Mapping[str, type[Kept]] = {
    "scaling_impl": KeptScale,
    "zero_point_impl": KeptZeroPoint,
    "pre_scaling_impl": KeptScale,
    "pre_zero_point_impl": KeptZeroPoint,
}
KEPT_SLOTS = tuple(_SLOTS)


def is_kept(proxy: QuantProxy) -> bool:
    """Whether a scale or zero point of a quantizer stays as it was saved."""
    return any(isinstance(_part(proxy, slot), Kept) for slot in _SLOTS)


def computed_slots(proxy: QuantProxy) -> tuple[str, ...]:
    """The parts of a weight's quantizer that compute a number from the weight, or keep one that was.

    Raises:
        LookupError: one of them also learns something, which would be lost.
    """
    found = []
    for slot in _SLOTS:
        part = _part(proxy, slot)
        if part is None or isinstance(part, FollowsParameters):
            continue
        if isinstance(part, Kept):
            found.append(slot)
        elif getattr(part, "depends_on_input", True) or proxy._reads_layer:
            if any(True for _ in part.parameters()):
                raise LookupError(slot)
            if not getattr(part, "symmetric", False):
                found.append(slot)
    return tuple(found)


@torch.no_grad()
def computed_numbers(proxy: QuantProxy, slots: Iterable[str], weight: Tensor) -> dict[str, Tensor]:
    """What these parts give for a weight, for which they have to run in evaluation mode."""
    quantizer: Any = proxy.tensor_quant
    found: dict[str, Tensor] = {}
    slots = tuple(slots)
    for names, method in (
        (("scaling_impl", "zero_point_impl"), "parameters_for"),
        (("pre_scaling_impl", "pre_zero_point_impl"), "pre_parameters_for"),
    ):
        if not set(names) & set(slots):
            continue
        output = (
            getattr(quantizer, method)(weight)
            if hasattr(quantizer, method)
            else quantizer(weight)[1:3]
        )
        found |= {name: t for name, t in zip(names, output[:2], strict=True) if name in slots}
    return {slot: found[slot].detach().clone() for slot in slots}


def keep(proxy: QuantProxy, numbers: Mapping[str, Tensor]) -> None:
    """Let scales and zero points be these numbers from now on.

    Args:
        proxy: of a weight.
        numbers: by the name of the part that gives them.

    Raises:
        ValueError: the quantizer has no such part.
    """
    proxy.release()
    for slot, number in numbers.items():
        if slot not in _SLOTS or _part(proxy, slot) is None:
            raise ValueError(f"{type(proxy.tensor_quant).__name__} has no {slot} to keep")
        kept = _SLOTS[slot](number)
        kept.train(proxy.training)
        setattr(proxy.tensor_quant, slot, kept)


@contextmanager
def keeping(proxy: QuantProxy, numbers: Mapping[str, Tensor]) -> Iterator[None]:
    """:func:`keep` inside a ``with`` block."""
    quantizer: Any = proxy.tensor_quant
    before = {slot: getattr(quantizer, slot) for slot in numbers}
    try:
        keep(proxy, numbers)
        yield
    finally:
        proxy.release()
        for slot, part in before.items():
            setattr(quantizer, slot, part)


def make_room(proxy: QuantProxy, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Before a state dict is loaded that holds kept numbers: let the quantizer keep such."""
    for slot, kind in _SLOTS.items():
        number = state_dict.get(f"{prefix}tensor_quant.{slot}.kept")
        part = _part(proxy, slot)
        if isinstance(number, Tensor) and part is not None and not isinstance(part, Kept):
            device = next((t.device for t in (*proxy.parameters(), *proxy.buffers())), None)
            made = kind(torch.ones_like(number, device=device))
            made.train(proxy.training)
            setattr(proxy.tensor_quant, slot, made)


def _part(proxy: QuantProxy, slot: str) -> nn.Module | None:
    part = getattr(proxy.tensor_quant, slot, None)
    return part if isinstance(part, nn.Module) else None
