"""How the engine computes: one object with a few documented settings, ``qframework.settings``."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_KERNELS = ("auto", "fused", "compiled", "reference")
_RECOMPUTE = ("auto", "always", "never")


class Changes:
    """Counts the changes that decide how something is computed: settings, and parts, settings and hooks of quantizers.

    What was looked up for one count holds while it stays. It is read on every call, and so an attribute rather than a function.
    Counts start with the time, so that what was looked up in another process, and pickled, holds for none of this one.
    """

    __slots__ = ("_next", "count")

    def __init__(self) -> None:
        self._next = itertools.count(time.time_ns())
        self.count = next(self._next)

    def note(self) -> None:
        """Something has changed."""
        self.count = next(self._next)


changes = Changes()


class Settings:
    """The settings; assign to them, or use :meth:`use` for a while.

    Attributes:
        kernels: which functions compute; values are the same bit for bit.
            ``'auto'``, the default: for tensors of over 8,192 elements on CPUs C++ functions of one pass over memory; the first
            such tensor has them built, in about three seconds, once on a machine. Else, and without a compiler, as ``'fused'``.
            ``'fused'``: torch's own functions in few passes, nothing to compile.
            ``'compiled'``: the C++ functions or an error; what they don't take, and other devices, by ``torch.compile``'s
            inductor, once for each dtype and device, in many seconds.
            ``'reference'``: everything composed of plain straight-through functions, to compare with.
            The environment variable ``QFRAMEWORK_KERNELS`` sets the start.
        cache: keep quantized weights and biases, and the scales of activations in evaluation, while what they are
            computed from is unchanged.
        recompute: whether layers make their quantized input anew in the backward pass from the quantizer's input, which is
            kept anyway, instead of keeping it, too. ``'auto'``, the default: where C++ functions do it in one pass over memory.
            ``'always'``: on other devices too. ``'never'``.
    """

    kernels: str
    cache: bool
    recompute: str

    def __init__(self) -> None:
        self.kernels = os.environ.get("QFRAMEWORK_KERNELS", "auto")
        self.cache = True
        self.recompute = "auto"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("kernels", "recompute"):
            allowed = _KERNELS if name == "kernels" else _RECOMPUTE
            if value not in allowed:
                raise ValueError(f"{name}={value!r}; allowed: {', '.join(map(repr, allowed))}")
        elif name == "cache":
            if not isinstance(value, bool):
                raise TypeError(f"cache={value!r} must be True or False")
        else:
            raise AttributeError(
                f"no setting {name!r}; there are 'kernels', 'cache' and 'recompute'"
            )
        changes.note()
        object.__setattr__(self, name, value)

    @contextmanager
    def use(self, **changes: Any) -> Iterator[Settings]:
        """Other settings inside a ``with`` block.

        Args:
            **changes: settings by name.

        Raises:
            AttributeError: there is no such setting.
            ValueError, TypeError: a value that isn't allowed.
        """
        before = dict(vars(self))
        try:
            for name, value in changes.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def __repr__(self) -> str:
        return (
            f"Settings(kernels={self.kernels!r}, cache={self.cache}, recompute={self.recompute!r})"
        )


#: The settings in effect.
settings = Settings()
