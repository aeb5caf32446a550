"""Fields of records that are made when they are first looked at, as what they would have been at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

_tracing_state = torch._C._get_tracing_state
_set_tracing_state: Callable[[object], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes, _function_modes = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
)


def can_wait() -> bool:
    """Whether what is computed later is what would be computed now: nothing looks on that may look no more."""
    return not (
        torch.compiler.is_compiling() or _onlookers_present() or forward_ad._current_level >= 0
    )


def _onlookers_present() -> bool:
    return bool(
        _tracing_state() is not None
        or _transforms_active()
        or _dispatch_modes()
        or _function_modes()
    )


@contextmanager
def _without_onlookers() -> Iterator[None]:
    """Without transforms, modes and traces, which are none of the business of what belongs to a time before them."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch.overrides import _pop_mode_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    trace = _tracing_state()
    with ExitStack() as stack:
        while _function_modes():
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(temporarily_clear_interpreter_stack())
        if _dispatch_modes():
            stack.enter_context(_disable_current_modes())
        _set_tracing_state(None)
        try:
            yield
        finally:
            _set_tracing_state(trace)


def as_before(make: Callable[[], dict[str, Tensor]], grad: bool) -> dict[str, Tensor]:
    """What a function gives, whatever is at work where it is looked at.

    Args:
        make: the function.
        grad: whether gradients are enabled for it.
    """
    if not torch.compiler.is_compiling() and _onlookers_present():
        with _without_onlookers():
            return as_before(make, grad)
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        return make()


class Later:
    """Fields of records that are computed when they are first looked at, once for all records that share them.

    Args:
        make: gives them.
    """

    __slots__ = ("_found", "_grad", "_make")

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        self._make: Callable[[], dict[str, Tensor]] | None = make
        self._found: dict[str, Tensor] = {}
        self._grad = torch.is_grad_enabled()

    def fields(self) -> dict[str, Tensor]:
        """The tensors, by the names of their fields."""
        make = self._make
        if make is not None:
            self._found = as_before(make, self._grad)
            self._make = None
        return self._found
