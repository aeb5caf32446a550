"""What is said of some modules when a model is quantized."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

from torch import nn


class Rule:
    """What becomes of the modules that a pattern or a type names, and of all within them.

    ::

        Rule("head", keep_float=True)
        Rule("features.*", weight_bit_width=4)
        Rule(nn.GELU, act_quant=Int8ActPerTensorFloat)
        Rule("attention", to=MyAttention, num_heads=8)

    Args:
        match: a name (``*`` and ``?`` as in file names), a compiled regular expression, a type, or several of them.
        to: the class to build instead, with the constructor arguments of the torch layer and the keywords.
        keep_float: leave them alone.
        **keywords: arguments for the quantized layer, which win over those for the model. Where several modules are
            named, those for a weight, bias, input, output or activation go to the layers that quantize one. Quantizers
            of norms and softmax are given by rules that name these themselves, not what holds them.
    """

    def __init__(
        self,
        match: Any,
        to: type[nn.Module] | None = None,
        keep_float: bool = False,
        **keywords: Any,
    ) -> None:
        several = match if isinstance(match, (tuple, list)) else (match,)
        for one in several:
            if not isinstance(one, (str, re.Pattern, type)):
                raise TypeError(
                    f"Rule: match must be a name, a compiled pattern or a type, got {one!r} of type {type(one).__name__}"
                )
        self.match, self.to, self.keep_float, self.keywords = (
            tuple(several),
            to,
            keep_float,
            keywords,
        )

    def fits(self, name: str, module: nn.Module) -> bool:
        """Whether it names a module."""
        return any(matches(m, name, module) for m in self.match)

    def __repr__(self) -> str:
        shown = [getattr(m, "__name__", repr(m)) for m in self.match]
        return f"Rule({', '.join(shown)})"


def matches(match: Any, name: str, module: nn.Module) -> bool:
    """Whether a name, a pattern or a type is that of a module."""
    if isinstance(match, type):
        return type(module) is match
    if isinstance(match, re.Pattern):
        return match.fullmatch(name) is not None
    return fnmatch.fnmatchcase(name, match)
