"""Quantized parameters and scales that are computed once, because that was asked for.

While a model is frozen its weights are constants: quantized once, without a gradient of their own. Whatever changes them thaws
the quantizers that it concerns, so that they compute at each call again: ``train()``, ``to()``, ``load_state_dict``, a write in place,
an optimizer's step, an assigned parameter, quantizer or part of one, a setting of a part, what is written to its class, a hook, a
write to the result. What leaves no trace isn't seen until the model is thawed: a write in place through ``.data`` or NumPy, a step
with ``fused=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qframework.arguments import check_module
from qframework.core.base import parts
from qframework.kernels.guards import Guards

if TYPE_CHECKING:
    from qframework.proxy.base import QuantProxy

_is_compiling = torch.compiler.is_compiling


#: A dictionary of a module, and a name in it.
Place = tuple[dict[str, Any], str]


def watch(
    quantizer: nn.Module,
    others: Iterable[Place],
    given: Iterable[Tensor],
    made: Iterable[Tensor],
) -> Callable[[], bool]:
    """A function that tells whether a result still is right, as far as assignments and writes in place are concerned.

    Args:
        quantizer: that computed it; its parts, their classes and settings, parameters and buffers, hooks and methods are watched.
        others: what else it looks at.
        given: what it quantized.
        made: the result, which must not be written to either.
    """
    places, guards = list(others), Guards()
    modules = [quantizer, *(place[name] for place, name in places)]
    below = [part for m in modules if isinstance(m, nn.Module) for part in parts(m)]
    for part in below:
        guards.watch(part)
        guards.watch_settings(part)
        kinds: Any = (part._parameters, part._buffers)
        places += [(kind, n) for kind in kinds for n, t in kind.items() if t is None or t.numel()]
    held = [place[name] for place, name in places]
    for place, name in places:
        guards.watch_place(place, name)
    guards.close()
    read = _distinct((*given, *held))
    written = _distinct((*read, *made))
    versions, pointers = tuple(map(_version, written)), tuple(map(_pointer, read))

    def holds() -> bool:
        return (
            tuple(map(_version, written)) == versions
            and tuple(map(_pointer, read)) == pointers
            and guards.hold()
        )

    # As torch.compiler.assume_constant_result does: a compiler asks while it traces.
    holds._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return holds


def _distinct(tensors: Iterable[Any]) -> tuple[Tensor, ...]:
    found = {id(t): t for t in tensors if isinstance(t, Tensor) and t.numel()}
    return tuple(t for t in found.values() if not t.is_inference())


_version, _pointer = attrgetter("_version"), Tensor.data_ptr


class Entry(NamedTuple):
    """One result.

    Attributes:
        given: the tensors that it is for, the same objects.
        quantizer: that computed it.
        holds: whether nothing that it depends on has changed.
        result: what to return.
    """

    given: tuple[Tensor, ...]
    quantizer: nn.Module
    holds: Callable[[], bool]
    result: Any


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

    def keep(
        self,
        quantizer: nn.Module,
        given: tuple[Tensor, ...],
        result: Any,
        others: Iterable[Place] = (),
    ) -> None:
        """Keep a result for these tensors, in place of the one for the first of them.

        Args:
            quantizer: that computed it.
            given: the tensors that it is for.
            result: has ``tensors()``, or is a quantized tensor.
            others: what else the quantizer looks at.
        """
        self.frozen = True
        found = result.tensors() if hasattr(result, "tensors") else pytree.tree_leaves(result)
        made = [t for t in found if isinstance(t, Tensor)]
        holds = watch(quantizer, others, given, made)
        kept = [e for e in self.entries if e.given and e.given[0] is not given[0]]
        self.entries = [*kept, Entry(given, quantizer, holds, result)]

    def recall(self, quantizer: Any, *given: Tensor) -> Any:
        """The result for these tensors; None where there is none."""
        for entry in self.entries:
            if entry.quantizer is quantizer and all(map(is_, entry.given, given)):
                if entry.holds():
                    return entry.result
                if not _is_compiling():
                    self.clear()
                return None
        return None


def _proxies(model: nn.Module) -> list[QuantProxy]:
    from qframework.proxy.base import QuantProxy

    return [m for m in model.modules() if isinstance(m, QuantProxy)]


def freeze(model: nn.Module) -> None:
    """Quantize all weights, biases and scales of a model once, until :func:`unfreeze`; for evaluation.

    Gradients flow to inputs, not to weights. ``train()``, ``to()``, ``load_state_dict``, an optimizer's step and other writes in
    place, what is assigned (parameters, quantizers, their parts and settings, methods of classes) and hooks thaw the quantizers that
    they concern. What leaves no trace isn't seen: a write in place through ``.data`` or NumPy, a step with ``fused=True``. Copies of a
    model aren't frozen.

    Args:
        model: in evaluation mode; anything with quantized layers.

    Raises:
        RuntimeError: a quantizer is in training mode. Nothing is frozen then.
    """
    check_module(model, "freeze")
    proxies = _proxies(model)
    training = [n for n, m in model.named_modules() if m in set(proxies) and m.training]
    if training:
        raise RuntimeError(
            f"a model is frozen for evaluation, and {training[0] or type(model).__name__} is in training mode: call "
            "model.eval() first"
        )
    begun = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            for proxy in proxies:
                if proxy.is_quant_enabled and not proxy.is_frozen:
                    begun.append(proxy)
                    proxy.freeze()
    except BaseException:
        for proxy in begun:
            proxy.release()
        raise


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
    check_module(model, "frozen")
    thawed = [proxy for proxy in _proxies(model) if not proxy.is_frozen]
    freeze(model)
    try:
        yield model
    finally:
        for proxy in thawed:
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
