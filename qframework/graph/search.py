"""Which quantizers hurt, and how many bits each weight should get."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from qframework.arguments import check_module
from qframework.core.snapshot import Snapshot
from qframework.graph.batches import Batches
from qframework.graph.bit_width_choice import Choice, Option, cheapest_within, costs_of
from qframework.graph.cached_forward import CachedForward
from qframework.graph.evaluating import evaluating
from qframework.graph.ptq_report import new_axes, sqnr
from qframework.graph.quantizers_off import quantizers_off
from qframework.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector

#: Called with the model, returns a figure that is better the larger it is.
Metric = Callable[[nn.Module], float]


class Sensitivity(BaseModel):
    """What the model is like with one quantizer alone.

    Attributes:
        layer: its name.
        tensor: ``weight``, ``input``, ``output``, ``act`` and so on.
        value: SQNR of the model's output in dB, or the metric.
    """

    layer: str
    tensor: str
    value: float


class SensitivityReport(BaseModel):
    """Prints as a table, the most harmful quantizer first.

    Attributes:
        metric: ``"SQNR, dB"``, or the metric's name.
        entries: in the order of the model.
    """

    metric: str
    entries: list[Sensitivity]

    def worst(self, count: int | None = None) -> list[Sensitivity]:
        """The most harmful ones first."""
        return sorted(self.entries, key=lambda e: e.value)[:count]

    def to_json(self) -> str:
        """As JSON; ``SensitivityReport.model_validate_json`` reads it."""
        return self.model_dump_json(indent=1)

    def __str__(self) -> str:
        width = max([len(f"{e.layer}.{e.tensor}") for e in self.entries], default=0)
        lines = [f"{'quantizer'.ljust(width)}  {self.metric}"]
        lines += [f"{f'{e.layer}.{e.tensor}'.ljust(width)}  {e.value:.4g}" for e in self.worst()]
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """A bar for each quantizer; returns matplotlib's axes.

        Args:
            axes: to draw on; None for new ones.

        Raises:
            ImportError: matplotlib isn't installed.
        """
        axes = new_axes(len(self.entries)) if axes is None else axes
        names = [f"{e.layer}.{e.tensor}" for e in self.entries]
        colors = ["C0" if e.tensor == "weight" else "C1" for e in self.entries]
        axes.barh(names, [e.value for e in self.entries], color=colors)
        axes.invert_yaxis()
        axes.set_xlabel(f"{self.metric}, this quantizer alone")
        return axes


def _proxies(model: nn.Module, kinds: tuple[Any, ...]) -> list[tuple[str, str, Any]]:
    found = []
    for name, module in model.named_modules():
        for attribute, proxy in module._modules.items():
            if isinstance(proxy, kinds) and proxy.is_quant_enabled:
                found.append((name, attribute.removesuffix("_quant"), proxy))
    return found


def _noise(exact: list[list[Tensor]], found: list[list[Tensor]]) -> float:
    return sum(
        float((a.double() - b.double()).square().sum())
        for x, y in zip(exact, found, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def _signal(exact: list[list[Tensor]]) -> float:
    return sum(float(a.double().square().sum()) for x in exact for a in x)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Any,
    metric: Metric | None = None,
    weights: bool = True,
    activations: bool = True,
) -> SensitivityReport:
    """Measure each quantizer of a model alone, all others off: what each one costs the model's output.

    :func:`qframework.inspect.sensitivity` measures layers, all quantizers of one at a time, and by a loss of batches where it is given one.

    Where torch.fx traces the model, only what depends on the quantizer's layer runs again.

    Args:
        model: quantized and calibrated; as it was afterwards.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that runs the model.
        metric: called with the model, larger is better; None for the SQNR of the model's output against that without
            quantizers.
        weights: measure those of weights.
        activations: measure those of activations.

    Returns:
        A report, which prints as a table.
    """
    check_module(model, "sensitivity")
    kinds = ((WeightQuantProxyFromInjector,) if weights else ()) + (
        (ActQuantProxyFromInjector,) if activations else ()
    )
    proxies = _proxies(model, kinds)
    entries = []
    with evaluating(model), quantizers_off(model):
        cached = None if metric is not None else CachedForward(model, Batches(batches))
        for layer, tensor, proxy in proxies:
            proxy.disable_quant = False
            try:
                if cached is None:
                    assert metric is not None
                    value = float(metric(model))
                else:
                    noise = _noise(cached.exact, cached.outputs(proxy))
                    value = sqnr(_signal(cached.exact), noise)
            finally:
                proxy.disable_quant = True
            entries.append(Sensitivity(layer=layer, tensor=tensor, value=value))
    name = "SQNR, dB" if metric is None else getattr(metric, "__name__", "metric")
    return SensitivityReport(metric=name, entries=entries)


# ------------------------------------------------------------ bits


class BitWidths(BaseModel):
    """Bits for the weights of each layer.

    Attributes:
        budget: that they meet.
        bits: from names of layers to bits; None for not quantized.
        cost: in the unit of the budget.
        noise: predicted energy of the output's error, or fall of the metric: the sum over layers.
        value: SQNR of the output with them, measured, weights alone quantized; or the metric.
    """

    budget: dict[str, float]
    bits: dict[str, int | None]
    cost: float
    noise: float
    value: float

    def apply(self, model: nn.Module) -> None:
        """Give the weight quantizers of a model these bits; they start anew from the weights."""
        for name, bits in self.bits.items():
            set_bits(model.get_submodule(name), bits)


def set_bits(layer: Any, bits: int | None) -> None:
    """Build a layer's weight quantizer anew for a number of bits; None turns it off."""
    proxy = layer.weight_quant
    proxy.disable_quant = bits is None
    if bits is not None:
        proxy.overrides = {**proxy.overrides, "bit_width": bits}
        proxy.init_tensor_quant()


BUDGETS = ("mean_bits", "bytes", "bops", "metric")


@torch.no_grad()
def search_bit_widths(
    model: nn.Module,
    batches: Any,
    metric: Metric | None = None,
    candidates: Sequence[int | None] = (2, 3, 4, 6, 8, None),
    budget: Mapping[str, float] | Sequence[Mapping[str, float]] = ({"mean_bits": 4},),
    share: Sequence[Sequence[str]] = (),
    keep_float: Sequence[str] = (),
    resume: str | Path | None = None,
) -> Any:
    """Choose the bits of each layer's weight so that the output suffers least within a budget.

    Each layer is measured alone with each candidate, once for all budgets; the errors of layers are taken to add up. From the most bits
    down the change that costs least error for what it saves is made, until the budget is met, and what is left of it is spent.

    Args:
        model: with quantized weights; as it was afterwards.
        batches: see :func:`sensitivity`.
        metric: called with the model, larger is better; None for the SQNR of its output in dB.
        candidates: bits, and None for not quantized (32 bits).
        budget: one or several: ``{"mean_bits": 4}`` (over all weights), ``{"bytes": 1e6}`` (of weights), ``{"bops": 1e9}`` (bit
            operations of one batch) or ``{"metric": 30}`` (fewest bits whose measured metric is at least that).
        share: groups of names of layers that get the same bits.
        keep_float: names of layers that aren't quantized.
        resume: a JSON file of measurements, which is gone on with.

    Returns:
        :class:`BitWidths`, a list of them for several budgets.

    Raises:
        ValueError: an unknown name or budget, or one that no candidates meet.
    """
    check_module(model, "search_bit_widths")
    several = not isinstance(budget, Mapping)
    if several and (isinstance(budget, str) or not isinstance(budget, Iterable)):
        raise TypeError(
            f"search_bit_widths: budget must be a dict, such as {{'mean_bits': 4}}, or several; got {budget!r}"
        )
    given: Any = budget if several else [budget]
    budgets: list[dict[str, float]] = [dict(b) for b in given]
    proxies = _proxies(model, (WeightQuantProxyFromInjector,))
    names: dict[str, Any] = {
        n: model.get_submodule(n) for n, tensor, _ in proxies if tensor == "weight"
    }
    _check(names, budgets, candidates, share, keep_float)
    data = Batches(batches)
    groups = _groups(names, share)
    costs = costs_of(model, names, data, budgets)
    before = {n: Snapshot(m) for n, m in names.items()}
    try:
        with evaluating(model), quantizers_off(model):
            cached = None if metric is not None else CachedForward(model, data)
            base = float(metric(model)) if metric is not None else 0.0
            noise = _Measured(resume)

            def measured(name: str, bits: int) -> float:
                layer: Any = names[name]
                set_bits(layer, bits)
                try:
                    if cached is None:
                        assert metric is not None
                        return float(metric(model))
                    return _noise(cached.exact, cached.outputs(layer.weight_quant))
                finally:
                    layer.weight_quant.disable_quant = True

            widths = [b for b in candidates if b is not None]
            free = [g for g in groups if not any(n in keep_float for n in g)]
            raw = {(n, b): noise.get(n, b, measured) for g in free for n in g for b in widths}
            if metric is not None:  # how far it falls, from where nothing is quantized
                top = base if math.isfinite(base) else max(raw.values(), default=0.0)
                raw = {key: max(top - value, 0.0) for key, value in raw.items()}
            choices = []
            for group in groups:
                options = [
                    Option(
                        b,
                        0.0 if b is None else sum(raw[n, b] for n in group),
                        {k: costs.of(group, b, k) for k in costs.kinds},
                    )
                    for b in (candidates if group in free else [None])
                ]
                choices.append(Choice(tuple(group), options))

            def value_of(bits: dict[str, int | None]) -> float:
                for n, b in bits.items():
                    set_bits(names[n], b)
                try:
                    if metric is not None:
                        return float(metric(model))
                    assert cached is not None
                    found = (
                        cached.outputs(model) if isinstance(cached.traced, str) else _all(cached)
                    )
                    return sqnr(_signal(cached.exact), _noise(cached.exact, found))
                finally:
                    for n in bits:
                        names[n].weight_quant.disable_quant = True

            results = []
            for wanted in budgets:
                bits, cost, lost, value = cheapest_within(wanted, choices, costs, value_of)
                results.append(
                    BitWidths(budget=wanted, bits=bits, cost=cost, noise=lost, value=value)
                )
    finally:
        for snapshot in before.values():
            snapshot.restore()
        for layer in names.values():
            layer.weight_quant.release()
    return results if several else results[0]


def _all(cached: CachedForward) -> list[list[Tensor]]:
    assert not isinstance(cached.traced, str)
    return cached._run(set(cached.traced.graph.nodes), [{} for _ in cached.data])


class _Measured:
    """Measurements, kept in a file after each."""

    def __init__(self, file: str | Path | None) -> None:
        self.file = None if file is None else Path(file)
        known = self.file is not None and self.file.exists()
        self.found: dict[str, float] = json.loads(self.file.read_text()) if known else {}  # type: ignore[union-attr]

    def get(self, name: str, bits: int, measure: Callable[[str, int], float]) -> float:
        key = f"{name}:{bits}"
        if key not in self.found:
            self.found[key] = measure(name, bits)
            if self.file is not None:
                part = self.file.with_suffix(".part")
                part.write_text(json.dumps(self.found))
                os.replace(part, self.file)
        return self.found[key]


def _groups(names: Mapping[str, Any], share: Sequence[Sequence[str]]) -> list[list[str]]:
    groups = [list(g) for g in share]
    taken = {n for g in groups for n in g}
    return groups + [[n] for n in names if n not in taken]


def _check(
    names: Mapping[str, Any], budgets: Any, candidates: Any, share: Any, keep_float: Any
) -> None:
    for name in [*keep_float, *(n for g in share for n in g)]:
        if name not in names:
            raise ValueError(
                f"search_bit_widths: no layer {name!r} with a quantized weight; there are {', '.join(names)}"
            )
    if not candidates or any(b is not None and b < 1 for b in candidates):
        raise ValueError(f"search_bit_widths: candidates={candidates!r} must be bits, or None")
    for budget in budgets:
        if len(budget) != 1 or next(iter(budget)) not in BUDGETS:
            raise ValueError(
                f"search_bit_widths: budget={budget!r} must have one of {', '.join(BUDGETS)}"
            )
