"""Records whose sums, differences, products and quotients are float tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from qframework.quant_tensor.base import Operand, dequantize
from qframework.quant_tensor.record import Record


class DecayingRecord(Record):
    """A record of a format whose grid no arithmetic keeps."""


def _arithmetic(function: Callable[[Any, Any], Any], reverse: bool) -> Any:
    def apply(self: Record, other: Operand) -> Any:
        other = dequantize(other)
        return function(other, self.value) if reverse else function(self.value, other)

    return apply


for _name in ("add", "sub", "mul", "truediv"):
    setattr(DecayingRecord, f"__{_name}__", _arithmetic(getattr(operator, _name), False))
    setattr(DecayingRecord, f"__r{_name}__", _arithmetic(getattr(operator, _name), True))
