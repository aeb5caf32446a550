"""A block on another device for its turn; what it shares with the float model stays where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qframework.graph.activation_store import moved
from qframework.graph.block_plan import Unit
from qframework.graph.layer_inputs import Call
from qframework.graph.recipe import Recipe


class DeviceError(ValueError, RuntimeError):
    """A recipe's device that can't be used."""


def device_of(plan: Recipe) -> torch.device | None:
    """The device of a recipe; None where it names none.

    Raises:
        DeviceError: there is no such device.
    """
    if plan.device is None:
        return None
    try:
        torch.empty(0, device=plan.device)
        return torch.device(plan.device)
    except Exception as error:
        text = f"ptq: device={plan.device!r} of the recipe can't be used here: {error}"
        raise DeviceError(text) from error


#: A module's parameters or buffers, the name of one, and itself.
_Place = tuple[dict[str, Tensor | None], str, Tensor]


@contextmanager
def on_device(unit: Unit, device: torch.device | None) -> Iterator[None]:
    """Let a block be on a device for a while, whatever happens meanwhile.

    Its parameters are others for that time, so that a model that shares them keeps its own, where they are. Those that nothing has
    changed are put back themselves; new ones go to where the block was.

    Args:
        unit: the block; its module may be replaced meanwhile.
        device: None for where it is.
    """
    before = _places(unit.module)
    if device is None or not before:
        yield
        return
    home = before[0][2].device
    try:
        _take_own_parameters(before)
        unit.module.to(device)
        yield
    finally:
        unit.module.to(home)
        _put_back(before)


def _places(block: nn.Module) -> list[_Place]:
    found: list[_Place] = []
    for module in block.modules():
        for held in (module._parameters, module._buffers):
            table: dict[str, Tensor | None] = held  # type: ignore[assignment]
            found += [(table, name, t) for name, t in table.items() if t is not None]
    return found


def _take_own_parameters(places: list[_Place]) -> None:
    own: dict[Tensor, nn.Parameter] = {}
    for table, name, tensor in places:
        if isinstance(tensor, nn.Parameter):
            made = own.get(tensor)
            if made is None:
                made = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
                own[tensor] = made
            table[name] = made


@torch.no_grad()
def _put_back(places: list[_Place]) -> None:
    for table, name, before in places:
        now = table.get(name)
        if now is None:
            continue
        if now.device != before.device:
            now.data = now.data.to(before.device)
        if now.dtype == before.dtype and torch.equal(now, before):
            table[name] = before


def calls_on(calls: list[dict[int, Call]], device: torch.device | None) -> list[dict[int, Call]]:
    """Calls of a block, by batches in each stream, on a device; None for where they are."""
    return [
        {b: Call(moved(c.args, device), moved(c.kwargs, device)) for b, c in own.items()}
        for own in calls
    ]
