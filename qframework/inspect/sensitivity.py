"""What the quantization of each layer alone costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.graph.evaluating import evaluating
from qframework.graph.table import Table, Tabled
from qframework.inspect.batches import Loss, runs
from qframework.inspect.places import Place, places
from qframework.quant_tensor import dequantize


class LayerSensitivity(BaseModel):
    """One layer quantized, the others float.

    Attributes:
        layer: its name in the model.
        tensors: that were quantized: ``weight``, ``input`` and so on.
        loss: the mean over all batches.
        change: from that of the float model.
    """

    layer: str
    tensors: list[str]
    loss: float
    change: float


class Sensitivity(Tabled):
    """All layers; ``print`` and rich show a table.

    Attributes:
        layers: the most sensitive first.
        float_loss: with every quantizer off.
        quantized_loss: with every quantizer on.
    """

    layers: list[LayerSensitivity]
    float_loss: float
    quantized_loss: float

    def table(self) -> Table:
        """One row for each layer, the last one with all of them quantized."""
        rows = [
            [x.layer, ", ".join(x.tensors), f"{x.loss:.5g}", f"{x.change:+.3g}"]
            for x in self.layers
        ]
        rows.insert(0, ["none", "", f"{self.float_loss:.5g}", ""])
        change = self.quantized_loss - self.float_loss
        rows.append(["all", "", f"{self.quantized_loss:.5g}", f"{change:+.3g}"])
        headings = ["quantized", "tensors", "loss", "change"]
        return Table("Sensitivity", headings, rows, text_columns=2, total=True)

    def to_csv(self) -> str:
        """A line for each layer."""
        rows = [[x.layer, " ".join(x.tensors), str(x.loss), str(x.change)] for x in self.layers]
        return Table("", list(LayerSensitivity.model_fields), rows).to_csv()

    def plot(self, axes: Any = None) -> Any:
        """Bars of the change of the loss by layer, by matplotlib (extra ``plot``).

        Args:
            axes: to draw in; new ones when None.

        Returns:
            The axes.
        """
        from qframework.inspect.plots import plot_bars

        names, values = [x.layer for x in self.layers], [x.change for x in self.layers]
        return plot_bars(names, values, "change of the loss", axes, names[0])


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Any,
    loss: Loss | None = None,
    layers: list[str] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """What it costs to quantize one layer at a time, all others being float.

    :func:`qframework.graph.sensitivity` measures each quantizer alone instead, weights and activations apart, and by a metric of the model.

    The model runs in evaluation mode, once for each layer and twice besides, and is as it was afterwards. Truncations of accumulators
    are left out, and so is a bias that takes the scale of an input which isn't quantized while its layer is alone.

    Args:
        model: quantized and calibrated.
        batches: an iterable of what ``loss`` takes, to be gone through several times: a list or a ``DataLoader``.
        loss: called with the model and a batch, gives a number; None for the noise at the output relative to that of the float
            model, for batches that the model takes.
        layers: names of layers; all when None.
        progress: show a bar for each pass; None for only on a terminal.

    Returns:
        A record for each layer, the most sensitive first; prints as a table, ``plot`` draws bars.

    Raises:
        ValueError: the model quantizes nothing, a layer isn't there, or a generator is used up.
        TypeError: batches that the model can't be run on, or a loss that isn't a number.
    """
    check_module(model, "sensitivity")
    every = places(model)
    chosen = every if layers is None else places(model, layers)
    by_layer: dict[str, list[Place]] = {}
    for place in chosen:
        if not _needs_quantized(place):
            by_layer.setdefault(place.layer, []).append(place)
    if hasattr(batches, "__next__"):
        batches = list(batches)
    outputs: list[Tensor] = []

    def mean_loss() -> float:
        found = []
        for i, run in enumerate(runs(batches, loss, progress)):
            result: Any = dequantize(run(model))
            if loss is None:
                result = _noise(result, outputs, i)
            elif (
                not isinstance(result, (int, float)) and getattr(result, "numel", lambda: 0)() != 1
            ):
                raise TypeError(f"sensitivity: loss must give one number, got {_kind(result)}")
            found.append(float(result))
        return sum(found) / len(found)

    entries = []
    with evaluating(model):
        with _only(model, every, []):
            base = mean_loss()
        with _only(model, every, every):
            quantized = mean_loss()
        for name, mine in by_layer.items():
            mine = [p for p in mine if _works_alone(p, mine)]
            if not mine:
                continue
            with _only(model, every, mine):
                value = mean_loss()
            tensors = [p.tensor for p in mine]
            entries.append(
                LayerSensitivity(layer=name, tensors=tensors, loss=value, change=value - base)
            )
    entries.sort(key=lambda e: -e.change)
    return Sensitivity(layers=entries, float_loss=base, quantized_loss=quantized)


def _kind(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _noise(result: Any, outputs: list[Tensor], index: int) -> float:
    """Noise over signal of an output; the first pass keeps what is exact."""
    if isinstance(result, (tuple, list)):
        result = result[0]
    if not isinstance(result, Tensor):
        raise TypeError(
            f"sensitivity: the model gives a {_kind(result)}; give a loss(model, batch)"
        )
    if index >= len(outputs):
        outputs.append(result.detach().clone())
        return 0.0
    exact = outputs[index].double()
    signal = float(exact.square().sum())
    return float((result.double() - exact).square().sum()) / signal if signal else 0.0


def _needs_quantized(place: Place) -> bool:
    """Whether a quantizer is for quantized tensors alone: a truncation."""
    return not hasattr(place.proxy, "scale")


def _works_alone(place: Place, mine: list[Place]) -> bool:
    """Whether a quantizer has what it needs while only those of its layer are on."""
    if not getattr(place.proxy, "requires_input_scale", False):
        return True
    return {"input", "weight"} <= {p.tensor for p in mine}


@contextmanager
def _only(model: nn.Module, every: list[Place], on: list[Place]) -> Iterator[None]:
    """Only these quantizers are on, for a while; where some are off, layers return plain tensors."""
    proxies = {id(p.proxy) for p in on}
    off: list[Any] = [p.proxy for p in every if id(p.proxy) not in proxies]
    returning: list[Any] = [
        m for m in model.modules() if getattr(m, "return_quant_tensor", False) is True
    ]
    plain = returning if off else []
    try:
        for proxy in off:
            proxy.disable_quant = True
        for module in plain:
            module.return_quant_tensor = False
        yield
    finally:
        for proxy in off:
            proxy.disable_quant = False
        for module in plain:
            module.return_quant_tensor = True
