"""Writing a quantized weight back: the float weight becomes one that the layer's quantizer makes exactly that of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.weight_grid import WeightGrid
from qframework.quant_tensor import dequantize

#: Of a step, by which values are moved to be sure of their place where a quantizer doesn't round to the nearest.
_ASIDE = {"FLOOR": 0.5, "CEIL": -0.5}
_ROOM = 1e-5


def own_parameter(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    """Give a layer a parameter of its own in place of one that a float model may share with it; its contents stay.

    Args:
        layer: with the parameter.
        name: of the parameter.
    """
    old = layer._parameters[name]
    assert old is not None
    made = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    layer._parameters[name] = made
    return made


@torch.no_grad()
def write_weight(layer: nn.Module, values: Tensor, grid: WeightGrid) -> bool:
    """Give a layer the float weight that its quantizer turns into ``values``.

    A scale that is a statistic of the weight is kept as a statistic where the new weight has the same; where it hasn't, it is
    fixed (:meth:`~qframework.proxy.WeightQuantProxyFromInjector.fix_scale`).

    Args:
        layer: with a quantized weight.
        values: of the grid, in the shape of the weight.
        grid: of the weight before.

    Returns:
        Whether that succeeded; if not, the layer is as it was.
    """
    held: Any = layer
    proxy, weight = held.weight_quant, held._parameters["weight"]
    before = weight.detach().clone()
    wanted = values.to(weight.dtype)
    aside = _ASIDE.get(proxy.rounding_mode or "")

    def nearly_as_before() -> Tensor:
        same = grid.nearest(before.to(torch.float32)).to(weight.dtype) == wanted
        return torch.where(same, before, wanted)

    makers = [nearly_as_before, lambda: wanted]
    if aside is not None:
        makers = [lambda: wanted + aside * grid.scale.to(weight.dtype)]
    elif proxy.rounding_mode in ("ROUND_TO_ZERO", "DPU"):
        makers.append(lambda: wanted + 0.25 * grid.scale.to(weight.dtype) * wanted.sign())
    proxy.stop_following()
    shared = len(proxy.tracked_module_list) > 1
    for make in makers if not shared else ():
        weight.copy_(make())
        if _gives(held, wanted, grid):
            return True
    weight.copy_(before)
    scaling, zero = _slots(proxy)
    proxy.fix_scale()
    for make in reversed(makers):
        weight.copy_(make())
        if _gives(held, wanted, grid):
            return True
    weight.copy_(before)
    _restore_slots(proxy, scaling, zero)
    return False


def _slots(proxy: Any) -> tuple[Any, Any]:
    made = proxy.tensor_quant
    return getattr(made, "scaling_impl", None), getattr(made, "zero_point_impl", None)


def _restore_slots(proxy: Any, scaling: Any, zero: Any) -> None:
    for name, part in (("scaling_impl", scaling), ("zero_point_impl", zero)):
        if part is not None:
            setattr(proxy.tensor_quant, name, part)


def _gives(layer: Any, wanted: Tensor, grid: WeightGrid) -> bool:
    value = dequantize(layer.quant_weight()).to(torch.float32)
    room = (grid.scale.abs() + wanted.abs().to(torch.float32)).mul_(_ROOM)
    if wanted.dtype not in (torch.float32, torch.float64):
        room.add_(wanted.abs().to(torch.float32), alpha=torch.finfo(wanted.dtype).eps * 2)
    return bool(((value - wanted).abs_() <= room).all())
