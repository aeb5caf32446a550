"""Whether a number that was initialised from parameters still belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Pristine:
    """Remembers from which state of which parameters a learned number was initialised.

    The number is pristine until it is written to by anything else (an optimizer, a state dict). A pristine number
    is stale when one of the parameters was edited in place or replaced. Both are read off version
    counters, without touching any value; an edit through ``.data`` bypasses the counter and can't be seen.
    """

    def __init__(self) -> None:
        self._mark: tuple[Any, ...] | None = None
        self._pending = False

    @staticmethod
    def _state(parameters: Sequence[Tensor]) -> tuple[Any, ...]:
        return tuple((id(p), p._version) for p in parameters)

    def mark(self, number: Tensor, parameters: Sequence[Tensor]) -> None:
        """The number has just been initialised from the parameters."""
        self._mark = (number._version, self._state(parameters))
        self._pending = False

    def end(self) -> None:
        """The number was loaded: it stands for itself from now on."""
        self._mark, self._pending = None, False

    def is_stale(self, number: Tensor, parameters: Sequence[Tensor]) -> bool:
        """True when the number should be initialised anew."""
        if (self._mark is None and not self._pending) or torch.compiler.is_compiling():
            return False
        if self._pending:  # a copy: the counters of its tensors have started anew, at 0
            if any(p._version for p in parameters):
                return True
            self.mark(number, parameters)
            return False
        assert self._mark is not None
        version, state = self._mark
        if number._version != version or not number.requires_grad:
            self.end()
            return False
        return bool(state != self._state(parameters))

    def __bool__(self) -> bool:
        return self._mark is not None or self._pending

    def __getstate__(self) -> bool:
        return bool(self)

    def __setstate__(self, pristine: bool) -> None:
        self._mark, self._pending = None, pristine

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self.__getstate__(),))


def _restore(pristine: bool) -> Pristine:
    out = Pristine()
    out.__setstate__(pristine)
    return out
