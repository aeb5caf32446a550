"""What the fused autograd functions share: when they may run, how they are called, what they keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from qframework.configuration import settings

# Named here, because to look them up in torch each time takes long where nothing is in a cache.
_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled


def is_fused() -> bool:
    """Whether fused functions may run; composed ones take their place under ``torch.func`` transforms.

    The fused ones compute in place, which transforms don't allow.
    """
    if settings.kernels == "reference":
        return False
    return _is_compiling() or not (_functorch_active() or forward_ad._current_level >= 0)


def transforms_active(*tensors: Tensor) -> bool:
    """Whether ``vmap``, ``grad`` or another transform is at work, or one of the tensors is a batch of tensors."""
    if _is_compiling():  # which can't look; what it makes changes nothing in place
        return False
    if _functorch_active():
        return True
    if not tensors:
        return False
    functorch: Any = torch._C._functorch
    return any(
        functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t) for t in tensors
    )


def distributed_active() -> bool:
    """Whether this process is one of several, whose broadcasts and sharded parameters write without moving a version counter."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def forward_mode_active() -> bool:
    """Whether forward-mode derivatives are asked for, which none of the functions has."""
    return forward_ad._current_level >= 0


def refuse_tangents(*operands: Any) -> None:
    """Refuse forward-mode derivatives, which would be those of the rounding itself, 0, in silence.

    Raises:
        NotImplementedError: an operand has a tangent.
    """
    if torch.compiler.is_compiling() or not forward_mode_active():
        return
    if any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in operands
    ):
        raise NotImplementedError(
            "quantizers have no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad); use reverse mode, "
            "such as torch.func.vjp or jacrev"
        )


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` for a call outside of transforms; without a gradient its ``forward`` alone.

    The ordinary ``apply`` inspects the signature at each call, which takes longer than a small forward.

    Raises:
        NotImplementedError: an operand has a tangent.
    """
    if _is_compiling():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    if forward_ad._current_level >= 0:
        refuse_tangents(*args)
    if not _is_grad_enabled():
        return function.forward(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def _count_fused_steps(optimizer: Optimizer, *_: Any) -> None:
    """Move the version counters of what an optimizer with ``fused=True`` has written, which torch 2.13 leaves on CPUs."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            written = [p for p in group["params"] if p.grad is not None and not p.is_inference()]
            torch.autograd.graph.increment_version(written)


register_optimizer_step_post_hook(_count_fused_steps)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where that isn't counted."""
    return -1 if tensor.is_inference() else tensor._version


def keep(ctx: Any, first: Tensor, *others: Tensor | None, always: bool = False) -> None:
    """Remember inputs for the backward pass.

    Those of a parameter stay with the node, so that its backward can run any number of times: a quantized weight is
    shared by several calls whose graphs are freed one by one. Others are saved as usual.

    Args:
        ctx: of the node.
        first: the tensor that is quantized, or that a scale is made of.
        *others: further inputs; never outputs, which would hold the node and themselves for good.
        always: keep them whatever ``first`` is, because they are small.
    """
    tensors = (first, *others)
    ctx.held = None
    if (always or first.is_leaf) and not torch.compiler.is_compiling():
        ctx.held = tensors
        ctx.versions = [None if t is None else version_of(t) for t in tensors]
    else:
        ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What :func:`keep` remembered.

    Raises:
        RuntimeError: it was changed in place since.
    """
    if ctx.held is None:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    for tensor, version in zip(ctx.held, ctx.versions, strict=True):
        if tensor is not None and version_of(tensor) != version:
            raise RuntimeError(
                "a tensor needed for the gradient of a quantizer has been modified by an inplace operation: "
                f"shape {tuple(tensor.shape)} is at version {version_of(tensor)}, expected {version}. Call backward "
                "before the optimizer's step"
            )
    return ctx.held  # type: ignore[no-any-return]
