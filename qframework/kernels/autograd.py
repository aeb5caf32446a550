"""What the fused functions share: when they may run, how they are called, how they are differentiated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from qframework.configuration import settings

# Named here, because to look them up in torch each time takes long where nothing is in a cache.
is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
is_grad_enabled = torch.is_grad_enabled
_is_batched = torch._C._functorch.is_batchedtensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_tracing_state = torch._C._get_tracing_state
_lazy_clone = torch._lazy_clone
_compiler = torch._C._dynamo.eval_frame.get_eval_frame_callback


def may_fuse(*_: object) -> bool:
    """Whether fused functions may run in eager mode, whatever their arguments.

    They compute in place and have no forward-mode derivatives, so that definitions run under ``torch.func`` transforms and
    for dual numbers; and under ``torch.jit.trace``, which records torch's own operations.
    """
    return not (
        settings.kernels == "reference"
        or is_compiling()
        or _functorch_active()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def is_exporting() -> bool:
    """Whether ``torch.export`` is at work."""
    return torch.compiler._is_exporting_flag


# Asked while a graph is traced. The compiler of torch 2.11 takes torch.compiler.is_exporting() for True, whether it exports or not.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def may_fuse_in_graph(*_: object) -> bool:
    """Whether a graph that ``torch.compile`` traces may hold fused forms; exports hold definitions alone."""
    return is_compiling() and not is_exporting() and settings.kernels != "reference"


def transforms_active(*tensors: Tensor | None) -> bool:
    """Whether ``vmap``, ``grad`` or another transform is at work, or one of the tensors is a batch of tensors."""
    if is_compiling():  # which can't look; what it makes changes nothing in place
        return False
    if _functorch_active():
        return True
    for t in tensors:  # noqa: SIM110 a generator takes longer
        if t is not None and (_is_batched(t) or _is_legacy_batched(t)):
            return True
    return False


class Context(Protocol):
    """What a function is given of a call; see ``torch.autograd.function.FunctionCtx``.

    Attributes:
        how: what it notes of the call besides tensors.
        saved_tensors: those that were saved.
        needs_input_grad: for each argument, whether its gradient is wanted.
    """

    how: Any
    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save tensors for the backward pass."""

    def set_materialize_grads(self, value: bool) -> None:
        """Whether gradients that nobody has are zeros rather than None."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Results that have no gradient."""


class _NoGraph:
    """Stands for the context of a function whose gradient nobody wants."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Save nothing."""

    def set_materialize_grads(self, value: bool) -> None:
        """There are none."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """All are."""


def may_fuse_anywhere(*_: object) -> bool:
    """Whether fused functions may run, in eager mode or in a graph."""
    return may_fuse() or may_fuse_in_graph()


def in_graph(*_: object) -> bool:
    """Whether a compiler or an export traces."""
    return is_compiling()


def in_any_graph(*_: object) -> bool:
    """Whether a compiler, an export or ``torch.jit.trace`` traces."""
    return is_compiling() or _tracing_state() is not None


def safe_from_writes(x: Tensor) -> Tensor:
    """``x`` as something that later writes to ``x`` don't change, for functions that save it for the backward pass.

    Both share their memory until one of them is written to, which is when torch copies it. So ``x += relu(x)`` works, as it does
    behind a ReLU that saves its result.
    """
    if is_compiling() or not is_grad_enabled() or x.is_leaf or not (x.is_cpu or x.is_cuda):
        return x  # nobody may write to a leaf, and compilers look after writes themselves
    try:
        return _lazy_clone(x)
    except RuntimeError:  # memory that isn't torch's own can't be shared so
        return x


class Fused(Function):
    """A function in few passes over memory, with gradients written by hand.

    Where a graph of the gradient is wanted (``create_graph=True``), or several gradients at once, those of the definition
    are taken.

    Attributes:
        tensors: which arguments of ``forward`` the first saved tensors are.
        call: ``apply`` where gradients are enabled, outside of transforms and compilers. The ordinary one inspects the signature at
            each call, which takes longer than a small forward.
    """

    call: ClassVar[Callable[..., Any]]
    tensors: ClassVar[tuple[int, ...]] = (0,)

    @staticmethod
    def define(ctx: Context, *tensors: Any) -> Any:
        """The results by the definition, of the tensors that :attr:`tensors` names."""
        raise NotImplementedError

    @staticmethod
    def gradients(ctx: Context, *grads: Any) -> Any:
        """The gradient for each argument of ``forward``."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def backward(ctx: Context, *grads: Any) -> Any:
            if not is_compiling() and (is_grad_enabled() or transforms_active(*grads)):
                return through_definition(cls, ctx, grads)
            return cls.gradients(ctx, *grads)

        cls.backward = staticmethod(backward)  # type: ignore[method-assign]
        cls.call = super(Function, cls).apply  # type: ignore[misc]


def through_definition(kind: type[Fused], ctx: Context, grads: Iterable[Any]) -> Any:
    """The gradients of the definition; differentiable where a graph of them is wanted.

    Args:
        kind: the function.
        ctx: of a call of it.
        grads: of its results.
    """
    saved = ctx.saved_tensors[: len(kind.tensors)]
    graph = torch.is_grad_enabled()
    needs = [ctx.needs_input_grad[place] for place in kind.tensors]
    with torch.enable_grad():
        # Aliases, so that what one argument was made of isn't counted through another.
        given = [
            t if t is None else t.view_as(t) if graph else t.detach().requires_grad_(need)
            for t, need in zip(saved, needs, strict=True)
        ]
        results = kind.define(ctx, *given)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [
        (r, g)
        for r, g in zip(results, grads, strict=False)
        if g is not None and isinstance(r, Tensor) and r.requires_grad
    ]
    found: list[Any] = [None] * len(ctx.needs_input_grad)
    wanted = [place for place, need in zip(kind.tensors, needs, strict=True) if need]
    if pairs and wanted:
        leaves: list[Any] = [t for t, need in zip(given, needs, strict=True) if need]
        gradients = torch.autograd.grad(
            [r for r, _ in pairs],
            leaves,
            [g for _, g in pairs],
            create_graph=graph,
            allow_unused=True,
        )
        for place, gradient in zip(wanted, gradients, strict=True):
            found[place] = gradient
    return tuple(found)


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` outside of transforms; without a gradient its ``forward`` alone."""
    if is_compiling():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    if not is_grad_enabled():
        return function.forward(_NoGraph(), *args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


# ------------------------------------------------------------ gradients that may be overwritten


def _holders(grad: Tensor) -> tuple[int, ...]:
    """How many hold a gradient and its memory, in Python and in C++, and what it is a view of; whether the memory is torch's own."""
    storage = grad.untyped_storage()
    memory: int = torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
    held: tuple[int, ...] = (sys.getrefcount(grad), grad._use_count(), memory)  # type: ignore[attr-defined]
    held = (*held, sys.getrefcount(storage), storage.resizable())
    base: Any = grad._base
    return held if base is None else (*held, sys.getrefcount(base), base._use_count())


class _Probe(Fused):
    @staticmethod
    def forward(ctx: Context, x: Tensor, found: list[Any]) -> Tensor:  # type: ignore[override]
        ctx.how = found
        return x.clone()

    @staticmethod
    def gradients(ctx: Context, grad: Tensor) -> Any:  # type: ignore[override]
        _note_holders(grad, ctx.how)
        return grad, None


def _note_holders(grad: Tensor, found: list[Any]) -> None:
    """In a frame of its own, as :func:`may_overwrite` is one."""
    found.append(_holders(grad))


def _held_by_calls() -> int:
    """How many hold an argument two calls deep: more where a compiler, or a debugger, has put itself in front of Python's calls."""
    return _pass_on(object())


def _pass_on(x: object) -> int:
    return _count(x)


def _count(x: object) -> int:
    return sys.getrefcount(x)


@cache
def _alone(held_by_calls: int) -> tuple[tuple[int, ...], ...]:
    """The holders of a gradient that nobody but the engine has, and of one that is a view of such a one.

    Args:
        held_by_calls: see :func:`_held_by_calls`.
    """
    found: list[tuple[int, ...]] = []
    with torch.enable_grad(), torch.inference_mode(False):
        x = torch.zeros(2, requires_grad=True, device="cpu")
        _Probe.apply(x, found).mul(2.0).sum().backward()  # type: ignore[no-untyped-call]
        _Probe.apply(x, found).view(1, 2).mul(2.0).sum().backward()  # type: ignore[no-untyped-call]
    return tuple(found)


#: Elements from which on it pays to find out who holds a gradient.
_WORTH = 1 << 14


def may_overwrite(grad: Tensor, like: Tensor) -> bool:
    """Whether a gradient may be written to: it is large, nobody else can see it, and it is laid out as a tensor is.

    Asked by ``gradients`` of a :class:`Fused` function itself, of one of its arguments.
    """
    return (
        grad.numel() >= _WORTH
        and grad.is_cpu
        and grad.stride() == like.stride()
        and not is_compiling()
        and not is_grad_enabled()
        and _compiler() is None
        and _holders(grad) in _alone(_held_by_calls())
    )
