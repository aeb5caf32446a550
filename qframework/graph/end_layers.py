"""Rules for the first and the last layer of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from qframework.graph.conversion_rule import Rule
from qframework.graph.forms import Forms
from qframework.graph.tracing import Traced


def end_rules(
    model: nn.Module,
    forms: Forms,
    first: Mapping[str, Any] | None,
    last: Mapping[str, Any] | None,
) -> list[Rule]:
    """Rules that name the first and the last layer with a weight.

    They are those that are called first and last in the traced model; where it can't be traced, those that are
    registered first and last.

    Args:
        model: the float model.
        forms: what its modules compute.
        first: what the rule for the first layer says; None for no rule.
        last: the same for the last.

    Raises:
        TypeError: no mapping, or a keyword ``match``.
        ValueError: the model has no layer with a weight.
    """
    rules = []
    for which, said in (("first", first), ("last", last)):
        if said is None:
            continue
        if not isinstance(said, Mapping):
            raise TypeError(
                f"quantize_model: {which} must be a dict of a Rule's keywords, such as {{'weight_bit_width': 8}}; got "
                f"{said!r} of type {type(said).__name__}"
            )
        layers = _in_order(model, forms)
        if not layers:
            raise ValueError(f"quantize_model: {which} has no effect, no layer has a weight")
        rules.append(Rule(re.compile(re.escape(layers[0 if which == "first" else -1])), **said))
    return rules


def _in_order(model: nn.Module, forms: Forms) -> list[str]:
    names = {m: n for n, m in model.named_modules()}
    order: list[nn.Module] = list(names)
    if isinstance(forms.traced, Traced):
        called = (forms.traced.called(n) for n in forms.traced.graph.nodes)
        order = [m for m in called if m is not None]
    found = []
    for module in order:
        conversion = forms.conversion(module) if module in names else None
        if conversion is not None and "weight" in conversion.roles and conversion.by_default:
            found.append(names[module])
    return found
