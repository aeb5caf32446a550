"""Where a quantized model departs from the float one that it was made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.graph.batch_norm_folding import FoldedBatchNorm
from qframework.graph.evaluating import evaluating
from qframework.graph.table import Table, Tabled
from qframework.inject.errors import did_you_mean
from qframework.inspect.batches import runs
from qframework.inspect.places import WHOLE, named
from qframework.inspect.statistics import decibels
from qframework.proxy import QuantProxy
from qframework.quant_tensor import dequantize


class LayerComparison(BaseModel):
    """The result of one layer in both models.

    Attributes:
        layer: its name, the same in both.
        type: its class in the quantized model.
        sqnr: of its result: ``10 log10(sum f^2 / sum (f - q)^2)`` in dB, infinite where both are equal.
        cosine: similarity of both results, flattened, 1 at most.
        input_sqnr: the same ratio for what the layer is given; None where that isn't a tensor.
        added_noise: by how much the noise grows within the layer: noise over signal of its result less that of its input.
    """

    layer: str
    type: str
    sqnr: float
    cosine: float
    input_sqnr: float | None
    added_noise: float


class Comparison(Tabled):
    """Two models, layer by layer; ``print`` and rich show a table.

    Attributes:
        layers: those of the same name in both, in the order in which they ran first.
        output: that of the whole model.
        only_float: names of layers of the float model that the quantized one has no result for.
    """

    layers: list[LayerComparison]
    output: LayerComparison
    only_float: list[str]

    @property
    def worst(self) -> LayerComparison:
        """The layer that loses most: the one that adds the most noise."""
        return max(self.layers, key=lambda x: x.added_noise)

    def __getitem__(self, layer: str) -> LayerComparison:
        """A layer by its name.

        Raises:
            KeyError: there is none; the message names the nearest.
        """
        return named({x.layer: x for x in self.layers}, layer, "no layer {name} was compared")

    def table(self) -> Table:
        """One row for each layer, the last one that of the output."""
        rows = [
            [
                f"{x.layer} {x.type}",
                f"{x.sqnr:.1f}",
                f"{x.cosine:.5f}",
                "" if x.input_sqnr is None else f"{x.input_sqnr:.1f}",
                f"{x.added_noise:.3g}",
                "loses most" if x is self.worst else "",
            ]
            for x in self.layers
        ]
        rows.append(["output", f"{self.output.sqnr:.1f}", f"{self.output.cosine:.5f}", "", "", ""])
        headings = ["layer", "SQNR dB", "cosine", "input SQNR", "noise added", ""]
        return Table("Float and quantized", headings, rows, total=True)

    def to_csv(self) -> str:
        """A line for each layer, the last one that of the output."""
        names = list(LayerComparison.model_fields)
        every = [*self.layers, self.output]
        return Table("", names, [[str(getattr(x, n)) for n in names] for x in every]).to_csv()

    def plot(self, axes: Any = None) -> Any:
        """Bars of SQNR by layer, by matplotlib (extra ``plot``).

        Args:
            axes: to draw in; new ones when None.

        Returns:
            The axes.
        """
        from qframework.inspect.plots import plot_bars

        finite = [(x.layer, x.sqnr) for x in self.layers if math.isfinite(x.sqnr)]
        marked = self.worst.layer
        return plot_bars([n for n, _ in finite], [v for _, v in finite], "SQNR in dB", axes, marked)


class _Sums:
    """Sums over pairs of tensors."""

    def __init__(self) -> None:
        self.signal = self.noise = self.other = self.product = 0.0

    def add(self, exact: Tensor, got: Tensor) -> None:
        # each product of two float32 is exact in float64, which sums of squares that nearly cancel need
        f, q = exact.detach().double().flatten(), got.detach().double().flatten()
        q = q.to(f.device)
        sums = torch.stack([f @ f, (f - q).square().sum(), q @ q, f @ q]).tolist()
        self.signal += sums[0]
        self.noise += sums[1]
        self.other += sums[2]
        self.product += sums[3]

    @property
    def sqnr(self) -> float:
        return decibels(self.signal, self.noise)

    @property
    def ratio(self) -> float:
        return self.noise / self.signal if self.signal else math.inf if self.noise else 0.0

    @property
    def cosine(self) -> float:
        length = math.sqrt(self.signal) * math.sqrt(self.other)
        if length == 0:
            return 1.0 if self.signal == self.other else 0.0
        return min(1.0, self.product / length)


class _Layer:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.given, self.made = _Sums(), _Sums()
        self.seen = self.seen_input = 0

    def result(self, name: str) -> LayerComparison:
        known = self.seen_input > 0
        return LayerComparison(
            layer=name,
            type=self.kind,
            sqnr=self.made.sqnr,
            cosine=self.made.cosine,
            input_sqnr=self.given.sqnr if known else None,
            added_noise=self.made.ratio - (self.given.ratio if known else 0.0),
        )


def _first(x: Any) -> Tensor | None:
    """The first tensor of arguments or results."""
    x = dequantize(x)
    if isinstance(x, Tensor):
        return x if x.is_floating_point() else None
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return next((t for t in map(_first, values) if t is not None), None)


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, without the model itself and what quantizers are made of."""
    inner = {p for m in model.modules() if isinstance(m, QuantProxy) for p in m.modules()}
    return {n: m for n, m in model.named_modules() if n and m not in inner}


@torch.no_grad()
def compare(
    float_model: nn.Module,
    quantized_model: nn.Module,
    batches: Any,
    progress: bool | None = None,
) -> Comparison:
    """How far the result of each layer of a quantized model is from that of the float model.

    Both run in evaluation mode on each batch, and are as they were afterwards. Layers are matched by their names; only those that
    compute (without submodules of their own in the float model) are compared, by the first tensor that they return. A batch norm that was
    folded into the layer in front is part of that layer: its result is what is compared.

    Args:
        float_model: the reference.
        quantized_model: with layers of the same names, such as ``quantize_model`` makes.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that runs a model.
        progress: show a bar; None for only on a terminal.

    Returns:
        A record for each layer and one for the output; prints as a table, ``plot`` draws bars.

    Raises:
        ValueError: the models have no layer of the same name, or results of other shapes.
        TypeError: batches that the models can't be run on.
    """
    check_module(float_model, "compare", "float_model")
    check_module(quantized_model, "compare", "quantized_model")
    floats, quantized = _own_modules(float_model), _own_modules(quantized_model)
    leaves = {n for n, m in floats.items() if not any(True for _ in m.children())}
    names = [n for n in quantized if n in leaves]
    if not names:
        near = did_you_mean(next(iter(leaves), ""), quantized)
        raise ValueError(
            f"compare: {type(float_model).__name__} and {type(quantized_model).__name__} have no layer of the same name; one has "
            f"{', '.join(sorted(leaves)[:5])}, the other {', '.join(list(quantized)[:5])}{near}"
        )
    found: dict[str, _Layer] = {}
    output = _Layer(type(quantized_model).__name__)
    exact: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {}
    folded: dict[str, str] = {}  # from a folded norm to the layer in front, whose part it is now
    last: list[Any] = [None, None]

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            given = _first([*args, *kwargs.values()])
            # a later layer may write in place into what this one was given or gave
            exact.setdefault(name, []).append((_copy(given), _copy(_first(result))))

        return hook

    def check(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            mine = (
                output if name == WHOLE else found.setdefault(name, _Layer(type(module).__name__))
            )
            if isinstance(module, FoldedBatchNorm) and args and args[0] is last[1]:
                folded[name] = last[0]
            last[:] = name, result
            if not exact.get(name):
                return
            given, made = exact[name].pop(0)
            mine.seen_input += _add(mine.given, given, _first([*args, *kwargs.values()]))
            mine.seen += _add(mine.made, made, _first(result))

        return hook

    handles = []
    try:
        for model, modules, look in (
            (float_model, floats, keep),
            (quantized_model, quantized, check),
        ):
            for name in names:
                handles.append(modules[name].register_forward_hook(look(name), with_kwargs=True))
            handles.append(model.register_forward_hook(look(WHOLE), with_kwargs=True))
        with evaluating(float_model), evaluating(quantized_model):
            for run in runs(batches, progress=progress):
                exact.clear()
                run(float_model)
                run(quantized_model)
    finally:
        for handle in handles:
            handle.remove()
    for norm, layer in folded.items():
        if norm in found and layer in found:
            found[layer].made, found[layer].seen = found[norm].made, found.pop(norm).seen
    last.clear()
    if not output.seen:
        raise ValueError("compare: the two models give no tensors of the same shape")
    layers = [x.result(n) for n, x in found.items() if x.seen]
    if not layers:
        raise ValueError("compare: no layer of the same name gave tensors of the same shape")
    compared = {x.layer for x in layers}
    return Comparison(
        layers=layers,
        output=output.result(WHOLE),
        only_float=[n for n in floats if n in leaves and n not in compared and n not in folded],
    )


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone()


def _add(sums: _Sums, exact: Tensor | None, got: Tensor | None) -> bool:
    if exact is None or got is None or exact.shape != got.shape:
        return False
    sums.add(exact, got)
    return True
