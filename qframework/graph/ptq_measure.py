"""What a quantized model's outputs, and those of its layers, lack of the float model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.batches import Batches
from qframework.graph.evaluating import evaluating
from qframework.graph.layer_inputs import call_with
from qframework.graph.layer_view import WEIGHTED
from qframework.graph.ptq_report import LayerRecord, sqnr
from qframework.graph.quantizers_off import quantizers_off, with_weights
from qframework.graph.recipe_steps import Work
from qframework.graph.weight_grid import NoGrid, WeightGrid, grid_of, parts_of
from qframework.graph.widths import bits_of_proxy
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.quant_tensor import dequantize


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    if isinstance(output, Tensor) or hasattr(output, "scale"):
        value = dequantize(output)
        return [value] if value.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for v in output.values() for t in tensors_of(v)]
    if isinstance(output, (tuple, list)):
        return [t for v in output for t in tensors_of(v)]
    return []


@torch.no_grad()
def output_sqnr(model: nn.Module, quantized: nn.Module, batches: Batches) -> float | None:
    """Energy of a float model's outputs over that of what the quantized model's lack, in dB; None for outputs without numbers."""
    if batches.is_callable:
        return None
    with evaluating(model):
        pairs = [(call_with(model, b), call_with(quantized, b)) for b in batches]
    return sqnr_of_outputs([a for a, _ in pairs], [b for _, b in pairs])


def sqnr_of_outputs(exact: list[Any], found: list[Any]) -> float | None:
    """Energy of outputs over that of what others lack, in dB; None for outputs without numbers."""
    signal = noise = 0.0
    seen = False
    for one, other in zip(exact, found, strict=True):
        for a, b in zip(tensors_of(one), tensors_of(other), strict=True):
            seen = True
            signal += float(a.double().square().sum())
            noise += float((a.double() - b.double()).square().sum())
    return sqnr(signal, noise) if seen else None


class _Energies:
    def __init__(self) -> None:
        self.signal = self.near = self.now = 0.0


@torch.no_grad()
def layer_records(work: Work, measured: bool = True) -> list[LayerRecord]:
    """A record for each layer with a quantized weight.

    Args:
        work: when all steps are done.
        measured: run the model on all batches, for what outputs lack.
    """
    layers: dict[Any, str] = {
        m: n
        for n, m in work.model.named_modules()
        if isinstance(m, QuantWeightBiasInputOutputLayer)
        and isinstance(m, WEIGHTED)
        and m.weight_quant.is_quant_enabled
    }
    records, energies = [], dict[Any, _Energies]()
    nearest: dict[Any, tuple[Tensor, WeightGrid]] = {}
    for layer, name in layers.items():
        record = LayerRecord(
            name=name,
            type=type(layer).__name__,
            weight_bits=bits_of_proxy(layer.weight_quant),
            input_bits=bits_of_proxy(layer.input_quant)
            if layer.input_quant.is_quant_enabled
            else None,
            seconds=work.seconds.get(name, 0.0),
            note=work.notes.get(name, ""),
        )
        records.append(record)
        whole = work.originals.get(name)
        if whole is None or whole.shape != layer.weight.shape:
            continue
        record.low, record.high = float(whole.min()), float(whole.max())
        try:
            grid = grid_of(layer.weight_quant, layer.weight)
        except NoGrid:
            continue
        record.clipped = _clipped_share(whole, grid) if grid.is_even else None
        nearest[layer] = whole, grid
        energies[layer] = _Energies()
    if measured:
        _measure(work, energies, nearest)
    for layer, record in zip(layers, records, strict=True):
        found = energies.get(layer)
        if found is not None and found.signal:
            record.sqnr_nearest = sqnr(found.signal, found.near)
            record.sqnr = sqnr(found.signal, found.now)
    return records


def _clipped_share(whole: Tensor, grid: WeightGrid) -> float:
    """The share of weights further than half a step from the grid."""
    count = 0
    for part in parts_of(whole):
        own = grid.of_part(part, whole.dim())
        near = own.nearest(whole[part].to(torch.float32, copy=True)).to(whole.dtype)
        count += int(((near - whole[part]).abs() > own.scale.abs() * 0.5001).sum())
    return count / max(whole.numel(), 1)


def _energy(t: Tensor) -> float:
    return float(t.square().sum(dtype=torch.float64))


def _measure(work: Work, energies: dict[Any, _Energies], nearest: dict[Any, Any]) -> None:
    def hook(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        whole, grid = nearest[layer]
        weight, found = layer._parameters["weight"], energies[layer]
        with quantizers_off(layer), with_weights({weight: whole}):
            exact = dequantize(layer.forward(*args, **kwargs))
        found.signal += _energy(exact)
        found.now += _energy(exact - dequantize(output))
        near = grid.nearest(whole.to(torch.float32)).to(whole.dtype)
        with quantizers_off(layer, biases=False, activations=False), with_weights({weight: near}):
            found.near += _energy(exact - dequantize(layer.forward(*args, **kwargs)))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in nearest]
    try:
        work.batches.run(work.model)
    finally:
        for handle in handles:
            handle.remove()
