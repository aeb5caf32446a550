"""Results that are kept while everything that they were computed from stays as it is.

A tensor is unchanged while it is the same object, on the same memory, with the same version counter, and asks for a gradient as
before. Optimizers, ``load_state_dict``, ``copy_`` and other functions in place move that counter; what is written through ``.data``
doesn't, and isn't seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.configuration import settings
from qframework.core.base import parts, structure
from qframework.functional.autograd import version_of

_Place = tuple[dict[str, Any], str]


class _Watched(NamedTuple):
    place: dict[str, Any]
    name: str
    tensor: Tensor | None
    state: _State | None


class _State(NamedTuple):
    version: int
    pointer: int
    requires_grad: bool
    storage: Any  # held, so that its address can't come again

    def holds(self, tensor: Tensor) -> bool:
        return (
            version_of(tensor) == self.version
            and tensor.requires_grad == self.requires_grad
            and tensor.data_ptr() == self.pointer
        )


class _Entry(NamedTuple):
    quantizer: nn.Module
    mode: tuple[Any, ...]
    inputs: tuple[Any, ...]
    states: tuple[_State, ...]
    watched: tuple[_Watched, ...]
    result: Any
    made: tuple[tuple[Tensor, int], ...]


def _mode(training: bool) -> tuple[Any, ...]:
    return structure(), training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class Memory:
    """Results of one quantizer, by a key.

    Nothing is kept for quantizers that draw at random or count their calls (see ``repeatable`` in
    :class:`~qframework.core.base.CoreModule`), nor for those with modules that don't say, nor with forward hooks.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._places: tuple[_Place, ...] = ()
        self._known: tuple[Any, ...] | None = None
        self._repeatable = False
        #: whether the quantizer's graph can be used again only through a Replay
        self.replays = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()

    def clear(self) -> None:
        """Free all results."""
        self._entries.clear()
        self._known = None

    def recall(self, key: int, quantizer: nn.Module, training: bool, *inputs: Any) -> Any:
        """The result of a quantizer for these inputs, None where there is none that still holds."""
        entry = self._entries.get(key)
        if entry is None or not settings.cache or entry.mode != _mode(training):
            return None
        if entry.quantizer is not quantizer or is_watched(quantizer):
            return None
        for given, tensor, state in zip(inputs, entry.inputs, entry.states, strict=True):
            if given is not tensor or not state.holds(given):
                return None
        for place, name, watched, before in entry.watched:
            if place.get(name) is not watched:
                return None
            if watched is not None and before is not None and not before.holds(watched):
                return None
        for tensor, version in entry.made:
            if version_of(tensor) != version:
                return None
        return entry.result

    def keep(
        self,
        key: int,
        quantizer: nn.Module,
        training: bool,
        layers: Iterable[_Place],
        result: Any,
        made: Iterable[Tensor],
        *inputs: Tensor,
    ) -> None:
        """Remember a result.

        Args:
            key: under which it is found; an older result of that key goes.
            quantizer: what computed it.
            training: its mode.
            layers: where the parameters stand that it may look at besides its own.
            result: what to return.
            made: the tensors of the result; a change of one forgets it.
            *inputs: what it was computed from.
        """
        if not settings.cache or not self.is_repeatable(quantizer, training):
            return
        if not torch.is_grad_enabled() and _is_distributed():
            return  # broadcasts and sharded parameters write without moving a counter
        layers = tuple(layers)
        places = (*layers, *self._places)
        watched = []
        for place, name in places:
            tensor = place.get(name)
            if tensor is not None and tensor.is_inference():
                return
            watched.append(
                _Watched(place, name, tensor, None if tensor is None else _state(tensor))
            )
        self._entries[key] = _Entry(
            quantizer,
            _mode(training),
            inputs,
            tuple(_state(t) for t in inputs),
            tuple(watched),
            result,
            tuple((t, version_of(t)) for t in made),
        )
        while len(self._entries) > max(1, len(layers)):  # of parameters that were replaced
            del self._entries[next(iter(self._entries))]

    def is_repeatable(self, quantizer: nn.Module, training: bool) -> bool:
        """Whether equal calls of the quantizer give equal results in this mode."""
        known = (structure(), training, id(quantizer))
        if known != self._known:
            found = list(parts(quantizer))
            self._repeatable = all(
                getattr(m, "repeatable", False) and not is_watched(m) for m in found
            )
            self._places = tuple(place for m in found for place in _places(m))
            self._known = known
            self.replays = False
        return self._repeatable


def is_watched(module: nn.Module) -> bool:
    """Whether hooks have to see each call of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _state(tensor: Tensor) -> _State:
    storage = tensor.untyped_storage()
    return _State(version_of(tensor), tensor.data_ptr(), tensor.requires_grad, storage)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _places(module: nn.Module) -> Iterable[_Place]:
    for place in (module._parameters, module._buffers):
        for name in place:
            yield place, name
    for name, held in vars(module).items():
        if isinstance(held, Tensor):
            yield vars(module), name


# ------------------------------------------------------------ graphs that can be used again


#: Nodes that save nothing, whose backward can run any number of times.
_FREE = frozenset(
    {
        "torch::autograd::AccumulateGrad",
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "ToCopyBackward0",
    }
)


def can_run_again(tensors: Iterable[Tensor]) -> bool:
    """Whether the backward pass through the graphs of ``tensors`` frees nothing, so that it can run again."""
    pending = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() not in _FREE and getattr(node, "held", None) is None:
            return False
        pending.extend(following for following, _ in node.next_functions if following is not None)
    return True


def hooks_active() -> bool:
    """Whether somebody looks at each tensor that is saved for the backward pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class Replay(Function):
    """Calls a function whose graph is kept, so that the backward pass through the result can run again.

    ``Replay.apply(function, *parameters)``: the tensors that ``function()`` returns; ``parameters`` are all that its
    gradient goes to.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[[], tuple[Tensor, ...]], *parameters: Tensor) -> Any:
        """Call it, with a graph of its own."""
        with torch.enable_grad():
            ctx.made = function()
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        ctx.held = True
        outputs = tuple(t.detach() for t in ctx.made)
        fixed = (o for o, t in zip(outputs, ctx.made, strict=True) if not t.requires_grad)
        ctx.mark_non_differentiable(*fixed)
        return outputs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """The gradient through the graph, which stays."""
        pairs = [
            (t, g)
            for t, g in zip(ctx.made, grads, strict=True)
            if g is not None and t.requires_grad
        ]
        wanted = [p for p in ctx.parameters if p.requires_grad]
        found: Any = (None,) * len(wanted)
        if pairs:
            found = torch.autograd.grad(
                [t for t, _ in pairs],
                wanted,
                [g for _, g in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        gradients = iter(found)
        return None, *(next(gradients) if p.requires_grad else None for p in ctx.parameters)
