"""Quantized parameters and scales that are computed once, because that was asked for.

While a model is frozen its weights are constants: quantized once, without a gradient of their own. Whatever changes them thaws
the quantizers that it concerns, so that they compute at each call again: ``train()``, ``to()``, ``load_state_dict``, a write in place,
an optimizer's step, an assigned parameter or quantizer. A write through ``.data`` alone leaves no trace, and isn't seen until the
model is thawed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qframework.proxy.base import QuantProxy

_is_compiling = torch.compiler.is_compiling


class Entry(NamedTuple):
    """One result.

    Attributes:
        given: the tensors that it is for, the same objects.
        quantizer: that computed it.
        watched: the tensors that it was computed from.
        versions: of those.
        pointers: to their memory.
        result: what to return.
    """

    given: tuple[Tensor, ...]
    quantizer: nn.Module
    watched: tuple[Tensor, ...]
    versions: tuple[int, ...]
    pointers: tuple[int, ...]
    result: Any

    def holds(self) -> bool:
        """Whether no write in place to what it was computed from is known."""
        watched = self.watched
        return (
            tuple(map(_version, watched)) == self.versions
            and tuple(map(_pointer, watched)) == self.pointers
        )


_version, _pointer = attrgetter("_version"), Tensor.data_ptr


class Memory:
    """What one quantizer has computed once.

    Attributes:
        frozen: whether results are kept.
        entries: the results.
    """

    def __init__(self) -> None:
        self.frozen = False
        self.entries: list[Entry] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()

    def clear(self) -> None:
        """Thaw."""
        self.frozen, self.entries = False, []

    def keep(self, quantizer: nn.Module, given: tuple[Tensor, ...], result: Any) -> None:
        """Keep a result for these tensors."""
        tensors = (*given, *quantizer.parameters(), *quantizer.buffers())
        watched = tuple(t for t in tensors if t.numel() and not t.is_inference())
        self.frozen = True
        states = tuple(map(_version, watched)), tuple(map(_pointer, watched))
        self.entries.append(Entry(given, quantizer, watched, *states, result))

    def recall(self, quantizer: Any, *given: Tensor) -> Any:
        """The result for these tensors; None where there is none."""
        for entry in self.entries:
            if entry.quantizer is quantizer and all(map(is_, entry.given, given)):
                if _is_compiling() or entry.holds():
                    return entry.result
                self.clear()
                return None
        return None


def _proxies(model: nn.Module) -> list[QuantProxy]:
    from qframework.proxy.base import QuantProxy

    return [m for m in model.modules() if isinstance(m, QuantProxy)]


def freeze(model: nn.Module) -> None:
    """Quantize all weights, biases and scales of a model once, until :func:`unfreeze`; for evaluation.

    Gradients flow to inputs, not to weights. ``train()``, ``to()``, ``load_state_dict``, an optimizer's step and other writes in
    place thaw the quantizers that they concern; a write through ``.data`` isn't seen. Copies of a model aren't frozen.

    Args:
        model: in evaluation mode; anything with quantized layers.

    Raises:
        RuntimeError: a quantizer is in training mode. Nothing is frozen then.
    """
    proxies = _proxies(model)
    training = [n for n, m in model.named_modules() if m in set(proxies) and m.training]
    if training:
        raise RuntimeError(
            f"a model is frozen for evaluation, and {training[0] or type(model).__name__} is in training mode: call "
            "model.eval() first"
        )
    with torch.inference_mode(False), torch.no_grad():
        for proxy in proxies:
            if proxy.is_quant_enabled and not proxy.is_frozen:
                proxy.freeze()


def unfreeze(model: nn.Module) -> None:
    """Compute quantized weights, biases and scales at each call again.

    Args:
        model: as for :func:`freeze`.
    """
    for proxy in _proxies(model):
        proxy.release()


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Quantize all weights, biases and scales of a model once inside a ``with`` block; see :func:`freeze`.

    ::

        with qframework.frozen(model.eval()), torch.no_grad():
            accuracy = sum((model(x).argmax(1) == y).sum() for x, y in batches)

    Args:
        model: in evaluation mode.

    Raises:
        RuntimeError: a quantizer is in training mode.
    """
    before = {proxy for proxy in _proxies(model) if proxy.is_frozen}
    freeze(model)
    try:
        yield model
    finally:
        for proxy in _proxies(model):
            if proxy not in before:
                proxy.release()


@contextmanager
def quant_inference_mode(
    model: nn.Module,
    cache_quant_weight: bool = True,
    compile: bool = False,
    enabled: bool = True,
) -> Iterator[nn.Module]:
    """:func:`frozen` by the name that the reference library has for it.

    Args:
        model: in evaluation mode.
        cache_quant_weight: freeze weights and biases too, not the scales of activations alone.
        compile: let ``torch.compile`` compile the quantizers of activations, each by itself.
        enabled: False for a block in which nothing is frozen.

    Raises:
        RuntimeError: a quantizer is in training mode.
    """
    if not enabled:
        yield model
        return
    with frozen(model):
        proxies = _proxies(model)
        weights = [p for p in proxies if hasattr(p, "parameter_name")]
        compiled = [p for p in proxies if compile and p not in weights]
        if not cache_quant_weight:
            for proxy in weights:
                proxy.release()
        for proxy in compiled:
            proxy.compile()
        try:
            yield model
        finally:
            for proxy in compiled:
                proxy._compiled_call_impl = None
