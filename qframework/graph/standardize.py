"""Passes that bring float models into a form that others work on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qframework.graph.batch_norm_folding import FoldedBatchNorm, foldable
from qframework.graph.graph_pass import GraphPass
from qframework.graph.layer_view import LINEAR, WEIGHTED, LayerView
from qframework.graph.layer_wrappers import replace_module
from qframework.graph.tracing import Traced
from qframework.layers.batch_norm import mul_add_from_bn
from qframework.layers.wbiol import QuantWeightBiasInputOutputLayer


class FoldedNorm(FoldedBatchNorm):
    """What is left of a norm that was folded."""


class MergeBatchNorm(GraphPass):
    """Fold batch norms into the layers in front of them; in evaluation mode the model computes the same.

    ``weight * gamma / sqrt(var + eps)``, ``(bias - mean) * gamma / sqrt(var + eps) + beta``. A batch norm that others
    read past, without running statistics, or behind something else stays, with the reason in ``report``.
    """

    def change(self, model: nn.Module, traced: Traced) -> None:
        """Fold all that can be."""
        names = {m: n for n, m in model.named_modules()}
        found = foldable(model, traced, lambda m: _base(m))
        for layer, norm in found.pairs.items():
            if isinstance(layer, QuantWeightBiasInputOutputLayer):
                layer.merge_bn_in(norm)
            else:
                merge(layer, norm)
            stands = FoldedNorm(isinstance(layer, LINEAR), found.then.get(norm, ()))
            for name in stands.then:
                stands.add_module(name, norm._modules[name])
            replace_module(model, norm, stands)
            self.report.changed[names[norm]] = f"folded into {names[layer]}"
        for norm, reason in found.reasons.items():
            self.report.skipped[names[norm]] = reason


def _base(module: nn.Module) -> type[nn.Module] | None:
    kinds = [k for k in WEIGHTED if isinstance(module, k)]
    return kinds[0] if kinds and "weight" in module._parameters else None


@torch.no_grad()
def merge(layer: Any, norm: Any) -> None:
    """Fold a batch norm into a float layer's own parameters; a missing bias is created."""
    factor, shift = mul_add_from_bn(
        norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    view = LayerView(layer)
    matrix = view.to_matrix(layer.weight) * factor.reshape(view.groups, 1, -1)
    layer.weight.copy_(view.from_matrix(matrix))
    if layer.bias is None:
        trained = layer.weight.requires_grad
        layer.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad=trained)
    else:
        layer.bias.mul_(factor).add_(shift)
