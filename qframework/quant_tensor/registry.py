"""Which rule says what a torch function does to a quantized tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Rule = Callable[..., Any]

#: From a torch function to its rule. A rule that returns NotImplemented lets the tensors decay.
RULES: dict[Any, Rule] = {}
#: From the name of a tensor method to the rule, for the method form.
METHODS: dict[str, Rule] = {}


def rule(*names: str, method: bool = True) -> Callable[[Rule], Rule]:
    """Register a rule for functions by name, wherever torch keeps them: ``torch``, ``F`` and ``torch.Tensor``.

    Args:
        *names: of the functions.
        method: whether it serves the method form too.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            for place in (torch, F, torch.Tensor):
                found = getattr(place, name, None)
                if found is not None and (place is not torch.Tensor or method):
                    RULES[found] = function
            if method and hasattr(torch.Tensor, name):
                METHODS[name] = function
        return function

    return register
