"""How the engine computes: one object with a few documented settings, ``qframework.settings``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qframework.changes import changes

_KERNELS = ("auto", "fused", "compiled", "reference")
_RECOMPUTE = ("auto", "always", "never")


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
    def use(self, **values: Any) -> Iterator[Settings]:
        """Other settings inside a ``with`` block.

        Args:
            **values: of settings, by name.

        Raises:
            AttributeError: there is no such setting.
            ValueError, TypeError: a value that isn't allowed.
        """
        before = dict(vars(self))
        try:
            for name, value in values.items():
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
