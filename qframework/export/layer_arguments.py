"""What a quantized layer was made with, read off it."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from qframework.inject.names import is_ours

#: Arguments that aren't attributes of the same name.
_ELSEWHERE = {
    "shared_input_hidden_weights": "_shares_input_weights",
    "init": "",
    "nhead": "self_attn.num_heads",
    "d_model": "self_attn.embed_dim",
}
#: Arguments that are parameters, not settings.
_TENSORS = ("_weight",)


def library_layer(name: str) -> type[nn.Module] | None:
    """The quantized layer of a name; None where there is none."""
    found = vars(sys.modules["qframework.layers"]).get(name)
    right = isinstance(found, type) and issubclass(found, nn.Module)
    return found if right and is_ours(found.__module__) else None


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one that a recipe names: a quantized layer, or what is left of a batch norm that was folded."""
    return hasattr(type(module), "_proxies") or type(module).__name__ == "FoldedBatchNorm"


def arguments_of_layer(layer: nn.Module) -> dict[str, Any]:
    """Constructor arguments that are numbers, flags and words, as far as the layer still knows them.

    Args:
        layer: of a class of the library.
    """
    found = {}
    for name in inspect.signature(type(layer).__init__).parameters:
        if name in ("self", "args", "kwargs", "device", "dtype", *_TENSORS) or name.endswith(
            "_quant"
        ):
            continue
        value = _attribute(layer, _ELSEWHERE.get(name, name))
        if name == "bias" and "bias" in layer._parameters:
            value = layer._parameters["bias"] is not None
        if _is_plain(value):
            found[name] = value
    return found


def _attribute(layer: Any, path: str) -> Any:
    for name in path.split("."):
        layer = getattr(layer, name, _ABSENT)
    return layer


_ABSENT = object()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)
