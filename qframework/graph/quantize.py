"""Quantization of whole models by their graph; also the place for what goes before it, and for tables of what becomes of which layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from qframework.core.snapshot import unchanged_on_error
from qframework.graph.graph_modules import ADDITIONS, as_graph_module, put_module
from qframework.graph.layer_maps import (
    COMPUTE_LAYER_MAP,
    LAYERWISE_COMPUTE_LAYER_MAP,
    QUANT_ACT_MAP,
    QUANT_IDENTITY_MAP,
    UNSIGNED_ACT_TUPLE,
    LayerMap,
    quantized_by_map,
    warn_of_biases,
)
from qframework.graph.layerwise import layerwise_quantize
from qframework.graph.preprocess import clean, preprocess_for_quantize
from qframework.graph.quantizer_places import Place, Places
from qframework.layers.base import QuantLayer


def quantize(
    graph_model: nn.Module,
    quant_identity_map: Mapping[str, Any] = QUANT_IDENTITY_MAP,
    compute_layer_map: LayerMap = COMPUTE_LAYER_MAP,
    quant_act_map: LayerMap = QUANT_ACT_MAP,
    unsigned_act_tuple: tuple[type[nn.Module], ...] = UNSIGNED_ACT_TUPLE,
    requantize_layer_handler_output: bool = True,
) -> fx.GraphModule:
    """Quantize a model by its graph: inputs, activations, layers, and the operands of additions and concatenations by one scale.

    Args:
        graph_model: of :func:`preprocess_for_quantize`; another module is traced. Not changed.
        quant_identity_map: ``"signed"`` and ``"unsigned"``: what stands where nothing else quantizes.
        compute_layer_map: from layers to ``(quantized layer, keywords)``, or None to leave them.
        quant_act_map: the same for activations.
        unsigned_act_tuple: activations without negative results.
        requantize_layer_handler_output: quantize the results of layers that no quantized activation follows.

    Returns:
        A graph module, to be calibrated.

    Raises:
        NoGraphError: the model can't be traced.
    """
    training = graph_model.training
    model = as_graph_module(copy.deepcopy(graph_model).eval(), "quantize")
    with unchanged_on_error(model):
        kinds = tuple(k for k, to in quant_act_map.items() if to is not None)
        places = Places(model, kinds, unsigned_act_tuple)
        computing = tuple(k for k, to in compute_layer_map.items() if to is not None)
        for node in list(model.graph.nodes):
            if node.op == "placeholder" and quant_identity_map.get("signed") is not None:
                places.after(node, "_quant", signed=True)
        for node in list(model.graph.nodes):
            adds = node.op != "call_module" and node.target in ADDITIONS
            if adds or isinstance(places.module(node), nn.AvgPool2d):
                if not places.are_all_quantized(node.users):
                    places.after(node, "_output_quant")
        places.align()
        for node in list(model.graph.nodes):
            if type(places.module(node)) in computing:
                if not places.is_quantized(node.args[0]):
                    places.before(node, 0, "_input_quant")
                wanted = requantize_layer_handler_output
                if wanted and not places.are_all_quantized(node.users):
                    places.after(node, "_output_quant", signed=True)
        _build_layers(model, compute_layer_map)
        _build_quantizers(model, places, quant_identity_map, quant_act_map)
        _plain_results(model)
        clean(model)
    model.train(training)
    return model


def _build_layers(model: fx.GraphModule, table: LayerMap) -> None:
    biases: list[str] = []
    for name, module in list(model.named_modules()):
        found = table.get(type(module))
        if found is not None:
            put_module(model, name, quantized_by_map(module, *found, name, biases))
    warn_of_biases("quantize", biases)


def _build_quantizers(
    model: fx.GraphModule, places: Places, identities: Mapping[str, Any], activations: LayerMap
) -> None:
    """Build what the places stand for, those with partners on one scale: that of a signed one, if there is any."""
    built: dict[Place, Any] = {}
    first: dict[Place, Place] = {}
    for place in places.all:
        known = first.setdefault(place.leader, place)
        if place.signed and not known.signed:
            first[place.leader] = place

    def build(place: Place) -> Any:
        if place in built:
            return built[place]
        more: dict[str, Any] = {}
        leader = first[place.leader]
        if leader is not place:
            quantizer = build(leader).act_quant.tensor_quant
            more = {
                "act_scaling_impl": quantizer.scaling_impl,
                "act_int_scaling_impl": quantizer.int_scaling_impl,
            }
        if place.float_module is None:
            target, keywords = identities["signed" if place.signed else "unsigned"]
            built[place] = target(**{**keywords, **more})
        else:
            table: Any = activations[type(place.float_module)]
            if place.signed and isinstance(place.float_module, nn.ReLU):
                more["act_signed"] = True
            built[place] = quantized_by_map(place.float_module, table[0], table[1], **more)
        return built[place]

    for place in places.all:
        put_module(model, place.name, build(place).eval())


def _plain_results(model: fx.GraphModule) -> None:
    """Let the model return plain tensors."""
    for node in model.graph.nodes:
        if node.op == "output":
            for given in node.all_input_nodes:
                if given.op == "call_module":
                    module: Any = model.get_submodule(str(given.target))
                    if isinstance(module, QuantLayer):
                        module.return_quant_tensor = False


__all__ = [
    "COMPUTE_LAYER_MAP",
    "LAYERWISE_COMPUTE_LAYER_MAP",
    "QUANT_ACT_MAP",
    "QUANT_IDENTITY_MAP",
    "UNSIGNED_ACT_TUPLE",
    "layerwise_quantize",
    "preprocess_for_quantize",
    "quantize",
]
