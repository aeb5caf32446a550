"""The integers of quantized tensors whose dtype is too coarse to tell them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qframework.core.stochastic_round import StochasticRoundSte
from qframework.functional import is_half
from qframework.quant_tensor.record import Record

R = TypeVar("R", bound=Record)


def know_codes(
    q: R,
    quantizer: nn.Module | None,
    x: Tensor,
    output: tuple[Any, ...],
    shaped: Callable[[Tensor], Tensor] | None = None,
    activation: nn.Module | None = None,
) -> R:
    """Let a quantized tensor of half precision know its integers, which are computed when they are asked for.

    Args:
        q: the tensor.
        quantizer: that made it.
        x: what it was made of; once that was written to, the integers are those nearest to the values.
        output: of the quantizer.
        shaped: from the quantizer's view of ``x`` to the shape of the value.
        activation: function in front of the quantizer.
    """
    if not is_half(q.value.dtype) or torch.compiler.is_compiling() or not _tells(quantizer):
        return q
    source, parameters = x.detach(), [t.detach() for t in output[1:]]
    version = None if source.is_inference() else source._version

    def find() -> Tensor | None:
        if version is not None and source._version != version:
            return None
        with torch.no_grad():
            seen = source if activation is None else activation(source)
            found: Tensor = quantizer.codes(seen, *parameters)  # type: ignore[operator, union-attr]
        return found if shaped is None else shaped(found)

    return q.with_codes(find)


def _tells(quantizer: Any) -> bool:
    """Whether a quantizer gives the same integers again."""
    if quantizer is None or not hasattr(quantizer, "codes"):
        return False
    if getattr(quantizer, "observer_only", False):
        return False
    rounds = getattr(quantizer, "int_quant", None)
    if rounds is None:
        return True
    delayed = getattr(rounds, "delay_wrapper", None) is not None
    return hasattr(rounds, "to_int") and not (
        delayed or isinstance(rounds.float_to_int_impl, StochasticRoundSte)
    )
