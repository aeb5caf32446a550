"""Channel splitting: outliers are halved by computing their channel twice."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.channel_factors import columns_of, follow_weights, rows_of
from qframework.graph.channel_regions import Region
from qframework.graph.channels import Channels
from qframework.graph.graph_pass import GraphPass
from qframework.graph.layer_view import LINEAR, TRANSPOSED, WEIGHTED
from qframework.graph.tracing import Traced
from qframework.layers.linear import TransposedLinear


class GraphChannelSplitting(GraphPass):
    """Outlier channel splitting (Zhao 2019, https://arxiv.org/abs/1901.09504); the model computes the same.

    The channels with the largest weights are there twice afterwards, behind the others: with ``split_input`` the weights that read
    them are halved, otherwise those that write them. Regions with grouped convolutions, norms or shared
    modules whose sides don't fit are left alone, with the reason in ``report``.

    Args:
        split_ratio: share of the channels, rounded up.
        split_criterion: ``"maxabs"``, the largest magnitude.
        split_input: split where channels are read.

    Raises:
        ValueError: a ratio outside of 0 to 1, or another criterion.
    """

    scales_channels = True

    def __init__(
        self, split_ratio: float = 0.02, split_criterion: str = "maxabs", split_input: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= split_ratio <= 1:
            raise ValueError(
                f"GraphChannelSplitting: split_ratio={split_ratio} must be from 0 to 1"
            )
        if split_criterion != "maxabs":
            raise ValueError(
                f"GraphChannelSplitting: split_criterion={split_criterion!r}; allowed: 'maxabs'"
            )
        self.split_ratio, self.split_input = split_ratio, split_input

    def change(self, model: nn.Module, traced: Traced) -> None:
        """Split the channels of all regions."""
        for region in Channels(traced, attention=False).regions():
            names = ", ".join(u.name for u in (*region.sources, *region.sinks))
            reason = self._hindrance(region)
            if reason is not None:
                self.report.skipped[names] = reason
            elif math.ceil(self.split_ratio * region.size):
                self._split(region)

    def _hindrance(self, region: Region) -> str | None:
        if not region.is_free:
            return "; ".join(region.reasons) or "some channels are read or written elsewhere"
        for use in (*region.sources, *region.sinks):
            if not isinstance(use.layer, WEIGHTED):
                return f"{use.name} is no layer with weights"
            if getattr(use.layer, "groups", 1) > 1:
                return f"{use.name} is a grouped convolution"
        ids = [u.ids for u in region.sources]
        if any(len(i) != region.size or not torch.equal(i, ids[0]) for i in ids):
            return "its channels are put together from several layers"
        for use in region.sinks:
            each = len(use.ids) // region.size
            if not torch.equal(use.ids, ids[0].repeat_interleave(max(each, 1))):
                return f"{use.name} reads its channels in another order"
        return None

    @torch.no_grad()
    def _split(self, region: Region) -> None:
        count = math.ceil(self.split_ratio * region.size)
        uses = region.sinks if self.split_input else region.sources
        chosen = []
        for use in uses:
            numbers = columns_of(use.layer) if self.split_input else rows_of(use.layer)
            largest = numbers.abs().amax(dim=1).reshape(region.size, -1).amax(dim=1)
            chosen.append(largest.argsort(descending=True)[:count])
        channels = torch.cat(chosen).unique()
        for use in region.sources:
            _extend_rows(use.layer, channels, 1.0 if self.split_input else 0.5)
        for use in region.sinks:
            each = len(use.ids) // region.size
            places = (channels.unsqueeze(1) * each + torch.arange(each)).flatten()
            _extend_columns(use.layer, places, 0.5 if self.split_input else 1.0)
        for use in (*region.sources, *region.sinks):
            self.report.changed[use.name] = f"{len(channels)} channels twice"


def _extend(weight: Tensor, axis: int, channels: Tensor, factor: float) -> Tensor:
    scale = weight.new_ones(weight.shape[axis])
    scale[channels] = factor
    shape = [1] * weight.dim()
    shape[axis] = -1
    scaled = weight * scale.reshape(shape)
    return torch.cat([scaled, scaled.index_select(axis, channels)], dim=axis)


def _extend_rows(layer: Any, channels: Tensor, factor: float) -> None:
    axis = 1 if isinstance(layer, (*TRANSPOSED, TransposedLinear)) else 0
    _assign(layer, "weight", _extend(layer.weight, axis, channels, factor))
    if layer.bias is not None:
        _assign(layer, "bias", _extend(layer.bias, 0, channels, factor))
    name = "out_features" if isinstance(layer, LINEAR) else "out_channels"
    setattr(layer, name, getattr(layer, name) + len(channels))
    follow_weights(layer)


def _extend_columns(layer: Any, channels: Tensor, factor: float) -> None:
    axis = 0 if isinstance(layer, (*TRANSPOSED, TransposedLinear)) else 1
    _assign(layer, "weight", _extend(layer.weight, axis, channels, factor))
    name = "in_features" if isinstance(layer, LINEAR) else "in_channels"
    setattr(layer, name, getattr(layer, name) + len(channels))
    follow_weights(layer)


def _assign(layer: nn.Module, name: str, value: Tensor) -> None:
    old = layer._parameters[name]
    assert old is not None
    setattr(layer, name, nn.Parameter(value, requires_grad=old.requires_grad))
