"""Quantization of whole models by their graph, or layer by layer, with tables of what becomes of which layer."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from qframework.core.snapshot import unchanged_on_error
from qframework.graph.bias_scales import asked_for, biases_without_scale, left_out, told
from qframework.graph.channel_splitting import GraphChannelSplitting
from qframework.graph.conversion import CONVERSIONS, arguments_of
from qframework.graph.cross_layer_equalization import EqualizeGraph
from qframework.graph.forms import is_computed
from qframework.graph.graph_modules import (
    ADDITIONS,
    as_graph_module,
    functions_to_modules,
    join_concatenations,
    means_to_pools,
    put_module,
    relu6_to_relu,
    stand_alone,
    without_dropout,
)
from qframework.graph.module_shells import shell_tree
from qframework.graph.quantizer_places import Place, Places
from qframework.graph.standardize import MergeBatchNorm
from qframework.graph.taken_over import take_over
from qframework.graph.torch_transformers import call_changed_parts
from qframework.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantHardTanh,
    QuantIdentity,
    QuantLinear,
    QuantLSTM,
    QuantMultiheadAttention,
    QuantReLU,
    QuantRNN,
    QuantSigmoid,
)
from qframework.layers.base import QuantLayer
from qframework.quantizers import (
    Int8ActPerTensorFloat,
    Int8ActPerTensorFloatMinMaxInit,
    Int8WeightPerTensorFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
    Uint8ActPerTensorFloatMaxInit,
)

#: From a torch layer to the quantized one and its keywords (functions of the layer are called with it); None to leave it.
LayerMap = Mapping[type[nn.Module], tuple[type[nn.Module], Mapping[str, Any]] | None]

_PAIRS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, QuantLinear),
    (nn.Conv1d, QuantConv1d),
    (nn.Conv2d, QuantConv2d),
    (nn.Conv3d, QuantConv3d),
    (nn.ConvTranspose1d, QuantConvTranspose1d),
    (nn.ConvTranspose2d, QuantConvTranspose2d),
    (nn.ConvTranspose3d, QuantConvTranspose3d),
)
_WEIGHT = {"weight_quant": Int8WeightPerTensorFloat, "bias_quant": Int32Bias}
_ATTENTION = {
    "in_proj_weight_quant": Int8WeightPerTensorFloat,
    "in_proj_bias_quant": Int32Bias,
    "attn_output_weights_quant": Uint8ActPerTensorFloat,
    "q_scaled_quant": Int8ActPerTensorFloat,
    "k_transposed_quant": Int8ActPerTensorFloat,
    "v_quant": Int8ActPerTensorFloat,
    "out_proj_input_quant": Int8ActPerTensorFloat,
    "out_proj_weight_quant": Int8WeightPerTensorFloat,
    "out_proj_bias_quant": Int32Bias,
}
_RECURRENT = {
    **_WEIGHT,
    "io_quant": Int8ActPerTensorFloat,
    "gate_acc_quant": Int8ActPerTensorFloat,
}
_LSTM = {
    **_RECURRENT,
    "sigmoid_quant": Uint8ActPerTensorFloat,
    "tanh_quant": Int8ActPerTensorFloat,
    "cell_state_quant": Int8ActPerTensorFloat,
}

#: For :func:`layerwise_quantize`.
LAYERWISE_COMPUTE_LAYER_MAP: LayerMap = {
    nn.AvgPool2d: None,
    nn.MultiheadAttention: (
        QuantMultiheadAttention,
        {**_ATTENTION, "in_proj_input_quant": Int8ActPerTensorFloat},
    ),
    nn.RNN: (QuantRNN, _RECURRENT),
    nn.LSTM: (QuantLSTM, _LSTM),
    **{f: (q, {**_WEIGHT, "input_quant": Int8ActPerTensorFloat}) for f, q in _PAIRS},
}
#: For :func:`quantize`.
COMPUTE_LAYER_MAP: LayerMap = {
    nn.AvgPool2d: None,
    nn.MultiheadAttention: (
        QuantMultiheadAttention,
        {**_ATTENTION, "in_proj_input_quant": Int8ActPerTensorFloat},
    ),
    nn.RNN: (QuantRNN, _RECURRENT),
    nn.LSTM: (QuantLSTM, _LSTM),
    **{f: (q, {**_WEIGHT, "return_quant_tensor": True}) for f, q in _PAIRS},
}
QUANT_ACT_MAP: LayerMap = {
    nn.ReLU: (QuantReLU, {"act_quant": Uint8ActPerTensorFloat, "return_quant_tensor": True}),
    nn.ReLU6: (
        QuantReLU,
        {"act_quant": Uint8ActPerTensorFloatMaxInit, "max_val": 6.0, "return_quant_tensor": True},
    ),
    nn.Hardtanh: (
        QuantHardTanh,
        {
            "act_quant": Int8ActPerTensorFloatMinMaxInit,
            "max_val": lambda module: module.max_val,
            "min_val": lambda module: module.min_val,
            "return_quant_tensor": True,
        },
    ),
    nn.Sigmoid: (QuantSigmoid, {"act_quant": Uint8ActPerTensorFloat, "return_quant_tensor": True}),
}
QUANT_IDENTITY_MAP: Mapping[str, tuple[type[nn.Module], Mapping[str, Any]]] = {
    "signed": (QuantIdentity, {"act_quant": Int8ActPerTensorFloat, "return_quant_tensor": True}),
    "unsigned": (QuantIdentity, {"act_quant": Uint8ActPerTensorFloat, "return_quant_tensor": True}),
}
UNSIGNED_ACT_TUPLE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid)


def layerwise_quantize(
    model: nn.Module,
    compute_layer_map: LayerMap = LAYERWISE_COMPUTE_LAYER_MAP,
    name_blacklist: Sequence[str] | None = None,
) -> nn.Module:
    """Replace layers by their quantized ones, each with a quantizer of its own for its input; activations stay float.

    Args:
        model: float; not changed. The result shares its parameters, but for recurrent and attention layers.
        compute_layer_map: from types to ``(quantized layer, keywords)``, or None to leave layers of a type.
        name_blacklist: names of layers to leave alone.

    Returns:
        The quantized model.

    Raises:
        ValueError: a name that the model doesn't have.

    Warns:
        UserWarning: layers of a class derived from one of the types, or with a computed weight, which stay float; attention and recurrent layers
            whose biases do, since the quantizers in the map give no scale for them.
    """
    names = dict(model.named_modules())
    for name in name_blacklist or ():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            hint = f" Near names: {', '.join(close)}" if close else ""
            raise ValueError(
                f"layerwise_quantize: name_blacklist names {name!r}, which the model doesn't have.{hint}"
            )
    root = shell_tree(model, {})
    left: list[str] = []
    biases: list[str] = []
    made: dict[nn.Module, nn.Module] = {}

    def convert(name: str, module: nn.Module) -> nn.Module:
        if module in made:
            return made[module]
        found = compute_layer_map.get(type(module)) if name not in (name_blacklist or ()) else None
        if found is not None and any(is_computed(m) for m in module.modules()):
            left.append(f"{name or 'the model'} ({type(module).__name__}, its weight is computed)")
            return module
        if found is not None:
            made[module] = _quantized(module, *found, name, biases)
            return made[module]
        kinds = [k for k, to in compute_layer_map.items() if to is not None]
        derived = isinstance(module, tuple(kinds)) and type(module) not in kinds
        if derived and not isinstance(module, QuantLayer) and name not in (name_blacklist or ()):
            left.append(f"{name or 'the model'} ({type(module).__name__})")
        made[module] = module
        for child, held in list(module._modules.items()):
            if held is not None:
                module._modules[child] = convert(f"{name}.{child}" if name else child, held)
        return module

    result = convert("", root)
    if left:
        warnings.warn(
            "layerwise_quantize left layers in floats, whose classes are derived from layers of torch, or whose weights are "
            f"computed at each call: {', '.join(left)}. Name the classes in compute_layer_map, make the weights "
            "parameters, or use quantize_model",
            UserWarning,
            stacklevel=2,
        )
    _warn_of_biases("layerwise_quantize", biases)
    call_changed_parts(result)
    return result


def _quantized(
    module: nn.Module,
    target: type[nn.Module],
    keywords: Mapping[str, Any],
    name: str = "",
    left: list[str] | None = None,
    **more: Any,
) -> nn.Module:
    """A quantized layer in place of a float one, which shares its parameters.

    Args:
        module: the float one.
        target: its class.
        keywords: for its constructor; functions are called with the float layer.
        name: of the layer.
        left: where it is noted that the layer leaves its biases in floats.
        **more: further keywords.
    """
    conversion = CONVERSIONS.get(type(module))
    special = {} if conversion is None else conversion.special
    arguments = arguments_of(module, target, special) if conversion is not None else {}
    given = {
        k: v(module) if isinstance(v, Callable) and not isinstance(v, type) else v  # type: ignore[arg-type]
        for k, v in keywords.items()
    }
    made = target(**{**arguments, **given, **more})
    missing = biases_without_scale(made, fed=True)
    missing = {n: why for n, why in missing.items() if asked_for(n, given) is None}
    if missing:
        made = target(**left_out({**arguments, **given, **more}, missing))
        if left is not None:
            left.append(f"{name or 'the model'} ({told(missing)})")
    if conversion is None or module._parameters or module._modules:
        take_over(module, made, conversion is not None and conversion.copies)
    return made.train(module.training)


def preprocess_for_quantize(
    model: nn.Module,
    trace_model: bool = True,
    relu6_to_relu: bool = True,
    equalize_iters: int = 0,
    equalize_merge_bias: bool = True,
    merge_bn: bool = True,
    equalize_bias_shrinkage: float | str = "vaiq",
    equalize_scale_computation: str = "maxabs",
    channel_splitting_ratio: float = 0.0,
    channel_splitting_split_input: bool = True,
    channel_splitting_criterion: str = "maxabs",
) -> fx.GraphModule:
    """A copy of a float model as a graph, in a form that quantizes well; in evaluation mode it computes the same.

    Functions become modules, each module without parameters stands in one place, dropout goes, batch norms are folded.

    Args:
        model: float; not changed.
        trace_model: whether it isn't a graph module yet.
        relu6_to_relu: take the bound of ReLU6 away.
        equalize_iters: rounds of cross-layer equalization.
        equalize_merge_bias: see :class:`~qframework.graph.equalize.EqualizeGraph`.
        merge_bn: fold batch norms.
        equalize_bias_shrinkage: see ``EqualizeGraph``.
        equalize_scale_computation: see ``EqualizeGraph``.
        channel_splitting_ratio: share of channels that are split, see :class:`~qframework.graph.channel_splitting.GraphChannelSplitting`.
        channel_splitting_split_input: split where channels are read.
        channel_splitting_criterion: ``"maxabs"``.

    Raises:
        NoGraphError: the model can't be traced.
        TypeError: ``trace_model=False`` and no graph module.
    """
    if not trace_model and not isinstance(model, fx.GraphModule):
        raise TypeError(
            f"preprocess_for_quantize: trace_model=False needs a torch.fx.GraphModule, got {type(model).__name__}"
        )
    training = model.training
    made = as_graph_module(copy.deepcopy(model).eval(), "preprocess_for_quantize")
    functions_to_modules(made)
    stand_alone(made)
    if relu6_to_relu:
        _relu6_to_relu(made)
    means_to_pools(made)
    join_concatenations(made)
    _clean(made)
    if merge_bn:
        MergeBatchNorm().apply(made)
    without_dropout(made)
    _clean(made)
    EqualizeGraph(
        iterations=equalize_iters,
        merge_bias=equalize_merge_bias,
        bias_shrinkage=equalize_bias_shrinkage,
        scale_computation_type=equalize_scale_computation,
    ).apply(made)
    if channel_splitting_ratio > 0:
        GraphChannelSplitting(
            channel_splitting_ratio, channel_splitting_criterion, channel_splitting_split_input
        ).apply(made)
    made.train(training)
    return made


_relu6_to_relu = relu6_to_relu


def _clean(model: fx.GraphModule) -> None:
    model.graph.lint()
    model.recompile()
    model.delete_all_unused_submodules()


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
        _clean(model)
    model.train(training)
    return model


def _warn_of_biases(who: str, left: list[str]) -> None:
    """Tell which layers have a quantizer for their biases that can't work with those that they were given."""
    if left:
        warnings.warn(
            f"{who} left biases in floats: {', '.join(left)}. Name a bias quantizer, or None, in the layer map",
            UserWarning,
            stacklevel=4,
        )


def _build_layers(model: fx.GraphModule, table: LayerMap) -> None:
    biases: list[str] = []
    for name, module in list(model.named_modules()):
        found = table.get(type(module))
        if found is not None:
            put_module(model, name, _quantized(module, *found, name, biases))
    _warn_of_biases("quantize", biases)


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
            built[place] = _quantized(place.float_module, table[0], table[1], **more)
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
