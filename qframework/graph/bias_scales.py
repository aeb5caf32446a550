"""Bias quantizers that take input scale times weight scale, in layers whose products have no such scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qframework.layers.recurrent_parameters import GateParams
from qframework.proxy import QuantProxy
from qframework.proxy.codebook_quant import CodebookQuantProxy
from qframework.proxy.float_quant import FloatQuantProxy
from qframework.quantizers.none import NoneBiasQuant


def no_single_scale(proxy: Any) -> str | None:
    """Why what a quantizer gives isn't integers times one scale for each output channel.

    Args:
        proxy: of a weight or an input; None for none.

    Returns:
        The reason; None where it is.
    """
    if not isinstance(proxy, QuantProxy) or not proxy.is_quant_enabled:
        return "isn't quantized"
    what = f"is quantized by {proxy.quantizer.__name__}"
    if isinstance(proxy, CodebookQuantProxy):
        return f"{what}, to entries of a codebook"
    if isinstance(proxy, FloatQuantProxy):
        return f"{what}, to minifloats"
    if proxy.is_groupwise:
        return f"{what}, with a scale for each group"
    if getattr(getattr(proxy.tensor_quant, "scaling_impl", None), "per_row", False):
        return f"{what}, with a scale for each row"
    return None


def biases_without_scale(layer: nn.Module, fed: bool = False) -> dict[str, str]:
    """The bias quantizers within a layer whose scale, input scale times weight scale, can't come from anywhere.

    Args:
        layer: a quantized one, of one part or of several.
        fed: its input may come quantized from what is in front.

    Returns:
        From the constructor's name of such a quantizer, ``"bias_quant"`` or ``"in_proj_bias_quant"``, to the reason.
    """
    found: dict[str, str] = {}
    for path, part in layer.named_modules():
        if not _needs_scale(part):
            continue
        if isinstance(part, GateParams):
            weight: Any = part.input_weight.weight_quant
            outputs_only = getattr(layer, "quantize_output_only", False)
            given: Any = None if outputs_only else getattr(layer, "io_quant", None)
        else:
            weight, given = part._modules.get("weight_quant"), part._modules.get("input_quant")
        reasons = {"weight": no_single_scale(weight), "input": no_single_scale(given)}
        if fed and reasons["input"] == "isn't quantized" and path in _READ_INPUT:
            del reasons["input"]
        text = " and ".join(f"its {tensor} {why}" for tensor, why in reasons.items() if why)
        if text:
            found.setdefault(_keyword(path), text)
    return found


#: Parts that read what the whole layer is given.
_READ_INPUT = ("", "in_proj", "q_proj", "k_proj", "v_proj", "self_attn.in_proj")


def _needs_scale(part: nn.Module) -> bool:
    """Whether a part has a bias quantizer that takes the scale of its products, or would have with a bias."""
    proxy: Any = part._modules.get("bias_quant")
    if not isinstance(proxy, QuantProxy) or proxy.disable_quant:
        return False
    if proxy.tensor_quant is not None:
        return bool(proxy.requires_input_scale)  # type: ignore[attr-defined]
    absent = part._parameters.get("bias") is None and proxy.quantizer is not NoneBiasQuant
    return absent and bool(getattr(proxy.quantizer, "requires_input_scale", False))


def _keyword(path: str) -> str:
    """The constructor's name of the bias quantizer of a part."""
    parts = path.split(".") if path else []
    if parts[:1] == ["layers"]:  # of a recurrent layer: one for all gates
        return "bias_quant"
    return "_".join(["in_proj" if n in _PROJECTIONS else n for n in parts] + ["bias_quant"])


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def asked_for(name: str, given: Mapping[str, Any]) -> Any:
    """The bias quantizer that was given, its own or one for several biases; None where none was.

    Args:
        name: of :func:`biases_without_scale`.
        given: what the layer's constructor is given.
    """
    names = [name.split("_", i)[-1] for i in range(name.count("_"))]  # its own first
    return next((given[n] for n in names if given.get(n) is not None), None)


def left_out(given: Mapping[str, Any], missing: Mapping[str, str]) -> dict[str, Any]:
    """What a constructor is given, without the bias quantizers that are missing a scale."""
    prefixes = tuple(n.removesuffix("quant") for n in missing)
    kept = {n: v for n, v in given.items() if not n.startswith(prefixes)}
    return kept | dict.fromkeys(missing)


def told(missing: Mapping[str, str]) -> str:
    """What a report says of biases that stay float."""
    by_reason: dict[str, list[str]] = {}
    for name, why in missing.items():
        by_reason.setdefault(why, []).append(f"{name}=None")
    return "; ".join(
        f"{', '.join(names)}, since {why}: there is no scale of the sums"
        for why, names in by_reason.items()
    )
