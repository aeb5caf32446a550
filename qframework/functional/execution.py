"""How a function runs: questions whose answer compilers have in another way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qframework.functional.registry import defined


@defined
def is_recomputing() -> bool:
    """Whether a forward pass runs again inside a backward pass, as ``torch.utils.checkpoint`` lets it.

    What is counted or collected at each training call has then been counted already.
    """
    return torch._C._current_graph_task_id() != -1


@defined
def repeat_while(
    going: Callable[..., Tensor],
    advance: Callable[..., tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    limit: int,
    look_every: int = 16,
) -> tuple[Tensor, ...]:
    """Advance a state until it no longer goes on.

    Args:
        going: of a state, a 0-dim bool tensor; once False, further steps may be taken and must change no result.
        advance: from a state to the next, of the same shapes and dtypes.
        state: the first one.
        limit: at most so many steps.
        look_every: steps between two looks at whether it goes on, each of which waits for the device.
    """
    for count in range(limit):
        state = advance(*state)
        if state[0].is_meta:  # shapes and dtypes stay
            break
        if count % look_every == 0 and not bool(going(*state)):
            break
    return state
