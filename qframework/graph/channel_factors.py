"""Factors on the channels of layers: what a layer's weights are on one side, and how they are multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qframework.graph.attention_projections import Projection
from qframework.graph.layer_view import WEIGHTED, LayerView
from qframework.proxy import QuantProxy


def rows_of(layer: nn.Module) -> Tensor:
    """The weights of each output channel, ``(channels, count)``; of a norm its factors."""
    if isinstance(layer, WEIGHTED):
        matrix = LayerView(layer).to_matrix(weight_of(layer))  # (groups, columns, rows)
        return matrix.transpose(1, 2).flatten(0, 1)
    return weight_of(layer).unsqueeze(1)


def columns_of(layer: nn.Module) -> Tensor:
    """The weights that read each input channel, ``(channels, count)``."""
    view = LayerView(layer)
    matrix: Tensor = view.to_matrix(weight_of(layer))
    channels = view.channels_of_columns()
    per_group = int(channels.max()) + 1 if view.groups == 1 else int(channels[0].max()) + 1
    split: Tensor = matrix.unflatten(1, (per_group, -1))  # type: ignore[no-untyped-call]
    return split.flatten(2).flatten(0, 1)


def bias_of(layer: nn.Module) -> Tensor | None:
    """The summand of each output channel."""
    bias = layer._parameters.get("bias")
    return None if bias is None else bias.detach()


def weight_of(layer: nn.Module) -> Tensor:
    """The weight itself, to be read or written in place; what a layer calls its weight may be quantized."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.detach()


@torch.no_grad()
def scale_rows(layer: nn.Module, factor: Tensor) -> None:
    """Multiply what a layer writes by a factor for each output channel, ``(channels,)``."""
    weight, bias = weight_of(layer), bias_of(layer)
    if isinstance(layer, WEIGHTED):
        view = LayerView(layer)
        matrix = view.to_matrix(weight_of(layer)) * factor.reshape(view.groups, 1, -1)
        weight.copy_(view.from_matrix(matrix))
    else:
        weight.mul_(factor)
    if bias is not None:
        bias.mul_(factor)
    follow_weights(layer)


@torch.no_grad()
def scale_columns(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the weights that read an input channel by a factor for each, ``(channels,)``."""
    view = LayerView(layer)
    channels = view.channels_of_columns().to(factor.device)
    matrix = view.to_matrix(weight_of(layer)) * factor[channels].unsqueeze(-1)
    weight_of(layer).copy_(view.from_matrix(matrix))
    follow_weights(layer)


def follow_weights(layer: nn.Module) -> None:
    """Let the quantizers of parameters start anew from what they are now."""
    layer = layer.holder if isinstance(layer, Projection) else layer
    for name in ("weight_quant", "bias_quant"):
        proxy: Any = layer._modules.get(name)
        if isinstance(proxy, QuantProxy):
            proxy.reinitialize()
