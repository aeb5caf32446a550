"""AWQ: weights that meet large activations are made larger before they are quantized, and outliers are clipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.core.snapshot import unchanged_on_error
from qframework.graph.activation_equalization import ACTIVATIONS
from qframework.graph.attention_projections import Projection
from qframework.graph.batches import Batches
from qframework.graph.channel_factors import columns_of, follow_weights, scale_columns, scale_rows
from qframework.graph.channel_regions import Region, Use
from qframework.graph.channels import Channels
from qframework.graph.graph_pass import PassReport
from qframework.graph.input_statistics import InputStatistics
from qframework.graph.layer_inputs import watching
from qframework.graph.layer_view import LINEAR, WEIGHTED, LayerView
from qframework.graph.layer_wrappers import ChannelFactor, InputChanged, replace_module
from qframework.graph.parameters_in_use import fixed_among, why_fixed
from qframework.graph.quantizers_off import quantizers_off
from qframework.graph.reading_code import noting_reads, read_by_code
from qframework.graph.single_layers import note_single_layer, traced_whole
from qframework.graph.torch_transformers import call_changed_parts
from qframework.graph.tracing import Traced
from qframework.graph.weight_writing import own_parameter
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer
from qframework.quant_tensor import dequantize

#: Shares of the largest weight of a channel that are tried as a bound.
_CLIPS = tuple(1 - 0.05 * i for i in range(1, 11))


class AWQ:
    """What :func:`awq` did.

    Attributes:
        report: what was changed, and what was skipped with the reason.
        read: modules whose parameters code reads past them.
        errors: from names of layers to the relative squared error of their outputs before and after.
        alphas: from names of layers to the exponent that was chosen.
    """

    def __init__(self, model: nn.Module, grid: int, clip: bool) -> None:
        self.model, self.grid, self.clip = model, grid, clip
        self.report = PassReport()
        self.read = read_by_code(model)
        self.errors: dict[str, tuple[float, float]] = {}
        self.alphas: dict[str, float] = {}
        self._statistics: dict[nn.Module, InputStatistics] = {}
        self._means: dict[nn.Module, tuple[Tensor, int]] = {}

    # ------------------------------------------------------------ statistics

    def see(self, layer: nn.Module, x: Tensor) -> None:
        """Take one input of a layer."""
        view = LayerView(layer)
        if layer not in self._statistics:
            self._statistics[layer] = InputStatistics(view, x.device, torch.float32, False)
        self._statistics[layer].add(x)
        axis = -1 if view.is_linear else -1 - len(layer.kernel_size)  # type: ignore[arg-type]
        rows = x.detach().movedim(axis, 0).flatten(1).abs().to(torch.float32)
        total, count = self._means.get(layer, (torch.zeros(len(rows), device=x.device), 0))
        self._means[layer] = (total + rows.sum(dim=1), count + rows.shape[1])

    # ------------------------------------------------------------ the search

    def regions(self) -> list[Region]:
        """Quantized layers with what writes their inputs; those without are alone."""
        wanted = {
            m: n
            for n, m in self.model.named_modules()
            if isinstance(m, QuantWeightBiasInputOutputLayer)
            and isinstance(m, WEIGHTED)
            and m.weight_quant.is_quant_enabled
            and not m.weight_quant.requires_quant_input
        }
        for layer, name in list(wanted.items()):
            fixed = why_fixed(layer, self.read)
            if fixed is not None:
                self.report.skipped[name] = fixed
                del wanted[layer]
        found: list[Region] = []
        traced = traced_whole(self.model)
        if isinstance(traced, Traced):
            self.report.way = "traced"
            for region in Channels(traced).regions():
                sinks = {u.layer for u in region.sinks}
                own = all(len(u.ids) == region.size for u in region.sinks)
                if (
                    sinks <= set(wanted)
                    and region.is_free
                    and own
                    and not isinstance(region.sources[0].layer, ACTIVATIONS)
                ):
                    found.append(region)
        else:
            self.report.way = (
                f"not known, so that each layer is alone: it can't be traced by torch.fx ({traced})"
            )
        done = {u.layer for r in found for u in r.sinks}
        for layer, name in wanted.items():
            if layer not in done:
                held: Any = layer
                count = held.in_features if isinstance(layer, LINEAR) else held.in_channels
                ids, free = torch.arange(count), torch.ones(count, dtype=torch.bool)
                found.append(Region([], [Use(name, layer, ids)], count, free, []))
        return found

    def is_fixed(self, region: Region) -> bool:
        """Whether the run showed that code reads parameters of a layer."""
        fixed = fixed_among(region.sinks, self.read)
        self.report.skipped.update(fixed)
        return bool(fixed)

    def search(self, region: Region) -> None:
        """Scale one region, and clip its weights."""
        uses = [u for u in region.sinks if u.layer in self._statistics]
        for use in region.sinks:
            if use not in uses:
                self.report.skipped[use.name] = "no data reached it"
        if len(uses) < len(region.sinks):
            return
        importance = torch.zeros(region.size, device=uses[0].layer.weight.device)  # type: ignore[arg-type]
        for use in uses:
            total, count = self._means[use.layer]
            importance.scatter_reduce_(0, use.ids.to(total.device), total / max(count, 1), "amax")
        importance = importance.clamp_min(1e-8)
        before = self._errors(uses, torch.ones_like(importance))
        best, least, alpha = torch.ones_like(importance), sum(before), 0.0
        # in front of the whole model nothing can be put
        alone = not region.sources and region.sinks[0].layer is self.model
        for i in range(1, 0 if alone else self.grid + 1):
            factor = importance ** (i / self.grid)
            factor = factor / (factor.max() * factor.min()).sqrt()
            error = sum(self._errors(uses, factor))
            if error < least:
                best, least, alpha = factor, error, i / self.grid
        if alpha:
            self._apply(region, best)
        after = before
        for i, use in enumerate(uses):
            scaled = best[use.ids]
            now = self._clip(use, scaled) if self.clip else None
            if now is None:
                now = self._errors([use], torch.ones_like(scaled), scaled)[0]
            after = [*after[:i], now, *after[i + 1 :]]
            self.alphas[use.name] = alpha
            self.errors[use.name] = (before[i], now)
            if alpha or now < before[i]:
                self.report.changed[use.name] = (
                    f"alpha {alpha:g}, error {before[i]:.3g} to {now:.3g}"
                )
            else:
                self.report.skipped[use.name] = "no scale or bound lowers its error"

    def _errors(self, uses: list[Use], factor: Tensor, base: Tensor | None = None) -> list[float]:
        """Relative errors with weights times a factor.

        Args:
            uses: the layers.
            factor: that is tried, for each channel of the region.
            base: by what the weights are scaled already; the statistics aren't.
        """
        return [self._error(use, factor[use.ids], base) for use in uses]

    def _error(self, use: Use, factor: Tensor, base: Tensor | None) -> float:
        layer: Any = use.layer
        view, weight = LayerView(layer), layer._parameters["weight"]
        original = weight.detach().clone()
        scale_columns(layer, factor.to(weight.dtype))
        value = dequantize(layer.quant_weight()).detach().clone()
        weight.copy_(original)
        follow_weights(layer)
        whole = factor if base is None else factor * base
        back = (1 / whole)[view.channels_of_columns().to(whole.device)].unsqueeze(-1)
        plain = view.to_matrix(original)
        if base is not None:
            plain = plain * (1 / base)[view.channels_of_columns().to(base.device)].unsqueeze(-1)
        return self._statistics[layer].relative_error(plain, view.to_matrix(value) * back)

    def _clip(self, use: Use, base: Tensor) -> float:
        """Bound the weights of a layer where that lowers its error; the error then."""
        layer: Any = use.layer
        view, weight = LayerView(layer), layer._parameters["weight"]
        original = weight.detach().clone()
        matrix = view.to_matrix(original)
        largest = matrix.abs().amax(dim=1, keepdim=True)
        best, least = original, self._clipped_error(use, original, original, base)
        for share in _CLIPS:
            bound = largest * share
            clipped = view.from_matrix(torch.minimum(torch.maximum(matrix, -bound), bound))
            error = self._clipped_error(use, clipped, original, base)
            if error < least:
                best, least = clipped, error
        weight.copy_(best)
        follow_weights(layer)
        return least

    def _clipped_error(self, use: Use, tried: Tensor, original: Tensor, base: Tensor) -> float:
        layer: Any = use.layer
        view, weight = LayerView(layer), layer._parameters["weight"]
        weight.copy_(tried)
        follow_weights(layer)
        value = dequantize(layer.quant_weight()).detach()
        back = (1 / base)[view.channels_of_columns().to(base.device)].unsqueeze(-1)
        whole, found = view.to_matrix(original) * back, view.to_matrix(value) * back
        return self._statistics[layer].relative_error(whole, found)

    def _apply(self, region: Region, factor: Tensor) -> None:
        for use in region.sources:
            each = (1 / factor)[use.ids]
            scale_rows(use.layer, each.to(use.layer.weight.dtype))  # type: ignore[arg-type]
        for use in region.sinks:
            each = factor[use.ids].to(columns_of(use.layer).dtype)
            scale_columns(use.layer, each)
            if not region.sources:
                layer: Any = use.layer
                axis = -1 if isinstance(layer, LINEAR) else -1 - len(layer.kernel_size)
                front = ChannelFactor(1 / each, axis).train(layer.training)
                replace_module(self.model, layer, InputChanged(front, layer))


@torch.no_grad()
def awq(model: nn.Module, batches: Any, grid: int = 20, clip: bool = True) -> AWQ:
    """Activation-aware weight quantization (Lin 2023, https://arxiv.org/abs/2306.00978).

    Channel ``c`` of a layer's input is divided by ``s_c = mean|x_c|^alpha`` (so that ``max s * min s = 1``) and the weights that read it
    are multiplied by it, for the ``alpha`` out of ``grid`` between 0 and 1 whose quantized weights give the least error of the output;
    then weights are clipped at a share of the largest one of their output channel, if that lowers the error. The factor
    goes into the layer before where the graph allows it, else in front of the layer. Inputs' quantizers
    are to be calibrated afterwards.

    Args:
        model: with quantized layers, in evaluation mode, not calibrated; changed in place. The float function stays the
            same up to clipping.
        batches: an iterable of tensors, tuples (``model(*batch)``) or dicts (``model(**batch)``), or a callable that runs the model.
        grid: number of exponents.
        clip: whether weights are clipped.

    Returns:
        What was done.

    Raises:
        ValueError: ``grid`` below 1.
    """
    if grid < 1:
        raise ValueError(f"awq: grid={grid} must be 1 or above")
    data = Batches(batches)
    done = AWQ(model, grid, clip)
    with unchanged_on_error(model):
        regions = done.regions()
        layers = [u.layer for r in regions for u in r.sinks]
        with (
            quantizers_off(model),
            watching(layers, done.see),
            noting_reads(model, done.read),
        ):
            data.run(model)
        regions = [r for r in regions if not done.is_fixed(r)]
        used = {u.layer: 0 for r in regions for u in (*r.sources, *r.sinks)}
        for layer in used:
            held, names = layer, ("weight", "bias")
            if isinstance(layer, Projection):
                held, names = layer.holder, layer.names
            for name in names:
                if held._parameters.get(name) is not None:
                    own_parameter(held, name)
        for layer in used:
            if isinstance(layer, Projection):
                layer.refresh()
        for region in regions:
            done.search(region)
        call_changed_parts(model)
    note_single_layer(done.report, model, "it has no linear layer or convolution to scale")
    return done
