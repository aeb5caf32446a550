"""Norms without factors of their own: their affine part goes into what reads them, their mean into what they read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qframework.graph.attention_projections import (
    Projection,
    Projections,
    operands_of,
    projections_of,
)
from qframework.graph.channel_factors import follow_weights
from qframework.graph.channel_operations import PASSING, PASSING_FUNCTIONS
from qframework.graph.channel_regions import MEAN, Region
from qframework.graph.channels import Channels
from qframework.graph.graph_pass import GraphPass
from qframework.graph.layer_view import LINEAR, LayerView
from qframework.graph.layer_wrappers import replace_module
from qframework.graph.parameters_in_use import part, readers_in_code, why_fixed
from qframework.graph.tracing import Traced


def readers_of(node: fx.Node, traced: Traced) -> list[fx.Node]:
    """The nodes that read a result, what passes it on left out."""
    found = []
    for user in node.users:
        module = traced.called(user)
        if isinstance(module, PASSING) or (module is None and user.target in PASSING_FUNCTIONS):
            found += readers_of(user, traced)
        else:
            found.append(user)
    return found


def _origin(node: fx.Node, traced: Traced) -> fx.Node:
    """The node whose result this is, through what passes it on."""
    while True:
        module = traced.called(node)
        passes = isinstance(module, PASSING) or (
            module is None and node.op.startswith("call") and node.target in PASSING_FUNCTIONS
        )
        if not passes or not node.args or not isinstance(node.args[0], fx.Node):
            return node
        node = node.args[0]


def _are_operands(call: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether attention is given nodes as query, key or value, and in no other place."""
    given = [*call.args, *call.kwargs.values()]
    places = sum(any(x is n for n in nodes) for x in given)
    return places == sum(any(x is n for n in nodes) for x in operands_of(call))


class MergeLnAffine(GraphPass):
    """Fold factors and summands of layer norms and RMS norms into the linear layers that read them; the model computes the same.

    ``W' = W diag(gamma)``, ``b' = b + W beta``, for each of the layers that read a norm, once; the projections of
    ``nn.MultiheadAttention`` are such layers. A norm that anything but linear layers reads stays, with the reason in ``report``.
    """

    def change(self, model: nn.Module, traced: Traced) -> None:
        """Fold all that can be."""
        self._model = model
        self._attention, self._in_code = projections_of(traced), readers_in_code(traced)
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in traced.graph.nodes:
            module = traced.called(node)
            if module is not None:
                calls.setdefault(module, []).append(node)
        for norm, nodes in calls.items():
            if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and "weight" in norm._parameters:
                if norm.weight is not None:
                    self._fold(norm, nodes, traced, calls)

    def _of_attention(
        self, norms: list[fx.Node], reader: fx.Node, parts: Projections, traced: Traced
    ) -> list[tuple[str, nn.Module]]:
        """The projections that read a norm in a call of attention, and nothing else in any call."""
        read: dict[nn.Module, set[bool]] = {}
        for call in traced.graph.nodes:
            if traced.called(call) is parts.attention:
                for _, layer, operand in parts.read_by(call):
                    here = operand is not None and _origin(operand, traced) in norms
                    read.setdefault(layer, set()).add(here)
        from_norm = [n for n in reader.all_input_nodes if _origin(n, traced) in norms]
        mixed = any(o in from_norm and read[m] != {True} for _, m, o in parts.read_by(reader))
        if mixed or not _are_operands(reader, from_norm):
            return []
        return [(name, layer) for name, layer, _ in parts.inputs if read[layer] == {True}]

    def _fold(
        self, norm: Any, nodes: list[fx.Node], traced: Traced, calls: dict[nn.Module, list[fx.Node]]
    ) -> None:
        name = str(nodes[0].target)
        readers = [r for n in nodes for r in readers_of(n, traced)]
        fixed = why_fixed(norm, self._in_code)
        if fixed is not None:
            self.report.skipped[name] = fixed
            return
        layers: dict[nn.Module, str] = {}
        whole: dict[nn.Module, Any] = {}
        for reader in readers:
            layer = traced.called(reader)
            fixed = None if layer is None else why_fixed(layer, self._in_code)
            if fixed is not None:
                self.report.skipped[name] = f"{reader.target} reads it: {fixed}"
                return
            if layer in self._attention and norm.weight.dim() == 1:
                found = self._of_attention(nodes, reader, self._attention[layer], traced)
                if not found:
                    self.report.skipped[name] = f"{reader.target} reads something else too"
                    return
                layers.update((part, part_name) for part_name, part in found)
                whole.update((part, layer) for _, part in found)
                continue
            if not isinstance(layer, LINEAR) or norm.weight.dim() != 1:
                self.report.skipped[name] = f"{reader.name} reads it, which is no linear layer"
                return
            if layer._forward_hooks or layer._forward_pre_hooks:
                self.report.skipped[name] = f"{reader.target} has hooks"
                return
            layers[layer] = str(reader.target)
        if not layers:
            self.report.skipped[name] = "nothing reads it"
            return
        for layer, reader_name in layers.items():
            if any(call not in readers for call in calls[whole.get(layer, layer)]):
                self.report.skipped[name] = f"{reader_name} reads something else too"
                return
        part(self._model, [norm])
        for layer, reader_name in layers.items():
            if isinstance(layer, Projection):
                layer.make_own(bias=getattr(norm, "bias", None) is not None)
            fold_affine(norm, layer)
            self.report.changed[reader_name] = f"{name} folded into it"
        with torch.no_grad():
            norm.weight.fill_(1)
            if getattr(norm, "bias", None) is not None:
                norm.bias.zero_()


@torch.no_grad()
def fold_affine(norm: Any, layer: Any) -> None:
    """Fold a norm's factors and summands into one linear layer, whose weight becomes a tensor of its own.

    That of a projection of attention is written in place.
    """
    view = LayerView(layer)
    matrix = view.to_matrix(layer.weight)  # (1, in, out)
    trained, in_place = layer.weight.requires_grad, isinstance(layer, Projection)
    summand = getattr(norm, "bias", None)
    if summand is not None:
        shift = summand.to(matrix.dtype) @ matrix[0]
        if in_place:
            layer.bias.add_(shift)
        else:
            bias = shift if layer.bias is None else layer.bias + shift
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    weight = view.from_matrix(matrix * norm.weight.to(matrix.dtype).reshape(1, -1, 1))
    if in_place:
        layer.weight.copy_(weight)
    else:
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    follow_weights(layer)


class LayerNormToRMS(GraphPass):
    """Turn layer norms into RMS norms (SliceGPT 2024, https://arxiv.org/abs/2401.15024); the model computes the same.

    The mean over channels is taken off what the layers in front write, ``W' = W - mean(W)`` over the output channels, so that a
    norm has none to subtract. All that write to a layer norm have to be linear layers or embeddings, all that read them layer
    norms, without a summand (:class:`MergeLnAffine` comes first); otherwise they stay, with the reason in ``report``.

    Args:
        return_rewriters: let ``apply`` return the names of the norms too.
    """

    def __init__(self, return_rewriters: bool = False) -> None:
        super().__init__()
        self.return_rewriters = return_rewriters

    def apply(self, model: nn.Module, *example_input: Any) -> Any:
        """Change a model in place; see :class:`~qframework.graph.graph_pass.GraphPass`."""
        result = super().apply(model, *example_input)
        return (result, list(self._norms)) if self.return_rewriters else result

    def change(self, model: nn.Module, traced: Traced) -> None:
        """Turn all that can be."""
        self._norms: list[str] = []
        for region in Channels(traced, moves=MEAN).regions():
            norms = [u for u in region.sinks if isinstance(u.layer, nn.LayerNorm)]
            if not norms:
                continue
            reason = self._hindrance(region)
            if reason is not None:
                self.report.skipped[", ".join(u.name for u in norms)] = reason
                continue
            part(model, [u.layer for u in region.sources])
            for use in region.sources:
                center_rows(use.layer)
                self.report.changed[use.name] = "mean of its output channels taken off"
            for use in norms:
                replace_module(model, use.layer, _rms_norm(use.layer))
                self.report.changed[use.name] = "an RMS norm"
                self._norms.append(use.name)

    def _hindrance(self, region: Region) -> str | None:
        if not region.is_free:
            return "; ".join(region.reasons) or "not all of its channels come from layers"
        for use in region.sinks:
            norm: Any = use.layer
            if not isinstance(norm, nn.LayerNorm):
                return f"{use.name} reads the same channels"
            if norm.bias is not None and bool((norm.bias != 0).any()):
                return f"{use.name} has a summand; apply MergeLnAffine before"
        for use in region.sources:
            if not isinstance(use.layer, (*LINEAR, nn.Embedding)):
                return f"{use.name} writes the same channels, which is no linear layer"
            if len(use.ids) != region.size:
                return f"{use.name} writes some of the channels only"
        return None


@torch.no_grad()
def center_rows(layer: Any) -> None:
    """Take the mean over output channels off what a layer writes."""
    wide = layer.weight.to(torch.float64)
    axis = -1 if isinstance(layer, nn.Embedding) else LayerView(layer).output_axis
    layer.weight.copy_(wide - wide.mean(dim=axis, keepdim=True))
    if getattr(layer, "bias", None) is not None:
        layer.bias.sub_(layer.bias.mean())
    follow_weights(layer)


def _rms_norm(norm: Any) -> nn.RMSNorm:
    affine = norm.weight is not None
    made = nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=affine)
    if affine:
        made.weight = norm.weight
    made.train(norm.training)
    return made
