"""Activation equalization (SmoothQuant): outliers of activations are moved into the weights that read them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qframework.core.snapshot import unchanged_on_error
from qframework.graph.attention_projections import (
    AttentionInputChanged,
    Projection,
    Projections,
    watching_projections,
    why_one_whole,
    with_projections,
)
from qframework.graph.channel_factors import columns_of, rows_of, scale_columns, scale_rows
from qframework.graph.channel_regions import Region, Use
from qframework.graph.channels import Channels
from qframework.graph.graph_pass import PassReport, graph_of, note_wholes
from qframework.graph.layer_view import LINEAR, WEIGHTED
from qframework.graph.layer_wrappers import (
    ChannelFactor,
    InputChanged,
    OutputChanged,
    replace_module,
)
from qframework.graph.parameters_in_use import fixed_among, part, why_fixed
from qframework.graph.quantizers_off import quantizers_off
from qframework.graph.reading_code import noting_reads, read_by_code
from qframework.graph.single_layers import BESIDE, IN_FRONT, note_single_layer, told
from qframework.graph.torch_transformers import call_changed_parts
from qframework.layers.base import QuantLayer

_NOTHING = 1e-9
#: Activations that don't commute with factors, behind which one can be put.
ACTIVATIONS = (
    nn.Sigmoid, nn.Tanh, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.ELU,
    nn.Softplus, nn.Hardtanh,
)  # fmt: skip


class ColumnFactor(nn.Module):
    """A parametrization: a weight whose input channels are divided by a factor.

    Args:
        layer: whose weight it is, for its shape.
        factor: the module that holds the factors.
    """

    def __init__(self, layer: nn.Module, factor: ChannelFactor) -> None:
        super().__init__()
        self.factor = factor
        per_group = getattr(layer, "in_channels", 0) // getattr(layer, "groups", 1)
        self.linear = isinstance(layer, LINEAR)
        self.groups = 1 if self.linear else int(layer.groups)  # type: ignore[arg-type]
        self.per_group = per_group

    def forward(self, weight: Tensor) -> Tensor:
        """The weight divided by the factors."""
        if self.linear:
            return weight / self.factor.weight
        each = self.factor.weight.reshape(self.groups, 1, self.per_group)
        rows = weight.shape[0] // self.groups
        beside = each.expand(-1, rows, -1).reshape(weight.shape[0], self.per_group)
        return weight / beside.reshape(*beside.shape, *[1] * (weight.dim() - 2))


class activation_equalization_mode:
    """SmoothQuant (Xiao 2022, https://arxiv.org/abs/2211.10438); the model computes the same.

    In the context the largest magnitudes of activations are seen; on leaving it channel ``c`` of a layer's input is multiplied by
    ``s_c = max|w_c|^(1 - alpha) / max|x_c|^alpha`` and the weights that read it are divided by it.

    The projections of ``nn.MultiheadAttention`` count as layers: one factor in front of query, key and value, and factors of the values
    between the rows that make them and the projection of the result.

    Args:
        model: float, in evaluation mode; changed in place.
        alpha: from 0 to 1: how much of the difficulty the weights get.
        add_mul_node: by graph, put a factor behind an activation that it can't pass.
        layerwise: True puts a factor in front of each layer; False moves it into the layers before, by graph.
        enabled: False makes the context do nothing.
        blacklist_layers: names of layers to leave alone.
        co_optimize_act_weights: by graph, take the mean of the ranges of activations and of the weights that make them.
        fuse_scaling: False leaves the factors as parameters to learn, ``fuse_parametrizations`` ends that.
        example_input: arguments of the model, where its graph can't be traced.

    Attributes:
        scale_factors: those of each region, in order.
        report: what was done, and what was skipped with the reason.

    Raises:
        ValueError: ``alpha`` outside of 0 to 1, or a name that the model doesn't have.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float,
        add_mul_node: bool = True,
        layerwise: bool = True,
        enabled: bool = True,
        blacklist_layers: Sequence[str] | None = None,
        co_optimize_act_weights: bool = False,
        fuse_scaling: bool = True,
        example_input: tuple[Any, ...] = (),
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"activation_equalization_mode: alpha={alpha} must be from 0 to 1")
        names = dict(model.named_modules())
        for name in blacklist_layers or ():
            if name not in names:
                raise ValueError(
                    f"activation_equalization_mode: blacklist_layers names {name!r}, which the model doesn't have"
                )
        self.model, self.alpha, self.enabled = model, alpha, enabled
        self.layerwise, self.add_mul_node = layerwise, add_mul_node
        self.blacklist = with_projections(model, blacklist_layers or ())
        self.co_optimize, self.fuse_scaling = co_optimize_act_weights, fuse_scaling
        self.example_input = example_input
        self.scale_factors: list[Tensor] = []
        self.report = PassReport(way="not needed" if layerwise else "")
        self._ranges: dict[nn.Module, Tensor] = {}
        self._fronts: dict[nn.Module, nn.Module] = {}

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        if not self.enabled:
            return self
        self._read = read_by_code(self.model) if self.layerwise else set()
        self._regions = self._alone() if self.layerwise else self._by_graph()
        sinks = {u.layer: None for r in self._regions for u in r.sinks}
        self._stack.enter_context(quantizers_off(self.model))
        self._stack.enter_context(watching_projections(list(sinks), self._see))
        if self.layerwise:
            self._stack.enter_context(noting_reads(self.model, self._read))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.close()
        if kind is None and self.enabled:
            with torch.no_grad(), unchanged_on_error(self.model):
                regions = [r for r in self._regions if not self._is_fixed(r)]
                used = [u.layer for r in regions for u in (*r.sources, *r.sinks)]
                part(self.model, used)
                for region in regions:
                    self._equalize(region)
                call_changed_parts(self.model)
            why = "it has no linear layer or convolution" if self.layerwise else BESIDE
            note_single_layer(self.report, self.model, why)

    # ------------------------------------------------------------ what is equalized

    def _alone(self) -> list[Region]:
        found, inside = list[Region](), set[nn.Module]()
        for name, layer in self.model.named_modules():
            if isinstance(layer, nn.MultiheadAttention) and not isinstance(layer, QuantLayer):
                inside |= set(layer.modules())
                found += self._of_attention(name, layer)
            elif isinstance(layer, WEIGHTED) and layer not in inside and name not in self.blacklist:
                fixed = why_fixed(layer, self._read)
                if fixed is not None:
                    self.report.skipped[name] = fixed
                    continue
                held: Any = layer
                count = held.in_features if isinstance(layer, LINEAR) else held.in_channels
                ids, free = torch.arange(count), torch.ones(count, dtype=torch.bool)
                found.append(Region([], [Use(name, layer, ids)], count, free, []))
        return [r for r in found if self._has_room(r)]

    def _of_attention(self, name: str, attention: nn.Module) -> list[Region]:
        """What attention projects, each alone, and the values, whose factors go into the rows that make them."""
        reason = why_one_whole(attention) or why_fixed(attention, self._read)
        if reason is not None:
            self.report.skipped[name] = reason
            return []
        same = bool(attention._qkv_same_embed_dim)  # one factor for all three then
        parts = Projections(attention, name, same)
        found = [_region([], [Use(n, layer, _channels(layer))]) for n, layer, _ in parts.inputs]
        (value, made), (result, last) = parts.value, parts.result
        if attention.bias_v is not None:
            self.report.skipped[result] = f"{name} adds bias_v to the values"
        else:
            sources = [Use(value, made, _channels(last))]
            found.append(_region(sources, [Use(result, last, _channels(last))]))
        return [r for r in found if r.sinks[0].name not in self.blacklist]

    def _has_room(self, region: Region) -> bool:
        """Whether a factor can be put in front of what reads it."""
        layer: Any = region.sinks[0].layer
        alone = getattr(layer, "attention", layer) is self.model
        if alone and not region.sources:
            self.report.skipped[region.sinks[0].name] = told(self.model, IN_FRONT)
        return not alone or bool(region.sources)

    def _is_fixed(self, region: Region) -> bool:
        """Whether the run showed that code reads parameters of a layer."""
        fixed = fixed_among(region.sinks, self._read)
        self.report.skipped.update(fixed)
        return bool(fixed)

    def _by_graph(self) -> list[Region]:
        traced, self.report.way = graph_of(
            self.model,
            "activation_equalization_mode",
            self.example_input,
            "activation_equalization_mode(..., example_input=(x,))",
        )
        restarts = ACTIVATIONS if self.add_mul_node else ()
        note_wholes(self.report, traced)
        regions = Channels(traced, restarts=restarts).regions()
        found = []
        for region in regions:
            names = [u.name for u in (*region.sources, *region.sinks)]
            if self.blacklist & set(names):
                self.report.skipped[", ".join(names)] = "as blacklist_layers says"
            elif not bool(region.free.any()):
                self.report.skipped[", ".join(names)] = "; ".join(region.reasons)
            else:
                found.append(region)
        return found

    def _see(self, layer: nn.Module, x: Tensor) -> None:
        axis = -1 if isinstance(layer, LINEAR) else -1 - len(layer.kernel_size)  # type: ignore[arg-type]
        largest = x.detach().movedim(axis, 0).flatten(1).abs().amax(dim=1).to(torch.float32)
        before = self._ranges.get(layer)
        self._ranges[layer] = largest if before is None else torch.maximum(before, largest)

    # ------------------------------------------------------------ the factors

    def _equalize(self, region: Region) -> None:
        seen = [(u, self._ranges[u.layer]) for u in region.sinks if u.layer in self._ranges]
        if not seen:
            self.report.skipped[", ".join(u.name for u in region.sinks)] = "no data reached it"
            return
        activations = _largest([(u, r.unsqueeze(1)) for u, r in seen], region)
        weights = _largest([(u, columns_of(u.layer)) for u in region.sinks], region)
        layers = [u for u in region.sources if isinstance(u.layer, WEIGHTED)]
        if self.co_optimize and layers and len(layers) == len(region.sources):
            made = _largest([(u, rows_of(u.layer)) for u in layers], region)
            activations = 0.5 * (activations + made)
        usable = region.free.to(weights.device) & (weights > _NOTHING) & (activations > _NOTHING)
        ones = torch.ones_like(weights)
        factor = torch.where(usable, weights, ones) ** (1 - self.alpha)
        factor = factor / torch.where(usable, activations, ones) ** self.alpha
        self.scale_factors.append(self._apply(region, factor))

    def _apply(self, region: Region, factor: Tensor) -> Tensor:
        learned = None if self.fuse_scaling else ChannelFactor(factor, -1).requires_grad_(True)
        for use in region.sources:
            each = factor[use.ids]
            if isinstance(use.layer, WEIGHTED) or "weight" in use.layer._parameters:
                scale_rows(use.layer, each.to(rows_of(use.layer).dtype))
            else:
                behind = ChannelFactor(each, self._axis(region))
                replace_module(self.model, use.layer, OutputChanged(use.layer, behind))
            self.report.changed[use.name] = "output channels scaled"
        for use in region.sinks:
            each = factor[use.ids].to(columns_of(use.layer).dtype)
            if not region.sources:
                self._in_front(use, each)
            else:
                scale_columns(use.layer, 1 / each)
            self.report.changed[use.name] = "input channels scaled"
        return factor if learned is None else learned.weight

    def _in_front(self, use: Use, factor: Tensor) -> None:
        layer: Any = use.layer
        if isinstance(layer, Projection):
            self._in_front_of_attention(layer, factor)
            return
        axis = -1 if isinstance(layer, LINEAR) else -1 - len(layer.kernel_size)
        front = ChannelFactor(factor, axis)
        if self.fuse_scaling:
            scale_columns(layer, 1 / factor)
        else:
            front.requires_grad_(True)
            parametrize.register_parametrization(layer, "weight", ColumnFactor(layer, front))
        replace_module(self.model, layer, InputChanged(front, layer))

    def _in_front_of_attention(self, layer: Projection, factor: Tensor) -> None:
        front = ChannelFactor(factor, -1).train(layer.attention.training)
        if self.fuse_scaling:
            scale_columns(layer, 1 / factor)
        else:
            front.requires_grad_(True)
            layer.parametrize(ColumnFactor(layer, front))
        now = self._fronts.get(layer.attention, layer.attention)
        made = AttentionInputChanged(front, now, layer.operands).train(layer.attention.training)
        self._fronts[layer.attention] = made
        replace_module(self.model, now, made)

    def _axis(self, region: Region) -> int:
        layer: Any = region.sinks[0].layer
        return -1 if isinstance(layer, LINEAR) else -1 - len(layer.kernel_size)


def _channels(layer: Any) -> Tensor:
    return torch.arange(layer.in_features)


def _region(sources: list[Use], sinks: list[Use]) -> Region:
    """A region of whole layers."""
    count = len(sinks[0].ids)
    return Region(sources, sinks, count, torch.ones(count, dtype=torch.bool), [])


def _largest(parts: list[tuple[Use, Tensor]], region: Region) -> Tensor:
    """The largest magnitude for each channel of a region."""
    result = torch.zeros(region.size, device=parts[0][1].device)
    for use, numbers in parts:
        values = numbers.abs().amax(dim=1).to(torch.float32)
        result.scatter_reduce_(0, use.ids.to(values.device), values, "amax")
    return result
