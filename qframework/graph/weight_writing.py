"""Writing a quantized weight back: the float weight becomes one that the layer's quantizer makes exactly that of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.weight_grid import WeightGrid, parts_of
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
def write_weight(
    layer: nn.Module, values: Tensor, grid: WeightGrid, before: Tensor | None = None
) -> bool:
    """Give a layer the float weight that its quantizer turns into ``values``.

    A scale that is a statistic of the weight is kept as a statistic where the new weight has the same; where it hasn't, it is
    fixed (:meth:`~qframework.proxy.WeightQuantProxyFromInjector.fix_scale`).

    Args:
        layer: with a quantized weight.
        values: of the grid, in the shape of the weight.
        grid: of the weight before.
        before: the weight as it is, elsewhere; None for a copy of it.

    Returns:
        Whether that succeeded; if not, the layer is as it was.
    """
    held: Any = layer
    proxy, weight = held.weight_quant, held._parameters["weight"]
    before = weight.detach().clone() if before is None else before
    wanted = values.to(weight.dtype)
    aside = _ASIDE.get(proxy.rounding_mode or "")

    def write_nearly_as_before() -> None:
        for part in parts_of(weight):
            near = grid.of_part(part, weight.dim()).nearest(
                before[part].to(torch.float32, copy=True)
            )
            same = near.to(weight.dtype) == wanted[part]
            weight[part].copy_(torch.where(same, before[part], wanted[part]))

    def write(shift: float, towards_zero: bool = False) -> None:
        weight.copy_(wanted)
        if shift:
            step = shift * grid.scale.to(weight.dtype)
            weight.add_(step * wanted.sign() if towards_zero else step)

    makers = [write_nearly_as_before, lambda: write(0.0)]
    if aside is not None:
        makers = [lambda: write(aside)]
    elif proxy.rounding_mode in ("ROUND_TO_ZERO", "DPU"):
        makers.append(lambda: write(0.25, towards_zero=True))
    proxy.stop_following()
    shared = len(proxy.tracked_module_list) > 1
    for make in makers if not shared else ():
        make()
        if _gives(held, wanted, grid):
            return True
    weight.copy_(before)
    scaling, zero = _slots(proxy)
    proxy.fix_scale()
    for make in reversed(makers):
        make()
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
    values = dequantize(layer.quant_weight())
    for part in parts_of(wanted):
        value, exact = values[part].to(torch.float32), wanted[part].to(torch.float32)
        room = (grid.of_part(part, wanted.dim()).scale.abs() + exact.abs()).mul_(_ROOM)
        if wanted.dtype not in (torch.float32, torch.float64):
            room.add_(exact.abs(), alpha=torch.finfo(wanted.dtype).eps * 2)
        if not bool(((value - exact).abs_() <= room).all()):
            return False
    return True
