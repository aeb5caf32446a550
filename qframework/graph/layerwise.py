"""Quantization layer by layer, each with a quantizer of its own for its input, which needs no graph."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence

from torch import nn

from qframework.graph.forms import is_computed
from qframework.graph.layer_maps import (
    LAYERWISE_COMPUTE_LAYER_MAP,
    LayerMap,
    quantized_by_map,
    warn_of_biases,
)
from qframework.graph.module_shells import shell_tree
from qframework.graph.torch_transformers import call_changed_parts
from qframework.layers.base import QuantLayer


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
            made[module] = quantized_by_map(module, *found, name, biases)
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
    warn_of_biases("layerwise_quantize", biases)
    call_changed_parts(result)
    return result
