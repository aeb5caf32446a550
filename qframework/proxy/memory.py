"""Results that are kept while everything that they were computed from stays as it is.

A tensor is unchanged while it is the same object, on the same memory, with the same version counter, and asks for a gradient as
before. Optimizers, ``load_state_dict``, ``copy_`` and other functions in place move that counter; what is written through ``.data``
doesn't, and isn't seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qframework.changes import changes
from qframework.configuration import settings
from qframework.core.base import parts
from qframework.functional.autograd import distributed_active

_Place = tuple[dict[str, Any], str]

#: Read off many tensors at once, since each call of Python costs more than what it asks for.
_version, _gradient = attrgetter("_version"), attrgetter("requires_grad")
_is_grad_enabled, _is_inference_mode = torch.is_grad_enabled, torch.is_inference_mode_enabled
_pointer, _is_inference = Tensor.data_ptr, Tensor.is_inference


class _States:
    """What some tensors were like.

    Args:
        movable: those that may get other memory while they stay the same objects.
        others: those that may not.
    """

    def __init__(self, movable: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
        counted = (*movable, *others)
        if any(map(_is_inference, counted)):  # which don't count their changes
            counted = tuple(t for t in counted if not t.is_inference())
        self.counted, self.movable = counted, movable
        self.versions = tuple(map(_version, counted))
        self.pointers = tuple(map(_pointer, self.movable))
        self.gradients = tuple(map(_gradient, self.movable))
        #: held, so that their addresses can't come again
        self.storages = tuple(map(Tensor.untyped_storage, movable))


class _Entry(NamedTuple):
    quantizer: nn.Module
    changes: int
    training: bool
    grows: bool
    inference: bool
    inputs: tuple[Any, ...]
    watched: list[tuple[dict[str, Any], str, Tensor | None]]
    states: _States
    result: Any


class Memory:
    """Results of one quantizer, by a key.

    Nothing is kept for quantizers that draw at random or count their calls (see ``repeatable`` in
    :class:`~qframework.core.base.CoreModule`), nor for those with modules that don't say, nor with forward hooks.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        #: where the quantizer's own tensors stand, but for its constants, changes of which are counted
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
        # In one frame: between two convolutions each call of Python takes several times as long as alone.
        entry = self._entries.get(key)
        if (
            entry is None
            or entry.changes != changes.count
            or entry.quantizer is not quantizer
            or entry.training is not training
            or entry.grows is not _is_grad_enabled()
            or entry.inference is not _is_inference_mode()
            or not all(map(is_, inputs, entry.inputs))
        ):
            return None
        for place, name, held in entry.watched:
            if place.get(name) is not held:
                return None
        states = entry.states
        if (
            tuple(map(_version, states.counted)) != states.versions
            or tuple(map(_pointer, states.movable)) != states.pointers
            or tuple(map(_gradient, states.movable)) != states.gradients
        ):
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
        if not torch.is_grad_enabled() and distributed_active():
            return
        layers = tuple(layers)
        watched = [(place, name, place.get(name)) for place, name in (*layers, *self._places)]
        found = [held for _, _, held in watched if held is not None]
        if any(map(_is_inference, found)):
            return
        others = [t for t in found if all(t is not given for given in inputs)]
        states = _States((*inputs, *others), tuple(made))
        mode = (changes.count, training, _is_grad_enabled(), _is_inference_mode())
        self._entries[key] = _Entry(quantizer, *mode, inputs, watched, states, result)
        while len(self._entries) > max(1, len(layers)):  # of parameters that were replaced
            del self._entries[next(iter(self._entries))]

    def is_repeatable(self, quantizer: nn.Module, training: bool) -> bool:
        """Whether equal calls of the quantizer give equal results in this mode."""
        known = (changes.count, training, id(quantizer))
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
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _places(module: nn.Module) -> Iterable[_Place]:
    unread = getattr(module, "unread", ())
    for place in (module._parameters, module._buffers):
        for name in place:
            if name not in unread:
                yield place, name
    for name, held in vars(module).items():
        if isinstance(held, Tensor):
            yield vars(module), name


# ------------------------------------------------------------ graphs that can be used again


#: Nodes that save nothing, whose backward can run any number of times.
_FREE = frozenset(
    {
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "ToCopyBackward0",
    }
)


_Leaf: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


def can_run_again(tensors: Iterable[Tensor]) -> bool:
    """Whether the backward pass through the graphs of ``tensors`` frees nothing, so that it can run again."""
    pending = list({t.grad_fn for t in tensors if t.grad_fn is not None})
    seen = set()
    while pending:
        node = pending.pop()
        if type(node) is _Leaf or node in seen:
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
