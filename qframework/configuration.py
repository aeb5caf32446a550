"""How the engine computes: one object with a few documented settings, ``qframework.settings``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_KERNELS = ("auto", "fused", "reference")
_RECOMPUTE = ("auto", "always", "never")
_UNUSED = ("warn", "error", "ignore")
_CHOICES = {
    "kernels": _KERNELS,
    "recompute": _RECOMPUTE,
    "reduce_statistics": _RECOMPUTE,
    "unused_keywords": _UNUSED,
}


class Settings:
    """The settings; assign to them, or use :meth:`use` for a while.

    Attributes:
        kernels: which functions compute; values are the same bit for bit.
            ``'auto'``, the default: for tensors of 256 elements or more on CPUs C++ functions of one pass over memory; the first
            such tensor has them built, in about ten seconds, once on a machine. Else, and without a compiler, as ``'fused'``.
            ``'fused'``: torch's own functions in few passes, nothing to compile.
            ``'reference'``: the composition of the parts, of plain straight-through functions, to compare with.
            The environment variable ``QFRAMEWORK_KERNELS`` sets the start.
        recompute: whether layers make their quantized input anew in the backward pass from the quantizer's input, which is
            saved anyway, instead of saving it, too. ``'auto'``, the default: where C++ functions do it in one pass over memory.
            ``'always'``: on other devices too. ``'never'``.
        reduce_statistics: whether several processes (``torch.distributed``) average the statistics that they collect, by one
            all-reduce at the end of each backward pass as long as there are scales to collect. ``'auto'``, the default: inside
            the forward of ``DistributedDataParallel``, over its process group; for models under ``fully_shard``, over their mesh;
            and when :func:`~qframework.graph.calibration_mode` ends. ``'always'``: elsewhere over all processes, too, so that
            all have to train alike. ``'never'``.
        unused_keywords: what becomes of a keyword that quantizers know and the one that it is given to has no use for:
            ``'warn'``, the default: an ``UnusedKeywordWarning``; ``'error'``: an ``UnknownNameError``; ``'ignore'``: nothing.
        verbose: let the printed form of a layer say how each of its quantizers runs.
    """

    kernels: str
    recompute: str
    reduce_statistics: str
    unused_keywords: str
    verbose: bool

    def __init__(self) -> None:
        self.kernels = os.environ.get("QFRAMEWORK_KERNELS", "auto")
        self.recompute = "auto"
        self.reduce_statistics = "auto"
        self.unused_keywords = "warn"
        self.verbose = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHOICES:
            allowed = _CHOICES[name]
            if value not in allowed:
                raise ValueError(f"{name}={value!r}; allowed: {', '.join(map(repr, allowed))}")
        elif name == "verbose":
            if not isinstance(value, bool):
                raise TypeError(f"verbose={value!r} must be True or False")
        else:
            raise AttributeError(
                f"no setting {name!r}; there are {', '.join(map(repr, _CHOICES))} and 'verbose'"
            )
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
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"Settings({values})"


#: The settings in effect.
settings = Settings()
