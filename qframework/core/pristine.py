"""Whether a number that was initialised from parameters still belongs to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Pristine:
    """Knows whether a learned number is still what it was initialised to.

    It is pristine until anything else writes to it: an optimizer, a state dict, a user. While it is, its owner
    initialises it anew at every call, so that it can't be stale, however the parameters were edited. Writing is
    read off the tensor's version counter, without looking at any value.
    """

    def __init__(self) -> None:
        self._mark: tuple[int, int] | None = None
        self._pending = False

    @torch.no_grad()
    def start(self, number: Tensor, value: Tensor) -> None:
        """Initialise the number. Its version counter stays, so that graphs that hold it stay valid."""
        number.data.copy_(value)
        self._mark, self._pending = (id(number), number._version), False

    def end(self) -> None:
        """The number was loaded: it stands for itself from now on."""
        self._mark, self._pending = None, False

    def holds(self, number: Tensor) -> bool:
        """Whether the number is pristine, to be initialised anew; never while it is traced or stood in for."""
        if torch.compiler.is_compiling():
            return False
        if self._pending:  # a copy, whose tensors' counters have started anew
            return True
        if self._mark is None or self._mark[0] != id(number):
            return False
        if self._mark[1] != number._version or not number.requires_grad:
            self.end()
        return self._mark is not None

    def __bool__(self) -> bool:
        return self._mark is not None or self._pending

    def __reduce__(self) -> tuple[Any, ...]:
        return (_copied, (bool(self),))


class FollowsParameters(nn.Module):
    """Mixin: a learned number, ``value``, that follows the parameters of its layers while it is pristine."""

    pristine: Pristine
    value: nn.Parameter

    def init_from_parameters(self) -> None:
        """For subclasses: start anew from the tracked parameters."""
        raise NotImplementedError

    def follow(self) -> None:
        """Start anew where the number is still what it was initialised to."""
        if self.pristine.holds(self.value):
            self.init_from_parameters()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """What is saved belongs to the parameters as they are now."""
        self.follow()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "value" in state_dict:
            self.pristine.end()


def _copied(pristine: bool) -> Pristine:
    out = Pristine()
    out._pending = pristine
    return out
