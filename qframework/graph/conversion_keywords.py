"""By which names a layer's constructor takes the keywords that are for a model, or in a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qframework.graph.conversion import Conversion
from qframework.layers.attention_keywords import operand_keywords

ROLES = frozenset({"weight", "bias", "input", "output", "act"})


def role_of(name: str) -> str:
    """The tensor that a keyword is for."""
    return name.split("_", 1)[0]


def roles_of(conversion: Conversion) -> set[str]:
    """The tensors that keywords for a model may be for in a layer."""
    roles = set(conversion.roles)
    # The input of an activation function is the output of a layer: a quantizer for inputs isn't meant for it.
    if "act" in roles:
        return roles - {"input"}
    return roles if conversion.operands is None else roles | {"act"}


def placed(
    conversion: Conversion, common: Mapping[str, Any], ruled: Mapping[str, Any]
) -> dict[str, Any]:
    """Keywords for a layer of several parts, each by the names of the parts that it is for.

    Args:
        conversion: to the layer.
        common: for the model, those for tensors that the layer has.
        ruled: of rules, which are stronger; those that are the layer's own names stay.
    """
    if conversion.operands is None:
        return {**common, **ruled}
    said = {**common, **ruled}
    plain = {n: v for n, v in said.items() if role_of(n) in conversion.roles and "_" in n}
    operands = _without_prefix(said, "act_")
    own = {n: v for n, v in said.items() if n not in plain and not n.startswith("act_")}
    if operands.get("quant", plain) is None:
        # without quantizers of inputs nothing but weights is quantized; with some, these are inputs too
        weights_only = plain.get("input_quant", plain) is None
        operands = {"quant": None} if weights_only else {}
    found = {p + n: v for p in conversion.prefixes for n, v in plain.items()}
    attention = _without_prefix(own, conversion.operands)
    made = operand_keywords(operands, _without_prefix(plain, "input_"), attention)
    return found | {conversion.operands + n: v for n, v in made.items()} | own


def _without_prefix(keywords: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in keywords.items() if n.startswith(prefix)}
